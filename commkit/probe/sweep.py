"""Message-size sweeps, and the line through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev

import torch

from ..types import Comm

SMALLEST, FIRST = (
    64,
    16 * 1024,
)  # bytes: of the latency, and where the sweep for the bandwidth begins
_LARGEST = 64 * 1024**2
_SMALL = 4  # times as many of the smallest, which cost nothing and vary
_ASYMPTOTE = 3  # of the largest sizes: what the bandwidth is the slope of


@dataclass(frozen=True)
class Sweep:
    """Seconds of repeated messages, by their bytes in ascending order.

    Args:
        seconds: what was measured; the first size is that of the latency.
    """

    seconds: dict[int, list[float]]

    @property
    def samples(self) -> list[tuple[int, float]]:
        return [(size, median(taken)) for size, taken in self.seconds.items()]

    @property
    def latency_s(self) -> float:
        """Of the smallest message."""
        return self.samples[0][1]

    @property
    def bytes_per_second(self) -> float:
        """The slope over the largest sizes: free of latency, and of what a link lets pass at once after a pause. Of the
        best of each, since a machine's other work only ever adds to it; see ``spread`` for the rest."""
        best = [(size, min(taken)) for size, taken in self.seconds.items()]
        largest = best[-_ASYMPTOTE:]
        slope = _slope(largest)
        return 1 / slope if slope > 0 else largest[-1][0] / largest[-1][1]

    @property
    def spread(self) -> float:
        """Relative standard deviation of the largest message."""
        taken = list(self.seconds.values())[-1]
        return pstdev(taken) / fmean(taken)


def _slope(samples: Sequence[tuple[int, float]]) -> float:
    x, y = fmean(n for n, _ in samples), fmean(t for _, t in samples)
    below = sum((n - x) ** 2 for n, _ in samples)
    return sum((n - x) * (t - y) for n, t in samples) / below if below else 0.0


def sweep(
    message: Callable[[int], float],
    comm: Comm,
    device: torch.device,
    target_s: float,
    repeats: int,
    multiple: int = 1,
) -> Sweep:
    """Double the size until a message takes ``target_s`` on some rank. Collective over ``comm``.

    Args:
        message: sends so many bytes once; the seconds to be noted down.
        device: of what ranks tell each other.
        target_s: of the largest.
        repeats: of each size, after one that is not counted.
        multiple: which sizes are multiples of.
    """
    seconds: dict[int, list[float]] = {}
    size = SMALLEST
    while True:
        size = -(-size // multiple) * multiple
        message(size)
        many = repeats if seconds else _SMALL * repeats
        seconds[size] = [message(size) for _ in range(many)]
        longest = slowest(median(seconds[size]), comm, device)
        if size >= _LARGEST or (len(seconds) > _ASYMPTOTE and longest >= target_s):
            return Sweep(seconds)
        size = max(FIRST, 2 * size)


def slowest(seconds: float, comm: Comm, device: torch.device) -> float:
    """The most that any rank took. Collective."""
    x = torch.tensor([seconds], dtype=torch.float64, device=device)
    return float(comm.all_reduce(x, op="max"))
