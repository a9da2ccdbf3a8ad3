"""Laws of the shape that all methods with local updates share."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import commkit
from commkit.outer import OuterSync, RoundAborted
from commkit.outer.diloco import DiLoCo
from commkit.outer.local_sgd import LocalSGD
from commkit.outer.options import SyncOptions
from commkit.reducer import Reducer
from tests.harness import ThreadComm, run_threads
from tests.outer.problem import Net, assert_same, batch, inner_step, train, weights

METHODS = {
    "local_sgd": functools.partial(LocalSGD, sync_every=3),
    "local_sgd_compressed": lambda *a, **k: LocalSGD(
        *a, sync_every=3, reducer=commkit.schemes.int8(min_numel=0), **k
    ),
    "diloco": functools.partial(DiLoCo, sync_every=3),
    "diloco_int8": lambda *a, **k: DiLoCo(
        *a, sync_every=3, reducer=commkit.schemes.int8(min_numel=0), **k
    ),
    "diloco_powersgd": lambda *a, **k: DiLoCo(
        *a, sync_every=3, reducer=commkit.schemes.powersgd(rank=2), **k
    ),
}
EVERY = pytest.mark.parametrize("name", METHODS)


@EVERY
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_replicas_are_bit_equal_after_every_synchronisation(name: str, world_size: int) -> None:
    def run(comm: ThreadComm) -> list[dict[str, torch.Tensor]]:
        model, seen = Net(comm.rank), []
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        with METHODS[name](model, inner, process_group=comm) as outer:
            seen.append(weights(model))
            for step in range(9):
                inner_step(model, inner, comm.rank, step)
                if (step + 1) % 3 == 0:
                    seen.append(weights(model) | dict(model.named_buffers()))
            assert outer.round == 3
        return seen

    runs = run_threads(run, world_size)
    assert len(runs[0]) == 4
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other, strict=True):
            assert_same(mine, theirs)


def test_replicas_differ_inside_a_round() -> None:
    def run(comm: ThreadComm) -> dict[str, torch.Tensor]:
        options = SyncOptions(final_sync=False)
        method = functools.partial(DiLoCo, sync_every=3, options=options)
        return weights(train(comm, method, 4)[0])

    one, other = run_threads(run, 2)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_one_step_rounds_of_sgd_are_gradient_averaging() -> None:
    def run(comm: ThreadComm) -> dict[str, torch.Tensor]:
        return weights(train(comm, functools.partial(LocalSGD, sync_every=1), 6, model=Small(0))[0])

    averaged = run_threads(run, 3)[0]
    model = Small(0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        inner.zero_grad()
        losses = [
            nn.functional.mse_loss(model(batch(rank, step)[0]), batch(rank, step)[1])
            for rank in range(3)
        ]
        torch.stack(losses).mean().backward()
        inner.step()
    for name, expected in weights(model).items():
        torch.testing.assert_close(averaged[name], expected, rtol=1e-5, atol=1e-6)


class Small(nn.Module):
    """Without batch statistics, which depend on how the batch is cut."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


def test_diloco_with_lr_1_and_no_momentum_is_local_sgd() -> None:
    def run(comm: ThreadComm) -> list[dict[str, torch.Tensor]]:
        methods = [
            functools.partial(LocalSGD, sync_every=4),
            functools.partial(DiLoCo, sync_every=4, outer_lr=1.0, outer_momentum=0.0),
        ]
        return [weights(train(comm, method, 12)[0]) for method in methods]

    for local, diloco in run_threads(run, 3):
        for name in local:
            torch.testing.assert_close(local[name], diloco[name], rtol=1e-5, atol=1e-6)


