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


def _fake_encode_signs(x: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_pack_signs(x), x.new_empty(1, dtype=torch.float32)


def _fake_encode_signs_compensated(
    residual: Tensor, gradient: Tensor, decay: float, sent: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _fake_encode_signs(gradient)


def _fake_pack_ternary(codes: Tensor) -> Tensor:
    return codes.new_empty((codes.numel() + 3) // 4, dtype=torch.uint8)


def _fake_pack_nibbles(codes: Tensor) -> Tensor:
    return codes.new_empty((codes.numel() + 1) // 2, dtype=torch.uint8)


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


def _fake_quantize_e3m0(
    x: Tensor, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    return _fake_quantize_blocks(x, 4, block_size, stochastic, seed)


def _fake_dequantize_e3m0(codes: Tensor, scales: Tensor, numel: int, block_size: int) -> Tensor:
    return codes.new_empty(numel, dtype=torch.float32)


def _fake_quantize_buckets(
    x: Tensor, levels: int, bucket_size: int, l2: bool, seed: int
) -> tuple[Tensor, Tensor]:
    scales = x.new_empty((x.numel() + bucket_size - 1) // bucket_size, dtype=torch.float32)
    return x.new_empty(x.numel(), dtype=torch.int8), scales


def _fake_quantize_codebook(
    x: Tensor, levels: Tensor, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    scales = x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)
    return x.new_empty(x.numel(), dtype=torch.uint8), scales


def _fake_dequantize_codebook(
    codes: Tensor, levels: Tensor, scales: Tensor, block_size: int
) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=torch.float32)


def _fake_quantize_natural(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.numel(), dtype=torch.uint8), x.new_empty(1, dtype=torch.float32)


def _fake_dequantize_natural(codes: Tensor, top: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=dtype)


def _fake_sample_threshold(x: Tensor, k: int, seed: int) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _fake_stratified_indices(numel: int, k: int, seed: int, device: torch.device) -> Tensor:
    return torch.empty(k, dtype=torch.int64, device=device)


def _fake_select_at_least(x: Tensor, threshold: Tensor) -> Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _fake_largest_of_rows(x: Tensor, k: int) -> Tensor:
    return x.new_empty((x.shape[0], k), dtype=torch.int64)


def _fake_largest(x: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(k, dtype=torch.int64), x.new_empty(k, dtype=dtype)


def _fake_dgc_step(u: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    k = arguments[-2]
    return v.new_empty(k, dtype=torch.int64), v.new_empty(k)


def _fake_in_place(*arguments: Any) -> None:
    return None


_FOREACH_COMPENSATED = (
    "(Tensor(a!) bits, Tensor(b!) scales, Tensor(c!)[] residuals, Tensor[] gradients, float decay, "
    "Tensor? sent) -> ()"
)
_FOREACH_SUMS = (
    "(Tensor(a!) bits, Tensor(b!) scales, Tensor(c!)[] sums, Tensor[] residuals, Tensor[] gradients, "
    "Tensor? sent) -> ()"
)
_FOREACH_REENCODE = (
    "(Tensor(a!) bits, Tensor(b!) scales, Tensor(c!)[] sums, Tensor[] residuals, Tensor? sent, Tensor[] rows, "
    "Tensor row_scales) -> ()"
)
_SUM_SIGNS = "(Tensor(a!) out, Tensor[] bits, Tensor scales) -> ()"
_FOREACH_SUM_SIGNS = "(Tensor(a!)[] outs, Tensor[] bits, Tensor scales) -> ()"
_SUM_BLOCKS = (
    "(Tensor(a!) out, Tensor[] codes, Tensor[] scales, int bits, int block_size, int divisor) -> ()"
)
_SUM_E3M0 = "(Tensor(a!) out, Tensor[] codes, Tensor[] scales, int block_size, int divisor) -> ()"
_CORRECT_MOMENTUM = "(Tensor(a!) u, Tensor(b!) v, Tensor g, Tensor? velocity, Tensor? unsent, float momentum, bool nesterov"
_FROZEN_ADAM = (
    "(Tensor(a!) p, Tensor(b!) exp_avg, Tensor momentum, Tensor denominator, float keep, float size)"
    " -> ()"
)
_COMBINE_TILES = (
    "(Tensor(a!) out, Tensor[] places, Tensor[] values, Tensor tall, Tensor wide, int columns, "
    "bool subtract) -> ()"
)

OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "uniform_noise": ("(SymInt numel, int seed, Device device) -> Tensor", _fake_uniform_noise),
    "pack_signs": ("(Tensor x) -> Tensor", _fake_pack_signs),
    "unpack_signs": ("(Tensor bits, SymInt numel, ScalarType dtype) -> Tensor", _fake_unpack),
    "encode_signs": ("(Tensor x) -> (Tensor, Tensor)", _fake_encode_signs),
    "write_signs_": (_SUM_SIGNS, _fake_in_place),
    "accumulate_signs_": (_SUM_SIGNS, _fake_in_place),
    "encode_signs_compensated_": (
        "(Tensor(a!) residual, Tensor gradient, float decay, Tensor? sent) -> (Tensor, Tensor)",
        _fake_encode_signs_compensated,
    ),
    "foreach_encode_signs_": (
        "(Tensor(a!) bits, Tensor(b!) scales, Tensor[] xs) -> ()",
        _fake_in_place,
    ),
    "foreach_encode_signs_compensated_": (_FOREACH_COMPENSATED, _fake_in_place),
    "foreach_encode_signs_of_sums_": (_FOREACH_SUMS, _fake_in_place),
    "foreach_reencode_signs_": (_FOREACH_REENCODE, _fake_in_place),
    "foreach_write_signs_": (_FOREACH_SUM_SIGNS, _fake_in_place),
    "foreach_accumulate_signs_": (_FOREACH_SUM_SIGNS, _fake_in_place),
    "ternarize": ("(Tensor x, Tensor scale, int seed) -> Tensor", _fake_ternarize),
    "pack_ternary": ("(Tensor codes) -> Tensor", _fake_pack_ternary),
    "unpack_ternary": ("(Tensor packed, SymInt numel, ScalarType dtype) -> Tensor", _fake_unpack),
    "pack_nibbles": ("(Tensor codes) -> Tensor", _fake_pack_nibbles),
    "unpack_nibbles": ("(Tensor packed, SymInt numel, ScalarType dtype) -> Tensor", _fake_unpack),
    "quantize_blocks": (
        "(Tensor x, int bits, int block_size, bool stochastic, int seed) -> (Tensor, Tensor)",
        _fake_quantize_blocks,
    ),
    "dequantize_blocks": (
        "(Tensor codes, Tensor scales, SymInt numel, int bits, int block_size) -> Tensor",
        _fake_dequantize_blocks,
    ),
    "write_blocks_": (_SUM_BLOCKS, _fake_in_place),
    "accumulate_blocks_": (_SUM_BLOCKS, _fake_in_place),
    "quantize_e3m0": (
        "(Tensor x, int block_size, bool stochastic, int seed) -> (Tensor, Tensor)",
        _fake_quantize_e3m0,
    ),
    "dequantize_e3m0": (
        "(Tensor codes, Tensor scales, SymInt numel, int block_size) -> Tensor",
        _fake_dequantize_e3m0,
    ),
    "write_e3m0_": (_SUM_E3M0, _fake_in_place),
    "accumulate_e3m0_": (_SUM_E3M0, _fake_in_place),
    "quantize_buckets": (
        "(Tensor x, int levels, int bucket_size, bool l2, int seed) -> (Tensor, Tensor)",
        _fake_quantize_buckets,
    ),
    "quantize_codebook": (
        "(Tensor x, Tensor levels, int block_size, bool stochastic, int seed) -> (Tensor, Tensor)",
        _fake_quantize_codebook,
    ),
    "dequantize_codebook": (
        "(Tensor codes, Tensor levels, Tensor scales, int block_size) -> Tensor",
        _fake_dequantize_codebook,
    ),
    "quantize_natural": ("(Tensor x, int seed) -> (Tensor, Tensor)", _fake_quantize_natural),
    "dequantize_natural": (
        "(Tensor codes, Tensor top, ScalarType dtype) -> Tensor",
        _fake_dequantize_natural,
    ),
    "sample_threshold": ("(Tensor x, int k, int seed) -> Tensor", _fake_sample_threshold),
    "select_at_least": ("(Tensor x, Tensor threshold) -> Tensor", _fake_select_at_least),
    "largest": ("(Tensor x, int k, int seed) -> (Tensor, Tensor)", _fake_largest),
    "largest_of_rows": ("(Tensor x, int k) -> Tensor", _fake_largest_of_rows),
    "stratified_indices": (
        "(SymInt numel, int k, int seed, Device device) -> Tensor",
        _fake_stratified_indices,
    ),
    "scatter_accumulate_": (
        "(Tensor(a!) out, Tensor indices, Tensor values) -> ()",
        _fake_in_place,
    ),
    "correct_momentum_": (f"{_CORRECT_MOMENTUM}) -> ()", _fake_in_place),
    "dgc_step_": (
        f"{_CORRECT_MOMENTUM}, bool masking, float negligible, int k, int seed) -> (Tensor, Tensor)",
        _fake_dgc_step,
    ),
    "combine_tiles_": (_COMBINE_TILES, _fake_in_place),
    "frozen_adam_": (
        _FROZEN_ADAM,
        _fake_in_place,
    ),
}
"""Name -> (schema, fake). The default kernel is the function of the same name in ``reference``."""

for _name, (_schema, _fake) in OPS.items():
    _qualified = f"{NAMESPACE}::{_name}"
    torch.library.define(_qualified, _schema)
    torch.library.impl(_qualified, "default", getattr(reference, _name))
    torch.library.register_fake(_qualified, _fake)
