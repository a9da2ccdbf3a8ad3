"""PowerSGD: the invariants of its definition, rank changes, degenerate layers, rounds."""

from __future__ import annotations

import pytest
import torch

from commkit.aggregators import PowerSGD, lowrank
from commkit.aggregators.lowrank import LowRank
from commkit.schemes import powersgd
from commkit.sim import ThreadComm, run_threads
from commkit.types import NonFiniteError

from .inputs import aggregate, contexts, sample


def low_rank(rows: int, columns: int, rank: int) -> torch.Tensor:
    return sample((rows, rank), 1) @ sample((rank, columns), 2)


def everything(rank: int = 2) -> PowerSGD:
    return PowerSGD(rank, min_compression_rate=0.0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_gradient_of_low_rank_is_exact_after_two_steps(world_size: int) -> None:
    target = low_rank(30, 20, 2)

    def body(comm: ThreadComm) -> None:
        reducer = powersgd(rank=2, min_compression_rate=0.0)
        for step in range(4):
            # the residual of the first step is sent with the second
            out = reducer.reduce({"w": target.clone()}, comm)["w"]
            reducer.end_step()
            if step >= 2:
                torch.testing.assert_close(out, target, rtol=1e-9, atol=1e-9)
        assert reducer.feedback.norm() < 1e-9

    run_threads(body, world_size)


@pytest.mark.parametrize("shape", [(6, 30), (30, 6), (8, 4, 3, 3)], ids=str)
def test_full_rank_is_the_mean(shape: tuple[int, ...]) -> None:
    ranks = [[sample(shape, seed)] for seed in range(3)]
    mean = sum(xs[0] for xs in ranks) / 3
    for (outcome,) in aggregate(lambda: everything(64), ranks):
        torch.testing.assert_close(outcome.mean, mean, rtol=1e-10, atol=1e-10)


def test_dense_tensors_are_averaged_and_fully_sent() -> None:
    ranks = [[sample((), s), sample((9,), s), sample((3, 3), s)] for s in range(2)]
    for xs, outcomes in zip(ranks, aggregate(lambda: PowerSGD(4), ranks), strict=True):
        for x, outcome, other in zip(xs, outcomes, ranks[0], strict=True):
            assert outcome.sent is x
            assert outcome.mean.shape == other.shape
        torch.testing.assert_close(outcomes[1].mean, (ranks[0][1] + ranks[1][1]) / 2)


@pytest.mark.parametrize(
    ("shape", "rank", "rate", "expected"),
    [
        ((1024, 4096), 4, 2.0, (1024, 4096, 4)),
        ((64, 64, 3, 3), 4, 2.0, (64, 576, 4)),
        ((10, 10), 4, 2.0, None),
        ((10, 10), 4, 0.0, (10, 10, 4)),
        ((3, 100), 16, 0.0, (3, 100, 3)),
        ((1000,), 1, 0.0, None),
        ((), 1, 0.0, None),
        ((0, 5), 1, 0.0, None),
        ((5, 0), 1, 0.0, None),
    ],
)
def test_what_is_factorised(shape, rank: int, rate: float, expected) -> None:
    assert PowerSGD(rank, rate).factors(torch.Size(shape)) == expected


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("kind", ["gaussian", "duplicated columns", "rank one", "zero"])
def test_the_basis_is_orthonormal(kind: str, scale: float) -> None:
    ps = {
        "gaussian": sample((3, 40, 4), 0, torch.float32),
        "duplicated columns": sample((3, 40, 1), 0, torch.float32).expand(3, 40, 4),
        "rank one": (sample((40, 1), 0) @ sample((1, 4), 1)).float().expand(3, 40, 4),
        "zero": torch.zeros(3, 40, 4),
    }[kind]
    basis = lowrank.orthonormalise(ps * scale)
    gram = basis.transpose(1, 2) @ basis
    assert (gram - torch.eye(4)).abs().max() < 1e-5  # float32
    left = ps - basis @ (basis.transpose(1, 2) @ ps)
    assert left.abs().max() < 1e-5 * max(1.0, float(ps.abs().max()))


def test_the_first_q_is_equal_on_all_ranks_and_differs_by_name() -> None:
    def body(comm: ThreadComm) -> dict[str, torch.Tensor]:
        aggregator, xs = everything(), [sample((20, 30), comm.rank)] * 2
        aggregator.aggregate(xs, contexts(xs), comm)
        aggregator.commit(True)
        return aggregator.state_dict()

    first, second = run_threads(body, 2)
    assert first.keys() == second.keys() == {"shared/0", "shared/1"}
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["shared/0"], first["shared/1"])


