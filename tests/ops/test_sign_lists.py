"""Signs with error feedback in the same pass, and of many tensors in one call: the same bits as the operators
they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commkit import ops
from commkit.ops import native

from .native_levels import levels, running

SIZES = (0, 1, 7, 8, 1023, 0, 1024, 1025, 300_001, 3, 0)
TOTAL = sum(-(-n // 8) for n in SIZES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_way = pytest.mark.parametrize(
    ("level", "threads"),
    [(level, threads) for level in levels() for threads in (1, 2, 7)] or [("", 1)],
)


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Zeros of both signs, infinities and NaN among them."""
    xs = [torch.randn(n, generator=torch.Generator().manual_seed(seed + n)) for n in SIZES]
    for x in xs:
        for first, step, special in (
            (1, 5, 0.0),
            (2, 7, -0.0),
            (200, 997, torch.inf),
            (100, 991, torch.nan),
        ):
            x[first::step] = special
    return [x.to(dtype) for x in xs]


def finite(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [x.nan_to_num(0.5, 3.0, -3.0) for x in tensors(seed, dtype)]


def room() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((TOTAL,), 77, dtype=torch.uint8), torch.full((len(SIZES),), torch.nan)


def work(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def running_at(level: str, threads: int) -> Any:
    return running(level, threads) if native.served() else torch.no_grad()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, and any NaN as good as another."""
    return torch.equal(a.nan_to_num(12.5), b.nan_to_num(12.5)) and torch.equal(
        a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()
    )


@every_way
@every_dtype
def test_feedback_is_add_and_encode(dtype: torch.dtype, level: str, threads: int) -> None:
    for gradient, residual in zip(tensors(1, dtype), tensors(2, work(dtype)), strict=True):
        wanted = torch.add(gradient, residual)
        with running_at(level, threads):
            bits, scale = ops.encode_signs_compensated_(residual, gradient)
            wanted_bits, wanted_scale = ops.encode_signs(wanted)
        assert same(residual, wanted)
        assert torch.equal(bits, wanted_bits)
        assert same(scale, wanted_scale)


@every_way
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_what_was_sent_may_be_taken_later(
    dtype: torch.dtype, decay: float, level: str, threads: int
) -> None:
    """Three steps in two passes each, and in one."""
    for n in SIZES:
        taken, late, sent = torch.zeros(n), torch.zeros(n), None
        with running_at(level, threads):
            for step in range(3):
                g = torch.randn(n, generator=torch.Generator().manual_seed(step)).to(dtype)
                bits, scale = ops.encode_signs_compensated_(taken, g, decay)
                ops.accumulate_signs_(taken, [bits], -scale)
                late_bits, sent = ops.encode_signs_compensated_(late, g, decay, sent)
                assert torch.equal(bits, late_bits)
                assert torch.equal(scale, sent)
            ops.accumulate_signs_(late, [ops.pack_signs(late)], -scale)
        assert torch.equal(taken, late)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_scale_shows_what_is_not_finite(bad: float) -> None:
    for place in (0, 5, 1030, 2048):
        gradient = torch.ones(2049)
        gradient[place] = bad
        assert not ops.encode_signs_compensated_(torch.ones(2049), gradient)[1].isfinite()


@every_way
@every_dtype
def test_a_list_is_each_of_its_tensors(dtype: torch.dtype, level: str, threads: int) -> None:
    xs, (bits, scales) = tensors(3, dtype), room()
    with running_at(level, threads):
        ops.foreach_encode_signs_(bits, scales, xs)
        single = [ops.encode_signs(x) for x in xs]
    assert torch.equal(bits, torch.cat([b for b, _ in single]))
    assert same(scales, torch.cat([s for _, s in single]))


@every_way
@every_dtype
@pytest.mark.parametrize("later", [False, True])
def test_a_list_with_feedback_is_each_of_its_pairs(
    later: bool, dtype: torch.dtype, level: str, threads: int
) -> None:
    gradients, residuals, (bits, scales) = finite(4, dtype), finite(5, work(dtype)), room()
    copies = [x.clone() for x in residuals]
    sent = torch.arange(len(SIZES)) * 0.1 if later else None
    with running_at(level, threads):
        ops.foreach_encode_signs_compensated_(bits, scales, residuals, gradients, 0.9, sent)
        single = [
            ops.encode_signs_compensated_(e, g, 0.9, None if sent is None else sent[i : i + 1])
            for i, (e, g) in enumerate(zip(copies, gradients, strict=True))
        ]
    assert all(map(torch.equal, residuals, copies))
    assert torch.equal(bits, torch.cat([b for b, _ in single]))
    assert torch.equal(scales, torch.cat([s for _, s in single]))


@every_way
@every_dtype
@pytest.mark.parametrize("later", [False, True])
def test_sums_elsewhere_are_those_in_place(
    later: bool, dtype: torch.dtype, level: str, threads: int
) -> None:
    gradients, residuals, (bits, scales) = finite(4, dtype), finite(5, work(dtype)), room()
    sums, (wanted, sizes) = [torch.full_like(e, 7) for e in residuals], room()
    sent = torch.arange(len(SIZES)) * 0.1 if later else None
    with running_at(level, threads):
        ops.foreach_encode_signs_of_sums_(bits, scales, sums, residuals, gradients, sent)
        ops.foreach_encode_signs_compensated_(wanted, sizes, residuals, gradients, 1.0, sent)
    assert all(map(torch.equal, sums, residuals))
    assert torch.equal(bits, wanted)
    assert torch.equal(scales, sizes)


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("peers", [1, 3])
def test_signs_are_encoded_again_as_their_sums_would_be(
    peers: int, later: bool, dtype: torch.dtype, level: str, threads: int
) -> None:
    sent = [room() for _ in range(peers)]
    for peer, message in enumerate(sent):
        ops.foreach_encode_signs_(*message, finite(10 * peer))
    rows, row_scales = [bits for bits, _ in sent], torch.stack([s for _, s in sent]) / peers
    residuals, own = finite(5, dtype), torch.arange(len(SIZES)) * 0.1 if later else None
    copies, means = [e.clone() for e in residuals], [torch.full_like(e, 7) for e in residuals]
    (bits, scales), (wanted, sizes) = room(), room()
    sums, both = [x.clone() for x in means], [x.clone() for x in means]
    with running_at(level, threads):
        ops.foreach_reencode_signs_(bits, scales, sums, residuals, own, rows, row_scales)
        ops.foreach_write_signs_(means, rows, row_scales)
        ops.foreach_encode_signs_of_sums_(wanted, sizes, both, residuals, means, own)
    assert all(map(torch.equal, sums, both))
    assert all(map(torch.equal, residuals, copies))
    assert torch.equal(bits, wanted)
    assert torch.equal(scales, sizes)


@every_way
@every_dtype
def test_sums_are_add_and_encode_and_leave_what_is_added(
    dtype: torch.dtype, level: str, threads: int
) -> None:
    gradients, residuals, (bits, scales) = tensors(4, dtype), tensors(5, work(dtype)), room()
    copies = [x.clone() for x in (*gradients, *residuals)]
    sums = [torch.full_like(e, 7) for e in residuals]
    with running_at(level, threads):
        ops.foreach_encode_signs_of_sums_(bits, scales, sums, residuals, gradients)
        wanted = [torch.add(e, g) for e, g in zip(residuals, gradients, strict=True)]
        single = [ops.encode_signs(x) for x in wanted]
    assert all(map(same, sums, wanted))
    assert all(map(same, (*gradients, *residuals), copies))
    assert torch.equal(bits, torch.cat([b for b, _ in single]))
    assert same(scales, torch.cat([s for _, s in single]))


def test_dtypes_of_a_list_may_differ() -> None:
    xs = [x.to(dtype) for x, dtype in zip(finite(6), DTYPES[:3] * 4, strict=False)]
    residuals, (bits, scales), (both, sizes) = [x.float() * 0 for x in xs], room(), room()
    ops.foreach_encode_signs_(bits, scales, xs)
    ops.foreach_encode_signs_compensated_(both, sizes, residuals, xs)
    assert all(torch.equal(e, x.float()) for e, x in zip(residuals, xs, strict=True))
    assert torch.equal(bits, both)
    assert torch.equal(scales, sizes)
    assert torch.equal(bits, torch.cat([ops.pack_signs(x) for x in xs]))


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("verb", ["write", "accumulate"])
@pytest.mark.parametrize("peers", [1, 3])
def test_a_sum_into_a_list_is_one_into_each(
    peers: int, verb: str, dtype: torch.dtype, level: str, threads: int
) -> None:
    sent = [room() for _ in range(peers)]
    for peer, message in enumerate(sent):
        ops.foreach_encode_signs_(*message, finite(10 * peer))
    rows, scales = [bits for bits, _ in sent], torch.stack([s for _, s in sent]) / peers
    outs, wanted = finite(7, dtype), finite(7, dtype)
    with running_at(level, threads):
        getattr(ops, f"foreach_{verb}_signs_")(outs, rows, scales)
        for i, out in enumerate(wanted):
            own = [ops.pack_signs(finite(10 * peer)[i]) for peer in range(peers)]
            getattr(ops, f"{verb}_signs_")(out, own, scales[:, i].to(dtype))
    assert all(map(torch.equal, outs, wanted))


def test_an_empty_list_is_fine() -> None:
    bits, scales = torch.empty(0, dtype=torch.uint8), torch.empty(0)
    ops.foreach_encode_signs_(bits, scales, [])
    ops.foreach_encode_signs_compensated_(bits, scales, [], [])
    ops.foreach_encode_signs_of_sums_(bits, scales, [], [], [])
    ops.foreach_reencode_signs_(bits, scales, [], [], None, [bits], torch.empty(1, 0))
    ops.foreach_write_signs_([], [bits], torch.empty(1, 0))


def test_strided_memory_is_served_too() -> None:
    memory, gradient = torch.ones(200), torch.randn(100, generator=torch.Generator().manual_seed(0))
    dense = torch.ones(100)
    bits, scale = ops.encode_signs_compensated_(memory[::2], gradient)
    wanted, size = ops.encode_signs_compensated_(dense, gradient)
    assert torch.equal(memory[::2], dense)
    assert bool((memory[1::2] == 1).all())
    assert torch.equal(bits, wanted)
    assert torch.allclose(scale, size, rtol=1e-6)
    sums = torch.ones(200)
    ops.foreach_encode_signs_of_sums_(bits, scale, [sums[::2]], [memory[::2]], [gradient])
    assert torch.equal(sums[::2], dense + gradient)
    assert bool((sums[1::2] == 1).all())
    bits, scale = wanted, size
    ops.foreach_accumulate_signs_([memory[::2]], [bits], -scale.view(1, 1))
    ops.accumulate_signs_(dense, [bits], -scale)
    assert torch.equal(memory[::2], dense)
    assert bool((memory[1::2] == 1).all())


X, BITS, ONE = torch.ones(9), torch.zeros(2, dtype=torch.uint8), torch.ones(1)
TWICE: dict[str, Any] = {"bits": BITS.repeat(2), "scales": torch.ones(2)}
COMPENSATED: dict[str, Any] = {"residual": torch.ones(9), "gradient": X}
ENCODED: dict[str, Any] = {**TWICE, "xs": [X, X]}
BOTH: dict[str, Any] = {**TWICE, "residuals": [torch.ones(9), torch.ones(9)], "gradients": [X, X]}
OTHER = torch.ones(9)
ADDED: dict[str, Any] = {
    **BOTH,
    "residuals": [OTHER, OTHER],
    "sums": [torch.ones(9), torch.ones(9)],
}
AGAIN: dict[str, Any] = {
    **TWICE,
    "sums": [torch.ones(9), torch.ones(9)],
    "residuals": [OTHER, OTHER],
    "sent": torch.ones(2),
    "rows": [BITS.repeat(2)],
    "row_scales": torch.ones(1, 2),
}
SUMMED: dict[str, Any] = {
    "outs": [torch.ones(9), torch.ones(9)],
    "bits": [BITS.repeat(2)],
    "scales": torch.ones(1, 2),
}
WRONG = [
    (
        "encode_signs_compensated_",
        COMPENSATED,
        {"residual": X},
        ValueError,
        "residual is the memory",
    ),
    (
        "encode_signs_compensated_",
        COMPENSATED,
        {"residual": X[1:]},
        ValueError,
        "residual has shape",
    ),
    (
        "encode_signs_compensated_",
        COMPENSATED,
        {"residual": X.double()},
        TypeError,
        "residual is of",
    ),
    ("encode_signs_compensated_", COMPENSATED, {"gradient": X.long()}, TypeError, "gradient is of"),
    (
        "encode_signs_compensated_",
        COMPENSATED,
        {"gradient": X.view(3, 3)},
        ValueError,
        "gradient has shape",
    ),
    ("encode_signs_compensated_", COMPENSATED, {"sent": X}, ValueError, "sent has shape"),
    ("encode_signs_compensated_", COMPENSATED, {"sent": ONE.half()}, TypeError, "sent is of"),
    ("foreach_encode_signs_", ENCODED, {"bits": BITS}, ValueError, r"bits has shape \(2,\)"),
    ("foreach_encode_signs_", ENCODED, {"bits": X}, TypeError, "bits is of"),
    ("foreach_encode_signs_", ENCODED, {"scales": ONE}, ValueError, "scales has shape"),
    ("foreach_encode_signs_", ENCODED, {"xs": [X, X.long()]}, TypeError, r"xs\[1\] is of"),
    ("foreach_encode_signs_", ENCODED, {"xs": [X, X.to("meta")]}, ValueError, r"xs\[1\] is on"),
    (
        "foreach_encode_signs_compensated_",
        BOTH,
        {"residuals": [X * 2]},
        ValueError,
        "residuals has",
    ),
    (
        "foreach_encode_signs_compensated_",
        BOTH,
        {"residuals": [X * 2, X]},
        ValueError,
        r"residual\[1\] is the memory",
    ),
    ("foreach_encode_signs_of_sums_", ADDED, {"sums": [X * 2]}, ValueError, "sums has 1"),
    *(
        ("foreach_encode_signs_of_sums_", ADDED, {"sums": [X * 2, bad]}, error, words)
        for bad, error, words in (
            (X, ValueError, r"sums\[1\] is the memory of gradients\[1\]"),
            (OTHER, ValueError, r"sums\[1\] is the memory of residuals\[1\]"),
            (X.double(), TypeError, r"sums\[1\] is of"),
            (torch.ones(8), ValueError, r"sums\[1\] has shape"),
        )
    ),
    ("foreach_encode_signs_compensated_", BOTH, {"sent": ONE}, ValueError, "sent has shape"),
    ("foreach_encode_signs_of_sums_", ADDED, {"sent": ONE}, ValueError, "sent has shape"),
    *(
        ("foreach_reencode_signs_", AGAIN, change, error, words)
        for change, error, words in (
            ({"sent": ONE}, ValueError, "sent has shape"),
            ({"residuals": [X]}, ValueError, "residuals has 1 tensors for 2 sums"),
            ({"residuals": [OTHER, OTHER.double()]}, TypeError, r"residual\[1\] is of"),
            ({"sums": [X, OTHER]}, ValueError, r"residual\[1\] is the memory of sum\[1\]"),
            ({"sums": [X, X.view(3, 3)]}, ValueError, r"sums\[1\] has shape"),
            ({"sums": [X, X.double()]}, ValueError, r"sums\[1\] is of"),
            ({"rows": []}, ValueError, "bits is empty"),
            ({"row_scales": torch.ones(2)}, ValueError, "scales has shape"),
        )
    ),
    *(
        (f"foreach_{verb}_signs_", SUMMED, change, error, words)
        for verb in ("write", "accumulate")
        for change, error, words in (
            ({"outs": [X, X.double()]}, ValueError, r"outs\[1\] is of"),
            ({"outs": [X, X.long()]}, TypeError, r"outs\[1\] is of"),
            ({"outs": [X, X.view(3, 3)]}, ValueError, r"outs\[1\] has shape"),
            ({"bits": []}, ValueError, "bits is empty"),
            ({"bits": [BITS]}, ValueError, r"bits\[0\] has shape"),
            ({"scales": torch.ones(2)}, ValueError, "scales has shape"),
            ({"scales": torch.ones(1, 2).double()}, TypeError, "scales is of"),
        )
    ),
]


@pytest.mark.parametrize(("name", "right", "change", "error", "words"), WRONG)
def test_a_wrong_argument_is_named(
    name: str, right: dict[str, Any], change: dict[str, Any], error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        getattr(ops, name)(**{**right, **change})
    assert bool((X == 1).all())
    for value in right.values():
        for x in value if isinstance(value, list) else [value]:
            assert bool((x <= 1).all()), "nothing was written"
