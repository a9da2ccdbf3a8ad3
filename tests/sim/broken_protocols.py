"""The membership protocol with mistakes that are easily made, to see whether the simulator notices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from commkit.membership import Ledger, Member, Ready, Record, View
from commkit.sim.membership.worker import SimWorker

Patch = pytest.MonkeyPatch


def _prepares_when_it_is_over(patch: Patch) -> None:
    def prepare(member: Member, epoch: int, step: int) -> bool:
        member.prepared = step
        return epoch == member.view.epoch

    patch.setattr(Member, "prepare", prepare)


def _changed(patch: Patch, change: Callable[[Member, View], View]) -> None:
    """Proposals are other ones."""
    original = Member._proposal

    def propose(member: Member, now: float) -> View | None:
        view = original(member, now)
        return view if view is None or view.stop else change(member, view)

    patch.setattr(Member, "_proposal", propose)


def _takes_the_furthest(patch: Patch) -> None:
    def furthest(member: Member, view: View) -> View:
        steps = [s for s in member.ledger.ready.values() if s is not None]
        return dataclasses.replace(view, step=max(steps, default=view.step))

    _changed(patch, furthest)


def _pins_no_donor(patch: Patch) -> None:
    _changed(patch, lambda _, view: dataclasses.replace(view, sources=view.members))


def _takes_the_last_donor(patch: Patch) -> None:
    """The newest member gives the state, whether it has it or not."""
    _changed(patch, lambda _, view: dataclasses.replace(view, sources=view.members[-1:]))


def _never_suspects(patch: Patch) -> None:
    patch.setattr(Member, "_lost", lambda *_: False)


def _does_not_count_members(patch: Patch) -> None:
    original = Member._refusal

    def refusal(member: Member, members: Any, sources: Any, step: int) -> str:
        told = original(member, members, sources, step)
        return "" if "min_workers" in told and members else told

    patch.setattr(Member, "_refusal", refusal)


def _tells_what_is_committed(patch: Patch) -> None:
    original = Member._wish

    def wish(member: Member, now: float) -> Record | None:
        record = original(member, now)
        if isinstance(record, Ready) and record.prepared is not None:
            return dataclasses.replace(record, prepared=member.committed)
        return record

    patch.setattr(Member, "_wish", wish)


def _decides_by_majority(patch: Patch) -> None:
    """Whoever is not ready when half of them are is left out."""
    original = Member._lost

    def lost(member: Member, worker: str, now: float) -> bool:
        ready, members = member.ledger.ready, member.ledger.view.members
        slow = worker in members and worker not in ready and 2 * len(ready) > len(members)
        return slow or original(member, worker, now)

    patch.setattr(Member, "_lost", lost)


def _hears_the_last_epoch(patch: Patch) -> None:
    """A connection of an epoch that is over is taken for one of the present."""

    def disconnected(member: Member, epoch: int, workers: Iterable[str]) -> None:
        member._disconnected.update(workers)

    patch.setattr(Member, "disconnected", disconnected)
    patch.setattr(
        SimWorker, "_closed", lambda self, epoch, name: self.member.disconnected(epoch, [name])
    )


def _takes_late_contributions(patch: Patch) -> None:
    """What was sent in an epoch that is over counts in the present one."""

    def arrival(
        self: SimWorker, peer: SimWorker, key: tuple[int, str, int], value: int
    ) -> Callable[[], None]:
        def arrive() -> None:
            peer._mail[peer._epoch, key[1], key[2]][self.name] = value
            peer._train()

        return peer._guarded(arrive)

    patch.setattr(SimWorker, "_arrival", arrival)


def _counts_a_vote_twice(patch: Patch) -> None:
    """A message that comes twice is counted twice."""
    original = SimWorker._arrival

    def arrival(
        self: SimWorker, peer: SimWorker, key: tuple[int, str, int], value: int
    ) -> Callable[[], None]:
        arrive = original(self, peer, key, value)
        times = []

        def again() -> None:
            times.append(None)
            if len(times) > 1 and key[1] == "done":
                peer._mail[key][f"{self.name} again"] = value
            arrive()

        return again

    patch.setattr(SimWorker, "_arrival", arrival)


def _counts_its_own_deafness(patch: Patch) -> None:
    """As it once was: all that a worker had not heard while it, or the store, was stopped was the others' silence."""

    def heard(member: Member, beats: Mapping[str, int], now: float) -> None:
        gap, member._listened = now - member._listened, now
        for worker, beat in beats.items():
            changed = beat != member._beats.get(worker, -1)
            member._beats[worker] = beat
            member._silent[worker] = 0.0 if changed else member._silent.get(worker, 0.0) + gap

    patch.setattr(Member, "heard", heard)


def _gives_a_group_all_time(patch: Patch) -> None:
    """As it once was: the limit was of steps alone, not of making the group."""
    original = SimWorker._enter

    def enter(self: SimWorker, view: View) -> None:
        original(self, view)
        self.member.rest()

    patch.setattr(SimWorker, "_enter", enter)


def _tries_for_ever(patch: Patch) -> None:
    original = Ledger._begin

    def begin(ledger: Ledger, view: View) -> None:
        original(ledger, view)
        ledger.tries = 0

    patch.setattr(Ledger, "_begin", begin)


# With the first seed that shows it.
BROKEN: dict[str, tuple[Callable[[Patch], None], int]] = {
    "a member works on after it said that it is ready": (_prepares_when_it_is_over, 77),
    "the furthest member decides, not the least": (_takes_the_furthest, 3),
    "a member says what it has committed, not what it has prepared": (_tells_what_is_committed, 33),
    "whoever joins counts as having the state": (_pins_no_donor, 3),
    "a member without the state gives it": (_takes_the_last_donor, 13),
    "nobody is ever given up": (_never_suspects, 3),
    "min_workers is not checked": (_does_not_count_members, 10),
    "a majority goes on without those who are not ready yet": (_decides_by_majority, 0),
    "a connection of an epoch that is over counts": (_hears_the_last_epoch, 56),
    "a contribution to an epoch that is over counts": (_takes_late_contributions, 4),
    "a vote that comes twice counts twice": (_counts_a_vote_twice, 4),
    "a worker takes its own deafness for the silence of others": (_counts_its_own_deafness, 6),
    "making a group may take for ever": (_gives_a_group_all_time, 19),
    "a step is tried for ever": (_tries_for_ever, 19),
}