def test_one_replica_with_one_step_lr_1_is_the_inner_optimizer() -> None:
    def run(comm: ThreadComm) -> dict[str, torch.Tensor]:
        method = functools.partial(DiLoCo, sync_every=1, outer_lr=1.0, outer_momentum=0.0)
        return weights(train(comm, method, 5)[0])

    model = Net(0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        inner_step(model, inner, 0, step)
    for name, value in run_threads(run, 1)[0].items():
        torch.testing.assert_close(value, weights(model)[name], rtol=1e-5, atol=1e-6)


def test_outer_steps_for_a_constant_pseudo_gradient() -> None:
    """phi = -1.33, -3.227, -5.6343, -8.50087 with lr 0.7 and momentum 0.9 (Nesterov of torch.optim.SGD)."""

    def run(comm: ThreadComm) -> list[float]:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        seen = []
        with DiLoCo(model, inner, sync_every=1, process_group=comm):
            for _ in range(4):
                model.weight.grad = torch.ones_like(model.weight)
                inner.step()
                seen.append(model.weight.item())
        return seen

    expected = [-1.33, -3.227, -5.6343, -8.50087]
    for seen in run_threads(run, 2):
        assert seen == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["local_sgd", "diloco", "diloco_int8"])
def test_a_replica_that_is_not_finite_is_left_out(name: str) -> None:
    """The others' result is that of a round without it, and it takes that with a fresh inner optimizer."""

    def run(comm: ThreadComm, poisoned: int | None) -> tuple[dict[str, torch.Tensor], bool, int]:
        model = Net(7)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        made = METHODS[name](model, inner, process_group=comm)
        with made as outer:
            for step in range(3):
                if step == 2 and comm.rank == poisoned:
                    with torch.no_grad():
                        model.first.weight[0, 0] = float("nan")
                inner_step(model, inner, comm.rank, step)
            return weights(model) | dict(model.named_buffers()), outer.was_reset, len(inner.state)

    with_poison = run_threads(functools.partial(run, poisoned=2), 3)
    without = run_threads(functools.partial(run, poisoned=None), 2)
    for rank, (state, was_reset, moments) in enumerate(with_poison):
        assert was_reset == (rank == 2)
        assert (moments == 0) == (rank == 2)
        for key, value in without[0][0].items():
            if name == "diloco_int8" and value.is_floating_point():
                assert torch.isfinite(state[key]).all()  # rounding depends on the number of ranks
            elif value.is_floating_point():
                torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def test_a_round_without_any_finite_replica_changes_nothing() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(7)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        options = SyncOptions(final_sync=False)
        with DiLoCo(model, inner, sync_every=2, process_group=comm, options=options) as outer:
            for step in range(2):
                inner_step(model, inner, comm.rank, step)
            before, anchors = weights(model), outer.state_dict()["anchors"]
            momenta = [s["momentum_buffer"].clone() for s in anchors["optimizer"]["state"].values()]
            for step in range(2, 4):
                with torch.no_grad():
                    model.second.weight.fill_(float("inf"))
                inner_step(model, inner, comm.rank, step)
            assert outer.skipped_rounds == 1
            assert_same(weights(model), before)
            after = outer.state_dict()["anchors"]["optimizer"]["state"].values()
            for old, new in zip(momenta, after, strict=True):
                assert torch.equal(old, new["momentum_buffer"])

    run_threads(run, 2)


def test_local_sgd_without_anchors_says_that_it_has_nothing_to_return_to() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(7)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with LocalSGD(model, inner, sync_every=1, process_group=comm):
            with torch.no_grad():
                model.second.weight.fill_(float("nan"))
            inner_step(model, inner, comm.rank, 0)

    with pytest.raises(Exception, match="no replica has finite weights"):
        run_threads(run, 2)


def test_buffers_are_averaged_and_counters_take_the_largest() -> None:
    def run(comm: ThreadComm) -> tuple[torch.Tensor, torch.Tensor, int]:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        with DiLoCo(model, inner, sync_every=1, process_group=comm):
            with torch.no_grad():
                model.norm.running_mean.fill_(float(comm.rank))
                model.norm.num_batches_tracked.fill_(10 + comm.rank)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            inner.step()
            return (
                model.norm.running_mean.clone(),
                model.norm.running_var.clone(),
                int(model.norm.num_batches_tracked),
            )

    for mean, _, count in run_threads(run, 3):
        assert torch.equal(mean, torch.full((6,), 1.0))
        assert count == 12


