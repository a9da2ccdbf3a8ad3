"""State of optimizers that own a reducer: whole, a rank's own, and mean-preserving."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from commkit.checkpoint import merge
from commkit.optim import DGCSGD, CommOptimizer, DeMo
from commkit.sim import ThreadComm, run_threads

from .replica import Make, Replica, Tensors, gradients, parameters, same

MAKERS: dict[str, Make] = {
    "dgc": lambda p: DGCSGD(p, lr=0.1, weight_decay=0.1, density=0.05, min_numel=0, start_step=2),
    "demo": lambda p: DeMo(p, lr=0.01, weight_decay=0.1, top_k=4, chunk=8, min_numel=0),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def train(replica: Replica, steps: range, dtype: torch.dtype = torch.float32) -> None:
    for step in steps:
        replica.step(gradients(replica.comm.rank, step, dtype))


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_dtype
@every_optimizer
@pytest.mark.parametrize("bound_first", [False, True])
def test_a_resumed_run_continues_bit_for_bit(
    make: Make, dtype: torch.dtype, bound_first: bool
) -> None:
    def body(comm: ThreadComm) -> bool:
        whole, before = Replica(make, comm, dtype), Replica(make, comm, dtype)
        train(whole, range(9), dtype)
        train(before, range(4), dtype)
        saved = through_a_file(before.optimizer.state_dict())
        if bound_first:
            after = Replica(make, comm, dtype)
            after.optimizer.load_state_dict(saved)
        else:

            def loaded(params: Any) -> CommOptimizer:
                optimizer = make(params)
                optimizer.load_state_dict(saved)
                return optimizer

            after = Replica(loaded, comm, dtype)
        with torch.no_grad():
            for name, p in after.parameters.items():
                p.copy_(before.parameters[name])
        train(after, range(4, 9), dtype)
        return same(after.values(), whole.values()) and same(after.state(), whole.state())

    assert all(run_threads(body, 2))


@every_optimizer
def test_another_ranks_state_is_refused(make: Make) -> None:
    def body(comm: ThreadComm) -> dict[str, Any]:
        replica = Replica(make, comm)
        train(replica, range(3), torch.float64)
        return replica.optimizer.state_dict()

    states = run_threads(body, 2)
    message = r"state of rank 1 of 2 was given to rank 0 of 2.*commkit\.checkpoint"

    def load(comm: ThreadComm) -> None:
        replica = Replica(make, comm)
        before = replica.state()
        if comm.rank == 0:
            with pytest.raises(ValueError, match=message):
                replica.optimizer.load_state_dict(states[1])
            assert same(replica.state(), before)
        replica.optimizer.load_state_dict(states[comm.rank])

    run_threads(load, 2)

    def load_first(comm: ThreadComm) -> None:
        named = parameters()
        optimizer = make(list(named.values()))
        optimizer.load_state_dict(states[1])
        if comm.rank == 1:
            optimizer.bind(named, comm)
        else:
            with pytest.raises(ValueError, match=message):
                optimizer.bind(named, comm)

    run_threads(load_first, 2)


@every_optimizer
def test_schedules_still_work_after_loading(make: Make) -> None:
    """torch gives the optimizer new groups; a step must read those."""

    def body(comm: ThreadComm) -> None:
        replica = Replica(make, comm)
        train(replica, range(4), torch.float64)
        replica.optimizer.load_state_dict(replica.optimizer.state_dict())
        for group in replica.optimizer.param_groups:
            group["lr"] = 0.0
        before = replica.values()
        train(replica, range(4, 6), torch.float64)
        assert same(replica.values(), before)

    run_threads(body, 2)


@every_optimizer
def test_what_is_shared_is_equal_on_all_ranks_and_the_rest_is_the_reducers(make: Make) -> None:
    def body(comm: ThreadComm) -> tuple[Any, Tensors]:
        replica = Replica(make, comm)
        train(replica, range(4), torch.float64)
        shared = replica.optimizer.shared_state_dict()
        assert set(shared) == {"state", "param_groups"}
        return shared, replica.state()

    (a, own), (b, other) = run_threads(body, 2)
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    assert all(same(a["state"][i], b["state"][i]) for i in a["state"])
    assert own.keys() == other.keys()
    assert not same(own, other)


@every_optimizer
def test_another_world_size_conserves_what_was_left_unsent(make: Make) -> None:
    """2 -> 4 -> 2 ranks: the mean of everything that is kept stays the same."""

    def states(world_size: int, start: dict[str, torch.Tensor] | None, step: int) -> Any:
        def body(comm: ThreadComm) -> Any:
            replica = Replica(make, comm)
            if start is not None:
                replica.reducer.load_state_dict(start)
            mean = replica.state()
            before = merge(comm.all_gather_object(replica.reducer.state_dict()))
            train(replica, range(step, step + 3), torch.float64)
            return mean, before, replica.reducer.state_dict()

        return run_threads(body, world_size)

    saved: dict[str, torch.Tensor] | None = None
    for step, world_size in ((0, 2), (3, 4), (6, 2)):
        ranks = states(world_size, saved, step)
        if saved is not None:
            for _, before, _ in ranks:
                for key, value in saved.items():
                    # float64 means of up to four equal numbers
                    torch.testing.assert_close(before[key], value, rtol=1e-15, atol=0)
        saved = merge([state for _, _, state in ranks])
        for key in saved:
            if key.startswith("rank/"):
                total = sum(state[key] for _, _, state in ranks) / world_size
                torch.testing.assert_close(saved[key], total, rtol=1e-14, atol=1e-15)


@every_optimizer
def test_parameters_cannot_be_added_once_attached(make: Make) -> None:
    def body(comm: ThreadComm) -> None:
        replica = Replica(make, comm)
        with pytest.raises(RuntimeError, match=r"is attached.*before commkit\.attach"):
            replica.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})

    run_threads(body, 1)


@every_optimizer
def test_steps_without_attachment_are_refused(make: Make) -> None:
    optimizer = make([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(RuntimeError, match=r"is not attached; call commkit\.attach"):
        optimizer.step()


@every_optimizer
def test_model_and_optimizer_must_hold_the_same_parameters(make: Make) -> None:
    def body(comm: ThreadComm) -> None:
        a, b, frozen = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
        frozen.requires_grad_(False)
        with pytest.raises(ValueError, match=r"parameter 'b' of the model is not in the optimizer"):
            make([a]).bind({"a": a, "b": b}, comm)
        with pytest.raises(ValueError, match=r"is in the optimizer but not in the model"):
            make([a, b]).bind({"a": a}, comm)
        make([a, b, frozen]).bind({"a": a, "b": b}, comm)

    run_threads(body, 1)


@every_optimizer
def test_a_step_evaluates_its_closure(make: Make) -> None:
    def body(comm: ThreadComm) -> None:
        replica = Replica(make, comm)

        def closure() -> float:
            assert torch.is_grad_enabled()
            replica.reduce(gradients(comm.rank, 0))
            return 7.0

        before = replica.values()
        assert replica.optimizer.step(closure) == 7.0
        assert not same(replica.values(), before)

    run_threads(body, 2)


@every_optimizer
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
    ],
    ids=["cosine", "lambda"],
)
def test_learning_rate_schedules(make: Make, schedule: Callable[[Any], Any]) -> None:
    def body(comm: ThreadComm) -> None:
        replica = Replica(make, comm)
        scheduler = schedule(replica.optimizer)
        first = replica.optimizer.param_groups[0]["lr"]
        replica.step(gradients(comm.rank, 0))
        scheduler.step()
        assert replica.optimizer.param_groups[0]["lr"] < first

    run_threads(body, 2)
