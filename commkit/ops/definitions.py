"""Schemas, fakes and default kernels of the ``commkit::`` operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

NAMESPACE = "commkit"


def _fake_uniform_noise(numel: int, seed: int, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=torch.float32, device=device)


def _fake_pack_signs(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _fake_pack_ternary(codes: Tensor) -> Tensor:
    return codes.new_empty((codes.numel() + 3) // 4, dtype=torch.uint8)


def _fake_unpack(packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(numel, dtype=dtype)


def _fake_ternarize(x: Tensor, scale: Tensor, seed: int) -> Tensor:
    return x.new_empty(x.numel(), dtype=torch.int8)


def _fake_quantize_blocks(
    x: Tensor, bits: int, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    n = x.numel()
    codes = x.new_empty(n if bits == 8 else (n + 1) // 2, dtype=torch.uint8)
    return codes, x.new_empty((n + block_size - 1) // block_size, dtype=torch.float32)


def _fake_dequantize_blocks(
    codes: Tensor, scales: Tensor, numel: int, bits: int, block_size: int
) -> Tensor:
    return codes.new_empty(numel, dtype=torch.float32)


def _fake_sample_threshold(x: Tensor, k: int, seed: int) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _fake_stratified_indices(numel: int, k: int, seed: int, device: torch.device) -> Tensor:
    return torch.empty(k, dtype=torch.int64, device=device)


def _fake_scatter_accumulate_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    return None


OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "uniform_noise": ("(SymInt numel, int seed, Device device) -> Tensor", _fake_uniform_noise),
    "pack_signs": ("(Tensor x) -> Tensor", _fake_pack_signs),
    "unpack_signs": ("(Tensor bits, SymInt numel, ScalarType dtype) -> Tensor", _fake_unpack),
    "ternarize": ("(Tensor x, Tensor scale, int seed) -> Tensor", _fake_ternarize),
    "pack_ternary": ("(Tensor codes) -> Tensor", _fake_pack_ternary),
    "unpack_ternary": ("(Tensor packed, SymInt numel, ScalarType dtype) -> Tensor", _fake_unpack),
    "quantize_blocks": (
        "(Tensor x, int bits, int block_size, bool stochastic, int seed) -> (Tensor, Tensor)",
        _fake_quantize_blocks,
    ),
    "dequantize_blocks": (
        "(Tensor codes, Tensor scales, SymInt numel, int bits, int block_size) -> Tensor",
        _fake_dequantize_blocks,
    ),
    "sample_threshold": ("(Tensor x, int k, int seed) -> Tensor", _fake_sample_threshold),
    "stratified_indices": (
        "(SymInt numel, int k, int seed, Device device) -> Tensor",
        _fake_stratified_indices,
    ),
    "scatter_accumulate_": (
        "(Tensor(a!) out, Tensor indices, Tensor values) -> ()",
        _fake_scatter_accumulate_,
    ),
}
"""Name -> (schema, fake). The default kernel is the function of the same name in ``reference``."""

for _name, (_schema, _fake) in OPS.items():
    _qualified = f"{NAMESPACE}::{_name}"
    torch.library.define(_qualified, _schema)
    torch.library.impl(_qualified, "default", getattr(reference, _name))
    torch.library.register_fake(_qualified, _fake)