@pytest.mark.parametrize("choice", ["keep", "reset", "average"])
def test_what_becomes_of_the_inner_state(choice: Any) -> None:
    def run(comm: ThreadComm) -> list[torch.Tensor]:
        model = Net(0)
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        options = SyncOptions(inner_state=choice, final_sync=False)
        with DiLoCo(model, inner, sync_every=2, process_group=comm, options=options):
            for step in range(2):
                inner_step(model, inner, comm.rank, step)
            return [s["exp_avg"].clone() for s in inner.state.values()]

    one, other = run_threads(run, 2)
    if choice == "reset":
        assert one == other == []
    else:
        same = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert same == (choice == "average")


def test_averaged_inner_state_is_the_mean() -> None:
    def run(comm: ThreadComm, choice: Any) -> torch.Tensor:
        model = Net(0)
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        options = SyncOptions(inner_state=choice, final_sync=False)
        with DiLoCo(model, inner, sync_every=2, process_group=comm, options=options):
            for step in range(2):
                inner_step(model, inner, comm.rank, step)
            return inner.state[model.first.weight]["exp_avg"].clone()

    own = run_threads(functools.partial(run, choice="keep"), 2)
    for averaged in run_threads(functools.partial(run, choice="average"), 2):
        torch.testing.assert_close(averaged, (own[0] + own[1]) / 2)


