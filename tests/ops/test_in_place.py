"""Operators that write into a given tensor: what they compute, and what they refuse by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commkit import ops

N, BLOCK = 100, 64
GENERATOR = torch.Generator().manual_seed(0)
XS = [torch.randn(N, generator=GENERATOR) for _ in range(3)]
BITS = [ops.pack_signs(x) for x in XS]
SCALES = torch.tensor([0.5, -2.0, 0.25])
CODES, BLOCK_SCALES = (
    [ops.quantize_blocks(x, 8, BLOCK, False, 0)[part] for x in XS] for part in (0, 1)
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_signs_are_added_up(dtype: torch.dtype) -> None:
    total = sum(
        ops.unpack_signs(b, N, dtype) * s for b, s in zip(BITS, SCALES.to(dtype), strict=True)
    )
    out = torch.full((N,), torch.nan, dtype=dtype)
    ops.write_signs_(out, BITS, SCALES.to(dtype))
    assert torch.equal(out, total)
    ops.accumulate_signs_(out, BITS, SCALES.to(dtype))
    assert torch.equal(out, total + total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blocks_are_added_up(dtype: torch.dtype) -> None:
    total = sum(
        ops.dequantize_blocks(c, s, N, 8, BLOCK).to(dtype) / 3
        for c, s in zip(CODES, BLOCK_SCALES, strict=True)
    )
    out = torch.full((N,), torch.nan, dtype=dtype)
    ops.write_blocks_(out, CODES, BLOCK_SCALES, 8, BLOCK, 3)
    assert torch.equal(out, total)
    ops.accumulate_blocks_(out, CODES, BLOCK_SCALES, 8, BLOCK, 3)
    assert torch.equal(out, total + total)


def test_a_negative_scale_subtracts_bit_for_bit() -> None:
    out = XS[0].clone()
    ops.accumulate_signs_(out, BITS[1:2], -SCALES[:1])
    assert torch.equal(out, XS[0] - ops.unpack_signs(BITS[1], N, torch.float32) * SCALES[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_e3m0_is_added_up(dtype: torch.dtype) -> None:
    codes, scales = zip(*(ops.quantize_e3m0(x, BLOCK, False, 0) for x in XS), strict=True)
    total = sum(
        ops.dequantize_e3m0(c, s, N, BLOCK).to(dtype) / 3
        for c, s in zip(codes, scales, strict=True)
    )
    out = torch.full((N,), torch.nan, dtype=dtype)
    ops.write_e3m0_(out, codes, scales, BLOCK, 3)
    assert torch.equal(out, total)
    ops.accumulate_e3m0_(out, codes, scales, BLOCK, 3)
    assert torch.equal(out, total + total)


def test_ternary_codes_are_blocks_of_two_bits() -> None:
    codes = [ops.ternarize(x, x.abs().amax(), 1) for x in XS]
    sizes = [x.abs().amax().view(1) for x in XS]
    out = torch.full((N,), torch.nan)
    ops.write_blocks_(out, [ops.pack_ternary(c) for c in codes], sizes, 2, N, 1)
    assert torch.equal(out, sum(c * s for c, s in zip(codes, sizes, strict=True)))


SIGNS: dict[str, Any] = {"out": XS[0], "bits": BITS, "scales": SCALES}
BLOCKS: dict[str, Any] = {
    "out": XS[0],
    "codes": CODES,
    "scales": BLOCK_SCALES,
    "bits": 8,
    "block_size": BLOCK,
    "divisor": 3,
}
WRONG = [
    (SIGNS, {"out": XS[0].long()}, TypeError, "out is of"),
    (SIGNS, {"out": XS[0].view(10, 10)}, ValueError, "out has shape"),
    (SIGNS, {"bits": []}, ValueError, "bits is empty"),
    (SIGNS, {"bits": [*BITS[:2], BITS[0][:5]]}, ValueError, r"bits\[2\] has shape \(5,\)"),
    (SIGNS, {"bits": [*BITS[:2], XS[0]]}, TypeError, r"bits\[2\] is of"),
    (SIGNS, {"scales": SCALES[:2]}, ValueError, "scales has shape"),
    (SIGNS, {"scales": SCALES.double()}, TypeError, "scales is of"),
    (BLOCKS, {"codes": CODES[:2]}, ValueError, "scales has 3 tensors for 2"),
    (BLOCKS, {"codes": [c[:9] for c in CODES]}, ValueError, r"codes\[0\] has shape \(9,\)"),
    (BLOCKS, {"scales": [s.double() for s in BLOCK_SCALES]}, TypeError, r"scales\[0\] is of"),
    (BLOCKS, {"bits": 5}, ValueError, "bits=5"),
    (BLOCKS, {"block_size": 0}, ValueError, "block_size=0"),
    (BLOCKS, {"divisor": 0}, ValueError, "divisor=0"),
    (BLOCKS, {"codes": [c.to("meta") for c in CODES]}, ValueError, r"codes\[0\] is on meta"),
]


@pytest.mark.parametrize("verb", ["write", "accumulate"])
@pytest.mark.parametrize(("right", "change", "error", "words"), WRONG)
def test_a_wrong_argument_is_named(
    verb: str, right: dict[str, Any], change: dict[str, Any], error: type, words: str
) -> None:
    function = getattr(ops, f"{verb}_{'signs' if right is SIGNS else 'blocks'}_")
    before = right["out"].clone()
    with pytest.raises(error, match=words):
        function(**{**right, **change})
    assert torch.equal(right["out"], before)