def test_the_running_mean_of_a_constant_gradient_converges_to_it() -> None:
    target, total, steps = sample((20, 30), 5), torch.zeros(20, 30).double(), 200

    def body(comm: ThreadComm) -> None:
        reducer = powersgd(rank=2, min_compression_rate=0.0)
        for _ in range(steps):
            total.add_(reducer.reduce({"w": target.clone()}, comm)["w"])
            reducer.end_step()

    run_threads(body, 1)
    # residual / steps; the residual is at most rows / rank gradients
    assert (total / steps - target).norm() < 10 / steps * target.norm()


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (1, 16)])
def test_the_rank_may_change_in_mid_run(before: int, after: int) -> None:
    def body(comm: ThreadComm) -> torch.Tensor:
        reducer = powersgd(rank=before, min_compression_rate=0.0)
        total = torch.zeros(12, 18).double()
        inputs = torch.zeros(12, 18).double()
        for step in range(8):
            if step == 4:
                reducer.aggregator.rank = after
            x = sample((12, 18), 10 * step + comm.rank)
            inputs += x
            total += reducer.reduce({"w": x}, comm)["w"]
            reducer.end_step()
        state = reducer.state_dict()
        assert state["aggregator/shared/w"].shape == (min(after, 12), 18)
        return torch.stack([total, inputs, state["rank/w"]])

    first, second = run_threads(body, 2)
    assert torch.equal(first[0], second[0])
    arrived = first[0] + (first[2] + second[2]) / 2
    torch.testing.assert_close(arrived, (first[1] + second[1]) / 2, rtol=1e-11, atol=1e-11)


def test_a_matrix_that_becomes_dense_takes_its_residual_with_it() -> None:
    def body(comm: ThreadComm) -> None:
        reducer = powersgd(rank=1, min_compression_rate=0.0)
        x = sample((12, 18), comm.rank)
        first = reducer.reduce({"w": x.clone()}, comm)["w"]
        reducer.end_step()
        reducer.aggregator.min_compression_rate = 100.0
        second = reducer.reduce({"w": torch.zeros_like(x)}, comm)["w"]
        reducer.end_step()
        mean = (sample((12, 18), 0) + sample((12, 18), 1)) / 2
        torch.testing.assert_close(first + second, mean, rtol=1e-11, atol=1e-11)
        assert reducer.feedback.norm() == 0

    run_threads(body, 2)


def test_a_silent_layer_remembers_its_subspace() -> None:
    """Steps without gradient, then the low-rank gradient of before: exact at once."""
    target = low_rank(30, 20, 2)

    def body(comm: ThreadComm) -> None:
        # Without feedback: with it, rounding errors of the residual would be what a silent step sends.
        reducer = powersgd(rank=2, min_compression_rate=0.0, error_feedback=False)
        for step in range(6):
            x = torch.zeros_like(target) if step in (3, 4) else target.clone()
            out = reducer.reduce({"w": x}, comm)["w"]
            reducer.end_step()
        torch.testing.assert_close(out, target, rtol=1e-9, atol=1e-9)

    run_threads(body, 2)


def test_matrices_of_one_shape_in_a_batch_equal_one_by_one(monkeypatch) -> None:
    ranks = [[sample((14, 9), 10 * r + i) for i in range(4)] for r in range(2)]
    expected = aggregate(everything, ranks)
    monkeypatch.setattr(lowrank, "_batched", lambda deltas: True)  # as on a GPU
    for one, other in zip(expected, aggregate(everything, ranks), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(a.sent, b.sent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shapes", "rounds"),
    [([], 0), ([(0,)], 0), ([(5,), ()], 1), ([(20, 30)], 2), ([(20, 30), (5,), (9, 40)], 2)],
)
def test_rounds(shapes: list[tuple[int, ...]], rounds: int) -> None:
    def body(comm: ThreadComm) -> int:
        xs = [sample(shape, i) for i, shape in enumerate(shapes)]
        everything().aggregate(xs, contexts(xs), comm)
        return comm.bytes.rounds

    assert run_threads(body, 2) == [rounds, rounds]


def test_a_refused_reduction_leaves_q_alone() -> None:
    def body(comm: ThreadComm) -> None:
        aggregator, xs = everything(), [sample((20, 30), comm.rank)]
        aggregator.aggregate(xs, contexts(xs), comm)
        aggregator.commit(True)
        before = aggregator.state_dict()["shared/0"].clone()
        if comm.rank == 1:
            xs[0][3, 3] = torch.nan
        with pytest.raises(NonFiniteError):
            aggregator.aggregate(xs, contexts(xs, 1), comm)
        aggregator.commit(False)
        assert torch.equal(aggregator.state_dict()["shared/0"], before)

    run_threads(body, 2)


def test_float32_and_float64_matrices_in_one_reduction() -> None:
    ranks = [
        [sample((20, 30), r), sample((20, 30), r, torch.float32), sample((7,), r)] for r in range(2)
    ]
    for outcomes in aggregate(everything, ranks):
        assert [o.mean.dtype for o in outcomes] == [torch.float64, torch.float32, torch.float64]


def test_the_fused_path_equals_the_slow_one() -> None:
    """Products that go straight into the gradient and the residual are those that are formed first."""
    generator = torch.Generator().manual_seed(0)
    p, q, own_q = (torch.randn(shape, generator=generator) for shape in ((24, 3), (3, 40), (3, 40)))
    outcome = LowRank((p, q), (p, own_q), torch.Size([24, 5, 8]), 2)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(24, 5, 8, dtype=dtype)
        outcome.mean_into(out)
        assert torch.equal(out, outcome.mean.to(dtype))
    delta = torch.randn(24, 5, 8, generator=generator)
    slow = delta - outcome.sent
    assert outcome.take_sent_from(delta)
    # One rounding less than forming the product first: a few ulps of values of about 5.
    torch.testing.assert_close(delta, slow, rtol=0, atol=5e-6)
