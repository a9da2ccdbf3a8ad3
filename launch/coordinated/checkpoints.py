"""Checkpoints to which every rank adds a file of its own: ``coordinator_NNNNNN.pt`` or ``worker_NNNNNN.pt``.

One is complete when all coordinators have written theirs. Workers write later, before they compute the next round; what a
worker had left unsent is lost if it is too late for that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commkit.structure import flatten, unflatten
from launch.rundir import RunDirectory


class Checkpoints:
    """Of one rank.

    Args:
        run: whose directory all ranks see.
        coordinators: their ranks; the first makes the directories.
        rank: this one.
    """

    def __init__(self, run: RunDirectory, coordinators: Sequence[int], rank: int) -> None:
        self._run, self._coordinators, self._rank = run, coordinators, rank

    def newest(self) -> Path | None:
        """The newest one in which every coordinator has its part."""
        names = [_coordinator(rank) for rank in self._coordinators]
        complete = [
            directory
            for directory in self._run.complete_checkpoints()
            if all((directory / name).is_file() for name in names)
        ]
        return complete[-1] if complete else None

    def save_coordinator(self, step: int, state: Mapping[str, Any]) -> None:
        """This coordinator's part; the first one's makes the others' a checkpoint, and removes old ones."""
        directory, leads = self._run.checkpoint(step), self._rank == self._coordinators[0]
        partial = directory.with_name(directory.name + ".partial")
        target = partial if leads else directory
        target.mkdir(parents=True, exist_ok=True)
        _write(target / _coordinator(self._rank), state)
        if not leads:
            return
        if directory.is_dir():  # another coordinator was faster
            for file in partial.iterdir():
                file.rename(directory / file.name)
            partial.rmdir()
        else:
            partial.rename(directory)
        self._run.prune_checkpoints()

    def load_coordinator(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest one and this coordinator's part of it, if there is one."""
        newest = self.newest()
        return None if newest is None else (newest, _read(newest / _coordinator(self._rank)))

    def save_worker(self, step: int, state: Mapping[str, Any]) -> None:
        """Into the one of that step, if it is still there."""
        directory = self._run.checkpoint(step)
        if directory.is_dir():
            _write(directory / _worker(self._rank), state)

    def load_worker(self, workers: int) -> dict[str, Any] | None:
        """This worker's own state; the mean of all if they were not as many as ``workers``; None if there is none."""
        newest = self.newest()
        if newest is None:
            return None
        saved, own = sorted(newest.glob("worker_*.pt")), newest / _worker(self._rank)
        if _read(newest / _coordinator(0))["workers"] != workers:
            return _mean([_read(file) for file in saved]) if saved else None
        if own.is_file():
            return _read(own)
        print(
            f"rank {self._rank}: {newest} lacks {own.name}, which was late; what it held is lost",
            flush=True,
        )
        return None


def _coordinator(rank: int) -> str:
    return f"coordinator_{rank:06d}.pt"


def _worker(rank: int) -> str:
    return f"worker_{rank:06d}.pt"


def _write(path: Path, state: Mapping[str, Any]) -> None:
    """Plain tensors, nothing pickled; a reader sees all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(flatten(state), temporary)
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = unflatten(torch.load(path, weights_only=True, map_location="cpu"))
    return state


def _mean(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One worker state of many: residuals are averaged, absent ones counting as zero."""
    slots: dict[str, dict[str, Tensor]] = {}
    for state in states:
        for slot, residuals in state["residuals"].items():
            mean = slots.setdefault(slot, {})
            for name, x in residuals.items():
                mean[name] = mean.get(name, torch.zeros_like(x)) + x / len(states)
    return {"residuals": slots, "saved": max(state["saved"] for state in states)}
