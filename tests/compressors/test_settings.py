"""Settings out of range are refused with field, value, rule and remedy."""

from __future__ import annotations

import pytest

from commkit.compressors import (
    QSGD,
    BlockQuantize,
    Cast,
    DynamicTree,
    MinMax,
    RandomK,
    Sign,
    Ternary,
    TopK,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockQuantize(bits=2), "bits=2 must be 4 or 8"),
        (lambda: BlockQuantize(block_size=0), "block_size=0 must be an even number >= 2"),
        (lambda: BlockQuantize(block_size=7), "block_size=7 must be an even number >= 2"),
        (lambda: BlockQuantize(rounding="up"), "rounding='up' must be"),
        (lambda: QSGD(bits=3), "bits=3 must be 2, 4 or 8; use"),
        (lambda: QSGD(bucket_size=6), "bucket_size=6 must be a multiple of 4; use"),
        (lambda: QSGD(norm="l1"), "norm='l1' must be 'l2' or 'max'; use"),
        (lambda: QSGD(levels=8), r"levels=8 must be in \[1, 7\] at bits=4; use"),
        (lambda: QSGD(levels=0), r"levels=0 must be in \[1, 7\]"),
        (lambda: DynamicTree(block_size=0), "block_size=0 must be >= 1; use"),
        (
            lambda: DynamicTree(rounding="up"),
            "rounding='up' must be 'nearest' or 'stochastic'; use",
        ),
        (lambda: MinMax(bits=5), "bits=5 must be 2, 4 or 8; use"),
        (lambda: MinMax(bucket_size=6), "bucket_size=6 must be a multiple of 4; use"),
        (lambda: MinMax(rounding="up"), "rounding='up' must be 'shift', 'stochastic' or 'nearest'"),
        (lambda: Cast("fp32"), "dtype='fp32' must be 'bf16' or 'fp16'"),
        (lambda: Sign("l2"), "scale='l2' must be 'l1' or 'rms'"),
        (lambda: Ternary(-0.1), "clip=-0.1 must be >= 0"),
        (lambda: TopK(0.0), r"density=0.0 must be in \(0, 1\]"),
        (lambda: TopK(1.1), r"density=1.1 must be in \(0, 1\]"),
        (lambda: TopK(float("nan")), r"density=nan must be in \(0, 1\]"),
        (lambda: TopK(threshold="guess"), "threshold='guess' must be"),
        (lambda: TopK(values="fp8"), "values='fp8' must be"),
        (lambda: TopK(warmup_steps=-1), "warmup_steps=-1 must be >= 0"),
        (lambda: RandomK(0), r"density=0 must be in \(0, 1\]"),
        (lambda: RandomK(2), r"density=2 must be in \(0, 1\]"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_ternary_refuses_a_clip_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="clip=nan must be >= 0"):
        Ternary(float("nan"))
