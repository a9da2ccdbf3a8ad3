"""Compiled kernels against the reference: the same bits, whatever the length, the alignment, the number of
threads and the instruction set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from commkit import ops
from commkit.ops import native, reference

from .native_levels import levels, needs_native, running

pytestmark = needs_native

# Around every boundary: a byte, a vector, a chunk of 1024, a block of 64.
LENGTHS = (*range(70), 127, 128, 129, 1000, 1023, 1024, 1025, 2047, 2049, 4095, 4096, 4097)
LONG = 10**7 + 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK = 64

every_level = pytest.mark.parametrize("level", levels())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

Result = torch.Tensor | tuple[torch.Tensor, ...] | None


def values(n: int, dtype: torch.dtype = torch.float32, at: int = 1) -> torch.Tensor:
    """Zeros of both signs, infinities, NaN and denormals among them; it begins ``at`` elements into its
    memory, so not at a multiple of a vector."""
    x = torch.randn(n + at, generator=torch.Generator().manual_seed(n)) ** 3
    for first, step, special in (
        (1, 5, 0.0),
        (2, 7, -0.0),
        (40, 101, torch.inf),
        (41, 103, -torch.inf),
        (42, 107, torch.nan),
        (43, 109, 1e-41),
    ):
        x[first::step] = special
    return x.to(dtype)[at:]


def finite(n: int, dtype: torch.dtype = torch.float32, at: int = 1) -> torch.Tensor:
    return values(n, dtype, at).nan_to_num(0.5, 3.0, -3.0)


def codes(n: int, top: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(-top, top + 1, (n + 1,), generator=generator).to(torch.int8)[1:]


def rows(n: int, count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    bits = [reference.pack_signs(finite(n) - r) for r in range(count)]
    return bits, torch.tensor([0.3, -1.7, 0.0, 1e-30, 7.1, -0.6, torch.inf, 2e-39][:count])


def compensated(
    n: int, dtype: torch.dtype, decay: float, sent: float | None
) -> Callable[[Any], tuple[torch.Tensor, ...]]:
    """The residual and the bits; means are as near as the reference's, not the same."""
    scale = None if sent is None else torch.tensor([sent])

    def call(module: Any) -> tuple[torch.Tensor, ...]:
        residual = finite(n, torch.promote_types(dtype, torch.float32)).flip(0) * 3
        gradient = finite(n, dtype)
        bits, _ = module.encode_signs_compensated_(residual, gradient, decay, scale)
        return residual, bits

    return call


