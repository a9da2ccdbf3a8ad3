"""What faulty ranks send: (h, P) vectors of the honest -> (f, P) of the attackers, who know them all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attack = Callable[[Tensor, int], Tensor]


def sign_flip(honest: Tensor, faulty: int, factor: float = 10.0) -> Tensor:
    """The mean of the honest, the other way and ``factor`` times as long."""
    return (-factor * honest.mean(0)).repeat(faulty, 1)


def gaussian(honest: Tensor, faulty: int, deviation: float = 100.0) -> Tensor:
    """Noise."""
    generator = torch.Generator().manual_seed(int(honest.abs().sum() * 1000) % 2**31)
    noise = torch.randn(faulty, honest.shape[1], generator=generator, dtype=honest.dtype)
    return deviation * noise


def little_is_enough(honest: Tensor, faulty: int, deviations: float | None = None) -> Tensor:
    """The honest mean moved by so many standard deviations of each element that it still hides among the
    honest (Baruch et al. 2019): as many as leave enough of them farther out to have a majority."""
    h = len(honest)
    if deviations is None:
        supporters = (h + faulty) // 2 + 1 - faulty
        share = torch.tensor((h - supporters) / h, dtype=torch.float64)
        deviations = float(torch.special.ndtri(share))
    return (honest.mean(0) - deviations * honest.std(0)).repeat(faulty, 1)


def inner_product(honest: Tensor, faulty: int, epsilon: float = 5.0) -> Tensor:
    """So much against the honest mean that the mean of all has a negative inner product with it (Xie et al.
    2020)."""
    return (-epsilon * honest.mean(0)).repeat(faulty, 1)


ATTACKS: dict[str, Attack] = {
    "sign_flip": sign_flip,
    "gaussian": gaussian,
    "little_is_enough": little_is_enough,
    "inner_product": inner_product,
}
