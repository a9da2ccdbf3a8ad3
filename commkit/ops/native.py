"""The compiled CPU kernels, bound to the operators of the same names.

A kernel serves contiguous 1-D tensors of the dtypes noted at each function; it hands everything else (float64
above all, strided and mismatched arguments, whose errors are torch's) to the reference. Results do not depend
on the number of threads, which is torch's, nor on the instruction set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .definitions import NAMESPACE
from .library import load, select_level

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CPU = torch.device("cpu")
_LARGE = 4 << 20  # bytes; two huge pages
_KERNELS: dict[str, tuple[Callable[..., Any], str]] = {}
_library: Any = None
_problem = "not loaded"
_registered: list[Any] = []


def register() -> None:
    """Load the library and put its kernels in front of the reference; once, at import."""
    global _library, _problem
    _library, _problem = load()
    if _library is None:
        return
    untyped: Any = torch.library
    implementations = untyped.Library(NAMESPACE, "IMPL")
    _registered.append(implementations)  # kernels live as long as it does
    for name, (kernel, key) in _KERNELS.items():
        implementations.impl(name, kernel, key)


def served() -> frozenset[str]:
    """Names of the operators that a compiled kernel serves."""
    return frozenset() if _library is None else frozenset(_KERNELS)


def status() -> dict[str, str]:
    """Which library is in use and with which instruction set; or why none."""
    if _library is None:
        return {"library": f"none: {_problem}", "instruction set": "torch's"}
    return {"library": "loaded", "instruction set": _library.ck_level().decode()}


def use_level(level: str) -> None:
    """Force an instruction set, one of ``library.LEVELS``; "" is the best. For tests.

    Raises:
        ValueError: this processor lacks it.
        RuntimeError: there is no library.
    """
    if _library is None:
        raise RuntimeError(f"no compiled kernels: {_problem}")
    select_level(_library, level)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, on huge pages where the system has some. The C library returns large blocks to the
    system and gets them back page by page, at several times the cost of what is then written to them."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if _library is not None and device.type == "cpu" and x.nbytes >= _LARGE:
        _library.ck_prefer_huge_pages(x.data_ptr(), x.nbytes)
    return x


def _kernel(key: str = "CPU") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        _KERNELS[function.__name__] = (function, key)
        return function

    return keep


def _flat(x: Tensor, *dtypes: torch.dtype) -> bool:
    return x.dtype in (dtypes or _DTYPES) and x.dim() == 1 and x.is_contiguous()


def _fits(x: Tensor, numel: int, dtype: torch.dtype) -> bool:
    return x.device.type == "cpu" and _flat(x, dtype) and x.numel() == numel


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _keys(seed: int) -> Any:
    return (ctypes.c_uint32 * 2)(*(key & 0xFFFFFFFF for key in reference.noise_keys(seed)))


def _encode_signs(x: Tensor, l1: Any) -> Tensor:
    bits = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    _library.ck_encode_signs(
        x.data_ptr(), _DTYPES[x.dtype], x.numel(), bits.data_ptr(), l1, torch.get_num_threads()
    )
    return bits


@_kernel()
def pack_signs(x: Tensor) -> Tensor:
    """float32, bfloat16, float16."""
    return _encode_signs(x, None) if _flat(x) else reference.pack_signs(x)


@_kernel()
def encode_signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16. The mean is summed up in float64."""
    if not _flat(x):
        return reference.encode_signs(x)
    l1 = ctypes.c_double()
    bits = _encode_signs(x, ctypes.byref(l1))
    return bits, torch.tensor([l1.value / max(x.numel(), 1)], dtype=torch.float32)


def _sum_signs(out: Tensor, bits: Sequence[Tensor], scales: Tensor, accumulate: bool) -> bool:
    n, size = out.numel(), (out.numel() + 7) // 8
    if not (
        bits
        and _flat(out, torch.float32)
        and _fits(scales, len(bits), torch.float32)
        and all(_fits(row, size, torch.uint8) for row in bits)
    ):
        return False
    _library.ck_sum_signs(
        out.data_ptr(),
        n,
        _pointers(bits),
        scales.data_ptr(),
        len(bits),
        accumulate,
        torch.get_num_threads(),
    )
    return True


