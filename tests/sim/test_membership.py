"""The membership protocol keeps its promises under thousands of random faults, and the simulator would notice if not."""

from __future__ import annotations

import pytest

from commkit.sim.membership import InvariantError, simulate
from commkit.sim.membership.world import FAULTS

from .broken_protocols import BROKEN

_SEEDS = 600


@pytest.mark.timeout(300)
def test_promises_hold_under_faults() -> None:
    outcomes = [simulate(seed) for seed in range(_SEEDS)]
    finished = [o for o in outcomes if not o.stop]
    assert len(finished) > 0.7 * _SEEDS  # faults are many, and yet most runs end well
    assert max(o.epochs for o in outcomes) > 5
    assert {kind for o in outcomes for kind in o.faults} == {*FAULTS, "store lost"}


def test_a_seed_gives_the_same_run_again() -> None:
    assert [simulate(seed) for seed in range(20)] == [simulate(seed) for seed in range(20)]


def test_many_workers() -> None:
    assert simulate(0, size=24).workers >= 24


@pytest.mark.parametrize("mistake", BROKEN)
def test_broken_protocols_are_found_out(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, seed = BROKEN[mistake]
    simulate(seed)
    patch(monkeypatch)
    with pytest.raises(InvariantError, match=f"seed {seed}: "):
        simulate(seed)
