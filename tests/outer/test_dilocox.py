"""DiLoCoX: its relation to DiLoCo, its recursion by hand, error feedback, ranks and round lengths."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commkit.aggregators import AllReduce, LowRankQuantized
from commkit.compressors import NoCompression
from commkit.feedback import ErrorFeedback
from commkit.outer.adaptive_rank import AdaptiveRank, numerical_rank
from commkit.outer.diloco import DiLoCo
from commkit.outer.dilocox import DiLoCoX, low_rank_int4
from commkit.outer.options import SyncOptions
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import Aggregated, Comm, TensorCtx
from tests.harness import run_ranks
from tests.outer.problem import Net, assert_same, train, weights

OPEN = SyncOptions(final_sync=False)


def dense() -> Reducer:
    return Reducer(AllReduce(NoCompression()))


@pytest.mark.parametrize("world_size", [1, 3])
def test_without_delay_and_compression_it_is_diloco(world_size: int) -> None:
    """Bit for bit."""

    def run(comm: ThreadComm, kind: Any, **knobs: Any) -> dict[str, Tensor]:
        method = functools.partial(kind, sync_every=3, outer_momentum=0.9, reducer=dense(), **knobs)
        model, _ = train(comm, method, 11)
        return weights(model) | dict(model.named_buffers())

    reference = run_threads(functools.partial(run, kind=DiLoCo), world_size)
    without = functools.partial(run, kind=DiLoCoX, delayed=False)
    for one, other in zip(run_threads(without, world_size), reference, strict=True):
        assert_same(one, other)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def starts(gradients: Sequence[Sequence[float]], **knobs: Any) -> list[list[float]]:
    """By rank, x at the start of every round; ``gradients[rank][round]`` is what a round's only step takes off."""

    def run(comm: ThreadComm) -> list[float]:
        model = Scalar()
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        seen = []
        own = {"reducer": dense()} | knobs
        with DiLoCoX(model, inner, sync_every=1, options=OPEN, process_group=comm, **own):
            for gradient in gradients[comm.rank]:
                model.x.grad = torch.full_like(model.x, gradient)
                inner.step()
                seen.append(model.x.item())
        return seen

    return run_threads(run, len(gradients))


def nesterov(steps: Sequence[float], lr: float, momentum: float) -> list[float]:
    x, b, seen = 0.0, 0.0, []
    for g in steps:
        b = momentum * b + g
        x -= lr * (g + momentum * b)
        seen.append(x)
    return seen


def test_one_replica_steps_on_the_round_before_exactly() -> None:
    """phi_1 = phi_0; phi_t = Nesterov(phi_{t-1}, delta_{t-1})."""
    gradients = [1.0, -3.0, 0.5, 2.0]
    (seen,) = starts([gradients], outer_lr=0.7, outer_momentum=0.5)
    assert seen == pytest.approx([0.0, *nesterov(gradients[:-1], 0.7, 0.5)], rel=1e-12)


def test_eager_takes_the_own_share_from_the_newer_round() -> None:
    """x_i = Nesterov with mean_{t-1} + (own_t - own_{t-1}) / W in place of the mean, from the common anchors;
    pseudo-gradients are measured from there, so nothing counts twice."""
    own = [[1.0, -3.0, 0.5, 2.0], [4.0, 0.0, 1.5, -1.0]]
    lr, momentum = 0.7, 0.5
    means = [(a + b) / 2 for a, b in zip(*own, strict=True)]
    common = nesterov(means, lr, momentum)
    seen = starts(own, outer_lr=lr, outer_momentum=momentum, eager=True)
    for mine, found in zip(own, seen, strict=True):
        expected = [0.0]
        for t in range(1, 4):
            b = 0.0
            for g in means[: t - 1]:
                b = momentum * b + g
            eager = means[t - 1] + (mine[t] - mine[t - 1]) / 2
            before = common[t - 2] if t > 1 else 0.0
            expected.append(before - lr * (eager + momentum * (momentum * b + eager)))
        assert found == pytest.approx(expected, rel=1e-12)


def test_eager_replicas_end_together() -> None:
    def run(comm: ThreadComm) -> dict[str, Tensor]:
        method = functools.partial(DiLoCoX, sync_every=2, reducer=dense(), eager=True)
        return weights(train(comm, method, 9)[0])

    assert_same(*run_threads(run, 2))


