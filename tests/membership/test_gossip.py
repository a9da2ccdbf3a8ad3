"""Gossip and its relatives lose a worker in the middle of a round and take in a new one: a method after the other, in the
same processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import commkit
from commkit import Elastic
from commkit.membership import Place, TrainingStopped

from .crew import Crew
from .training import QUICK, await_joiner, die, digest, loss_of, make_model

pytestmark = pytest.mark.timeout(300)  # the first test makes the runs of all
_SIZE, _STEPS = 4, 12
_LOSS, _JOIN = 3, 8  # steps; rounds end with every second
_STRIDE = 13
SPARE = "hypercube"  # exists for 4 workers and not for 3: the new one is there before, and waits
STOPS = "monna with a faulty rank"
METHODS: dict[str, dict[str, Any]] = {
    "pairs": {"name": "gossip"},  # of 3 workers one sits out
    "ring": {
        "name": "gossip",
        "topology": {"name": "ring"},
        "gossip_steps": 2,
        "schedule": {"p_gossip": 0.5, "windows": [[1, 2, "gossip"], [3, 4, "merge"]]},
    },
    "overlap": {"name": "gossip", "overlap": True},
    SPARE: {"name": "gossip", "topology": {"name": "hypercube"}},
    "push-sum": {"name": "push_sum"},
    "monna": {"name": "monna", "num_faulty": 0, "momentum": 0.9},
    "a2cid2": {"name": "a2cid2"},
    "dfedsam": {"name": "dfedsam_mgs", "rho": 0.01},
    "local sgd": {"name": "local_sgd"},
    "adloco": {"name": "adloco"},
    "dilocox": {
        "name": "dilocox",
        "rank": 4,
        "eager": True,
        "adaptive_rank": {"min_rank": 1, "min_sync_every": 1, "window": 1},
    },
    STOPS: {"name": "monna", "num_faulty": 1, "momentum": 0.9},
}
CONSERVING = ("pairs", "ring", "overlap", SPARE, "push-sum", "monna", "a2cid2", "dfedsam")


def train_through(place: Place, tell: Callable[[Any], None], first: int = 0) -> None:
    """Each method with the workers that the one before has left; worker ``at + 1`` dies in method ``at``."""
    for at, name in enumerate(METHODS):
        if at >= first:
            own = dataclasses.replace(place, job=f"test/{at}", world_size=_SIZE)
            tell((name, _train(own, tell, name, mortal=place.rank == at + 1)))


def _train(place: Place, tell: Callable[[Any], None], name: str, mortal: bool) -> dict[str, Any]:
    model = make_model()
    numbers, worlds = [], []
    with Elastic(QUICK, place) as members:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scheme = METHODS[name] | {"sync_every": 2}
        method = commkit.attach(model, scheme, optimizer, members=members)
        rounds = _watched(method) if name in CONSERVING else {}

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step.number, place.rank)
            loss.backward()
            return loss

        try:
            for step in members.steps(_STEPS, model=model, optimizer=optimizer):
                with step:
                    if name == SPARE and step.number == 1:
                        tell(name)
                        members.agent.wait_for(lambda m: m.ledger.waiting)
                    if name == "push-sum" and step.number == _LOSS - 1:
                        method.w = (
                            1.3 if members.rank == 1 else 0.9
                        )  # that of who dies, and the others'
                    if step.number == _LOSS and mortal:
                        _die_in_round(method)
                    if step.number == _JOIN and name not in (SPARE, STOPS):
                        tell(name)
                        await_joiner(members, 3)
                    if name == "dfedsam":
                        optimizer.step(closure)
                    else:
                        closure()
                        optimizer.step()
                numbers.append(step.number)
                worlds.append(members.world_size)
            method.close()
        except TrainingStopped as error:
            return {"stopped": str(error), "numbers": numbers}
    return {
        "digest": digest(model),
        "numbers": numbers,
        "worlds": worlds,
        "round": method.round,
        "rounds": rounds,
    }


def _die_in_round(method: Any) -> None:
    if hasattr(method, "peers"):
        method.peers.exchange = lambda *_: die()
    else:
        method.reducer.reduce = lambda *_: die()


def _watched(method: Any) -> dict[int, dict[str, Any]]:
    """By round: what went in, at each attempt, what this worker had before and after, and how many there were; some
    elements stand for all."""
    rounds: dict[int, dict[str, Any]] = {}
    snapshot, apply = method.snapshot, method.apply

    def own() -> tuple[list[float], float]:
        values = [method.contribution(name).reshape(-1) for name in method.replica.parameters]
        return torch.cat(values)[::_STRIDE].double().tolist(), method.mass()

    def taken(unit: Any) -> Any:
        values = snapshot(unit)
        sent = torch.cat([x.reshape(-1) for x in values.values()])[::_STRIDE].tolist()
        rounds.setdefault(method.round, {"sent": []})["sent"].append(sent)
        return values

    def applied(unit: Any, mean: Any) -> None:
        noted = rounds[method.round - 1]
        noted["before"] = own()
        apply(unit, mean)
        noted["after"], noted["workers"] = own(), method.comm.world_size

    method.snapshot, method.apply = taken, applied
    return rounds


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    """By method, the results of the two or three that are left, and at last of the one that joined."""
    with Crew(train_through, _SIZE, deadline_s=240.0) as crew:
        for at, name in enumerate(METHODS):
            if name != STOPS:
                crew.wait_for(0, name)
                crew.start(at)
        crew.finish(0, *range(len(METHODS) + 1, len(METHODS) + _SIZE - 1))
    by_method: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for _, told in sorted(crew.told.items()):
        for name, result in (each for each in told if isinstance(each, tuple)):
            by_method[name].append(result)
    return by_method


@pytest.mark.parametrize("name", [name for name in METHODS if name != STOPS])
def test_all_go_on_and_end_alike(name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    *survivors, joined = runs[name]
    assert len(survivors) == 3
    for result in survivors:
        assert result["numbers"] == list(range(_STEPS))
        assert set(result["worlds"]) == ({4} if name == SPARE else {4, 3})
        assert result["worlds"][-1] == 4
    assert joined["numbers"] == list(range(joined["numbers"][0], _STEPS))
    assert len({(result["round"], result["digest"]) for result in runs[name]}) == 1


@pytest.mark.parametrize("name", CONSERVING)
def test_a_round_keeps_the_mean_of_those_who_make_it(
    name: str, runs: dict[str, list[dict[str, Any]]]
) -> None:
    """After the loss, and with the new worker. Of push-sum, after its masses were made to add up again."""
    numbers = sorted(set().union(*(result["rounds"] for result in runs[name])))
    checked = set()
    for number in numbers:
        of_round = [r["rounds"][number] for r in runs[name] if number in r["rounds"]]
        workers = of_round[0]["workers"]
        if len(of_round) < workers:  # one of them is gone
            continue
        before, after = (_totals([each[when] for each in of_round]) for when in ("before", "after"))
        assert after[1] == pytest.approx(workers, abs=1e-9)
        if before[1] == pytest.approx(workers, abs=1e-9):
            torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-6)
            checked.add(workers)
    assert checked == ({4} if name == SPARE else {3, 4})


def _totals(owned: list[tuple[list[float], float]]) -> tuple[torch.Tensor, float]:
    vectors, masses = zip(*owned, strict=True)
    return torch.tensor(vectors, dtype=torch.float64).sum(0), sum(masses)


@pytest.mark.parametrize("name", [name for name in CONSERVING if name != "overlap"])
def test_a_round_made_anew_is_the_same(name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    attempts = [noted["sent"] for result in runs[name] for noted in result["rounds"].values()]
    again = [sent for sent in attempts if len(sent) > 1]
    assert again  # by some of those who had begun it when the loss came
    assert all(other == first for first, *others in again for other in others)


def test_too_few_for_the_method_stop(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert len(runs[STOPS]) == 3
    for result in runs[STOPS]:
        assert "3 workers are left, and rule=nearest with num_faulty=1" in result["stopped"]
        assert result["numbers"] == [0, 1, 2]
