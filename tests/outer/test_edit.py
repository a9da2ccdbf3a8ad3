"""Laws of EDiT: layers are synchronised in the forward pass, and misbehaving replicas do not count."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import commkit
from commkit.outer import OuterSync, RoundAborted
from commkit.outer.diloco import DiLoCo
from commkit.outer.edit import EDiT
from commkit.outer.local_sgd import LocalSGD
from commkit.outer.options import SyncOptions
from commkit.outer.penalty import Penalty
from commkit.reducer import Reducer
from tests.harness import ThreadComm, run_threads
from tests.outer.deep import Deep, inner_step, loss_of
from tests.outer.problem import Net, assert_same, weights

Weights = dict[str, torch.Tensor]
OPEN = SyncOptions(final_sync=False)
CALM = Penalty(warm_rounds=5)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def run(
    comm: ThreadComm,
    method: Callable[..., OuterSync],
    steps: int,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    model: nn.Module | None = None,
    **knobs: Any,
) -> Weights:
    """Weights after ``steps`` steps and the end of the ``with`` block."""
    model = Deep(comm.rank) if model is None else model
    inner = optimizer(model)
    with method(model, inner, process_group=comm, **knobs):
        for step in range(steps):
            inner_step(model, inner, comm.rank, step)
    return weights(model)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 9])
@pytest.mark.parametrize("world_size", [1, 3])
def test_without_penalty_it_is_diloco_bit_for_bit(prefetch: int, world_size: int) -> None:
    knobs: dict[str, Any] = {"sync_every": 3, "outer_momentum": 0.8}

    def both(comm: ThreadComm) -> tuple[Weights, Weights]:
        return (
            run(comm, DiLoCo, 11, **knobs),
            run(comm, EDiT, 11, penalty=None, prefetch=prefetch, **knobs),
        )

    for diloco, edit in run_threads(both, world_size):
        assert_same(diloco, edit)


def test_equal_weights_without_clip_are_diloco() -> None:
    """The penalty's own way through the norms, with nothing to find."""
    knobs: dict[str, Any] = {"sync_every": 3, "outer_momentum": 0.8}
    penalty = Penalty(weighting="none", clip=None)

    def both(comm: ThreadComm) -> tuple[Weights, Weights]:
        return run(comm, DiLoCo, 11, **knobs), run(comm, EDiT, 11, penalty=penalty, **knobs)

    for diloco, edit in run_threads(both, 3):
        for name in diloco:
            torch.testing.assert_close(edit[name], diloco[name], rtol=1e-5, atol=1e-6)


