"""Bytes that a machine's network interface carries in each step, as the kernel counted them.

With ``COMMKIT_INTERFACE=eth0`` in the environment the first rank of each machine appends to
``interface/rank_NNNN.jsonl`` of the run: ``step``, the interface's ``tx_bytes, tx_packets, rx_bytes,
rx_packets``, and ``wire_bytes`` that commkit says this rank has sent (null if it was not counted).

The counters are read before a step and after the mean of its loss has been agreed. Until then every
rank has received all of the step's messages, so the difference is the step's traffic, whole, and
nothing of validation, checkpoints or rendezvous. What it holds besides gradients: headers,
acknowledgements, the loss mean (8 bytes), and buffers that DDP broadcasts.
"""

import json
import os
from pathlib import Path

VARIABLE = "COMMKIT_INTERFACE"
DIRECTORY = "interface"
# Of Ethernet, IPv4 and TCP with timestamps, which Linux uses unless told otherwise. A packet that
# segmentation offload hands over as one is counted as one, with one header.
HEADER_BYTES = 14 + 20 + 32
KEYS = ("tx_bytes", "tx_packets", "rx_bytes", "rx_packets")
_DEVICES = Path("/proc/self/net/dev")  # of this process's network namespace


class InterfaceMeter:
    """Appends the traffic of each step to a file.

    Args:
        interface: its name, e.g. ``eth0``.
        path: where to append; made anew unless ``resume``.
        resume: whether the file of an earlier part of the run is to be kept.

    Raises:
        ValueError: no such interface.
    """

    def __init__(self, interface: str, path: Path, resume: bool) -> None:
        self._interface = interface
        self._before = read_interface(interface)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a" if resume else "w", encoding="utf-8")

    def start(self) -> None:
        """A step begins."""
        self._before = read_interface(self._interface)

    def stop(self, step: int, wire_bytes: int | None) -> None:
        """All ranks have ended step number ``step``."""
        now = read_interface(self._interface)
        counts = {key: now[key] - self._before[key] for key in KEYS}
        record = {"step": step, **counts, "wire_bytes": wire_bytes}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def meter_from_environment(
    run: Path, rank: int, local_rank: int, resume: bool
) -> InterfaceMeter | None:
    """The meter of this rank, if it is the first of its machine and the environment names one.

    Raises:
        ValueError: the environment names an interface that is not there.
    """
    interface = os.environ.get(VARIABLE)
    if not interface or local_rank != 0:
        return None
    return InterfaceMeter(interface, run / DIRECTORY / f"rank_{rank:04d}.jsonl", resume)


def read_interface(interface: str) -> dict[str, int]:
    """``KEYS`` of an interface, counted since it was made.

    Raises:
        ValueError: no such interface.
    """
    names = []
    for line in _DEVICES.read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            counts = [int(word) for word in numbers.split()]
            return dict(zip(KEYS, [*counts[8:10], *counts[0:2]], strict=True))
        names.append(name.strip())
    raise ValueError(
        f"{VARIABLE}: got {interface!r}, but the interfaces here are {', '.join(names)}; name one "
        "of them or unset the variable"
    )
