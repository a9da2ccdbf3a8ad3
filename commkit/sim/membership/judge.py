"""Sees everything that happens in a simulated run, and knows what must not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ...membership import View


class InvariantError(AssertionError):
    """The protocol broke a promise."""


@dataclass
class Judge:
    """What is promised, whatever goes wrong:

    1. An epoch has one set of members, and on every worker epochs follow one another without a gap.
    2. A step comes to the same on all workers that make it real, so replicas are equal.
    3. No step counts twice, or is left out, on any worker; a verdict takes none back that a worker has made real.
    4. Only members of an epoch make steps real in it.
    5. What a worker has left unsent, together with what of it is in steps that count, is what it has computed: no residual
       is lost or doubled.
    6. Nobody trains with fewer than ``min_workers``, workers that are done included.
    7. A worker that nothing has happened to, or a short pause, is never left out; and training does not stop while
       ``min_workers`` of those are left. (On networks whose delays are short against the limit.)
    8. Everything comes to an end: :class:`~.world.World` sees to that.

    Args:
        seed: of the run, for messages.
        patient_s: pauses that no worker may be left out for.
        min_workers: of the options.
        fair: whether the network is fast enough for the seventh promise.

    Attributes:
        views: the one of each epoch.
        values: what each step came to. The number is made of all contributions, so a step that is done twice, in
            two epochs or by two sets of members, shows.
        commits: steps made real, counted on every worker.
    """

    seed: int
    patient_s: float = 0.0
    min_workers: int = 1
    fair: bool = True
    views: dict[int, View] = field(default_factory=dict)
    values: dict[int, int] = field(default_factory=dict)
    commits: int = 0
    _epochs: dict[str, int] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)
    _sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _hits: Counter[str] = field(default_factory=Counter)

    def require(self, true: bool, what: str) -> None:
        if not true:
            raise InvariantError(f"seed {self.seed}: {what}")

    def hit(self, worker: str, seconds: float) -> None:
        """``worker`` cannot take part for so long. After a second time nobody may rely on it."""
        self._hits[worker] += 1 if seconds <= self.patient_s else 2

    def saw_view(self, worker: str, view: View, left: Mapping[str, str]) -> None:
        """``worker`` has read ``view`` from the log, and of those who had left by then why."""
        last = self._epochs.get(worker, 0)
        self.require(view.epoch == last + 1, f"{worker} goes from epoch {last} to {view.epoch}")
        self._epochs[worker] = view.epoch
        first = self.views.setdefault(view.epoch, view)
        self.require(first == view, f"two views of epoch {view.epoch}: {first} and {view}")
        before = self.views[view.epoch - 1].members if view.epoch > 1 else ()
        done = sum(w in left and not left[w] for w in before)
        if not view.stop:
            enough = len(view.members) + done >= self.min_workers
            self.require(enough, f"{view} has too few, and {done} are done")
        if self.fair:
            self._require_fair(view, [w for w in before if w not in left], done)

    def _require_fair(self, view: View, before: Collection[str], done: int) -> None:
        well = {w for w in before if self._hits[w] < 2}
        if not view.stop:
            out = well - set(view.members)
            self.require(not out, f"{sorted(out)} did nothing wrong and are not in {view}")
        elif "min_workers" in view.stop:
            enough = len(well) + done >= self.min_workers
            self.require(not enough, f"{sorted(well)} did nothing wrong, and yet: {view}")

    def saw_state(self, worker: str, step: int) -> None:
        """``worker`` was given the state after ``step``."""
        self._steps[worker] = step

    def saw_verdict(self, worker: str, real: int, view: View) -> None:
        """``worker``, which has made ``real`` steps real, learns of ``view``, of which it is a source."""
        self.require(
            real <= view.step <= real + 1, f"{worker} has made {real} steps real, but {view}"
        )

    def saw_commit(
        self, worker: str, epoch: int, step: int, value: int, contributors: Collection[str]
    ) -> None:
        self.commits += 1
        inside = epoch in self.views and worker in self.views[epoch].members
        self.require(inside, f"{worker} makes step {step} real outside epoch {epoch}")
        before = self._steps.get(worker, 0)
        self.require(step == before + 1, f"{worker} makes step {step} real after {before}")
        self._steps[worker] = step
        self.require(worker in contributors, f"step {step} is real on {worker} without its part")
        first = self.values.setdefault(step, value)
        self.require(first == value, f"{worker} makes another step {step} real in epoch {epoch}")

    def saw_outcome(self, step: int, parts: Mapping[str, int]) -> None:
        """The first worker has made ``step`` real, of these parts."""
        for worker, sent in parts.items():
            self._sent[worker] += sent

    def saw_end(self, worker: str, real: int, computed: int, residual: int) -> None:
        """``worker`` has ended well after ``real`` steps, of which it has computed so much in all."""
        if real == max(self.values, default=0):
            sent = self._sent[worker]
            self.require(
                computed == sent + residual,
                f"{worker} computed {computed}, of which {sent} counts and {residual} is left",
            )
