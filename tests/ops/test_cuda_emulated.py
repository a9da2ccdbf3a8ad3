"""The CUDA kernels, run on a CPU by an emulation, against the reference: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commkit.ops import reference

from .emulated import KERNELS, emulating, library, needs_compiler
from .test_native import (
    BLOCK,
    DTYPES,
    EXACT,
    assert_same,
    blocks,
    codes,
    finite,
    rows,
    stepped,
    values,
)

pytestmark = needs_compiler

# Around a byte, a quad's and a word's end, a warp's tile of 1024 and a block's of 8192.
LENGTHS = (*range(18), *range(30, 36), 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025)
LENGTHS += (2047, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 3 * 8192 + 1027)


def aligned_in_place(name: str, n: int, *arguments: Any) -> Callable[[Any], torch.Tensor]:
    def call(module: Any) -> torch.Tensor:
        out = finite(n, at=0).clone()
        getattr(module, name)(out, *arguments)
        return out

    return call


def summed(name: str, code: str, n: int, at: int, divisor: int) -> Callable[[Any], torch.Tensor]:
    """``name`` of three rows of codes, on memory that begins ``at`` elements after a vector."""
    xs = [finite(n) * (r + 1) for r in range(3)]
    if code == "ternary":
        rows = [(reference.pack_ternary(codes(n, 1)), blocks(n, 8, 1)[1][0]) for _ in xs]
    elif code == "e3m0":
        rows = [reference.quantize_e3m0(x, BLOCK, True, 5) for x in xs]
    else:
        rows = [reference.quantize_blocks(x, int(code), BLOCK, True, 5) for x in xs]
    packed, scales = [list(column) for column in zip(*rows, strict=True)]
    form = "e3m0" if code == "e3m0" else "blocks"
    width = [] if code == "e3m0" else [2 if code == "ternary" else int(code)]

    def call(module: Any) -> torch.Tensor:
        out = finite(n, at=at).clone() if at == 0 else finite(n, at=at)
        getattr(module, f"{name}_{form}_")(out, packed, scales, *width, BLOCK, divisor)
        return out

    return call


def momenta(
    n: int, dtype: torch.dtype, at: int, before: str, nesterov: bool
) -> Callable[[Any], Any]:
    g, memory = finite(n, dtype, at), [finite(n, at=at) * 3, finite(n, at=at) - 1]
    velocity, unsent = (
        x if wanted == "1" else None for x, wanted in zip(memory, before, strict=True)
    )

    def call(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        u, v = (torch.empty(n + at)[at:] for _ in range(2))
        module.correct_momentum_(u, v, g, velocity, unsent, 0.9, nesterov)
        return u, v

    return call


def adam(n: int, at: int) -> Callable[[Any], Any]:
    def call(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        p, exp_avg, momentum = (finite(n + at)[at:] * scale for scale in (1, 2, 3))
        denominator = finite(n + at)[at:].abs() + 1e-3
        module.frozen_adam_(p, exp_avg, momentum, denominator, 0.99, 1e-3)
        return p, exp_avg

    return call


def e3m0(module: Any, x: torch.Tensor, stochastic: bool) -> tuple[torch.Tensor, torch.Tensor]:
    packed, scales = module.quantize_e3m0(x, BLOCK, stochastic, 5)
    return packed, scales + 0.0  # the sign of a scale of zero means nothing


CASES: dict[str, Callable[[int], Callable[[Any], Any]]] = {
    **EXACT,
    "unpack_nibbles": lambda n: (
        lambda m: m.unpack_nibbles(reference.pack_nibbles(codes(n, 7)), n, torch.float32)
    ),
    "aligned pack_signs": lambda n: lambda m: m.pack_signs(values(n, at=0)),
    **{
        f"select_at_least at {at} {dtype}": lambda n, a=at, d=dtype: (
            lambda m: m.select_at_least(values(n, d, a), torch.tensor(1.5))
        )
        for at in (0, 1)
        for dtype in DTYPES
    },
    **{
        f"aligned quantize_blocks {bits} {dtype}": lambda n, b=bits, d=dtype: (
            lambda m: m.quantize_blocks(finite(n, d, 0), b, BLOCK, True, 5)
        )
        for bits in (4, 8)
        for dtype in DTYPES
    },
    **{
        f"quantize_e3m0 at {at} {stochastic} {dtype}": lambda n, a=at, s=stochastic, d=dtype: (
            lambda m: e3m0(m, finite(n, d, a), s)
        )
        for at in (0, 1)
        for stochastic in (False, True)
        for dtype in DTYPES
    },
    "dequantize_e3m0": lambda n: (
        lambda m: m.dequantize_e3m0(*reference.quantize_e3m0(finite(n), BLOCK, True, 5), n, BLOCK)
    ),
    **{
        f"{name} {code} at {at} by {divisor}": lambda n, a=name, c=code, p=at, d=divisor: summed(
            a, c, n, p, d
        )
        for name in ("write", "accumulate")
        for code in ("4", "8", "ternary", "e3m0")
        for at in (0, 1)
        for divisor in (3, 4)
    },
    **{
        f"aligned {name}": lambda n, a=name: aligned_in_place(a, n, *rows(n, 5))
        for name in ("write_signs_", "accumulate_signs_")
    },
    **{
        f"correct_momentum_ {dtype} at {at} {before} {nesterov}": (
            lambda n, d=dtype, a=at, b=before, s=nesterov: momenta(n, d, a, b, s)
        )
        for dtype, before in [(dtype, "11") for dtype in DTYPES]
        + [(torch.float32, before) for before in ("00", "01", "10")]
        for at in (0, 1)
        for nesterov in (False, True)
    },
    **{
        f"aligned dgc_step_ {dtype}": lambda n, d=dtype: stepped(n, d, 0.02, at=0)
        for dtype in DTYPES
    },
    **{f"frozen_adam_ at {at}": lambda n, a=at: adam(n, a) for at in (0, 1)},
}


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_the_reference(name: str) -> None:
    with emulating() as backend:
        for n in LENGTHS:
            call = CASES[name](n)
            assert_same(call(KERNELS), call(reference))
    assert bool(backend.calls) == ("float64" not in name)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_sampled_threshold_is_the_references(dtype: torch.dtype) -> None:
    with emulating() as backend:
        for n in (1, 2, 31, 100, 4097, 70_001):
            for k in {1, max(1, n // 100), max(1, n // 2), n}:
                x = values(n, dtype)
                got, wanted = (m.sample_threshold(x, k, n + k) for m in (KERNELS, reference))
                assert_same(got.nan_to_num(-1), wanted.nan_to_num(-1))
    assert set(backend.calls) == {"ck_ranked_magnitude"}


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("make", [values, lambda n, dtype: codes(n, 3).to(dtype)])
def test_the_largest_of_rows_are_the_references(make: Any, dtype: torch.dtype) -> None:
    with emulating() as backend:
        for rows, n in ((1, 1), (3, 7), (5, 64), (2, 4096), (2, 5000)):
            for k in {1, n // 2 + 1, n}:
                x = make(rows * n, dtype).view(rows, n)
                assert_same(KERNELS.largest_of_rows(x, k), reference.largest_of_rows(x, k))
    assert set(backend.calls) == {"ck_largest_of_rows"}


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 4097, 50_001])
def test_the_mean_size_is_as_near_as_the_references(n: int, dtype: torch.dtype) -> None:
    x = finite(n, dtype)
    exact = float(x.double().abs().mean()) if n else 0.0
    wanted = float(reference.encode_signs(x)[1])
    with emulating():
        got = float(KERNELS.encode_signs(x)[1])
    assert abs(got - exact) <= max(2 * abs(wanted - exact), abs(exact) * 2**-24)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_mean_size_shows_what_is_not_finite(bad: float) -> None:
    for place in (0, 5, 1030, 2048):
        x = finite(2049)
        x[place] = bad
        with emulating():
            assert not KERNELS.encode_signs(x)[1].isfinite()


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "block_size", [2, 4, 8, 62, 128, 256, 512, 1000, 1024, 2048, 4096, 1 << 14]
)
def test_blocks_of_any_size(block_size: int, bits: int, stochastic: bool) -> None:
    for at, n in ((0, 3 * 4096), (1, 2 * 4096 + 131)):
        x = finite(n, at=at)
        with emulating():
            got = KERNELS.quantize_blocks(x, bits, block_size, stochastic, 1)
            decoded = KERNELS.dequantize_blocks(*got, n, bits, block_size)
        assert_same(got, reference.quantize_blocks(x, bits, block_size, stochastic, 1))
        assert_same(decoded, reference.dequantize_blocks(*got, n, bits, block_size))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [BLOCK, 100])
def test_blocks_with_bad_values_decode_alike(bits: int, block_size: int) -> None:
    x = values(1000)
    with emulating():
        got = KERNELS.quantize_blocks(x, bits, block_size, False, 0)
    wanted = reference.quantize_blocks(x, bits, block_size, False, 0)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1].nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))


def test_nothing_is_written_beyond_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is given to write to lies between fences."""
    memories: list[tuple[torch.Tensor, int, int]] = []

    def fenced(
        *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None, at: int = 32
    ) -> torch.Tensor:
        size = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        memory = torch.full((size.numel() + 64,), 77, dtype=dtype)
        memories.append((memory, at, at + size.numel()))
        return memory[at : at + size.numel()].view(size)

    for n in (1, 7, 31, 33, 1000, 1024, 1025, 8195):
        for name in CASES:
            call = CASES[name](n)
            with emulating(), monkeypatch.context() as patch:
                patch.setattr(torch, "empty", fenced)
                call(KERNELS)
        for at in (32, 33):
            out = fenced(n, at=at)
            with emulating():
                KERNELS.write_signs_(out, *rows(n, 2))
                KERNELS.write_blocks_(out, *blocks(n, 4, 1), 4, BLOCK, 1)
                KERNELS.frozen_adam_(out, out.clone(), out.clone(), out.clone(), 0.9, 0.1)
    for memory, begin, end in memories:
        assert bool((memory[:begin] == 77).all())
        assert bool((memory[end:] == 77).all())


def test_more_rows_than_a_launch_takes_go_to_the_reference() -> None:
    bits, scales = rows(100, 1)
    out, wanted = torch.zeros(100), torch.zeros(100)
    many = library().ck_cuda_max_rows() + 1
    with emulating() as backend:
        KERNELS.write_signs_(out, bits * many, scales.repeat(many))
    reference.write_signs_(wanted, bits * many, scales.repeat(many))
    assert torch.equal(out, wanted)
    assert not backend.calls


def test_an_index_outside_stops_the_kernel() -> None:
    out = torch.zeros(4)
    for bad in (-1, 4, 2**31 - 1):
        indices = torch.tensor([bad, 0], dtype=torch.int32)
        with emulating(), pytest.raises(RuntimeError, match="ck_scatter_accumulate failed"):
            KERNELS.scatter_accumulate_(out, indices, torch.ones(2))
    assert not out.any()