def test_warmup_is_gradient_averaging_and_then_replicas_part() -> None:
    def run(comm: ThreadComm) -> list[bool]:
        model = Small(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = SyncOptions(warmup_steps=3, final_sync=False)
        equal = []
        with DiLoCo(model, inner, sync_every=2, process_group=comm, options=options):
            for step in range(5):
                inner_step(model, inner, comm.rank, step)
                gathered = comm.all_gather(model.layer.weight.detach().reshape(-1))
                equal.append(bool((gathered == gathered[0]).all()))
        return equal

    assert run_threads(run, 2)[0] == [True, True, True, False, True]


def test_half_precision_weights_are_measured_from_the_rounded_anchor() -> None:
    """Without any inner progress nothing may move, although the anchor is finer than the weights."""

    def run(comm: ThreadComm) -> float:
        model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with DiLoCo(model, inner, sync_every=1, process_group=comm) as outer:
            outer.anchors.values["weight"].detach().fill_(1.0 + 2.0**-12)
            outer.anchors.write_back(["weight"])
            model.weight.grad = torch.zeros_like(model.weight)
            inner.step()
            return float(outer.anchors.values["weight"].detach().max())

    assert run_threads(run, 2) == [1.0 + 2.0**-12] * 2


def test_master_weights_are_read_and_written() -> None:
    def run(comm: ThreadComm) -> None:
        model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
        master = model.weight.detach().float().clone().requires_grad_()
        inner = torch.optim.SGD([master], lr=0.1)
        with DiLoCo(
            model,
            inner,
            sync_every=1,
            outer_lr=1.0,
            outer_momentum=0.0,
            process_group=comm,
            master_weights={"weight": master},
        ):
            before = master.detach().clone()
            master.grad = torch.full_like(master, 1e-4 * (1 + comm.rank))
            inner.step()
            torch.testing.assert_close(master.detach(), before - 1.5e-5, rtol=0, atol=1e-7)
            assert torch.equal(model.weight.detach(), master.detach().to(torch.bfloat16))

    run_threads(run, 2)


@EVERY
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(name: str, stop: int) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.02)

    def unbroken(comm: ThreadComm) -> dict[str, torch.Tensor]:
        model = Net(0)
        inner = optimizer(model)
        with METHODS[name](model, inner, process_group=comm):
            for step in range(8):
                inner_step(model, inner, comm.rank, step)
        return weights(model)

    def broken(comm: ThreadComm) -> dict[str, torch.Tensor]:
        model = Net(0)
        inner = optimizer(model)
        no_final = {"options": SyncOptions(final_sync=False)}
        with METHODS[name](model, inner, process_group=comm, **no_final) as outer:
            for step in range(stop):
                inner_step(model, inner, comm.rank, step)
            saved = [
                {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
                for s in (model.state_dict(), outer.reducer.state_dict())
            ]
            inner_state, outer_state = inner.state_dict(), outer.state_dict()
        model = Net(0)
        inner = optimizer(model)
        with METHODS[name](model, inner, process_group=comm) as outer:
            model.load_state_dict(saved[0])
            inner.load_state_dict(inner_state)
            outer.load_state_dict(outer_state)
            outer.reducer.load_state_dict(saved[1])
            for step in range(stop, 8):
                inner_step(model, inner, comm.rank, step)
        return weights(model)

    for a, b in zip(run_threads(unbroken, 2), run_threads(broken, 2), strict=True):
        assert_same(a, b)


def test_final_sync_closes_the_open_round() -> None:
    def run(comm: ThreadComm) -> dict[str, torch.Tensor]:
        return weights(train(comm, functools.partial(DiLoCo, sync_every=100), 5)[0])

    assert_same(*run_threads(run, 2))


def test_an_exception_in_the_loop_stops_without_communication() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with DiLoCo(model, inner, sync_every=2, process_group=comm):
            inner_step(model, inner, comm.rank, 0)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_threads(run, 2)


def test_bytes_are_counted() -> None:
    def run(comm: ThreadComm) -> list[int]:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        with DiLoCo(model, inner, sync_every=2, process_group=comm) as outer:
            for step in range(4):
                inner_step(model, inner, comm.rank, step)
                seen.append(outer.last_step.wire_bytes)
        return seen

    trained = sum(p.numel() for p in Net(0).parameters() if p.requires_grad)
    for seen in run_threads(run, 2):
        assert seen[0] == seen[2] == 0
        assert 4 * trained <= seen[1] == seen[3] < 4 * trained + 200


def test_unequal_weights() -> None:
    """Rank 1 counts three times."""

    def run(comm: ThreadComm) -> float:
        model = nn.Linear(1, 1, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        method = DiLoCo(
            model, inner, sync_every=1, outer_lr=1.0, outer_momentum=0.0, process_group=comm
        )
        with method as outer:
            start = model.weight.item()
            outer.weight = [1.0, 3.0][comm.rank]
            model.weight.grad = torch.full_like(model.weight, [4.0, 8.0][comm.rank])
            inner.step()
            return model.weight.item() - start

    assert run_threads(run, 2) == pytest.approx([-7.0, -7.0], abs=1e-5)


def test_offloaded_anchors_change_nothing() -> None:
    def run(comm: ThreadComm, offload: bool) -> dict[str, torch.Tensor]:
        method = functools.partial(DiLoCo, sync_every=2, options=SyncOptions(offload=offload))
        return weights(train(comm, method, 6)[0])

    results = [run_threads(functools.partial(run, offload=o), 2)[0] for o in (False, True)]
    assert_same(*results)


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        (DiLoCo, {"sync_every": 0}, "sync_every=0 must be >= 1"),
        (LocalSGD, {"sync_every": -1}, "sync_every=-1 must be >= 1"),
        (DiLoCo, {"outer_lr": 0.0}, "outer_lr=0.0 must be > 0"),
        (DiLoCo, {"outer_momentum": 1.0}, r"outer_momentum=1.0 must be in \[0, 1\)"),
        (DiLoCo, {"master_weights": {"no": torch.zeros(1)}}, "fits no trainable parameter"),
    ],
)
def test_bad_knobs(method: type[OuterSync], knobs: dict[str, Any], message: str) -> None:
    model = Net(0)
    with pytest.raises(ValueError, match=message):
        method(model, torch.optim.SGD(model.parameters(), lr=0.1), **knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"warmup_steps": -1}, "warmup_steps=-1 must be"), ({"timeout_s": 0.0}, "timeout_s=0.0 must")],
)
def test_bad_options(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyncOptions(**knobs)


def test_ranks_must_agree() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        DiLoCo(model, inner, sync_every=2 + comm.rank, process_group=comm).start()

    with pytest.raises(RuntimeError, match="ranks disagree on sync_every: rank 0 has 2"):
        run_threads(run, 2)


def test_outer_optimizers_must_agree() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        DiLoCo(model, inner, outer_lr=0.5 + 0.1 * comm.rank, process_group=comm).start()

    with pytest.raises(RuntimeError, match=r"ranks disagree on outer optimizer\.groups\.0\.lr"):
        run_threads(run, 2)


def test_survivors_that_applied_different_rounds_do_not_go_on() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = DiLoCo(model, inner, process_group=comm).start()
        if comm.rank == 1:
            outer.anchors.values["second.bias"].detach()[0] += 1.0
        outer.rebuild(comm)

    with pytest.raises(RuntimeError, match=r"ranks disagree on anchors\.second\.bias"):
        run_threads(run, 2)


def test_frozen_weights_must_agree() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        with torch.no_grad():
            model.frozen.fill_(float(comm.rank))
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        DiLoCo(model, inner, process_group=comm).start()

    with pytest.raises(RuntimeError, match=r"ranks disagree on frozen parameters\.frozen"):
        run_threads(run, 2)


def test_a_round_that_fails_keeps_local_weights_and_residuals() -> None:
    """A reducer that raises on one rank: that rank and (here, threads) the others abort, nothing changes."""

    class Broken(Reducer):
        def reduce(self, *args: Any, **kwargs: Any) -> Any:
            raise OSError("cable")

    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        reducer = Broken(commkit.schemes.int8().aggregator)
        with DiLoCo(model, inner, sync_every=1, reducer=reducer, process_group=comm) as outer:
            anchors = {n: v.detach().clone() for n, v in outer.anchors.values.items()}
            with pytest.raises(RoundAborted, match="cable"):
                inner_step(model, inner, comm.rank, 0)
            assert_same({n: v.detach() for n, v in outer.anchors.values.items()}, anchors)
            raise KeyError("done")

    with pytest.raises(KeyError, match="done"):
        run_threads(run, 1)


def test_averaged_inner_state_is_written_when_the_round_is_applied() -> None:
    """Until then the inner optimizer goes on with its own."""
    seen: list[torch.Tensor] = []

    class Late(DiLoCo):
        def apply(self, unit: Any, mean: Any) -> None:
            # The transfer is over.
            seen.append(self.optimizer.state[self.model.first.weight]["exp_avg"].clone())
            super().apply(unit, mean)

    def run(comm: ThreadComm, method: type[DiLoCo], choice: Any) -> torch.Tensor:
        model = Net(0)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        options = SyncOptions(inner_state=choice, final_sync=False)
        with method(model, inner, sync_every=2, options=options, process_group=comm):
            for step in range(2):
                inner_step(model, inner, comm.rank, step)
        return inner.state[model.first.weight]["exp_avg"].clone()

    own = run_threads(functools.partial(run, method=DiLoCo, choice="keep"), 2)
    run_threads(functools.partial(run, method=Late, choice="average"), 2)
    assert len(seen) == 2
    for moment in seen:
        assert any(torch.equal(moment, mine) for mine in own)


def test_inner_state_of_master_weights_is_theirs() -> None:
    """It is the masters that the inner optimizer keeps state for."""

    def run(comm: ThreadComm) -> torch.Tensor:
        model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
        master = model.weight.detach().float().clone().requires_grad_()
        inner = torch.optim.AdamW([master], lr=0.1)
        options = SyncOptions(inner_state="average", final_sync=False)
        masters = {"weight": master}
        knobs: dict[str, Any] = {"master_weights": masters, "options": options}
        with DiLoCo(model, inner, sync_every=1, process_group=comm, **knobs):
            master.grad = torch.full_like(master, 1.0 + comm.rank)
            inner.step()
            return inner.state[master]["exp_avg"].clone()

    for averaged in run_threads(run, 2):
        torch.testing.assert_close(averaged, torch.full((4, 4), 0.15))


@pytest.mark.parametrize("scheme", ["diloco", "edit", "streaming_diloco"])
def test_building_a_scheme_draws_nothing_from_the_global_generator(scheme: str) -> None:
    """A user who has seeded it gets the same weights and dropout with any scheme."""
    before = torch.get_rng_state()
    commkit.schemes.make_scheme(scheme)
    assert torch.equal(torch.get_rng_state(), before)
