"""Runs a function on several ranks that mpirun has started, as ``harness.run_ranks`` does on processes of its own."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1
_GRACE_S = 15.0


def find_mpirun() -> str | None:
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


needs_mpi = pytest.mark.skipif(
    find_mpirun() is None or find_spec("mpi4py") is None,
    reason="mpi4py or Open MPI is not installed (pip: commkit[mpi])",
)


def run_mpi(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    deadline_s: float = 100.0,
    dying: Collection[int] = (),
) -> list[Any]:
    """``function(rank, world_size, *args)`` on ``world_size`` ranks of MPI; results in rank order. Ranks in ``dying``
    end without a result, which is then None; the others survive it."""
    mpirun = find_mpirun()
    assert mpirun is not None
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        task = (function.__module__, function.__qualname__, args)
        (directory / "task").write_bytes(pickle.dumps(task))
        words = [mpirun, "--with-ft", "ulfm", "-n", str(world_size)]
        words += ["--map-by", f"ppr:{world_size}:node:oversubscribe", "--bind-to", "none"]
        words += [sys.executable, "-m", "tests.mpi", str(directory), str(0.8 * deadline_s)]
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        environment = {**os.environ, **root, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        awaited = [directory / str(rank) for rank in range(world_size) if rank not in dying]
        try:
            output = _output(process, awaited, deadline_s)
        finally:
            if process.poll() is None:  # the test was interrupted
                _end(process)
        results, failed = [], {}
        for rank in range(world_size):
            file = directory / str(rank)
            if not file.exists():
                if rank not in dying:
                    failed[rank] = "it died without a word"
                results.append(None)
                continue
            ok, value = pickle.loads(file.read_bytes())
            results.append(value)
            if not ok:
                failed[rank] = value
    if failed:
        raise AssertionError("\n".join(f"rank {r}:\n{text}" for r, text in failed.items()) + output)
    return results


def _output(process: subprocess.Popen[str], awaited: list[Path], deadline_s: float) -> str:
    """What was printed, once mpirun has ended. With a killed rank it sometimes does not; it is ended when all results
    have been there for a while."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return process.communicate(timeout=1.0)[0]
        except subprocess.TimeoutExpired:
            if all(file.exists() for file in awaited):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                break
    output = _end(process)
    if not all(file.exists() for file in awaited):
        raise TimeoutError(f"no end within {deadline_s:g} s:\n{output}")
    return output


def _end(process: subprocess.Popen[str]) -> str:
    """End mpirun, which ends its ranks; what they have printed."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=20)[0]
    finally:
        process.kill()


def _end_with_parent() -> None:
    """Also when the tests are killed, mpirun shall end, and end its ranks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _main(directory: Path, patience_s: float) -> None:
    # Where it hangs, if it does; and mpirun ends when its ranks do.
    faulthandler.dump_traceback_later(patience_s, exit=True)
    import torch

    torch.set_num_threads(1)
    module, name, args = pickle.loads((directory / "task").read_bytes())
    function = getattr(importlib.import_module(module), name)
    # Only now: ranks that wait inside MPI keep the processor busy, and others would take for ever to get here.
    from mpi4py import MPI

    rank, world_size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    try:
        outcome = (True, function(rank, world_size, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    unfinished = directory / f"{rank}.partial"
    unfinished.write_bytes(pickle.dumps(outcome))
    unfinished.rename(directory / str(rank))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), float(sys.argv[2]))