def parts(x: torch.Tensor) -> list[torch.Tensor]:
    """Neighbours of very different sizes, with none of a vector's alignment."""
    n = x.numel()
    ends = sorted({0, n // 100, n // 3, n // 2, n})
    return [x[:0], *(x[a:b] for a, b in pairwise(ends)), x[n:]]


def foreach_encoded(
    n: int, dtype: torch.dtype, sent: bool | None, apart: bool = False
) -> Callable[[Any], tuple[torch.Tensor, ...]]:
    """The bits of many tensors, and their residuals if ``sent`` says whether that is given; ``apart`` leaves
    residuals as they are, and the sums are elsewhere."""

    def call(module: Any) -> tuple[torch.Tensor, ...]:
        residual = finite(n, torch.promote_types(dtype, torch.float32)).flip(0) * 3
        xs, residuals = parts(finite(n, dtype)), parts(residual)
        bits = torch.full((sum(-(-x.numel() // 8) for x in xs),), 77, dtype=torch.uint8)
        scales = torch.full((len(xs),), torch.nan)
        sums = torch.full_like(residual, 7)
        if sent is None:
            module.foreach_encode_signs_(bits, scales, xs)
        elif apart:
            own = torch.arange(len(xs)) * 0.3 if sent else None
            module.foreach_encode_signs_of_sums_(bits, scales, parts(sums), residuals, xs, own)
        else:
            own = torch.arange(len(xs)) * 0.3 if sent else None
            module.foreach_encode_signs_compensated_(bits, scales, residuals, xs, 0.9, own)
        assert not scales.isnan().any()
        return bits, residual, sums

    return call


def reencoded(
    n: int, count: int, sent: bool, dtype: torch.dtype = torch.float32
) -> Callable[[Any], tuple[torch.Tensor, ...]]:
    """The bits, the sums and the residuals, which are left as they are."""

    def call(module: Any) -> tuple[torch.Tensor, ...]:
        residual = finite(n, dtype).flip(0) * 3
        sums = torch.full_like(residual, 7)
        of_each = parts(sums)
        bits = torch.full((sum(-(-x.numel() // 8) for x in of_each),), 77, dtype=torch.uint8)
        scales = torch.full((len(of_each),), torch.nan)
        own = torch.arange(len(of_each)) * 0.3 if sent else None
        row_bits, row_scales = rows(8 * bits.numel(), count)
        column = torch.outer(row_scales, torch.arange(len(of_each)) - 1.3)
        module.foreach_reencode_signs_(
            bits, scales, of_each, parts(residual), own, row_bits, column
        )
        assert not scales.isnan().any()
        return bits, sums, residual

    return call


def foreach_summed(
    name: str, n: int, count: int, dtype: torch.dtype = torch.float32
) -> Callable[[Any], torch.Tensor]:
    def call(module: Any) -> torch.Tensor:
        out = finite(n, dtype)
        outs = parts(out)
        bits, scales = rows(8 * sum(-(-x.numel() // 8) for x in outs), count)
        getattr(module, name)(outs, bits, torch.outer(scales, torch.arange(len(outs)) - 1.3))
        return out

    return call


def blocks(n: int, bits: int, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    quantized = [
        reference.quantize_blocks(finite(n) * (r + 1), bits, BLOCK, True, r) for r in range(count)
    ]
    return [q[0] for q in quantized], [q[1] for q in quantized]


def e3m0(n: int, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    quantized = [reference.quantize_e3m0(finite(n) * (r + 1), BLOCK, True, r) for r in range(count)]
    return [q[0] for q in quantized], [q[1] for q in quantized]


def ternary(n: int, block_size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    packed = [reference.pack_ternary(codes(n + r, 1)[r:]) for r in range(3)]
    blocks = -(-n // block_size)
    return packed, [finite(blocks + r)[r:] for r in range(3)]


def momenta(n: int, dtype: torch.dtype, has_u: bool, has_v: bool) -> tuple[Any, Any, Any]:
    work = torch.promote_types(dtype, torch.float32)
    u, v = finite(n, work) * 2, finite(n, work).flip(0)
    return finite(n, dtype), u if has_u else None, v if has_v else None


def corrected(
    n: int, dtype: torch.dtype, before: tuple[bool, bool], nesterov: bool, at: int = 1
) -> Callable[[Any], tuple[torch.Tensor, ...]]:
    """Momentum correction with the velocity or the unsent there or not."""
    moments = momenta(n, dtype, *before)

    def call(module: Any) -> tuple[torch.Tensor, ...]:
        work = torch.promote_types(dtype, torch.float32)
        u, v = (torch.empty(n + at, dtype=work)[at:].fill_(torch.nan) for _ in range(2))
        module.correct_momentum_(u, v, *moments, 0.9, nesterov)
        return u, v

    return call


def stepped(
    n: int,
    dtype: torch.dtype,
    share: float,
    before: tuple[bool, bool] = (True, True),
    nesterov: bool = False,
    masking: bool = True,
    negligible: float = 0.0,
    at: int = 1,
) -> Callable[[Any], tuple[torch.Tensor, ...]]:
    """A step of DGC that sends a share of everything."""
    moments, k = momenta(n, dtype, *before), min(n, max(1, int(share * n)))

    def call(module: Any) -> tuple[torch.Tensor, ...]:
        work = torch.promote_types(dtype, torch.float32)
        u, v = (torch.empty(n + at, dtype=work)[at:].fill_(torch.nan) for _ in range(2))
        found = module.dgc_step_(u, v, *moments, 0.9, nesterov, masking, negligible, k, n)
        return u, v, *found

    return call


def adam(module: Any, n: int) -> tuple[torch.Tensor, ...]:
    p, m, momentum, d = finite(n), torch.empty(n), finite(n).flip(0), finite(n).abs() + 0.1
    d[::3] = torch.inf
    module.frozen_adam_(p, m, momentum, d, 0.999, 1e-3)
    return p, m


def in_place(name: str, n: int, *arguments: Any) -> Callable[[Any], torch.Tensor]:
    """Calls an in-place operator of a module on a fresh unaligned tensor and returns that."""

    def call(module: Any) -> torch.Tensor:
        out = finite(n)
        getattr(module, name)(out, *arguments)
        return out

    return call


def indices_of(n: int) -> torch.Tensor:
    return torch.arange(0, n, 3, dtype=torch.int32)


def noise_of(n: int) -> Callable[[Any], Result]:
    return lambda m: m.uniform_noise(n, 2**40 + 5, torch.device("cpu"))


# Name -> what to call for n elements, with ``ops`` or with ``reference``.
EXACT: dict[str, Callable[[int], Callable[[Any], Result]]] = {
    "noise": noise_of,
    **{
        f"pack_signs {dtype}": lambda n, d=dtype: lambda m: m.pack_signs(values(n, d))
        for dtype in DTYPES
    },
    "bits of encode_signs": lambda n: lambda m: m.encode_signs(values(n))[0],
    "unpack_signs": lambda n: lambda m: m.unpack_signs(rows(n, 1)[0][0], n, torch.float32),
    **{
        f"{name} {count}": lambda n, a=name, c=count: in_place(a, n, *rows(n, c))
        for name in ("write_signs_", "accumulate_signs_")
        for count in (1, 2, 4, 5, 8)
    },
    **{
        f"encode_signs_compensated_ {decay} {sent} {dtype}": (
            lambda n, d=dtype, a=decay, s=sent: compensated(n, d, a, s)
        )
        for dtype in DTYPES
        for decay, sent in ((1.0, None), (0.9, 0.7))
    },
    **{
        f"{name} {dtype}": lambda n, d=dtype, s=sent, a=apart: foreach_encoded(n, d, s, a)
        for dtype in DTYPES
        for name, sent, apart in (
            ("foreach_encode_signs_", None, False),
            ("foreach_encode_signs_compensated_", False, False),
            ("foreach_encode_signs_compensated_ after", True, False),
            ("foreach_encode_signs_of_sums_", False, True),
            ("foreach_encode_signs_of_sums_ after", True, True),
        )
    },
    **{
        f"foreach_reencode_signs_ {count} {sent} {dtype}": (
            lambda n, c=count, s=sent, d=dtype: reencoded(n, c, s, d)
        )
        for count, sent, dtype in (
            (1, False, torch.float32),
            (2, True, torch.float32),
            (5, True, torch.float32),
            (2, True, torch.float64),
        )
    },
    **{
        f"{name} {count} {dtype}": (lambda n, a=name, c=count, d=dtype: foreach_summed(a, n, c, d))
        for name in ("foreach_write_signs_", "foreach_accumulate_signs_")
        for count, dtype in ((1, torch.float32), (5, torch.float32), (2, torch.float64))
    },
    **{
        f"quantize_blocks {bits} {stochastic} {dtype}": lambda n, b=bits, s=stochastic, d=dtype: (
            lambda m: m.quantize_blocks(finite(n, d), b, BLOCK, s, 5)
        )
        for bits in (4, 8)
        for stochastic in (False, True)
        for dtype in DTYPES
    },
    **{
        f"dequantize_blocks {bits}": lambda n, b=bits: (
            lambda m: m.dequantize_blocks(*(part[0] for part in blocks(n, b, 1)), n, b, BLOCK)
        )
        for bits in (4, 8)
    },
    **{
        f"{name} {bits} {count}": lambda n, a=name, b=bits, c=count: in_place(
            a, n, *blocks(n, b, c), b, BLOCK, c
        )
        for name in ("write_blocks_", "accumulate_blocks_")
        for bits in (4, 8)
        for count in (1, 3, 4)
    },
    **{
        f"ternarize {dtype}": lambda n, d=dtype: (
            lambda m: m.ternarize(finite(n, d), torch.tensor(2.5), 9)
        )
        for dtype in DTYPES
    },
    "ternarize by nothing": lambda n: lambda m: m.ternarize(finite(n), torch.tensor(0.0), 9),
    "pack_ternary": lambda n: lambda m: m.pack_ternary(codes(n, 1)),
    "unpack_ternary": lambda n: (
        lambda m: m.unpack_ternary(reference.pack_ternary(codes(n, 1)), n, torch.float32)
    ),
    "pack_nibbles": lambda n: lambda m: m.pack_nibbles(codes(n, 7)),
    "unpack_nibbles": lambda n: (
        lambda m: m.unpack_nibbles(reference.pack_nibbles(codes(n, 7)), n, torch.float32)
    ),
    **{
        f"quantize_e3m0 {stochastic} {dtype}": lambda n, s=stochastic, d=dtype: (
            lambda m: m.quantize_e3m0(finite(n, d), BLOCK, s, 5)
        )
        for stochastic in (False, True)
        for dtype in DTYPES
    },
    "dequantize_e3m0": lambda n: (
        lambda m: m.dequantize_e3m0(*(part[0] for part in e3m0(n, 1)), n, BLOCK)
    ),
    **{
        f"{name} {count}": lambda n, a=name, c=count: in_place(a, n, *e3m0(n, c), BLOCK, c)
        for name in ("write_e3m0_", "accumulate_e3m0_")
        for count in (1, 3)
    },
    **{
        f"{name} of ternary {size}": lambda n, a=name, b=size: in_place(
            a, n, *ternary(n, min(b, max(n, 1))), 2, min(b, max(n, 1)), 3
        )
        for name in ("write_blocks_", "accumulate_blocks_")
        for size in (BLOCK, 2**40)
    },
    **{
        f"sample_threshold {dtype}": lambda n, d=dtype: (
            lambda m: m.sample_threshold(finite(n + 1, d), n // 100 + 1, 77)
        )
        for dtype in DTYPES
    },
    **{
        f"largest_of_rows {k} {dtype}": lambda n, k=k, d=dtype: (
            lambda m: m.largest_of_rows(values(n, d).view(1, -1), min(k, n))
        )
        for k in (1, 32, 10**9)
        for dtype in DTYPES
    },
    **{
        f"largest {k} {dtype}": lambda n, k=k, d=dtype: (
            lambda m: m.largest(finite(n, d), min(k, n), 77)
        )
        for k in (1, 32, 10**9)
        for dtype in DTYPES
    },
    "largest_of_rows of many": lambda n: (
        lambda m: m.largest_of_rows(values(5 * n).view(5, n), n // 40)
    ),
    **{
        f"correct_momentum_ {has_u} {has_v} {nesterov} {dtype}": (
            lambda n, u=has_u, v=has_v, a=nesterov, d=dtype: corrected(n, d, (u, v), a)
        )
        for has_u in (False, True)
        for has_v in (False, True)
        for nesterov in (False, True)
        for dtype in DTYPES
    },
    **{
        f"dgc_step_ {share} {dtype}": lambda n, s=share, d=dtype: stepped(n, d, s)
        for share in (0.01, 0.3)
        for dtype in DTYPES
    },
    **{
        f"dgc_step_ {has_u} {has_v} {nesterov}": (
            lambda n, u=has_u, v=has_v, a=nesterov: stepped(n, torch.float32, 0.02, (u, v), a)
        )
        for has_u in (False, True)
        for has_v in (False, True)
        for nesterov in (False, True)
    },
    "dgc_step_ of all": lambda n: stepped(n, torch.float32, 1.0, (False, False)),
    "dgc_step_ without masking": lambda n: stepped(n, torch.float32, 0.02, masking=False),
    "dgc_step_ of little": lambda n: stepped(n, torch.float32, 0.5, negligible=0.25),
    "frozen_adam_": lambda n: lambda m: adam(m, n),
    **{
        f"select_at_least {dtype}": lambda n, d=dtype: (
            lambda m: m.select_at_least(values(n, d), torch.tensor(1.5))
        )
        for dtype in DTYPES
    },
    "select_at_least of all": lambda n: lambda m: m.select_at_least(finite(n), torch.tensor(0.0)),
    "scatter_accumulate_": lambda n: in_place(
        "scatter_accumulate_", n, indices_of(n), finite(-(-n // 3))
    ),
}


def assert_same(got: Result, wanted: Result) -> None:
    pairs = [(got, wanted)] if isinstance(got, torch.Tensor) else zip(got, wanted, strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


# The same for what has a kernel for CPUs alone.
ON_CPUS: dict[str, Callable[[int], Callable[[Any], Result]]] = {
    **EXACT,
    **{
        f"quantize_buckets {levels} {size} {l2} {dtype}": (
            lambda n, s=levels, b=size, t=l2, d=dtype: (
                lambda m: m.quantize_buckets(finite(n, d), s, b, t, 5)
            )
        )
        for levels, size in ((1, 12), (7, 512), (127, 2000))
        for l2 in (False, True)
        for dtype in DTYPES
    },
}


@every_level
@pytest.mark.parametrize("name", ON_CPUS)
def test_same_bits_as_the_reference(name: str, level: str) -> None:
    for n in LENGTHS:
        call = ON_CPUS[name](n)
        with running(level):
            got = call(ops)
        assert_same(got, call(reference))


@pytest.mark.parametrize("name", ON_CPUS)
def test_same_bits_on_any_number_of_threads(name: str) -> None:
    n = (1 << 20) + 77  # enough for seven
    call = ON_CPUS[name](n)
    wanted = call(reference)
    for threads in (1, 2, 7):
        with running("", threads):
            assert_same(call(ops), wanted)


@every_level
@pytest.mark.parametrize("name", ["pack_signs torch.float32", "pack_ternary", "pack_nibbles"])
def test_packing_ten_million(name: str, level: str) -> None:
    call = EXACT[name](LONG)
    wanted = call(reference)
    for threads in (1, 2):
        with running(level, threads):
            assert_same(call(ops), wanted)


def written(write: Callable[[Any, torch.Tensor], None], n: int) -> Callable[[Any, int], Result]:
    """What an operator leaves in a tensor whose memory begins at such an element."""

    def call(module: Any, at: int) -> torch.Tensor:
        out = torch.full((n + at,), torch.nan)[at:]
        write(module, out)
        return out

    return call


# Of so many elements that results go past the caches.
BEYOND = (1 << 21) + 1029
PAST_THE_CACHES: dict[str, Callable[[Any, int], Result]] = {
    **{
        f"write_signs_ {count}": written(
            lambda m, out, c=count: m.write_signs_(out, *rows(BEYOND, c)), BEYOND
        )
        for count in (1, 8)
    },
    **{
        f"write_blocks_ {bits} {count}": written(
            lambda m, out, b=bits, c=count: m.write_blocks_(
                out, *blocks(BEYOND, b, c), b, BLOCK, c
            ),
            BEYOND,
        )
        for bits in (4, 8)
        for count in (1, 3)
    },
    "write_e3m0_": written(lambda m, out: m.write_e3m0_(out, *e3m0(BEYOND, 2), BLOCK, 2), BEYOND),
    "write_blocks_ of ternary": written(
        lambda m, out: m.write_blocks_(out, *ternary(BEYOND, BEYOND), 2, BEYOND, 3), BEYOND
    ),
    **{
        f"quantize_blocks {block} {stochastic}": lambda m, at, b=block, s=stochastic: (
            m.quantize_blocks(finite(4 * BEYOND), 8, b, s, 5)
        )
        for block in (16, BLOCK, 4096)
        for stochastic in (False, True)
    },
}


@every_level
@pytest.mark.parametrize("name", PAST_THE_CACHES)
def test_the_same_bits_past_the_caches(name: str, level: str) -> None:
    call = PAST_THE_CACHES[name]
    wanted = call(reference, 0)
    for threads, at in ((1, 0), (2, 0), (2, 1)):
        with running(level, threads):
            assert_same(call(ops, at), wanted)


@every_dtype
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 4097, (1 << 20) + 77])
def test_the_mean_size_is_as_near_as_the_references(n: int, dtype: torch.dtype) -> None:
    x = finite(n, dtype)
    exact = float(x.double().abs().mean()) if n else 0.0
    wanted = float(reference.encode_signs(x)[1])
    means = set()
    for level in levels():
        for threads in (1, 2, 7):
            with running(level, threads):
                means.add(float(ops.encode_signs(x)[1]))
    assert len(means) == 1, "one result, whatever computes it"
    limit = max(2 * abs(wanted - exact), abs(exact) * 2**-24)
    assert abs(means.pop() - exact) <= limit


@every_level
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_mean_size_shows_what_is_not_finite(bad: float, level: str) -> None:
    for place in (0, 5, 1030, 2048):
        x = finite(2049)
        x[place] = bad
        with running(level):
            assert not ops.encode_signs(x)[1].isfinite()


@every_level
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [2, 62, 256, 4096, 1 << 14])
def test_blocks_of_any_size(block_size: int, bits: int, stochastic: bool, level: str) -> None:
    x = finite(2 * 4096 + 131)
    with running(level):
        got = ops.quantize_blocks(x, bits, block_size, stochastic, 1)
        decoded = ops.dequantize_blocks(*got, x.numel(), bits, block_size)
    assert_same(got, reference.quantize_blocks(x, bits, block_size, stochastic, 1))
    assert_same(decoded, reference.dequantize_blocks(*got, x.numel(), bits, block_size))


@every_level
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_with_bad_values_decode_alike(bits: int, level: str) -> None:
    x = values(1000)
    with running(level):
        got = ops.quantize_blocks(x, bits, BLOCK, False, 0)
    wanted = reference.quantize_blocks(x, bits, BLOCK, False, 0)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1].nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))


@every_level
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("size", [1e-38, 1.0, 1e38])
def test_buckets_with_bad_values_decode_alike(size: float, l2: bool, level: str) -> None:
    """Norms that are NaN or infinite, that only a scale is too small for, or too large."""
    x = values(1000) * size
    with running(level):
        got = ops.quantize_buckets(x, 7, 24, l2, 3)
    wanted = reference.quantize_buckets(x, 7, 24, l2, 3)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1].nan_to_num(-1.0, -2.0), wanted[1].nan_to_num(-1.0, -2.0))


def strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x]).t().reshape(-1)[::2]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.pack_signs(x),
        lambda m, x: m.quantize_blocks(x, 8, BLOCK, True, 1),
        lambda m, x: m.ternarize(x, torch.tensor(1.0), 1),
        lambda m, x: m.select_at_least(x, torch.tensor(1.0)),
        lambda m, x: m.pack_ternary(torch.sign(x).to(torch.int8)),
    ],
)
def test_strided_input_is_served_too(call: Callable[[Any, torch.Tensor], Result]) -> None:
    x = finite(999)
    assert not strided(x).is_contiguous()
    assert_same(call(ops, strided(x)), call(reference, x))


def test_strided_output_is_written() -> None:
    bits, scales = rows(100, 2)
    memory, dense = torch.ones(200), torch.ones(100)
    ops.accumulate_signs_(memory[::2], bits, scales)
    ops.accumulate_signs_(dense, bits, scales)
    assert torch.equal(memory[::2], dense)
    assert bool((memory[1::2] == 1).all())


def test_nothing_is_written_beyond_the_end() -> None:
    for n in (1, 31, 33, 1000):
        memory = torch.full((n + 64,), 5.0)
        ops.write_signs_(memory[32 : 32 + n], *rows(n, 2))
        ops.write_blocks_(memory[32 : 32 + n], *blocks(n, 4, 1), 4, BLOCK, 1)
        assert bool((memory[:32] == 5).all())
        assert bool((memory[32 + n :] == 5).all())


def test_an_index_outside_is_refused_and_nothing_is_done() -> None:
    out = torch.zeros(4)
    for bad in (-1, 4, 2**31 - 1):
        indices = torch.tensor([0, bad], dtype=torch.int32)
        with pytest.raises(IndexError):
            ops.scatter_accumulate_(out, indices, torch.ones(2))
    assert not out.any()


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="COMMKIT_CPU='sse9'"):
        native.use_level("sse9")


def test_operators_say_who_serves_them() -> None:
    expected: Sequence[str] = ("pack_signs", "uniform_noise", "accumulate_blocks_")
    assert native.served() >= set(expected)
    assert native.status()["library"] == "loaded"
