"""Things that go wrong at a chosen step of a run: a node slowed, paused or cut off.

plan = FaultPlan.parse(["20:cut:1:2", "50:slow:0:0.5"])
with plan.follow(lab, Path("runs/a/metrics.jsonl")):
    lab.torchrun("launch/train.py", [...], deadline_s=300)
"""

import json
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launch.netlab import processes

_LOOK_S = 1.0  # how often a slowed node is searched for new processes
_POLL_S = 0.02
_UNDO = {"cut": "mend", "pause": "resume", "slow": "resume"}
_ACTIONS = (*_UNDO, "mend", "resume")


class Faulty(Protocol):
    """What a plan acts on: a :class:`launch.netlab.Lab`."""

    nodes: int

    def cut(self, node: int) -> None: ...
    def mend(self, node: int) -> None: ...
    def pause(self, node: int) -> None: ...
    def resume(self, node: int) -> None: ...
    def slow(self, node: int, duty: float) -> None: ...


@dataclass(frozen=True)
class Fault:
    """Do ``action`` to ``node`` when the run has recorded ``step``.

    It takes hold a tenth of a second or so later, while the run goes on.

    Args:
        step: first recorded step at or after which it happens, from 0.
        action: cut, mend, pause, resume or slow.
        node: from 0.
        for_s: seconds after which it is undone; none leaves it so. A run that waits for the node
            makes no further steps, so a later step cannot undo a cut or a pause.
        duty: share of the time that a slowed node runs, above 0 and below 1.
    """

    step: int
    action: str
    node: int
    for_s: float | None = None
    duty: float = 0.5

    def __post_init__(self) -> None:
        if self.action not in _ACTIONS:
            raise ValueError(f"action: got {self.action!r}; choose from {', '.join(_ACTIONS)}")
        if self.step < 0 or self.node < 0:
            raise ValueError(f"step and node: got {self.step} and {self.node}; both start at 0")
        if self.for_s is not None and (self.for_s <= 0 or self.action not in _UNDO):
            raise ValueError(
                f"for_s: got {self.for_s:g} for {self.action}; give seconds above 0 to one of "
                f"{', '.join(_UNDO)}"
            )
        check_duty(self.duty)

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """``STEP:ACTION:NODE[:SECONDS]``, or ``STEP:slow:NODE:DUTY[:SECONDS]``."""
        words = text.split(":")
        slow = len(words) > 1 and words[1] == "slow"
        try:
            if not 3 + slow <= len(words) <= 4 + slow:
                raise ValueError("wrong number of parts")
            return cls(
                step=int(words[0]),
                action=words[1],
                node=int(words[2]),
                for_s=float(words[3 + slow]) if len(words) == 4 + slow else None,
                duty=float(words[3]) if slow else 0.5,
            )
        except ValueError as error:
            raise ValueError(
                f"fault: got {text!r} ({error}); write STEP:ACTION:NODE[:SECONDS] such as "
                "20:cut:1:2, or STEP:slow:NODE:DUTY[:SECONDS]"
            ) from error

    def apply(self, lab: Faulty) -> None:
        if self.action == "slow":
            lab.slow(self.node, self.duty)
        else:
            getattr(lab, self.action)(self.node)

    def undo(self, lab: Faulty) -> None:
        getattr(lab, _UNDO[self.action])(self.node)


class FaultPlan:
    """Faults, each applied once, when a run's ``metrics.jsonl`` reaches their step.

    ``applied`` lists what was done: the fault and the step that was last recorded by then.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = sorted(faults, key=lambda fault: fault.step)
        self.applied: list[tuple[Fault, int]] = []
        self._stop = threading.Event()
        self._error: Exception | None = None

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "FaultPlan":
        """From texts that :meth:`Fault.parse` reads."""
        return cls([Fault.parse(text) for text in texts])

    @contextmanager
    def follow(self, lab: Faulty, metrics: Path) -> Iterator["FaultPlan"]:
        """Watch ``metrics`` in the body; at its end, undo what is to be undone.

        Raises:
            ValueError: a fault names a node that the lab has not.
            Exception: what a fault raised when it was applied, at the end of the body.
        """
        for fault in self.faults:
            if fault.node >= lab.nodes:
                raise ValueError(
                    f"fault: node {fault.node} of {fault}; nodes go from 0 to {lab.nodes - 1}"
                )
        self._stop.clear()
        thread = threading.Thread(target=self._run, args=(lab, metrics), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, lab: Faulty, metrics: Path) -> None:
        waiting = list(self.faults)
        ends: list[tuple[float, Fault]] = []
        reader = StepReader(metrics)
        try:
            while not self._stop.wait(_POLL_S) and (waiting or ends):
                step = reader.latest()
                while waiting and step is not None and waiting[0].step <= step:
                    fault = waiting.pop(0)
                    fault.apply(lab)
                    self.applied.append((fault, step))
                    if fault.for_s is not None:
                        ends.append((time.monotonic() + fault.for_s, fault))
                for due in [end for end in ends if end[0] <= time.monotonic()]:
                    ends.remove(due)
                    due[1].undo(lab)
            for _, fault in ends:
                fault.undo(lab)
        except Exception as error:
            self._error = error


class StepReader:
    """Follows the ``step`` of a growing ``metrics.jsonl``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._step: int | None = None

    def latest(self) -> int | None:
        """The last whole line's step; None before the first."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return None
        if newline:
            self._position += len(whole) + 1
            self._step = int(json.loads(whole.rpartition(b"\n")[2])["step"])
        return self._step


class Slowdown:
    """A thread that lets a node's processes run for ``duty`` of the time.

    Args:
        belongs: which processes.
        duty: share of the time that they run.
        period_s: a stop and a run together, seconds.
        jitter: each stop lasts its share of the period times a number drawn uniformly from
            ``1 - jitter`` to ``1 + jitter``.
        seed: of these numbers.
    """

    def __init__(
        self, belongs: processes.Belongs, duty: float, period_s: float, jitter: float, seed: int
    ) -> None:
        check_duty(duty)
        if period_s < 0.01:
            raise ValueError(f"period_s: got {period_s:g}, but at least 0.01 is needed; raise it")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter: got {jitter:g}; it goes from 0 to 1")
        self._belongs = belongs
        self._stop_s = (1 - duty) * period_s
        self._run_s = duty * period_s
        self._jitter = jitter
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Let them run, for good."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        pids: list[int] = []
        look_at = 0.0
        while not self._over.is_set():
            if time.monotonic() >= look_at:
                pids = processes.find(self._belongs)
                look_at = time.monotonic() + _LOOK_S
            processes.send(pids, self._belongs, signal.SIGSTOP)
            self._over.wait(self._stop_s * (1 + self._jitter * self._random.uniform(-1, 1)))
            processes.send(pids, self._belongs, signal.SIGCONT)
            self._over.wait(self._run_s)


def check_duty(duty: float) -> None:
    """Raise ValueError unless ``duty`` is above 0 and below 1."""
    if not 0 < duty < 1:
        raise ValueError(
            f"duty: got {duty:g}, the share of time that runs; choose above 0, below 1"
        )
