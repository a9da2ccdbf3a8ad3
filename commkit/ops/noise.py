"""The randomness of every kernel: a hash of (seed, element index), the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def _as_int32(value: int) -> int:
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def noise_keys(seed: int) -> tuple[int, int]:
    """Two int32 keys of a seed (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    z ^= z >> 31
    return _as_int32(z), _as_int32(z >> 32)


def uniform_noise(numel: int, seed: int, device: torch.device) -> Tensor:
    """(numel,) float32 in [0, 1), multiples of 2^-24: a 32-bit finaliser hash of the index, keyed twice
    so that two seeds never give shifted copies of one stream."""
    first, second = noise_keys(seed)
    x = torch.arange(numel, dtype=torch.int64, device=device).to(torch.int32)
    x += first
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x += second
    x ^= (x >> 15) & 0x1FFFF
    x *= _as_int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return ((x >> 8) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)