@_kernel()
def write_signs_(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    """float32."""
    if not _sum_signs(out, bits, scales, False):
        reference.write_signs_(out, bits, scales)


@_kernel()
def accumulate_signs_(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    """float32."""
    if not _sum_signs(out, bits, scales, True):
        reference.accumulate_signs_(out, bits, scales)


@_kernel()
def unpack_signs(bits: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """float32."""
    if dtype == torch.float32:
        out = empty((numel,), torch.float32, _CPU)
        if _sum_signs(out, [bits], torch.ones(1), False):
            return out
    return reference.unpack_signs(bits, numel, dtype)


@_kernel("BackendSelect")
def uniform_noise(numel: int, seed: int, device: torch.device) -> Tensor:
    """Any length. There is no tensor to choose a kernel by, so this one chooses."""
    if device.type != "cpu":
        return reference.uniform_noise(numel, seed, device)
    out = empty((numel,), torch.float32, device)
    _library.ck_uniform_noise(out.data_ptr(), numel, _keys(seed), torch.get_num_threads())
    return out


@_kernel()
def quantize_blocks(
    x: Tensor, bits: int, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16; at 4 bits blocks of an even size."""
    if not (_flat(x) and block_size >= 1 and (bits == 8 or (bits == 4 and block_size % 2 == 0))):
        return reference.quantize_blocks(x, bits, block_size, stochastic, seed)
    n = x.numel()
    codes = x.new_empty(n if bits == 8 else (n + 1) // 2, dtype=torch.uint8)
    scales = x.new_empty((n + block_size - 1) // block_size, dtype=torch.float32)
    _library.ck_quantize_blocks(
        x.data_ptr(),
        _DTYPES[x.dtype],
        n,
        bits,
        block_size,
        _keys(seed) if stochastic else None,
        codes.data_ptr(),
        scales.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, scales


def _sum_blocks(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
    accumulate: bool,
) -> bool:
    n = out.numel()
    if min(block_size, divisor) < 1 or bits not in (4, 8) or (bits == 4 and block_size % 2):
        return False
    size, blocks = (n if bits == 8 else (n + 1) // 2), (n + block_size - 1) // block_size
    if not (
        len(codes) == len(scales) > 0
        and _flat(out, torch.float32)
        and all(_fits(row, size, torch.uint8) for row in codes)
        and all(_fits(row, blocks, torch.float32) for row in scales)
    ):
        return False
    _library.ck_sum_blocks(
        out.data_ptr(),
        n,
        _pointers(codes),
        _pointers(scales),
        len(codes),
        bits,
        block_size,
        divisor,
        accumulate,
        torch.get_num_threads(),
    )
    return True


@_kernel()
def write_blocks_(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    """float32; at 4 bits blocks of an even size."""
    if not _sum_blocks(out, codes, scales, bits, block_size, divisor, False):
        reference.write_blocks_(out, codes, scales, bits, block_size, divisor)


@_kernel()
def accumulate_blocks_(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    """float32; at 4 bits blocks of an even size."""
    if not _sum_blocks(out, codes, scales, bits, block_size, divisor, True):
        reference.accumulate_blocks_(out, codes, scales, bits, block_size, divisor)


@_kernel()
def dequantize_blocks(
    codes: Tensor, scales: Tensor, numel: int, bits: int, block_size: int
) -> Tensor:
    """At 4 bits blocks of an even size."""
    out = empty((numel,), torch.float32, _CPU)
    if _sum_blocks(out, [codes], [scales], bits, block_size, 1, False):
        return out
    return reference.dequantize_blocks(codes, scales, numel, bits, block_size)


@_kernel()
def ternarize(x: Tensor, scale: Tensor, seed: int) -> Tensor:
    """float32, bfloat16, float16; a scale of float32."""
    if not (_flat(x) and scale.dtype == torch.float32 and scale.numel() == 1):
        return reference.ternarize(x, scale, seed)
    codes = x.new_empty(x.numel(), dtype=torch.int8)
    _library.ck_ternarize(
        x.data_ptr(),
        _DTYPES[x.dtype],
        x.numel(),
        float(scale),
        _keys(seed),
        codes.data_ptr(),
        torch.get_num_threads(),
    )
    return codes


@_kernel()
def pack_ternary(codes: Tensor) -> Tensor:
    """int8."""
    if not _flat(codes, torch.int8):
        return reference.pack_ternary(codes)
    packed = codes.new_empty((codes.numel() + 3) // 4, dtype=torch.uint8)
    _library.ck_pack_ternary(
        codes.data_ptr(), codes.numel(), packed.data_ptr(), torch.get_num_threads()
    )
    return packed


@_kernel()
def unpack_ternary(packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """float32."""
    if not (dtype == torch.float32 and _fits(packed, (numel + 3) // 4, torch.uint8)):
        return reference.unpack_ternary(packed, numel, dtype)
    out = empty((numel,), torch.float32, _CPU)
    _library.ck_unpack_ternary(packed.data_ptr(), numel, out.data_ptr(), torch.get_num_threads())
    return out


@_kernel()
def pack_nibbles(codes: Tensor) -> Tensor:
    """int8."""
    if not _flat(codes, torch.int8):
        return reference.pack_nibbles(codes)
    packed = codes.new_empty((codes.numel() + 1) // 2, dtype=torch.uint8)
    _library.ck_pack_nibbles(
        codes.data_ptr(), codes.numel(), packed.data_ptr(), torch.get_num_threads()
    )
    return packed


@_kernel()
def select_at_least(x: Tensor, threshold: Tensor) -> Tensor:
    """float32."""
    if not (_flat(x, torch.float32) and threshold.numel() == 1):
        return reference.select_at_least(x, threshold)
    found = ctypes.c_void_p()
    count = _library.ck_select_at_least(
        x.data_ptr(), x.numel(), float(threshold), ctypes.byref(found), torch.get_num_threads()
    )
    if count < 0:
        raise MemoryError("no memory for the indices of select_at_least")
    indices = x.new_empty(count, dtype=torch.int64)
    _library.ck_take(found, indices.data_ptr())
    return indices


@_kernel()
def scatter_accumulate_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    """float32, indices of int32 or int64."""
    k = indices.numel()
    if not (
        _flat(out, torch.float32)
        and _flat(indices, torch.int32, torch.int64)
        and indices.device == out.device
        and _fits(values, k, torch.float32)
    ):
        reference.scatter_accumulate_(out, indices, values)
    elif _library.ck_scatter_accumulate(
        out.data_ptr(),
        out.numel(),
        indices.data_ptr(),
        indices.element_size(),
        values.data_ptr(),
        k,
    ):
        raise IndexError(f"indices has one outside of out, which has {out.numel()} elements")
