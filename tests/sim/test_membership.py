"""The membership protocol keeps its promises under thousands of random faults, and the simulator would notice if not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from commkit.membership import Member, View
from commkit.sim.membership import InvariantError, simulate

_SEEDS = 1000


@pytest.mark.timeout(300)
def test_promises_hold_under_faults() -> None:
    outcomes = [simulate(seed) for seed in range(_SEEDS)]
    finished = [o for o in outcomes if not o.stop]
    assert len(finished) > 0.8 * _SEEDS  # faults are many, and yet most runs end well
    assert max(o.epochs for o in outcomes) > 5
    assert {kind for o in outcomes for kind in o.faults} == {
        "kill",
        "vanish",
        "pause",
        "exception",
        "cut from the store",
        "cut from a peer",
        "partition",
        "join",
    }


def test_a_seed_gives_the_same_run_again() -> None:
    assert [simulate(seed) for seed in range(20)] == [simulate(seed) for seed in range(20)]


def test_many_workers() -> None:
    assert simulate(0, size=24).workers >= 24


def _prepares_when_it_is_over(member: Member, epoch: int, step: int) -> bool:
    member.prepared = step
    return epoch == member.view.epoch


def _takes_the_furthest(original: Callable[..., Any]) -> Callable[..., Any]:
    def propose(member: Member, now: float) -> View | None:
        view = original(member, now)
        if view is None or view.stop or not view.sources:
            return view
        steps = [s for s in member.ledger.ready.values() if s is not None]
        return View(view.epoch, view.members, view.sources, max(steps, default=view.step))

    return propose


def _forgets_who_has_the_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def propose(member: Member, now: float) -> View | None:
        view = original(member, now)
        if view is None:
            return view
        return View(view.epoch, view.members, view.members, view.step, view.stop)

    return propose


def _never_suspects(member: Member, worker: str, now: float) -> bool:
    return False


_MUTANTS = {
    "a member works on after it said that it is ready": lambda m: m.setattr(
        Member, "prepare", _prepares_when_it_is_over
    ),
    "the furthest member decides, not the least": lambda m: m.setattr(
        Member, "_proposal", _takes_the_furthest(Member._proposal)
    ),
    "whoever joins counts as having the state": lambda m: m.setattr(
        Member, "_proposal", _forgets_who_has_the_state(Member._proposal)
    ),
    "nobody is ever given up": lambda m: m.setattr(Member, "_lost", _never_suspects),
}


@pytest.mark.parametrize("mutant", _MUTANTS)
def test_broken_protocols_are_found_out(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _MUTANTS[mutant](monkeypatch)
    with pytest.raises(InvariantError, match="seed"):
        _simulate_all(range(200))


def _simulate_all(seeds: range) -> None:
    for seed in seeds:
        simulate(seed)
