"""How a node's link is made slow: a token bucket (``tbf``), and ``netem`` for delay and loss."""

from dataclasses import dataclass

from launch.netlab.rates import parse_share, parse_time

MTU = 1500  # bytes
# Tokens that an idle link saves up: this long at the rate, sent at once. Too few and the kernel's
# timers cannot keep up with the rate; too many and short messages seem to cost nothing.
BURST_S = 0.003
SMALLEST_BURST = 2048  # bytes; one packet must fit
# The kernel handles packets of one stream as one piece (GSO) as far as it can, and tbf takes apart a
# piece that does not fit the bucket: at 4 x 50 Mbit/s that took a third of two cores away from what
# was measured, and pieces that fit a tenth. The rest is for the headers, which tbf counts too.
PIECE = 0.9  # of the burst
LARGEST_PIECE = 65536  # bytes
# What waits before packets are dropped. Enough for several senders to one node; longer queues made
# TCP's slow start overshoot by more and so cost more retransmissions, not fewer.
QUEUE_S = 0.1
SMALLEST_QUEUE = 32 * 1024  # bytes
NETEM_LIMIT = 100_000  # packets


@dataclass(frozen=True)
class Impairment:
    """What ``netem`` adds to each packet that a node sends.

    Args:
        delay_s: one way, so a round trip between two nodes takes twice this. Seconds.
        jitter_s: the delay varies by up to this, uniformly. Seconds, at most ``delay_s``.
        loss: share of packets lost, from 0 to 1.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        if self.jitter_s > self.delay_s:
            raise ValueError(
                f"jitter: got {self.jitter_s:g} s, more than the delay of {self.delay_s:g} s; "
                "lower jitter or raise delay"
            )

    @classmethod
    def parse(cls, delay: str | None, jitter: str | None, loss: str | None) -> "Impairment":
        """From texts such as ``"20ms"``, ``"2ms"``, ``"0.1%"``; see :mod:`launch.netlab.rates`."""
        return cls(
            delay_s=parse_time(delay, "delay") if delay else 0.0,
            jitter_s=parse_time(jitter, "jitter") if jitter else 0.0,
            loss=parse_share(loss, "loss") if loss else 0.0,
        )

    def __bool__(self) -> bool:
        return bool(self.delay_s or self.loss)

    def __str__(self) -> str:
        parts = [f"delay {self.delay_s * 1e3:g} ms"] if self.delay_s else []
        parts += [f"jitter {self.jitter_s * 1e3:g} ms"] if self.jitter_s else []
        parts += [f"loss {self.loss:.3%}"] if self.loss else []
        return ", ".join(parts) or "none"


def burst_bytes(bits_per_second: int) -> int:
    """What a link sends at once after a pause."""
    return max(round(bits_per_second / 8 * BURST_S), SMALLEST_BURST)


def piece_bytes(bits_per_second: int) -> int:
    """Largest piece of one stream that may come to the link's queue: ``gso_max_size`` of a device."""
    return max(MTU, min(round(burst_bytes(bits_per_second) * PIECE), LARGEST_PIECE))


def queue_commands(
    device: str, bits_per_second: int, impairment: Impairment | None = None
) -> list[str]:
    """Words for ``tc`` that limit what ``device`` sends, in the order in which to run them."""
    burst = burst_bytes(bits_per_second)
    queue = max(round(bits_per_second / 8 * QUEUE_S), SMALLEST_QUEUE) + burst
    bucket = f"rate {bits_per_second}bit burst {burst}b limit {queue}b"
    commands = [f"qdisc add dev {device} root handle 1: tbf {bucket}"]
    if impairment:
        words = f"qdisc add dev {device} parent 1: handle 10: netem limit {NETEM_LIMIT}"
        if impairment.delay_s:
            words += f" delay {impairment.delay_s * 1e6:.0f}us {impairment.jitter_s * 1e6:.0f}us"
        if impairment.loss:
            words += f" loss {impairment.loss * 100:.6f}%"
        commands.append(words)
    return commands
