"""Whole-tensor updates: momentum correction and Adam with a frozen variance."""

from __future__ import annotations

import itertools

import pytest
import torch

from commkit import ops

N = 1000
GENERATOR = torch.Generator().manual_seed(0)
G, U, V, D = (torch.randn(N, generator=GENERATOR) for _ in range(4))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("has_u", "has_v"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_momentum_is_corrected(
    dtype: torch.dtype, has_u: bool, has_v: bool, nesterov: bool
) -> None:
    work = torch.promote_types(dtype, torch.float32)
    g, u, v = G.to(dtype), U.to(work) if has_u else None, V.to(work) if has_v else None
    before = [None if x is None else x.clone() for x in (g, u, v)]
    velocity, unsent = torch.empty(N, dtype=work), torch.empty(N, dtype=work)
    ops.correct_momentum_(velocity, unsent, g, u, v, 0.75, nesterov)
    # zeros stand for what is not there, and 0.75 times a float is nearly exact in float64
    exact_g, exact_u = g.double(), torch.zeros(N).double() if u is None else u.double()
    wanted_u = 0.75 * (exact_u + exact_g) if nesterov else 0.75 * exact_u + exact_g
    wanted_v = (0 if v is None else v.double()) + wanted_u + (exact_g if nesterov else 0)
    eps = torch.finfo(work).eps
    for got, wanted in ((velocity, wanted_u), (unsent, wanted_v)):
        assert (got - wanted).abs().max() <= 3 * eps * 16  # three roundings of values below 16
    for x, kept in zip((g, u, v), before, strict=True):
        assert x is None or torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_frozen_adam_is_the_formula_bit_for_bit(dtype: torch.dtype) -> None:
    p, m, momentum, d = (x.to(dtype, copy=True) for x in (G, U, V, D.abs()))
    d[::7] = torch.inf
    wanted = p * 0.99 + (-0.125 * momentum) / d
    ops.frozen_adam_(p, m, momentum, d, 0.99, 0.125)
    assert torch.equal(p, wanted)
    assert torch.equal(m, momentum)
    assert torch.equal(p[::7], (G.to(dtype) * 0.99)[::7]), "inf keeps a coordinate where it is"


RIGHT = {"u": torch.zeros(N), "v": torch.zeros(N), "g": G, "velocity": U, "unsent": V}
RIGHT |= {"momentum": 0.9, "nesterov": False}
STEP = {**RIGHT, "masking": True, "negligible": 0.0, "k": 10, "seed": 0}
ADAM = {"p": G, "exp_avg": U, "momentum": V, "denominator": D, "keep": 1.0, "size": 0.1}


@pytest.mark.parametrize(
    ("function", "right", "change", "error", "words"),
    [
        *(
            (function, right, change, error, words)
            for function, right in ((ops.correct_momentum_, RIGHT), (ops.dgc_step_, STEP))
            for change, error, words in (
                ({"g": G.long()}, TypeError, "g is of torch.int64"),
                ({"g": G.view(10, 100)}, ValueError, r"g has shape \(10, 100\)"),
                ({"u": U.double()}, TypeError, "u is of torch.float64"),
                ({"v": V[1:]}, ValueError, r"v has shape \(999,\)"),
                ({"velocity": U[1:]}, ValueError, r"velocity has shape \(999,\)"),
                ({"unsent": V.half()}, TypeError, "unsent is of torch.float16"),
                ({"unsent": V.to("meta")}, ValueError, "unsent is on meta and must be on cpu"),
                ({"u": U}, ValueError, "u is the memory of velocity, and must have its own"),
                ({"v": G}, ValueError, "v is the memory of g"),
                ({"u": D, "v": D}, ValueError, "u is the memory of v"),
            )
        ),
        (ops.dgc_step_, STEP, {"k": N + 1}, ValueError, "k=1001 must be from 0 to the 1000"),
        (ops.frozen_adam_, ADAM, {"p": G.half()}, TypeError, "p is of torch.float16"),
        (ops.frozen_adam_, ADAM, {"exp_avg": U[1:]}, ValueError, "exp_avg has shape"),
        (ops.frozen_adam_, ADAM, {"momentum": V.double()}, TypeError, "momentum is of"),
        (ops.frozen_adam_, ADAM, {"denominator": D.view(10, 100)}, ValueError, "denominator has"),
        (
            ops.frozen_adam_,
            ADAM,
            {"denominator": D.to("meta")},
            ValueError,
            "denominator is on meta and must be on cpu",
        ),
    ],
)
def test_a_wrong_argument_is_named(function, right, change, error, words) -> None:
    with pytest.raises(error, match=words):
        function(**{**right, **change})