class Recorder:
    """An aggregator that remembers what it was given and what was sent of it."""

    def __init__(self, inner: LowRankQuantized) -> None:
        self.inner = inner
        self.seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        before = [x.clone() for x in xs]
        outcomes = self.inner.aggregate(xs, ctxs, comm)
        self.seen.append(
            {c.key: (x, o.sent.clone()) for c, x, o in zip(ctxs, before, outcomes, strict=True)}
        )
        return outcomes

    def __repr__(self) -> str:  # ranks compare it
        return "Recorder"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_was_sent_and_the_residual_are_what_there_was(world_size: int) -> None:
    """decoded + e_{t+1} = delta_t, with delta_t = progress + e_t, in every round and matrix."""

    def run(comm: ThreadComm) -> None:
        recorder = Recorder(LowRankQuantized(2, min_compression_rate=0.0, granule=8))
        reducer = Reducer(recorder, ErrorFeedback(), Policy(min_numel=0))
        residuals: list[dict[str, Tensor]] = [{}]
        progress: list[dict[str, Tensor]] = []

        class Watched(DiLoCoX):
            def snapshot(self, unit: Any) -> dict[str, Tensor]:
                values = super().snapshot(unit)
                progress.append({n: x.clone() for n, x in values.items()})
                return values

            def prepare_sync(self, unit: Any = None) -> None:
                super().prepare_sync(unit)
                self._wait(self._in_flight[-1])
                state = reducer.feedback.state_dict()
                residuals.append({n: x.clone() for n, x in state.items()})

        train(comm, functools.partial(Watched, sync_every=2, reducer=reducer), 9)
        assert len(recorder.seen) == len(progress) == 5
        for t, seen in enumerate(recorder.seen):
            lossy = 0
            for name, (delta, sent) in seen.items():
                left = residuals[t].get(name, torch.zeros_like(delta))
                torch.testing.assert_close(delta, progress[t][name] + left)
                now = residuals[t + 1].get(name, torch.zeros_like(delta))
                torch.testing.assert_close(sent + now, delta, rtol=1e-5, atol=1e-6)
                lossy += bool(now.any())
            assert lossy >= 2  # both weight matrices

    run_threads(run, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_residual_of_a_random_walk_is_bounded(world_size: int) -> None:
    """Fresh noise of norm 1 in every round, at rank 4 of 24: what is left unsent levels off."""

    def run(comm: ThreadComm) -> list[float]:
        reducer = low_rank_int4(4)
        assert isinstance(reducer.aggregator, LowRankQuantized)
        reducer.aggregator.min_compression_rate = 0.0
        generator = torch.Generator().manual_seed(comm.rank)
        norms = []
        for _ in range(450):
            noise = torch.randn(24, 24, generator=generator) / 24
            reducer.reduce({"w": noise}, comm)
            reducer.end_step()
            norms.append(reducer.feedback.norm())
        return norms

    for norms in run_threads(run, world_size):
        settled = sum(norms[100:150]) / 50
        assert settled > 1, "there must be something to bound"
        # 1.8 times as much if it grew like the square root of the steps
        assert sum(norms[400:450]) / 50 < 1.1 * settled


class Narrow(nn.Module):
    """Its gradient is of rank 1, whatever the data."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(24, 16, generator=generator))

    def pull(self, rank: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * rank + step)
        direction = torch.linspace(-1, 1, 16)
        return torch.outer(torch.randn(24, generator=generator), direction)


RULE = AdaptiveRank(window=2, probe_every=5, min_sync_every=2)


def narrowing(comm: Any, rank: int, steps: int = 60) -> list[tuple[int, int, int | None, int]]:
    """(step, round, rank, steps of the open round) after each step."""
    model = Narrow()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    reducer = Reducer(
        LowRankQuantized(8, min_compression_rate=0.0), ErrorFeedback(), Policy(min_numel=0)
    )
    seen = []
    with DiLoCoX(
        model, inner, sync_every=8, reducer=reducer, adaptive_rank=RULE, process_group=comm
    ) as outer:
        for step in range(steps):
            model.w.grad = model.pull(rank, step)
            inner.step()
            seen.append((step + 1, outer.round, outer.rank, outer.steps_of_round))
    return seen


def check_narrowing(runs: list[list[tuple[int, int, int | None, int]]]) -> None:
    seen = runs[0]
    assert all(other == seen for other in runs)
    assert seen[0] == (1, 0, 8, 8)
    ranks = {rank for _, _, rank, _ in seen}
    assert min(r for r in ranks if r) <= 2  # it found the one direction there is
    boundary, length = 0, 8
    for (step, number, rank, steps), before in zip(seen[1:], seen[:-1], strict=True):
        if number == before[1]:
            assert (rank, steps) == before[2:], "changed inside a round"
        else:
            assert step - boundary == length, "a round lasts what was said at its start"
            boundary, length = step, steps
            assert rank is not None
            assert steps == max(rank, RULE.min_sync_every)  # 8 * rank / 8


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_agree_on_rank_and_round_length(world_size: int) -> None:
    check_narrowing(run_threads(lambda comm: narrowing(comm, comm.rank), world_size))


def narrowing_process(rank: int, world_size: int) -> list[tuple[int, int, int | None, int]]:
    return narrowing(None, rank)


def test_processes_agree_on_rank_and_round_length() -> None:
    check_narrowing(run_ranks(narrowing_process, 2))


def test_the_schedule_is_resumed_with_a_transfer_in_flight() -> None:
    """Bit for bit, at steps before and after the rank begins to fall."""

    def run(comm: ThreadComm, stop: int | None) -> tuple[Tensor, list[Any]]:
        def build() -> tuple[Narrow, Any, DiLoCoX]:
            model = Narrow()
            inner = torch.optim.SGD(model.parameters(), lr=0.01)
            reducer = Reducer(
                LowRankQuantized(8, min_compression_rate=0.0), ErrorFeedback(), Policy(min_numel=0)
            )
            method = DiLoCoX(
                model,
                inner,
                sync_every=8,
                reducer=reducer,
                adaptive_rank=RULE,
                options=OPEN,
                process_group=comm,
            )
            return model, inner, method

        model, inner, outer = build()
        outer.start()
        seen = []
        for step in range(45):
            if step == stop:
                saved = [
                    {k: v.clone() if isinstance(v, Tensor) else v for k, v in part.items()}
                    for part in (model.state_dict(), outer.state_dict())
                ]
                reduced = outer.reducer.state_dict()
                outer.close(finish=False)
                model, inner, outer = build()
                outer.start()
                model.load_state_dict(saved[0])
                outer.load_state_dict(saved[1])
                outer.reducer.load_state_dict(reduced)
            model.w.grad = model.pull(comm.rank, step)
            inner.step()
            seen.append((outer.round, outer.rank, outer.steps_of_round))
        outer.close()
        return model.w.detach().clone(), seen

    unbroken = run_threads(functools.partial(run, stop=None), 2)
    for stop in (9, 18, 30):
        for one, other in zip(
            run_threads(functools.partial(run, stop=stop), 2), unbroken, strict=True
        ):
            assert one[1] == other[1]
            assert torch.equal(one[0], other[0])


def test_memory_between_the_ends_of_rounds() -> None:
    """Measured: 8 bytes of anchor and momentum, 4 of residual, 4 in flight, and the few rows of Q."""
    size = 256

    def alive() -> int:
        gc.collect()
        storages = {}
        for x in gc.get_objects():
            if type(x) in (Tensor, nn.Parameter):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return sum(storages.values())

    def run(comm: ThreadComm) -> float:
        model = nn.Linear(size, size, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        model.weight.grad = torch.ones_like(model.weight)
        before = alive()
        reducer = low_rank_int4(2)
        with DiLoCoX(
            model, inner, sync_every=2, reducer=reducer, process_group=comm, options=OPEN
        ) as outer:
            for _ in range(5):
                inner.step()
            outer._wait(outer._in_flight[0])
            return (alive() - before) / size**2

    assert run_threads(run, 1)[0] == pytest.approx(16, abs=0.2)


def test_momentum_that_the_delay_makes_fragile_is_warned_of_with_the_figure() -> None:
    model = Net(0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"kappa=0\.36 .*synchronously: 1\.94.*allow 0\.80"):
        DiLoCoX(model, inner, outer_momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiLoCoX(model, inner)
        DiLoCoX(model, inner, outer_momentum=0.9, delayed=False)


def test_where_the_figure_comes_from() -> None:
    """A minimum at 0 that each round gets kappa nearer to: converges below 0.36, not above."""

    def end(kappa: float, momentum: float) -> float:
        def run(comm: ThreadComm) -> float:
            model = Scalar()
            nn.init.ones_(model.x)
            inner = torch.optim.SGD(model.parameters(), lr=1.0)
            with DiLoCoX(
                model,
                inner,
                sync_every=1,
                reducer=dense(),
                outer_momentum=momentum,
                options=OPEN,
                process_group=comm,
            ):
                peak = 0.0
                for step in range(300):
                    model.x.grad = kappa * model.x.detach()
                    inner.step()
                    peak = max(peak, abs(model.x.item())) if step > 280 else peak
            return peak

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return run_threads(run, 1)[0]

    assert end(0.33, 0.9) < 0.1 < 10 < end(0.39, 0.9)
    assert end(0.75, 0.5) < 0.1 < 10 < end(0.85, 0.5)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sync_every": 0}, "sync_every=0 must be >= 1"),
        ({"outer_lr": 0.0}, "outer_lr=0.0 must be > 0"),
        ({"outer_momentum": 1.0}, r"outer_momentum=1.0 must be in \[0, 1\)"),
        ({"eager": True, "delayed": False}, "eager=True corrects the delayed step"),
        (
            {"reducer": Reducer(AllReduce(NoCompression())), "adaptive_rank": AdaptiveRank()},
            "needs a reducer with a rank, but this one has AllReduce",
        ),
        ({"sync_every": 5, "adaptive_rank": AdaptiveRank(min_sync_every=9)}, "min_sync_every=9 is"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    model = Net(0)
    with pytest.raises(ValueError, match=message):
        DiLoCoX(model, torch.optim.SGD(model.parameters(), lr=0.1), **knobs)


def test_numerical_rank_of_one_direction() -> None:
    """What the narrowing problem shows to the rule."""
    model = Narrow()
    mean = torch.stack([model.pull(0, step) for step in range(4)]).mean(0)
    assert numerical_rank({"w": torch.linalg.svdvals(mean.double()) ** 2}, 0.95) == 1