def test_without_penalty_and_momentum_it_is_local_sgd() -> None:
    def both(comm: ThreadComm) -> tuple[Weights, Weights]:
        edit = functools.partial(EDiT, penalty=None, outer_lr=1.0, outer_momentum=0.0)
        return run(comm, LocalSGD, 8, sync_every=4), run(comm, edit, 8, sync_every=4)

    for local, edit in run_threads(both, 3):
        for name in local:
            torch.testing.assert_close(local[name], edit[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reducer", [None, "int8", "powersgd"])
@pytest.mark.parametrize("majority", [None, "sum", "count"])
def test_replicas_are_bit_equal_inside_the_forward_pass(reducer: str | None, majority: Any) -> None:
    def body(comm: ThreadComm) -> list[Weights]:
        model = Net(comm.rank)
        inner = adamw(model)
        made = {
            None: lambda: None,
            "int8": lambda: commkit.schemes.int8(min_numel=0),
            "powersgd": lambda: commkit.schemes.powersgd(rank=2),
        }[reducer]()
        seen: list[Weights] = []
        outer = EDiT(
            model, inner, sync_every=2, reducer=made, majority=majority, process_group=comm
        )
        with outer:
            for step in range(9):
                x = torch.randn(
                    8, 5, generator=torch.Generator().manual_seed(10 * step + comm.rank)
                )
                loss = model(x).square().mean()
                if step and step % 2 == 0:
                    seen.append(weights(model) | {"mean": model.norm.running_mean.clone()})
                inner.zero_grad()
                loss.backward()
                inner.step()
        seen.append(weights(model))
        return seen

    runs = run_threads(body, 3)
    assert len(runs[0]) == 5
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other, strict=True):
            mean = (mine.pop("mean", None), theirs.pop("mean", None))
            assert_same(mine, theirs)
            assert mean[0] is None or not torch.equal(*mean)  # after a batch of one's own


class Spy(EDiT):
    """Writes down in which order layers are begun and done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log: list[str] = []

    def prepare_sync(self, unit: Any = None) -> None:
        self.log.append(f"begin {unit.index}")
        super().prepare_sync(unit)

    def apply(self, unit: Any, mean: Any) -> None:
        self.log.append(f"end {unit.index}")
        super().apply(unit, mean)


def spied(
    comm: ThreadComm, forward: Callable[[Spy, Deep, int], None], steps: int = 3, **knobs: Any
) -> list[str]:
    """The log of ``steps`` steps, each ``forward`` and then the optimizer's."""
    model = Deep(0)
    inner = sgd(model)
    outer = Spy(model, inner, sync_every=2, process_group=comm, options=OPEN, **knobs)
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: outer.log.append(f"block {index}"))
    with outer:
        inner.register_step_pre_hook(lambda *_: outer.log.append("optimizer"))
        for step in range(steps):
            outer.log.append(f"step {step}")
            inner.zero_grad()
            forward(outer, model, step)
            inner.step()
    return outer.log


def forward_backward(outer: Spy, model: Deep, step: int) -> None:
    loss_of(model, outer.comm.rank, step).backward()


def test_layers_are_synchronised_as_they_come_with_the_next_one_on_its_way() -> None:
    log = run_threads(functools.partial(spied, forward=forward_backward), 2)[0]
    assert log[log.index("step 2") :] == [
        *("step 2", "begin 0", "begin 1", "end 0"),
        *("begin 2", "end 1", "block 0"),
        *("begin 3", "end 2", "block 1"),
        *("begin 4", "end 3", "block 2"),
        *("end 4", "optimizer"),
    ]
    assert not any(entry.startswith(("begin", "end")) for entry in log[: log.index("step 2")])


def test_accumulation_synchronises_in_the_first_micro_step_only() -> None:
    def accumulate(outer: Spy, model: Deep, step: int) -> None:
        for micro in range(3):
            loss_of(model, outer.comm.rank, 10 * step + micro).backward()
            outer.log.append(f"micro {micro}")

    for log in run_threads(functools.partial(spied, forward=accumulate, steps=7), 2):
        begun = [entry for entry in log if entry.startswith("begin")]
        assert begun == [f"begin {i}" for i in range(5)] * 3
        last = None
        for entry in log:
            if entry.startswith(("micro", "step")):
                last = entry
            elif entry.startswith(("begin", "end")):
                assert last is not None
                assert last.startswith("step")


