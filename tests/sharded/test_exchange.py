"""Rows of flat gradients on their way to their owners, and chunks of weights to everybody; ranks are threads."""

from __future__ import annotations

import pytest
import torch

from commkit.aggregators.nodes import placement
from commkit.compressors import BlockQuantize, MinMax, NoCompression
from commkit.policy import Policy
from commkit.sharded import OneHop, RowCodec, Segment, TwoHops, gather_into
from commkit.sharded.exchange import OneHopWithFeedback
from commkit.sharded.layout import pieces

from ..harness import run_threads

SIZES = {"matrix": (37, 12), "few": (3, 64), "vector": (50,), "big": (256, 16)}
SHAPES = {name: torch.Size(shape) for name, shape in SIZES.items()}


def segments(world_size):
    return tuple(
        Segment(name, shape[0], shape.numel() // shape[0], world_size)
        for name, shape in SHAPES.items()
    )


def rows_of(wholes, world_size, dtype=torch.float32):
    """The flat buffer that FSDP makes of whole gradients."""
    rows = []
    for r in range(world_size):
        parts = []
        for segment in segments(world_size):
            flat = wholes[segment.key].reshape(-1)
            at = r * segment.padded
            part = flat[at : at + segment.valid(r)]
            parts.append(torch.cat([part, part.new_zeros(segment.padded - part.numel())]))
        rows.append(torch.cat(parts))
    return torch.stack(rows).to(dtype)


def gradients(rank, step=0):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def exchange_of(kind, comm, code, policy=None):
    codec = RowCodec(code, policy or Policy(min_numel=0), SHAPES)
    if kind == "one hop":
        return OneHop(codec, comm)
    place = placement(comm, comm.world_size // 2 if comm.world_size > 2 else 1, None)
    ranks = place.inter.all_gather_object(place.intra.all_gather_object(comm.rank))
    return TwoHops(codec, codec, place, ranks)


@pytest.mark.parametrize("kind", ["one hop", "two hops"])
@pytest.mark.parametrize("world_size", [2, 4, 6])
def test_without_loss_owners_get_the_mean_of_their_shard(kind, world_size):
    def rank(comm):
        rows = rows_of(gradients(comm.rank), world_size)
        out = torch.full((rows.shape[1],), torch.nan)
        exchange_of(kind, comm, NoCompression()).mean_into(out, rows, segments(world_size), 0)
        return out

    all_rows = torch.stack([rows_of(gradients(r), world_size) for r in range(world_size)])
    for r, out in enumerate(run_threads(rank, world_size)):
        torch.testing.assert_close(out, all_rows.mean(0)[r])


@pytest.mark.parametrize("kind", ["one hop", "two hops"])
def test_every_element_reaches_its_own_place(kind):
    """Without the transposition of two hops, shards would end on wrong ranks."""

    def rank(comm):
        index = {n: torch.arange(s.numel(), dtype=torch.float32).view(s) for n, s in SHAPES.items()}
        rows = rows_of(index, 4)
        out = torch.empty(rows.shape[1])
        exchange_of(kind, comm, NoCompression()).mean_into(out, rows, segments(4), 0)
        return torch.equal(out, rows[comm.rank])

    assert all(run_threads(rank, 4))


@pytest.mark.parametrize("kind", ["one hop", "two hops"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constants_are_exact_and_errors_bounded(kind, dtype):
    code = BlockQuantize(4, 64)

    def rank(comm):
        constant = rows_of({n: torch.full(s, 3.0) for n, s in SHAPES.items()}, 4, dtype)
        out = torch.empty(constant.shape[1], dtype=dtype)
        exchange = exchange_of(kind, comm, code)
        exchange.mean_into(out, constant, segments(4), 0)
        exact = torch.equal(out, constant[comm.rank])
        rows = rows_of(gradients(comm.rank), 4, dtype)
        exchange.mean_into(out, rows, segments(4), 1)
        return exact, out.float()

    told = run_threads(rank, 4)
    all_rows = torch.stack([rows_of(gradients(r), 4, dtype).float() for r in range(4)])
    hops = 1 if kind == "one hop" else 2
    bound = hops * float(all_rows.abs().max()) / 7 * 1.02
    for r, (exact, out) in enumerate(told):
        assert exact
        assert float((out - all_rows.mean(0)[r]).abs().max()) <= bound


@pytest.mark.parametrize("kind", ["one hop", "two hops"])
def test_rounding_is_unbiased(kind):
    draws = 300

    def rank(comm):
        rows = rows_of(gradients(comm.rank), 4)
        exchange = exchange_of(kind, comm, BlockQuantize(4, 64))
        total = torch.zeros(rows.shape[1])
        for step in range(draws):
            out = torch.empty(rows.shape[1])
            exchange.mean_into(out, rows, segments(4), step)
            total += out
        return total / draws

    all_rows = torch.stack([rows_of(gradients(r), 4) for r in range(4)])
    for r, mean in enumerate(run_threads(rank, 4)):
        error = mean - all_rows.mean(0)[r]
        # A rounding's deviation is at most half a step, 4/14; of the mean of four and of the draws less.
        sigma = 4 / 14 / (4 * draws) ** 0.5
        assert float(error.abs().max()) < 6 * sigma * (1 if kind == "one hop" else 2)
        assert abs(float(error.mean())) < 4 * sigma / error.numel() ** 0.5 * 2


def test_small_parameters_go_as_they_are():
    policy = Policy(min_numel=100, min_ndim=2)

    def rank(comm):
        rows = rows_of(gradients(comm.rank), 4)
        out = torch.empty(rows.shape[1])
        exchange_of("one hop", comm, BlockQuantize(4, 64), policy).mean_into(
            out, rows, segments(4), 0
        )
        return pieces(out, segments(4), comm.rank)

    exact = [
        [
            torch.stack(p).mean(0)
            for p in zip(
                *(pieces(rows_of(gradients(s), 4)[r], segments(4), r) for s in range(4)),
                strict=True,
            )
        ]
        for r in range(4)
    ]
    for ours, theirs in zip(run_threads(rank, 4), exact, strict=True):
        by_name = dict(zip(SHAPES, zip(ours, theirs, strict=True), strict=True))
        torch.testing.assert_close(*by_name["vector"])
        assert not torch.equal(*by_name["big"])


def test_two_hops_cross_nodes_once_per_node():
    def rank(comm):
        rows = rows_of(gradients(comm.rank), 4)
        out = torch.empty(rows.shape[1])
        exchange_of("two hops", comm, BlockQuantize(8, 256)).mean_into(out, rows, segments(4), 0)
        return comm.bytes.labelled("inter"), comm.bytes.labelled("intra"), rows.numel()

    for inter, intra, numel in run_threads(rank, 4):
        # (K-1)/K of a rank's half, and (L-1)/L of everything; scales, flags and alignment besides.
        assert numel / 4 * 0.9 < inter < numel / 4 * 1.15
        assert numel / 2 * 0.9 < intra < numel / 2 * 1.15


def test_everybody_decodes_the_same_weights_and_again():
    code = MinMax(8, 64, "shift")

    def rank(comm):
        row = rows_of(gradients(7), 4)[comm.rank]
        codec = RowCodec(code, Policy(min_numel=0), SHAPES)
        outs = []
        for step in (0, 0, 1):
            out = torch.empty(4, row.numel())
            gather_into(out, row, segments(4), codec, comm, step)
            outs.append(out)
        return outs

    exact = rows_of(gradients(7), 4)
    told = run_threads(rank, 4)
    for outs in told:
        forward, backward, later = outs
        assert torch.equal(forward, backward)
        assert not torch.equal(forward, later)
        assert torch.equal(forward, told[0][0])
        step = (exact.max() - exact.min()) / 255
        assert float((forward - exact).abs().max()) <= float(step) / 2 * 1.001


def test_error_feedback_loses_nothing():
    """Everything sent and what is left is everything put in, in float64."""
    steps = 6

    def rank(comm):
        codec = RowCodec(BlockQuantize(4, 64, "nearest"), Policy(min_numel=0), SHAPES)
        exchange = OneHopWithFeedback(codec, comm)
        arrived = []
        for step in range(steps):
            rows = rows_of(gradients(comm.rank, step), 4, torch.float64)
            out = torch.empty(rows.shape[1], dtype=torch.float64)
            exchange.mean_into(out, rows, segments(4), step)
            exchange.commit()
            arrived.append(out)
        left = torch.cat([exchange.feedback.state_dict()[n] for n in SHAPES], dim=1)
        return torch.stack(arrived).sum(0), left

    told = run_threads(rank, 4)
    put_in = (
        sum(rows_of(gradients(r, s), 4, torch.float64) for r in range(4) for s in range(steps)) / 4
    )
    left = torch.stack([rows for _, rows in told]).mean(0)
    for r, (arrived, _) in enumerate(told):
        torch.testing.assert_close(arrived + left[r], put_in[r], rtol=1e-6, atol=1e-6)


def test_a_pass_that_is_not_finite_leaves_residuals_alone():
    def rank(comm):
        codec = RowCodec(BlockQuantize(4, 64, "nearest"), Policy(min_numel=0), SHAPES)
        exchange = OneHopWithFeedback(codec, comm)
        out = torch.empty(rows_of(gradients(0), 4).shape[1])
        for step in range(3):
            rows = rows_of(gradients(comm.rank, step), 4)
            if step == 1 and comm.rank == 2:
                rows[0, 3] = torch.inf
            exchange.mean_into(out, rows, segments(4), step)
            before = {k: x.clone() for k, x in exchange.feedback.state_dict().items()}
            exchange.commit()
            after = exchange.feedback.state_dict()
            if step == 1:
                return all(torch.equal(before[k], after[k]) for k in before)
        return False

    assert all(run_threads(rank, 4))
