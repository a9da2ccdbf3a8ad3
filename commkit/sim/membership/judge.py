"""Sees everything that happens in a simulated run, and knows what must not."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...membership import View


class InvariantError(AssertionError):
    """The protocol broke a promise."""


@dataclass
class Judge:
    """
    Attributes:
        views: the one of each epoch.
        values: what each step came to. The number is made of all contributions, so a step that is done twice, in
            two epochs or by two sets of members, shows.
        commits: steps made real, counted on every worker.
    """

    seed: int
    views: dict[int, View] = field(default_factory=dict)
    values: dict[int, int] = field(default_factory=dict)
    commits: int = 0

    def require(self, true: bool, what: str) -> None:
        if not true:
            raise InvariantError(f"seed {self.seed}: {what}")

    def saw_view(self, view: View) -> None:
        first = self.views.setdefault(view.epoch, view)
        self.require(first == view, f"two views of epoch {view.epoch}: {first} and {view}")

    def saw_verdict(self, worker: str, real: int, view: View) -> None:
        """``worker``, which has made ``real`` steps real, learns of ``view``, of which it is a source."""
        self.require(
            real <= view.step <= real + 1, f"{worker} has made {real} steps real, but {view}"
        )

    def saw_commit(self, worker: str, epoch: int, step: int, value: int) -> None:
        self.commits += 1
        self.require(
            worker in self.views[epoch].members,
            f"{worker} makes step {step} real outside epoch {epoch}",
        )
        first = self.values.setdefault(step, value)
        self.require(first == value, f"{worker} makes another step {step} real in epoch {epoch}")
