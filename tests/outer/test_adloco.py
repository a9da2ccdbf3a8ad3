"""Laws of AdLoCo."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import commkit
from commkit.outer import RoundAborted
from commkit.outer.adloco import AdLoCo
from commkit.outer.diloco import DiLoCo
from commkit.outer.norm_test import BatchPlan, NormTest
from commkit.outer.options import SyncOptions
from commkit.outer.trainers import pick_pair
from tests.harness import ThreadComm, run_ranks, run_threads
from tests.outer.problem import Net, assert_same, inner_step, train, weights

NO_FINAL = SyncOptions(final_sync=False)
Small = functools.partial(AdLoCo, sync_every=2, initial_batch=4, max_micro_batch=16)


def sample(
    rank: int, step: int, rows: int, noise: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7919 * rank + step)
    x = torch.randn(rows, 5, generator=generator)
    clean = torch.sin(x @ torch.linspace(-1, 1, 30).view(5, 6))
    return x, clean + noise * torch.randn(clean.shape, generator=generator)


def planned_step(
    model: nn.Module, inner: torch.optim.Optimizer, plan: BatchPlan, rank: int, step: int
) -> None:
    inner.zero_grad()
    x, y = sample(rank, step, plan.samples)
    for part_x, part_y in zip(x.chunk(plan.accumulation), y.chunk(plan.accumulation), strict=True):
        (F.mse_loss(model(part_x), part_y) / plan.accumulation).backward()
    inner.step()


def anchors_of(outer: DiLoCo) -> dict[str, torch.Tensor]:
    return {n: v.detach().clone() for n, v in outer.anchors.values.items()}


def test_one_trainer_whose_batch_stays_is_diloco() -> None:
    """eta is so large that nothing grows."""

    def run(comm: ThreadComm) -> None:
        fixed = functools.partial(Small, test=NormTest(1e6))
        results = [
            weights(train(comm, method, 9)[0])
            for method in (fixed, functools.partial(DiLoCo, sync_every=2))
        ]
        assert_same(*results)

    run_threads(run, 3)


def test_batches_grow_together_and_never_shrink() -> None:
    def run(comm: ThreadComm) -> list[tuple[int, BatchPlan]]:
        model, seen, told = Net(comm.rank), [], []
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        outer = Small(
            model,
            inner,
            test=NormTest(0.7),
            max_batch=100,
            process_group=comm,
            on_plan=told.append,
        )
        with outer:
            for step in range(40):
                before = outer.plan
                planned_step(model, inner, before, comm.rank, step)
                if step % 2 == 0:
                    assert outer.plan == before  # only at the end of a round
                seen.append((outer.requested, outer.plan))
                assert outer.samples_per_step == outer.plan.samples * 3
        plans = [plan for _, plan in seen]
        assert told == [b for a, b in zip([BatchPlan(4), *plans], plans, strict=False) if a != b]
        return seen

    first, *others = run_threads(run, 3)
    for other in others:
        assert other == first
    asked = [requested for requested, _ in first]
    assert asked == sorted(asked)
    assert 4 < asked[-1] <= 100
    assert all(plan.micro_batch <= 16 and plan.samples <= 100 for _, plan in first)


def test_the_test_sees_the_gradient_of_the_last_step() -> None:
    """The hand case, through the loop: M=2, b=4, gradients (1,0) and (0,1), eta=0.5 -> 16."""

    def run(comm: ThreadComm) -> int:
        model = nn.Linear(2, 1, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = AdLoCo(
            model,
            inner,
            sync_every=2,
            initial_batch=4,
            max_micro_batch=64,
            test=NormTest(0.5),
            process_group=comm,
        )
        with outer:
            for gradient in ([5.0, 5.0], [[1.0, 0.0], [0.0, 1.0]][comm.rank]):
                model.weight.grad = torch.tensor([gradient])
                inner.step()
                inner.zero_grad()
            return outer.plan.samples

    assert run_threads(run, 2) == [16, 16]


@pytest.mark.parametrize("poison", ["gradient", "nothing to see"])
def test_a_gradient_that_is_not_finite_skips_the_test(poison: str) -> None:
    def run(comm: ThreadComm) -> None:
        model = nn.Linear(2, 1, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        knobs = {"sync_every": 1, "initial_batch": 4, "max_micro_batch": 64}
        outer = AdLoCo(model, inner, test=NormTest(0.5), process_group=comm, **knobs)
        with outer:
            gradient = [[1.0, 0.0], [0.0, 1.0]][comm.rank]
            if poison == "gradient" and comm.rank == 1:
                gradient = [float("inf"), 0.0]
            model.weight.grad = None if poison != "gradient" else torch.tensor([gradient])
            inner.step()
            assert outer.requested == 4

    if poison == "gradient":
        run_threads(run, 2)
    else:
        with pytest.raises(RoundAborted, match="no parameter has a gradient"):
            run_threads(run, 2)


def test_a_worker_alone_keeps_its_batch() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with Small(model, inner, process_group=comm) as outer:
            for step in range(6):
                planned_step(model, inner, outer.plan, 0, step)
            assert outer.requested == 4

    run_threads(run, 1)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_the_learning_rate_follows_and_schedulers_do_not_notice(rule: Any, factor: float) -> None:
    def run(comm: ThreadComm) -> None:
        model = nn.Linear(2, 1, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
        outer = AdLoCo(
            model,
            inner,
            sync_every=1,
            initial_batch=4,
            max_micro_batch=64,
            test=NormTest(0.5),
            lr_rule=rule,
            process_group=comm,
            options=NO_FINAL,
            outer_lr=1.0,
            outer_momentum=0.0,
        )
        with outer:
            model.weight.grad = torch.tensor([[[1.0, 0.0], [0.0, 1.0]][comm.rank]])
            inner.step()
            scheduler.step()
            assert (outer.plan.samples, outer.lr_factor) == (16, factor)
            assert inner.param_groups[0]["lr"] == 0.25
            before = model.weight.detach().clone()
            model.weight.grad = torch.ones(1, 2)
            inner.step()
            moved = before - model.weight.detach()
            torch.testing.assert_close(moved, torch.full((1, 2), 0.25 * factor))
            assert inner.param_groups[0]["lr"] == 0.25

    run_threads(run, 2)


# Trainers.


@pytest.mark.parametrize(
    ("batches", "pairing", "pair"),
    [
        ({0: 8, 1: 4, 2: 16}, "worst+worst", (0, 1)),
        ({0: 8, 1: 4, 2: 16}, "best+worst", (2, 1)),
        ({0: 8, 1: 8, 2: 8}, "worst+worst", (0, 1)),
        ({3: 8, 5: 8}, "best+worst", (3, 5)),
        ({3: 1, 5: 8}, "worst+worst", (5, 3)),
    ],
)
def test_who_merges(batches: dict[int, int], pairing: Any, pair: tuple[int, int]) -> None:
    assert pick_pair(batches, pairing) == pair


def test_trainers_train_apart_and_merge_until_one_is_left() -> None:
    def run(comm: ThreadComm) -> tuple[Any, ...]:
        model = Net(comm.rank)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        method = Small(
            model, inner, trainers=3, merge_every=2, process_group=comm, test=NormTest(0.7)
        )
        history = []
        with method as outer:
            for step in range(14):
                planned_step(model, inner, outer.plan, comm.rank, step)
                if step % 2:
                    mine = weights(model) | dict(model.named_buffers())
                    copied = {n: x.clone() for n, x in mine.items()}
                    history.append((outer.trainers, outer.trainer, outer.requested, copied))
            assert outer.samples_per_step == outer.plan.samples * 5
            merges = outer.merges
            momenta = outer.anchors.optimizer.state_dict()["state"]
            named = {str(i): s["momentum_buffer"].clone() for i, s in momenta.items()}
        return history, merges, named, weights(model)

    ranks = run_threads(run, 5)
    sizes = [len(trainers) for trainers, *_ in ranks[0][0]]
    assert sizes == [3, 2, 2, 1, 1, 1, 1]  # after rounds 1, 2, ...
    assert ranks[0][0][0][0] == {0: [0, 1], 1: [2, 3], 2: [4]}
    for at in range(7):
        trainers = ranks[0][0][at][0]
        for rank, (history, *_) in enumerate(ranks):
            assert history[at][0] == trainers
            leader = ranks[trainers[history[at][1]][0]][0][at]
            assert rank in trainers[history[at][1]]
            assert history[at][2] == leader[2]
            assert_same(history[at][3], leader[3])
        if len(trainers) > 1:
            leads = [ranks[members[0]][0][at][3] for members in trainers.values()]
            assert not torch.equal(leads[0]["first.weight"], leads[1]["first.weight"])
    for _, merges, momenta, final in ranks:
        assert merges == ranks[0][1]
        assert_same(momenta, ranks[0][2])
        assert_same(final, ranks[0][3])


def _merge_two(comm: ThreadComm, change: Any, group: Any = None) -> dict[str, Any]:
    """Two trainers of two ranks; ``change(outer, model, rank)`` and then a merger."""
    model = Net(0)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    outer = Small(
        model,
        inner,
        trainers=2,
        merge_every=100,
        process_group=comm if group is None else None,
        options=NO_FINAL,
        test=NormTest(1e6),
        reducer=commkit.schemes.topk(density=0.5, min_numel=0),
    )
    with outer:
        for step in range(4):
            inner_step(model, inner, comm.rank if change is not None else 0, step)
        if change is not None:
            change(outer, model, comm.rank)
        momenta = outer.anchors.optimizer.state_dict()["state"]
        before = {
            "anchors": anchors_of(outer),
            "weights": weights(model),
            "momenta": {str(i): s["momentum_buffer"].clone() for i, s in momenta.items()},
            "buffers": {n: b.clone() for n, b in model.named_buffers()},
        }
        outer.merge_trainers()
        momenta = outer.anchors.optimizer.state_dict()["state"]
        after = {
            "anchors": anchors_of(outer),
            "weights": weights(model),
            "momenta": {str(i): s["momentum_buffer"].clone() for i, s in momenta.items()},
            "buffers": {n: b.clone() for n, b in model.named_buffers()},
        }
        assert outer.trainers == {outer.trainer: [0, 1, 2, 3]}
        assert outer.reducer.residual_norm == 0
        for step in range(4, 8):  # they train on, all four together
            inner_step(model, inner, comm.rank, step)
        assert outer.round == 4
        return {"before": before, "after": after, "end": weights(model), "plan": outer.plan}


def _batches(outer: AdLoCo, model: nn.Module, rank: int) -> None:
    outer._ask_for([4, 4, 12, 12][rank])


def _check_merge(ranks: list[dict[str, Any]]) -> None:
    """Trainer 1 asked for 12 samples, trainer 0 for 4: weights 3/4 and 1/4; trainer 1 survives."""
    freed, survivor = ranks[0]["before"], ranks[2]["before"]
    for part in ("anchors", "weights", "buffers"):
        assert_same(freed[part], ranks[1]["before"][part])
        assert_same(survivor[part], ranks[3]["before"][part])
    for rank in ranks:
        after = rank["after"]
        for part in ("anchors", "weights", "buffers"):
            assert_same(after[part], ranks[0]["after"][part])
            for name, value in after[part].items():
                a, b = freed[part][name], survivor[part][name]
                if value.is_floating_point():
                    torch.testing.assert_close(value, 0.25 * a + 0.75 * b)
                else:
                    assert torch.equal(value, torch.maximum(a, b))
        assert_same(after["momenta"], survivor["momenta"])
        assert rank["plan"] == BatchPlan(12)
        assert_same(rank["end"], ranks[0]["end"])
    name = "first.weight"
    assert not torch.equal(freed["anchors"][name], survivor["anchors"][name])
    assert not torch.equal(freed["momenta"]["0"], survivor["momenta"]["0"])


def test_merging_averages_by_batch_and_keeps_the_survivors_momentum() -> None:
    _check_merge(run_threads(functools.partial(_merge_two, change=_batches), 4))


class _Rank:
    def __init__(self, rank: int) -> None:
        self.rank = rank


def _processes_merge(rank: int, world_size: int) -> dict[str, Any]:
    return _merge_two(_Rank(rank), _batches, group=dist.group.WORLD)  # type: ignore[arg-type]


def test_merging_between_processes() -> None:
    _check_merge(run_ranks(_processes_merge, 4))


def test_merging_identical_models_changes_nothing() -> None:
    for rank in run_threads(functools.partial(_merge_two, change=None), 4):
        for part in ("anchors", "weights", "momenta", "buffers"):
            assert_same(rank["before"][part], rank["after"][part])


def test_a_resumed_run_is_bit_equal_before_and_after_a_merger() -> None:
    def make(comm: ThreadComm) -> tuple[Any, ...]:
        model = Net(0)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        outer = Small(
            model,
            inner,
            trainers=2,
            merge_every=3,
            test=NormTest(0.7),
            process_group=comm,
            reducer=commkit.schemes.topk(density=0.5, min_numel=0),
        )
        return model, inner, outer

    def run(comm: ThreadComm, stop: int) -> tuple[Any, ...]:
        model, inner, outer = make(comm)
        if stop:
            outer.start()
            for step in range(stop):
                planned_step(model, inner, outer.plan, comm.rank, step)
            parts = (outer, outer.reducer, model, inner)
            states = [copy.deepcopy(part.state_dict()) for part in parts]
            outer.close(finish=False)
            model, inner, outer = make(comm)
        with outer:
            if stop:
                for part, state in zip((outer, outer.reducer, model, inner), states, strict=True):
                    part.load_state_dict(state)
            for step in range(stop, 12):
                planned_step(model, inner, outer.plan, comm.rank, step)
        return weights(model), outer.plan, outer.merges, outer.trainers

    whole = run_threads(functools.partial(run, stop=0), 4)
    for stop in (3, 4, 7):
        for one, other in zip(
            whole, run_threads(functools.partial(run, stop=stop), 4), strict=True
        ):
            assert_same(one[0], other[0])
            assert one[1:] == other[1:]
    assert len(whole[0][2]) == 1


def test_adaptive_batches_reach_a_lower_loss_than_the_first_batch() -> None:
    """Noisy targets: with 2 samples per step the noise floor is high; the batch grows and it falls."""

    def run(comm: ThreadComm, eta: float, trainers: int) -> tuple[Any, int]:
        model = nn.Linear(5, 6)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = AdLoCo(
            model,
            inner,
            sync_every=5,
            initial_batch=2,
            max_micro_batch=16,
            max_batch=256,
            test=NormTest(eta),
            trainers=trainers,
            process_group=comm,
        )
        with outer:
            for step in range(100):
                planned_step(model, inner, outer.plan, comm.rank, step)
        return weights(model), outer.requested

    def excess(trained: dict[str, torch.Tensor]) -> float:
        """Mean squared distance from the best linear function's values."""
        x, y = sample(99, 0, 2000, noise=0.0)
        ones = torch.cat([x, torch.ones(2000, 1)], 1)
        best = torch.linalg.lstsq(ones, y).solution
        return float(
            (F.linear(x, trained["weight"], trained["bias"]) - ones @ best).square().mean()
        )

    fixed = run_threads(functools.partial(run, eta=1e6, trainers=2), 4)
    grown = run_threads(functools.partial(run, eta=0.5, trainers=2), 4)
    assert fixed[0][1] == 2
    assert grown[0][1] > 16
    assert excess(grown[0][0]) < 0.5 * excess(fixed[0][0])
    for trained, _ in grown:
        assert_same(trained, grown[0][0])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"initial_batch": 0}, "initial_batch=0 must be >= 1"),
        ({"max_micro_batch": 0}, "max_micro_batch=0 must be >= 1"),
        ({"switch_at": 0.5}, "switch_at=0.5 must be >= 1"),
        ({"trainers": 0}, "trainers=0 must be >= 1"),
        ({"merge_every": 0}, "merge_every=0 must be >= 1"),
        ({"max_batch": 3}, "max_batch=3 must be at least initial_batch=4"),
        ({"lr_rule": "cubic"}, "lr_rule='cubic' must be one of none, sqrt, linear"),
        ({"merge": "best+best"}, "merge='best\\+best' must be"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    model = Net(0)
    with pytest.raises(ValueError, match=message):
        Small(model, torch.optim.SGD(model.parameters(), lr=0.1), **knobs)


def test_more_trainers_than_ranks() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        Small(model, inner, trainers=3, process_group=comm).start()

    with pytest.raises(ValueError, match="trainers=3 must be at most the number of ranks, 2"):
        run_threads(run, 2)
