"""Bytes that crossed a node's link, as the kernel counted them."""

from dataclasses import dataclass

from launch.netlab.iproute import show_queue


@dataclass(frozen=True)
class Counters:
    """One node's link since the lab was built, or between two readings (``later - earlier``).

    Counted by the two queues of the link, so each is what a wire would carry: Ethernet frames of
    at most 1514 bytes with all headers, ARP and retransmissions included. (The interface's own
    counters see TCP's 64 kB super-packets, with one header instead of forty: up to 4 % fewer.)

    Args:
        tx_bytes: bytes that the node sent.
        rx_bytes: bytes that the node received.
        tx_packets: frames sent.
        rx_packets: frames received.
        drops: frames that found one of the two queues full and were not counted above.
    """

    tx_bytes: int
    rx_bytes: int
    tx_packets: int
    rx_packets: int
    drops: int

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(
            self.tx_bytes - earlier.tx_bytes,
            self.rx_bytes - earlier.rx_bytes,
            self.tx_packets - earlier.tx_packets,
            self.rx_packets - earlier.rx_packets,
            self.drops - earlier.drops,
        )


def read_counters(node: str, device: str, switch: str, port: str) -> Counters:
    """Counters of the link from ``device`` in namespace ``node`` to ``port`` in ``switch``."""
    sent = show_queue(node, device)
    received = show_queue(switch, port)  # what the switch sends is what the node receives
    return Counters(
        tx_bytes=sent["bytes"],
        rx_bytes=received["bytes"],
        tx_packets=sent["packets"],
        rx_packets=received["packets"],
        drops=sent["drops"] + received["drops"],
    )
