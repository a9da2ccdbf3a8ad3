"""Every operator's schema, fake and default kernel agree, and torch.compile can trace it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commkit import ops

CPU = torch.device("cpu")
_GENERATOR = torch.Generator().manual_seed(0)
FLOATS = torch.randn(1000, generator=_GENERATOR)
LEVELS = torch.linspace(-1, 1, 16)
TERNARY = torch.randint(-1, 2, (1001,), generator=_GENERATOR).to(torch.int8)

TWO = ([torch.ones(9), torch.ones(12)], [FLOATS[:9], FLOATS[9:21]])
FOUR_BYTES = ops.pack_signs(FLOATS[:32])

SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "uniform_noise": [(0, 1, CPU), (100, 2**40, CPU)],
    "pack_signs": [(FLOATS,), (FLOATS[:9].double(),), (FLOATS[:0],), (FLOATS.bfloat16(),)],
    "unpack_signs": [(ops.pack_signs(FLOATS[:9]), 9, torch.float32)],
    "encode_signs": [(FLOATS,), (FLOATS[:9].double(),), (FLOATS[:0],), (FLOATS.bfloat16(),)],
    **{
        name: [
            (
                torch.ones(9, dtype=dtype),
                [ops.pack_signs(FLOATS[:9])] * rows,
                FLOATS[:rows].to(dtype),
            )
            for rows, dtype in ((1, torch.float32), (3, torch.float32), (2, torch.float64))
        ]
        for name in ("write_signs_", "accumulate_signs_")
    },
    "encode_signs_compensated_": [
        (torch.ones(9, dtype=work), FLOATS[:9].to(dtype), decay, sent)
        for dtype, work in (
            (torch.float32, torch.float32),
            (torch.half, torch.float32),
            (torch.double, torch.double),
        )
        for decay, sent in ((1.0, None), (0.9, FLOATS[:1]))
    ],
    "foreach_encode_signs_": [
        (torch.zeros(4, dtype=torch.uint8), torch.zeros(2), [FLOATS[:9].to(dtype), FLOATS[9:21]])
        for dtype in (torch.float32, torch.half, torch.double)
    ],
    "foreach_encode_signs_compensated_": [
        (torch.zeros(4, dtype=torch.uint8), torch.zeros(2), *TWO, 0.9, sent)
        for sent in (None, FLOATS[:2])
    ],
    "foreach_encode_signs_of_sums_": [
        (
            *(torch.zeros(4, dtype=torch.uint8), torch.zeros(2)),
            *([torch.zeros(9), torch.zeros(12)], *TWO, sent),
        )
        for sent in (None, FLOATS[:2])
    ],
    "foreach_reencode_signs_": [
        (
            *(torch.zeros(4, dtype=torch.uint8), torch.zeros(2)),
            *([torch.zeros(9), torch.zeros(12)], TWO[0], sent),
            *([FOUR_BYTES] * 3, FLOATS[:6].view(3, 2)),
        )
        for sent in (None, FLOATS[:2])
    ],
    **{
        name: [
            ([torch.ones(9, dtype=dtype), torch.ones(12, dtype=dtype)], [FOUR_BYTES] * rows, scales)
            for dtype in (torch.float32, torch.float64)
            for rows in (1, 3)
            for scales in [FLOATS[: 2 * rows].view(rows, 2)]
        ]
        for name in ("foreach_write_signs_", "foreach_accumulate_signs_")
    },
    "ternarize": [(FLOATS, FLOATS.abs().amax(), 3)],
    "pack_ternary": [(TERNARY,), (TERNARY[:0],)],
    "unpack_ternary": [(ops.pack_ternary(TERNARY), 1001, torch.float64)],
    "pack_nibbles": [(TERNARY * 7,), (TERNARY[:0],)],
    "unpack_nibbles": [(ops.pack_nibbles(TERNARY), 1001, torch.float64)],
    "quantize_buckets": [
        (FLOATS, 7, 64, True, 5),
        (FLOATS[:7].half(), 1, 64, False, 5),
        (FLOATS[:0], 7, 64, True, 5),
    ],
    "quantize_codebook": [
        (FLOATS, LEVELS, 64, True, 5),
        (FLOATS[:7].half(), LEVELS, 64, False, 0),
        (FLOATS[:0], LEVELS, 64, True, 0),
    ],
    "dequantize_codebook": [
        ((TERNARY + 1).to(torch.uint8), LEVELS, FLOATS[:16], 64),
    ],
    "quantize_natural": [(FLOATS, 5), (FLOATS[:7].double(), 5), (FLOATS[:0].half(), 5)],
    "dequantize_natural": [((TERNARY + 1).to(torch.uint8), FLOATS[:1], torch.float64)],
    "quantize_blocks": [
        (FLOATS, bits, 64, stochastic, 5) for bits in (4, 8) for stochastic in (False, True)
    ]
    + [(FLOATS[:0], 8, 64, False, 0), (FLOATS[:7].half(), 4, 64, True, 0)],
    "dequantize_blocks": [
        (*ops.quantize_blocks(FLOATS, bits, 64, False, 0), 1000, bits, 64) for bits in (4, 8)
    ],
    **{
        name: [
            (torch.ones(1000), *([part] * 2 for part in quantized), bits, 64, 3)
            for bits in (4, 8)
            for quantized in [ops.quantize_blocks(FLOATS, bits, 64, False, 0)]
        ]
        for name in ("write_blocks_", "accumulate_blocks_")
    },
    "quantize_e3m0": [(FLOATS, 64, stochastic, 5) for stochastic in (False, True)]
    + [(FLOATS[:0], 64, False, 0), (FLOATS[:7].half(), 64, True, 0), (FLOATS.double(), 3, True, 0)],
    "dequantize_e3m0": [(*ops.quantize_e3m0(FLOATS, 64, False, 0), 1000, 64)],
    **{
        name: [
            (torch.ones(1000, dtype=dtype), *([part] * 2 for part in quantized), 64, 3)
            for dtype in (torch.float32, torch.float64)
            for quantized in [ops.quantize_e3m0(FLOATS, 64, False, 0)]
        ]
        for name in ("write_e3m0_", "accumulate_e3m0_")
    },
    "select_at_least": [(FLOATS, torch.tensor(1.5)), (FLOATS[:0], torch.tensor(0.0))],
    "sample_threshold": [(FLOATS, 10, 7)],
    "largest": [
        (FLOATS, 7, 5),
        (FLOATS.double(), 1000, 5),
        (FLOATS.half(), 1, 5),
        (FLOATS[:0], 0, 5),
    ],
    "largest_of_rows": [
        (FLOATS.view(10, 100), 7),
        (FLOATS.view(10, 100).double(), 100),
        (FLOATS.view(1, 1000).half(), 1),
        (FLOATS[:0].view(0, 5), 2),
        (FLOATS.view(10, 100), 0),
    ],
    "stratified_indices": [(1000, 10, 7, CPU), (0, 0, 7, CPU)],
    **{
        name: [
            (*after, FLOATS.to(g), *before, 0.9, nesterov, *rest)
            for g, work in ((torch.float32,) * 2, (torch.half, torch.float32), (torch.double,) * 2)
            for after in [[torch.zeros(1000, dtype=work), torch.ones(1000, dtype=work)]]
            for both in [[FLOATS.to(work) * 2, FLOATS.to(work) * 3]]
            for before, nesterov in ((both, False), (both, True), ([None, both[1]], True))
        ]
        for name, rest in (("correct_momentum_", ()), ("dgc_step_", (True, 0.0, 7, 5)))
    },
    "combine_tiles_": [
        (
            torch.ones(2 * 6, dtype=dtype),
            [torch.tensor([[0, 3], [5, 1]], dtype=torch.int16)] * 2,
            [FLOATS[:4].view(2, 2).to(dtype), FLOATS[4:8].view(2, 2).to(dtype)],
            torch.eye(2, dtype=dtype),
            torch.eye(3, dtype=dtype),
            2,
            subtract,
        )
        for dtype in (torch.float32, torch.float64)
        for subtract in (False, True)
    ],
    "frozen_adam_": [
        (*(torch.ones(1000, dtype=d) for _ in range(4)), 0.99, 0.1)
        for d in (torch.float, torch.double)
    ],
    "scatter_accumulate_": [(torch.zeros(10), torch.tensor([1, 5], dtype=torch.int32), FLOATS[:2])],
}


def overload(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.commkit, name).default


def test_every_operator_has_samples() -> None:
    assert set(SAMPLES) == set(ops.OPS)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(n, a) for n, samples in SAMPLES.items() for a in samples],
    ids=[f"{n}-{i}" for n, samples in SAMPLES.items() for i in range(len(samples))],
)
def test_schema_and_fake_match_the_kernel(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(overload(name), arguments)


def test_an_operator_compiles_without_a_graph_break() -> None:
    def round_trip(x: torch.Tensor) -> torch.Tensor:
        codes, scales = ops.quantize_blocks(x * 2, 8, 64, False, 0)
        return ops.dequantize_blocks(codes, scales, x.numel(), 8, 64) + 1

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(FLOATS), round_trip(FLOATS))


@pytest.mark.parametrize("name", sorted(ops.OPS))
def test_the_front_end_calls_the_operator_of_its_name(name: str) -> None:
    """A compiled kernel registered for the operator must reach every caller."""
    arguments = SAMPLES[name][0]
    first, second = (
        function(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
        for function in (getattr(ops, name), overload(name))
    )
    assert type(first) is type(second)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (first, second)), strict=True):
        assert a is None or torch.equal(a, b)
