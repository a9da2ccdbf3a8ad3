"""Local updates go on among the workers that are left, and lose none of their own progress."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

import commkit
from commkit import Elastic
from commkit.membership import Place

from .crew import Crew
from .training import QUICK, await_joiner, die, digest, loss_of, make_model

SYNC_EVERY = 4
DILOCO = {"name": "diloco", "sync_every": SYNC_EVERY, "outer_lr": 0.7, "outer_momentum": 0.9}
INT8 = DILOCO | {"reducer": {"name": "int8", "min_numel": 0}}


def train_in_rounds(
    place: Place,
    tell: Callable[[Any], None],
    scheme: Any,
    steps: int,
    at_step: Callable[[int, int, Any], None] | None = None,
    join_at: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """``join_at``: the step that waits for a worker to join, and the epoch that it is in then."""
    model = make_model()
    numbers, worlds = [], []
    with Elastic(QUICK, place) as members:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        method = commkit.attach(model, scheme, optimizer, members=members)
        for step in members.steps(steps, model=model, optimizer=optimizer):
            with step:
                optimizer.zero_grad()
                loss_of(model, step.number, place.rank).backward()
                if at_step is not None:
                    at_step(place.rank, step.number, method)
                if join_at is not None and step.number == join_at[0]:
                    await_joiner(members, join_at[1])
                optimizer.step()
            numbers.append(step.number)
            worlds.append(members.world_size)
            tell(step.number)
            tell(f"{members.world_size} workers")
        method.close()
    return {
        "digest": digest(model),
        "numbers": numbers,
        "worlds": worlds,
        "round": method.round,
        "step": method.step,
    }


def _dies_between_rounds(rank: int, step: int, method: Any) -> None:
    if (rank, step) == (1, 5):
        die()


def dies_in_round(rank: int, step: int, method: Any) -> None:
    if (rank, step) == (1, 7):
        method.reducer.reduce = lambda *_: die()


def _dies_after_its_part(rank: int, step: int, method: Any) -> None:
    if (rank, step) == (1, 7):
        reduce = method.reducer.reduce

        def dying(*args: Any, **kwargs: Any) -> None:
            reduce(*args, **kwargs)
            die()

        method.reducer.reduce = dying


def _stops(rank: int, step: int, method: Any) -> None:
    if (rank, step) == (1, 5):
        die(signal.SIGSTOP)


def _reference(steps: int, lost: int, since_round: int) -> float:
    """DiLoCo with three replicas on one device, ``lost`` being left out from a round on."""
    replicas = {rank: make_model() for rank in range(3)}
    optimizers = {r: torch.optim.SGD(m.parameters(), lr=0.05) for r, m in replicas.items()}
    anchor = make_model()
    outer = torch.optim.SGD(anchor.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for step in range(steps):
        for rank, model in replicas.items():
            optimizers[rank].zero_grad()
            loss_of(model, step, rank).backward()
            optimizers[rank].step()
        if (step + 1) % SYNC_EVERY:
            continue
        if (step + 1) // SYNC_EVERY == since_round:
            del replicas[lost]
        models = list(replicas.values())
        for p, *ps in zip(anchor.parameters(), *(m.parameters() for m in models), strict=True):
            p.grad = torch.stack([p.detach() - q.detach() for q in ps]).mean(0)
        outer.step()
        for model in models:
            model.load_state_dict(copy.deepcopy(anchor.state_dict()))
    return digest(anchor)


@pytest.mark.parametrize(
    "what", [_dies_between_rounds, dies_in_round, _stops], ids=["between", "inside", "stopped"]
)
def test_the_round_is_made_by_those_who_are_left(what: Any) -> None:
    with Crew(train_in_rounds, 3, DILOCO, 12, what) as crew:
        first, last = crew.finish(0, 2)
    for result in (first, last):
        assert result["numbers"] == list(range(12))  # no inner step is done twice
        assert (result["step"], result["round"]) == (12, 3)
        assert result["worlds"][-1] == 2
        assert result["digest"] == first["digest"]
        assert result["digest"] == pytest.approx(_reference(12, lost=1, since_round=2), rel=1e-5)


def test_a_round_whose_outcome_all_have_counts() -> None:
    with Crew(train_in_rounds, 3, DILOCO, 12, _dies_after_its_part) as crew:
        first, last = crew.finish(0, 2)
    assert first["digest"] == last["digest"]
    assert first["round"] == last["round"] == 3
    # Whether the last bytes of the dead worker arrived is not known; all that are left go by the same answer.
    assert any(
        first["digest"] == pytest.approx(_reference(12, lost=1, since_round=since), rel=1e-5)
        for since in (2, 3)
    )


def test_a_compressed_round() -> None:
    with Crew(train_in_rounds, 3, INT8, 12, dies_in_round) as crew:
        first, last = crew.finish(0, 2)
    assert first["digest"] == last["digest"]
    assert first["round"] == 3


def test_a_worker_that_joins_takes_part_from_the_next_round_on() -> None:
    with Crew(train_in_rounds, 2, DILOCO, 28, None, (14, 2)) as crew:
        crew.wait_for(0, 5)
        late = crew.start()
        results = crew.finish(0, 1, late)
    assert len({result["digest"] for result in results}) == 1
    assert {(result["step"], result["round"]) for result in results} == {(28, 7)}
    assert results[0]["worlds"][-1] == 3
    assert results[2]["numbers"] == list(range(results[2]["numbers"][0], 28))


def _lingers(rank: int, step: int, method: Any) -> None:
    """It has done all steps, and leaves when another has been taken in."""
    close = method.close

    def close_late() -> None:
        close()
        await_joiner(method.members, 2)

    if step == 3:
        method.close = close_late


def test_a_worker_that_comes_too_late_does_not_wait() -> None:
    with Crew(train_in_rounds, 2, DILOCO, 4, _lingers) as crew:
        crew.wait_for(0, 3)
        late = crew.start()
        crew.finish(0, 1)
        kind, message = crew.error_of(late)
    assert kind == "TrainingStopped"
    assert "the others have done all steps" in message


LATE = {
    "streaming": {"name": "streaming_diloco", "sync_every": 4, "fragments": 2, "overlap": 1},
    "co2": {"name": "co2", "sync_every": 4},
    "edit": {"name": "edit", "sync_every": 4},
}
GOSSIP = {"noloco": {"name": "noloco", "sync_every": 4, "beta": 0.6, "gamma": 0.8}}


@pytest.mark.parametrize("name", [*LATE, *GOSSIP])
def test_other_methods_go_on(name: str) -> None:
    """The loss comes while something travels, and later one joins; nobody loses a step, and all that are left end alike."""
    with Crew(train_in_rounds, 3, (LATE | GOSSIP)[name], 32, dies_in_step_8, (18, 3)) as crew:
        crew.wait_for(0, "2 workers")
        late = crew.start()
        first, last, joined = crew.finish(0, 2, late)
    for result in (first, last):
        assert result["numbers"] == list(range(32))
        assert set(result["worlds"]) == {3, 2}, result["worlds"]
    assert joined["numbers"] == list(range(joined["numbers"][0], 32))
    assert len({result["digest"] for result in (first, last, joined)}) == 1
    assert {(result["step"], result["round"]) for result in (first, last, joined)} == {
        (32, first["round"])
    }
    assert first["worlds"][-1] == 3


def dies_in_step_8(rank: int, step: int, method: Any) -> None:
    """Its part of the round before is on its way, or the others wait for it."""
    if (rank, step) == (1, 8):
        die()


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"name": "a_edit"}, "AEDiT cannot go on without a worker: its rounds go by the clock"),
        ({"name": "adloco", "trainers": 2}, "trainers=2 must be 1 with members"),
        (DILOCO | {"options": {"warmup_steps": 2}}, "warmup_steps=2 must be 0 with members"),
    ],
    ids=str,
)
def test_other_methods_are_refused(scheme: Any, message: str) -> None:
    from commkit.outer.following import follow_members
    from commkit.schemes import make_scheme

    model = make_model()
    method = make_scheme(scheme)(model, torch.optim.SGD(model.parameters(), lr=0.1), None)  # type: ignore[operator]
    with pytest.raises((TypeError, ValueError), match=message):
        follow_members(method, Elastic(QUICK))
