"""Runs trials one after another in a lab."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from launch.compare.failures import find_error
from launch.compare.plan import DDP, ROOT, Trial, words
from launch.interface import VARIABLE
from launch.netlab import DeadlineError, Lab, NodeResult
from launch.netlab.faults import StepReader
from launch.rundir import RunDirectory

FIRST_DEADLINE_S = 3600.0  # until it is known how long plain DDP takes
DEADLINE_FACTOR, DEADLINE_MARGIN_S = 8.0, 120.0  # then this many times as long, and this on top
REFUSED = "error on rank"  # so begins what launch/train.py says of settings that it cannot use
_POLL_S = 0.5
Status = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Args:
        trial: which.
        status: finished, failed, or interrupted from outside.
        error: the line that says why it failed.
        seconds: it took, start and end of its processes included.
        link_bytes: sent on each node's link in all that time, every header included; none on
            loopback.
        load: of the machine when the trial began: its load average over a minute.
    """

    trial: Trial
    status: Status
    error: str | None = None
    seconds: float = 0.0
    link_bytes: list[int] = field(default_factory=list)
    load: float = 0.0


class Executor:
    """Runs trials in a lab.

    Args:
        lab: entered.
        steps: of each run.
        overrides: fields replaced in every recipe.
        ranks_per_node: processes on each node.
        deadline_s: for one run; none is an hour until plain DDP has run, from then on eight times
            its time and two minutes.
    """

    def __init__(
        self,
        lab: Lab,
        steps: int,
        overrides: Sequence[str],
        ranks_per_node: int,
        deadline_s: float | None,
    ) -> None:
        self._lab = lab
        self._steps = steps
        self._overrides = overrides
        self._ranks_per_node = ranks_per_node
        self._deadline_s = deadline_s
        self._ddp_seconds: float | None = None

    def run_all(self, trials: Sequence[Trial], done: Callable[[Outcome], None]) -> None:
        """Run all; ``done`` is told of each, also of one that an exception cuts short.

        A configuration that failed is tried again in later blocks, except if it was refused: its
        settings will not get better.
        """
        refused: dict[str, str] = {}
        bar: tqdm[Any] = tqdm(
            total=len(trials) * self._steps, unit="step", smoothing=0.05, disable=None
        )
        with bar:
            for number, trial in enumerate(trials):
                name = trial.configuration.name
                bar.set_description(f"{name}, seed {trial.seed}, round {trial.round}")
                if name in refused:
                    outcome = Outcome(trial, "failed", refused[name])
                else:
                    outcome = self._run(trial, bar, done)
                bar.n = (number + 1) * self._steps
                bar.refresh()
                done(outcome)
                bar.write(_line(outcome), file=sys.stderr)
                if outcome.error and outcome.error.startswith(REFUSED):
                    refused[name] = outcome.error

    def _run(self, trial: Trial, bar: "tqdm[Any]", done: Callable[[Outcome], None]) -> Outcome:
        start, before, load = time.monotonic(), self._sent(), os.getloadavg()[0]
        metrics = RunDirectory(trial.directory).metrics
        try:
            with _shown(bar, metrics):
                error = self._train(trial)
        except BaseException:  # ctrl-C, or the machine fails us: the report shows where
            done(Outcome(trial, "interrupted", "interrupted", time.monotonic() - start, [], load))
            raise
        seconds = time.monotonic() - start
        shutil.rmtree(RunDirectory(trial.directory).checkpoints, ignore_errors=True)
        if error is None and trial.configuration.name == DDP:
            self._ddp_seconds = max(seconds, self._ddp_seconds or 0.0)
        sent = [now - then for now, then in zip(self._sent(), before, strict=True)]
        return Outcome(trial, "failed" if error else "finished", error, seconds, sent, load)

    def _train(self, trial: Trial) -> str | None:
        """Run ``launch/train.py``; returns why it failed."""
        counted = self._lab.network.interface != "lo"
        try:
            results = self._lab.torchrun(
                ROOT / "launch" / "train.py",
                words(trial, self._steps, self._overrides),
                deadline_s=self._deadline(),
                ranks_per_node=self._ranks_per_node,
                env={VARIABLE: self._lab.network.interface if counted else ""},
                logs=trial.directory / "logs",
            )
        except DeadlineError as error:
            return f"hung: {str(error).splitlines()[0]}; {find_error([str(error)]) or 'no message'}"
        if any(result.returncode for result in results):
            return _describe(results)
        if not RunDirectory(trial.directory).summary.is_file():
            return "ended well but wrote no summary.json"
        return None

    def _deadline(self) -> float:
        if self._deadline_s is not None:
            return self._deadline_s
        if self._ddp_seconds is None:
            return FIRST_DEADLINE_S
        return DEADLINE_FACTOR * self._ddp_seconds + DEADLINE_MARGIN_S

    def _sent(self) -> list[int]:
        if self._lab.network.interface == "lo":
            return []
        return [counters.tx_bytes for counters in self._lab.counters()]


def _line(outcome: Outcome) -> str:
    trial = outcome.trial
    end = outcome.error or f"{outcome.seconds:.0f} s"
    return f"{trial.configuration.name}, seed {trial.seed}, round {trial.round}: {outcome.status}, {end}"


def _describe(results: Sequence[NodeResult]) -> str:
    codes = ", ".join(f"node {r.node}: {r.returncode}" for r in results if r.returncode)
    first = find_error([result.output for result in results])
    if first:
        return first
    tail = next(result.tail for result in results if result.returncode)
    return f"exit status {codes}; {tail.splitlines()[-1] if tail else 'no output'}"


@contextmanager
def _shown(bar: "tqdm[Any]", metrics: Path) -> Iterator[None]:
    """Let ``bar`` follow the steps that a run records while the body runs."""
    over, base, reader = threading.Event(), bar.n, StepReader(metrics)

    def follow() -> None:
        while not over.wait(_POLL_S):
            bar.n = base + (reader.latest() or 0)
            bar.refresh()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
