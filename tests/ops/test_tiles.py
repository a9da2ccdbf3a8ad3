"""Matrices in tiles, each given by a few coefficients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commkit import ops
from commkit.compressors.dct_topk import dct_basis
from commkit.ops import reference

from .native_levels import levels, running

CPU = torch.device("cpu")


def problem(
    rows: int, height: int, columns: int, width: int, k: int, payloads: int, dtype: torch.dtype
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(height * width + k)
    tiles = rows * columns
    order = [torch.rand(tiles, height * width, generator=generator) for _ in range(payloads)]
    values = [torch.randn(tiles, k, generator=generator).to(dtype) for _ in range(payloads)]
    values[0][:, :1] = 0  # is not held
    return {
        "places": [x.argsort(dim=1)[:, :k].to(torch.int16) for x in order],
        "values": values,
        "tall": dct_basis(height, dtype, CPU),
        "wide": dct_basis(width, dtype, CPU),
        "columns": columns,
    }


SHAPES = [
    (3, 5, 2, 7, 4),
    (2, 64, 3, 64, 32),
    (1, 1, 9, 50, 5),
    (2, 8, 1, 33, 264),
    (1, 181, 1, 181, 8),
]


@pytest.mark.parametrize("payloads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tile_is_its_coefficients_between_the_bases(shape, payloads: int) -> None:
    rows, height, columns, width, _ = shape
    given = problem(*shape, payloads, torch.float64)
    out = torch.full((rows * height * columns * width,), torch.nan, dtype=torch.float64)
    ops.combine_tiles_(out, **given, subtract=False)
    matrix = out.view(rows, height, columns, width)
    for tile in range(rows * columns):
        held = [
            {int(p): float(v) for p, v in zip(ps[tile], vs[tile], strict=True) if v != 0}
            for ps, vs in zip(given["places"], given["values"], strict=True)
        ]
        c = torch.zeros(height * width, dtype=torch.float64)
        for place in {p for one in held for p in one}:
            found = [one[place] for one in held if place in one]
            c[place] = sum(found) / len(found)
        expected = given["tall"].T @ c.view(height, width) @ given["wide"]
        torch.testing.assert_close(matrix[tile // columns, :, tile % columns], expected)


@pytest.mark.parametrize("payloads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_is_as_near_as_the_reference(shape, payloads: int) -> None:
    rows, height, columns, width, _ = shape
    n = rows * height * columns * width
    exact, plain = torch.empty(n, dtype=torch.float64), torch.empty(n)
    reference.combine_tiles_(exact, **problem(*shape, payloads, torch.float64), subtract=False)
    given = problem(*shape, payloads, torch.float32)
    reference.combine_tiles_(plain, **given, subtract=False)
    limit = 2 * float((plain - exact).abs().max())
    before = torch.randn(n, generator=torch.Generator().manual_seed(1))
    results = []
    for level in levels():
        for threads in (1, 2, 7):
            with running(level, threads):
                out, left = torch.empty(n + 1)[1:], before.clone()
                ops.combine_tiles_(out, **given, subtract=False)
                ops.combine_tiles_(left, **given, subtract=True)
            assert torch.equal(left, before - out)
            assert (out - exact).abs().max() <= limit
            results.append(out)
    assert all(torch.equal(out, results[0]) for out in results)


RIGHT = {
    "out": torch.zeros(2 * 3 * 4),
    **problem(2, 3, 1, 4, 2, 2, torch.float32),
    "subtract": False,
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"out": torch.zeros(25)}, ValueError, "columns=1 of 12 elements do not divide 25"),
        ({"columns": 0}, ValueError, "columns=0"),
        ({"tall": torch.zeros(3, 4)}, ValueError, r"tall has shape \(3, 4\)"),
        ({"wide": torch.zeros(4, 4).double()}, TypeError, "wide is of torch.float64"),
        ({"places": []}, ValueError, "places has 0 tensors and values 2"),
        ({"places": [torch.zeros(2, 2)] * 2}, TypeError, r"places\[0\] is of torch.float32"),
        ({"values": [torch.zeros(2, 3)] * 2}, ValueError, r"values\[0\] has shape \(2, 3\)"),
        ({"places": [torch.full((2, 2), 12, dtype=torch.int16)] * 2}, IndexError, "out"),
        ({"places": [torch.full((2, 2), -30, dtype=torch.int16)] * 2}, IndexError, "out"),
    ],
)
def test_a_wrong_argument_is_refused(change, error, words) -> None:
    with pytest.raises(error, match=words):
        ops.combine_tiles_(**{**RIGHT, **change})