@pytest.mark.parametrize("how", ["eval", "no_grad", "submodule"])
def test_evaluation_between_steps_synchronises_nothing(how: str) -> None:
    def evaluated(outer: Spy, model: Deep, step: int) -> None:
        before = len(outer.log)
        if how == "eval":
            model.eval()
        x = torch.ones(2, 5)
        with torch.set_grad_enabled(how != "no_grad"):
            if how == "submodule":
                model.stem(x)
            elif outer.comm.rank == 0:  # the others are not even there
                model(x)
        model.train()
        assert not any(e.startswith(("begin", "end")) for e in outer.log[before:])
        forward_backward(outer, model, step)

    for log in run_threads(functools.partial(spied, forward=evaluated), 2):
        assert [e for e in log if e.startswith("end")] == [f"end {i}" for i in range(5)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_synchronises_once_and_changes_nothing(reentrant: bool) -> None:
    def both(comm: ThreadComm) -> tuple[Weights, Weights]:
        knobs: dict[str, Any] = {"sync_every": 2, "penalty": CALM}
        again = Deep(comm.rank, checkpointing=reentrant)
        return run(comm, EDiT, 7, **knobs), run(comm, EDiT, 7, model=again, **knobs)

    for plain, checkpointed in run_threads(both, 2):
        assert_same(plain, checkpointed)

    def log(comm: ThreadComm) -> list[str]:
        model = Deep(0, checkpointing=reentrant)
        inner = sgd(model)
        with Spy(model, inner, sync_every=2, process_group=comm, options=OPEN) as outer:
            for step in range(3):
                inner_step(model, inner, comm.rank, step)
        return outer.log

    assert [e for e in run_threads(log, 2)[0] if e[0] == "e"] == [f"end {i}" for i in range(5)]


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("skipping", [{0: 0, 1: 0}, {0: 2}, {0: 1, 1: 2}, {0: 0, 1: None, 2: 1}])
def test_layers_that_are_not_executed_are_synchronised_all_the_same(
    skipping: dict[int, int | None], prefetch: int
) -> None:
    """Also where each replica leaves out another one, which must not mix up the collectives."""

    def body(comm: ThreadComm) -> tuple[list[Weights], list[str]]:
        model = Deep(comm.rank)
        model.skip = skipping.get(comm.rank)
        inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        seen = []
        outer = Spy(model, inner, sync_every=2, prefetch=prefetch, process_group=comm, options=OPEN)
        with outer:
            hook = inner.register_step_pre_hook(lambda *_: seen.append(weights(model)))
            for step in range(7):
                inner_step(model, inner, comm.rank, step)
            hook.remove()
        return seen[2::2], outer.log

    results = run_threads(body, 3)
    for seen, log in results:
        assert len(seen) == 3
        assert log.count("end 2") == 3
        for mine, theirs in zip(seen, results[0][0], strict=True):
            assert_same(mine, theirs)


def test_a_forward_pass_that_is_not_seen_is_made_up_for_before_the_step() -> None:
    def around(outer: Spy, model: Deep, step: int) -> None:
        x = torch.ones(2, 5)
        for module in (model.stem, *model.blocks, model.head):
            x = module(x)
        x.square().mean().backward()

    for log in run_threads(functools.partial(spied, forward=around), 2):
        assert [e for e in log if e.startswith("end")] == [f"end {i}" for i in range(5)]
        assert log[-2:] == ["end 4", "optimizer"]


def test_steps_that_the_optimizer_does_not_see() -> None:
    """As under a GradScaler that skips: the rest of the round is made up for when the step is counted."""

    def body(comm: ThreadComm) -> list[str]:
        model = Deep(0)
        inner = sgd(model)
        with Spy(model, inner, sync_every=1, process_group=comm, options=OPEN) as outer:
            inner_step(model, inner, comm.rank, 0)
            model(torch.ones(2, 5)) if comm.rank else None
            outer.after_step()
            assert outer.log.count("end 4") == 1
        return outer.log

    ends = [f"end {i}" for i in range(5)]
    for log in run_threads(body, 2):
        assert [e for e in log if e.startswith("end")] == [*ends, *ends]


def test_frozen_layers_are_not_sent() -> None:
    def body(comm: ThreadComm) -> tuple[int, list[str]]:
        model = Deep(0)
        model.blocks[1].requires_grad_(False)
        inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        outer = Spy(model, inner, sync_every=2, process_group=comm, options=OPEN)
        with outer:
            for step in range(3):
                inner_step(model, inner, comm.rank, step)
        return len(outer.units), outer.log

    units, log = run_threads(body, 2)[0]
    assert units == 4
    assert [e for e in log if e.startswith("end")] == [f"end {i}" for i in range(4)]


def spoil(model: nn.Module, value: float, part: str = "blocks.1.up.weight") -> None:
    with torch.no_grad():
        model.get_parameter(part).add_(value)


@pytest.mark.parametrize("temperature", [1.0, 1e12])
def test_an_anomalous_layer_has_weight_exactly_0_and_the_others_count(temperature: float) -> None:
    """The result of that layer is what it would be without that replica."""
    penalty = Penalty(warm_rounds=4, weighting="none", temperature=temperature, clip=None)

    def body(comm: ThreadComm, spike: bool) -> tuple[list[tuple[float, ...]], Weights, int]:
        model = Deep(0)
        inner = sgd(model)
        outer = EDiT(model, inner, sync_every=2, penalty=penalty, process_group=comm, options=OPEN)
        with outer:
            for step in range(20):
                inner_step(model, inner, comm.rank, step)
            if spike and comm.rank == 1:
                spoil(model, 1e3)
            loss_of(model, comm.rank, 20)
            rosters = [roster.weights for roster in outer._rosters]
            return rosters, weights(model), outer.rejected

    results = run_threads(functools.partial(body, spike=True), 3)
    rosters, state, _ = results[0]
    assert rosters[2] == (0.5, 0.0, 0.5)
    for index in (0, 1, 3, 4):
        assert rosters[index] == pytest.approx([1 / 3] * 3)
    assert [rejected for *_, rejected in results] == [0, 1, 0]
    calm = run_threads(functools.partial(body, spike=False), 3)[0][1]
    for name, value in state.items():
        other_layers = not name.startswith("blocks.1.")
        assert torch.equal(value, calm[name]) == other_layers, name
        assert (value - calm[name]).abs().max() < 0.1


def test_a_layer_in_which_nobody_counts_returns_to_its_anchor() -> None:
    def body(comm: ThreadComm) -> None:
        model = Deep(0)
        inner = sgd(model)
        with EDiT(
            model,
            inner,
            sync_every=2,
            penalty=Penalty(warm_rounds=4),
            process_group=comm,
            options=OPEN,
        ) as outer:
            for step in range(20):
                inner_step(model, inner, comm.rank, step)
            anchors = {n: v.detach().clone() for n, v in outer.anchors.values.items()}
            momentum = _momenta(outer)
            detectors = outer.state_dict()["detectors"]
            spoil(model, 1e3)
            loss_of(model, comm.rank, 20)
            after, moved = outer.anchors.values, _momenta(outer)
            for name, value in weights(model).items():
                spoiled = name.startswith("blocks.1.")
                assert torch.equal(value, after[name])
                assert torch.equal(after[name], anchors[name]) == spoiled
                assert torch.equal(momentum[name], moved[name]) == spoiled
            assert outer.skipped_rounds == 1
            told = outer.state_dict()["detectors"]["count"] - detectors["count"]
            assert told.tolist() == [[1, 1, 0, 1, 1]] * 2

    run_threads(body, 2)


def _momenta(outer: OuterSync) -> Weights:
    state = outer.anchors.optimizer.state  # type: ignore[union-attr]
    return {n: state[v]["momentum_buffer"].clone() for n, v in outer.anchors.values.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("penalty", [None, CALM])
def test_a_replica_that_is_not_finite_does_not_count(value: float, penalty: Penalty | None) -> None:
    def body(comm: ThreadComm) -> tuple[Weights, Any, Any, bool, int]:
        model = Deep(0)
        inner = adamw(model)
        with EDiT(
            model, inner, sync_every=2, penalty=penalty, process_group=comm, options=OPEN
        ) as outer:
            for step in range(4):
                inner_step(model, inner, comm.rank, step)
            if comm.rank == 1:
                spoil(model, value)
            before = outer.state_dict()["detectors"]
            loss_of(model, comm.rank, 4)
            after = outer.state_dict()["detectors"]
            assert outer._rosters[2].weights[1] == 0.0
            assert sum(outer._rosters[2].weights) == pytest.approx(1.0)
            return weights(model), before, after, outer.was_reset, len(inner.state)

    results = run_threads(body, 3)
    for rank, (state, before, after, was_reset, moments) in enumerate(results):
        assert_same(state, results[0][0])
        assert all(bool(x.isfinite().all()) for x in state.values())
        assert was_reset == (rank == 1)
        assert (moments == 0) == (rank == 1)
        if penalty is not None:
            assert (after["count"] - before["count"])[:, 2].tolist() == [1, 0, 1]
            for name in before:
                assert torch.equal(before[name][1, 2].nan_to_num(), after[name][1, 2].nan_to_num())


def test_the_combined_pseudo_gradient_is_clipped_layer_by_layer() -> None:
    class Seen(EDiT):
        def apply(self, unit: Any, mean: dict[str, torch.Tensor]) -> None:
            norm = torch.cat([x.reshape(-1) for x in mean.values()]).norm()
            norms.append(norm.item())
            super().apply(unit, mean)

    norms: list[float] = []

    def body(comm: ThreadComm, clip: float | None) -> None:
        run(comm, Seen, 6, sgd, sync_every=3, penalty=Penalty(clip=clip))

    run_threads(functools.partial(body, clip=None), 2)
    free, limit = max(norms), 0.5 * max(norms)
    norms.clear()
    run_threads(functools.partial(body, clip=limit), 2)
    assert max(norms) == pytest.approx(limit, rel=1e-5)
    assert max(norms) < free
    assert min(norms) < 0.9 * limit  # the others are as they were


def test_weights_of_the_penalty_are_those_of_the_sum() -> None:
    """One layer, known norms: the anchor moves by the softmax-weighted sum."""

    def body(comm: ThreadComm) -> tuple[float, float]:
        model = nn.Linear(1, 1, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        with EDiT(
            model,
            inner,
            sync_every=1,
            outer_lr=1.0,
            outer_momentum=0.0,
            process_group=comm,
            options=OPEN,
        ):
            start = model.weight.item()
            model.weight.grad = torch.full_like(model.weight, [1.0, 2.0, 3.0][comm.rank])
            inner.step()
            model(torch.ones(1, 1))
            return start, model.weight.item()

    expected = 0.665241 * 1 + 0.244728 * 2 + 0.090031 * 3
    for start, end in run_threads(body, 3):
        assert start - end == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("majority", ["sum", "count"])
def test_only_the_majority_of_signs_is_averaged(majority: Any) -> None:
    """Elements: all agree; two small ones outvote one by count, one large one by sum; all zero."""
    rows = [[1.0, -0.5, 0.0], [2.0, -0.25, 0.0], [3.0, 4.0, 0.0]]

    def body(comm: ThreadComm) -> list[float]:
        model = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(model.weight)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        method = EDiT(
            model,
            inner,
            sync_every=1,
            outer_lr=1.0,
            outer_momentum=0.0,
            penalty=None,
            majority=majority,
            process_group=comm,
            options=OPEN,
        )
        with method:
            model.weight.grad = torch.tensor([rows[comm.rank]])
            inner.step()
            model(torch.ones(1, 3))
            return (-model.weight[0]).tolist()

    expected = [2.0, 4.0 if majority == "sum" else -0.375, 0.0]
    for seen in run_threads(body, 3):
        assert seen == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("stop", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("reducer", [None, "int8"])
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(stop: int, reducer: str | None) -> None:
    penalty = Penalty(warm_rounds=2, weighting="none", clip=0.5)

    def build(comm: ThreadComm, model: nn.Module, inner: Any, **knobs: Any) -> EDiT:
        made = commkit.schemes.int8(min_numel=0) if reducer else None
        return EDiT(
            model,
            inner,
            sync_every=2,
            penalty=penalty,
            reducer=made,
            process_group=comm,
            **knobs,
        )

    def steps(model: nn.Module, inner: Any, rank: int, step: int) -> None:
        if rank == 1 and step == 9:
            spoil(model, 10.0)  # which only detectors that remember find
        inner_step(model, inner, rank, step)

    def unbroken(comm: ThreadComm) -> Weights:
        model = Deep(0)
        inner = adamw(model)
        with build(comm, model, inner) as outer:
            for step in range(12):
                steps(model, inner, comm.rank, step)
        assert outer.rejected == comm.rank
        return weights(model)

    def broken(comm: ThreadComm) -> Weights:
        model = Deep(0)
        inner = adamw(model)
        with build(comm, model, inner) as outer:
            for step in range(stop):
                steps(model, inner, comm.rank, step)
            # What checkpoints are made of, so that it is a copy and of nothing but plain data.
            flat = commkit.structure.flatten(
                [model.state_dict(), inner.state_dict(), outer.state_dict()]
            )
            saved = commkit.structure.unflatten({k: v.clone() for k, v in flat.items()})
            residuals = {k: v.clone() for k, v in outer.reducer.state_dict().items()}
        model = Deep(0)
        inner = adamw(model)
        with build(comm, model, inner) as outer:
            model.load_state_dict(saved[0])
            inner.load_state_dict(saved[1])
            outer.load_state_dict(saved[2])
            outer.reducer.load_state_dict(residuals)
            again = outer.state_dict()
            for key in ("step", "began_at", "next_number", "ripe", "rosters", "rejected"):
                assert again[key] == saved[2][key]
            for step in range(stop, 12):
                steps(model, inner, comm.rank, step)
        return weights(model)

    for a, b in zip(run_threads(unbroken, 2), run_threads(broken, 2), strict=True):
        assert_same(a, b)


def test_a_state_saved_between_forward_and_step_holds_the_rest_of_the_round() -> None:
    def body(comm: ThreadComm) -> tuple[Weights, Weights]:
        results = []
        for interrupted in (False, True):
            model = Deep(0)
            model.skip = 1
            inner = sgd(model)
            with EDiT(model, inner, sync_every=2, process_group=comm) as outer:
                for step in range(3):
                    if step == 2:
                        inner.zero_grad()
                        x = model.stem(torch.ones(2, 5))  # not through the model: nothing yet
                        assert not outer._under_way
                        del x
                        outer._before_model(model, ())
                        model.stem(torch.ones(2, 5))
                        if interrupted:
                            state = outer.state_dict()
                            assert state["pending"] == [2, 3, 4]
                            outer.load_state_dict(state)
                    inner_step(model, inner, comm.rank, step)
            results.append(weights(model))
        return results[0], results[1]

    for plain, interrupted in run_threads(body, 2):
        assert_same(plain, interrupted)


def test_a_replica_with_less_data_stays_until_the_others_are_there() -> None:
    def body(comm: ThreadComm) -> tuple[Weights, int]:
        model = Deep(0)
        inner = adamw(model)
        with EDiT(model, inner, sync_every=2, process_group=comm) as outer:
            for step in range([3, 11, 8][comm.rank]):
                inner_step(model, inner, comm.rank, step)
        return weights(model), outer.round

    results = run_threads(body, 3)
    for state, rounds in results:
        assert_same(state, results[0][0])
        assert rounds == results[0][1] == 6 * 5


def test_the_end_does_not_move_weights_that_are_synchronised() -> None:
    def body(comm: ThreadComm) -> None:
        model = Deep(0)
        inner = sgd(model)
        with EDiT(model, inner, sync_every=2, process_group=comm) as outer:
            for step in range(4):
                inner_step(model, inner, comm.rank, step)
            x, _ = torch.ones(2, 5), None
            model(x)
            before = weights(model)
        assert_same(weights(model), before)
        assert outer.round == 10

    run_threads(body, 2)


def test_warmup_is_gradient_averaging() -> None:
    def body(comm: ThreadComm) -> list[bool]:
        model = Deep(0)
        inner = sgd(model)
        options = SyncOptions(warmup_steps=3, final_sync=False)
        equal = []
        with EDiT(model, inner, sync_every=2, process_group=comm, options=options):
            for step in range(7):
                inner.zero_grad()
                loss = loss_of(model, comm.rank, step)
                gathered = comm.all_gather(model.head.weight.detach().reshape(-1))
                equal.append(bool((gathered == gathered[0]).all()))
                loss.backward()
                inner.step()
        return equal

    assert run_threads(body, 2)[0] == [True, True, True, True, False, True, False]


def test_a_round_that_fails_says_so_and_forgets_the_rest_of_it() -> None:
    class Broken(Reducer):
        def reduce(self, named: Any, *args: Any, **kwargs: Any) -> Any:
            if "blocks.1.up.weight" in named:
                raise OSError("cable")
            return super().reduce(named, *args, **kwargs)

    def body(comm: ThreadComm) -> None:
        model = Deep(0)
        inner = sgd(model)
        reducer = Broken(commkit.schemes.int8().aggregator)
        outer = EDiT(model, inner, sync_every=1, reducer=reducer, process_group=comm).start()
        inner_step(model, inner, comm.rank, 0)
        with pytest.raises(RoundAborted, match="cable"):
            loss_of(model, comm.rank, 1)
        outer.rebuild(comm)
        assert outer.round == 5
        outer.reducer = Reducer(reducer.aggregator)
        for step in range(2, 5):
            inner_step(model, inner, comm.rank, step)
        outer.close()
        assert outer.round == 5 + 3 * 5

    run_threads(body, 1)


@pytest.mark.parametrize(
    "penalty",
    [Penalty(warm_rounds=10), Penalty(warm_rounds=10, weighting="none", clip=None)],
    ids=["paper", "detector alone"],
)
def test_a_corrupted_replica_spikes_diloco_and_not_edit(penalty: Penalty) -> None:
    """From step 60 on rank 3 trains on noise with huge targets."""
    corrupted_from, steps = 60, 96

    def losses(comm: ThreadComm, method: Callable[..., OuterSync]) -> list[float]:
        model = Deep(0)
        inner = sgd(model)
        seen = []
        with method(model, inner, sync_every=3, process_group=comm, options=OPEN):
            for step in range(steps):
                inner.zero_grad()
                loss = loss_of(model, comm.rank, step)
                bad = comm.rank == 3 and step >= corrupted_from
                if not bad:
                    seen.append(loss.item())
                generator = torch.Generator().manual_seed(step)
                noise = 60 * torch.randn(8, 4, generator=generator)
                x = torch.randn(8, 5, generator=generator)
                target = (model(x) - noise).square().mean() if bad else loss
                target.backward()
                inner.step()
        return seen

    def highest(method: Callable[..., OuterSync]) -> tuple[float, float]:
        seen = run_threads(functools.partial(losses, method=method), 4)[0]
        return max(seen[30:corrupted_from]), max(seen[corrupted_from:])

    if penalty.clip is not None:  # once is enough
        before, after = highest(functools.partial(DiLoCo, outer_momentum=0.8))
        assert after > 3 * before
    before, after = highest(functools.partial(EDiT, penalty=penalty))
    assert after < 1.1 * before


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sync_every": 0}, "sync_every=0 must be >= 1"),
        ({"prefetch": -1}, "prefetch=-1 must be >= 0"),
        ({"majority": "mean"}, "majority='mean' must be"),
        ({"outer_lr": 0.0}, "outer_lr=0.0 must be > 0"),
        ({"layers": ["no"]}, "layers name 'no'"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    model = Deep(0)
    with pytest.raises(ValueError, match=message):
        EDiT(model, sgd(model), **knobs)


def test_ranks_must_agree_on_the_penalty() -> None:
    def body(comm: ThreadComm) -> None:
        model = Deep(0)
        EDiT(model, sgd(model), penalty=Penalty(clip=1.0 + comm.rank), process_group=comm).start()

    with pytest.raises(RuntimeError, match=r"ranks disagree on penalty\.clip: rank 0 has 1.0"):
        run_threads(body, 2)
