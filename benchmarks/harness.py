"""What the benchmarks share: ranks as processes, interleaved timing, results.

Ranks are started by :func:`run_ranks` over gloo on loopback, one thread each, with a file for rendezvous, and
never outlive their deadline.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # programs are run as scripts: find `commkit` and `launch`

WORLD_SIZE = 2
_GRACE_S = 5.0  # for the peers of a rank that failed, before they are ended


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Args:
        status: "finished"; "raised" an exception; "died" of a signal; "stopped" by us, because it hung
            until the deadline or because a peer had failed.
        value: what the function returned.
        detail: traceback, or signal and last words on stderr.
        seconds: how long it ran.
    """

    status: Literal["finished", "raised", "died", "stopped"]
    value: Any = None
    detail: str = ""
    seconds: float = 0.0


def _body(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    args: tuple[Any, ...],
    environment: Mapping[str, str],
    join: bool,
) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ.update(environment)
    log = os.open(f"{folder}/{rank}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)  # gloo's last words come from C++
    torch.set_num_threads(1)
    try:
        if join:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=120),
            )
        outcome = Outcome("finished", function(rank, world_size, *args))
    except BaseException:
        outcome = Outcome("raised", detail=traceback.format_exc())
    with open(f"{folder}/{rank}.part", "wb") as file:
        pickle.dump(outcome, file)
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.pkl")
    os._exit(0)  # a rank whose peers failed may have a thread that waits for them


def _end_with(parent: int) -> None:
    """A killed program must not leave its ranks behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    deadline_s: float,
    world_size: int = WORLD_SIZE,
    environment: Mapping[str, str] | None = None,
    preload: Sequence[str] = (),
    join: bool = True,
) -> list[Outcome]:
    """``function(rank, world_size, *args)`` in ``world_size`` processes; how each ended, in rank order.

    Args:
        function: at module level of the calling program; its result must be picklable.
        deadline_s: processes that still live then are killed.
        environment: extra variables for the ranks.
        preload: modules that a server imports once and for all; ranks are forked from it, which takes tenths
            of a second. Without them every rank starts from nothing.
        join: whether ranks find a process group; if not, they have to make their own.
    """
    extra = dict(environment or {})
    os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **extra})
    if "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = _context(preload)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_body, args=(function, r, world_size, folder, args, extra, join), daemon=True
            )
            for r in range(world_size)
        ]
        start = time.monotonic()
        for process in processes:
            process.start()
        ended = _wait(processes, folder, start, deadline_s)
        return [_outcome(p, folder, r, ended[r]) for r, p in enumerate(processes)]


def _context(preload: Sequence[str]) -> SpawnContext | ForkServerContext:
    if not preload:
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # Python 3.11's server imports with the path that it starts with, not with ours.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


def _wait(
    processes: Sequence[BaseProcess], folder: str, start: float, deadline_s: float
) -> list[float]:
    """Seconds at which each process ended; kills what is left at the deadline."""
    ended: dict[int, float] = {}
    deadline = start + deadline_s
    try:
        while len(ended) < len(processes) and time.monotonic() < deadline:
            for rank, process in enumerate(processes):
                if rank not in ended and not process.is_alive():
                    ended[rank] = time.monotonic() - start
                    if not _finished(folder, rank):
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    now = time.monotonic() - start
    return [ended.get(rank, now) for rank in range(len(processes))]


def _finished(folder: str, rank: int) -> bool:
    path = Path(folder, f"{rank}.pkl")
    return path.exists() and pickle.loads(path.read_bytes()).status == "finished"


def _outcome(process: BaseProcess, folder: str, rank: int, seconds: float) -> Outcome:
    path = Path(folder, f"{rank}.pkl")
    if path.exists():
        told: Outcome = pickle.loads(path.read_bytes())
        return Outcome(told.status, told.value, told.detail, seconds)
    errors = Path(folder, f"{rank}.err")
    words = errors.read_text(errors="replace").strip()[-600:] if errors.exists() else ""
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return Outcome("stopped", detail=f"still running after {seconds:.0f} s; {words}")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Outcome("died", detail=f"{name}: {words}", seconds=seconds)


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """What the ranks returned.

    Raises:
        RuntimeError: a rank did not finish; the message says how each ended.
    """
    if any(o.status != "finished" for o in outcomes):
        raise RuntimeError(
            "\n".join(f"rank {r} {o.status}: {o.detail}" for r, o in enumerate(outcomes))
        )
    return [o.value for o in outcomes]


@dataclass
class Timing:
    """Seconds per step of one arm, one entry per round."""

    wall: list[float]
    cpu: list[float]  # of the whole process, all its threads

    def from_round(self, first: int) -> Timing:
        return Timing(self.wall[first:], self.cpu[first:])


def interleave(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    steps: int,
    fence: Callable[[], object],
    warm_up: int = 1,
    lead: int = 0,
) -> dict[str, Timing]:
    """Time the arms by turns, so that other work on the machine falls on all alike.

    In a round each arm runs a block of ``steps`` calls, between fences (a barrier of the ranks), after
    ``lead`` calls that are not timed; the order rotates from round to round. The first ``warm_up`` rounds
    are run and not counted.
    """
    names = list(arms)
    timings = {name: Timing([], []) for name in names}
    for turn in range(warm_up + rounds):
        shift = turn % len(names)
        order = names[shift:] + names[:shift]
        for name in order if (turn // len(names)) % 2 == 0 else reversed(order):
            for _ in range(lead):
                arms[name]()
            fence()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                arms[name]()
            fence()
            timings[name].wall.append((time.perf_counter() - wall) / steps)
            timings[name].cpu.append((time.process_time() - cpu) / steps)
    return {name: timing.from_round(warm_up) for name, timing in timings.items()}


@dataclass(frozen=True)
class Ratio:
    """Step time of one arm over another's: round by round, and best round over best round."""

    median: float
    low: float
    high: float
    best: float

    @classmethod
    def of(cls, timing: Timing, over: Timing) -> Ratio:
        each = [a / b for a, b in zip(timing.wall, over.wall, strict=True)]
        return cls(median(each), min(each), max(each), min(timing.wall) / min(over.wall))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.2f}..{self.high:.2f}], best/best {self.best:.3f}"


def timing_row(name: str, timing: Timing, over: Timing) -> dict[str, Any]:
    """One line of a timing table."""
    ratio = Ratio.of(timing, over)
    return {
        "arm": name,
        "s/step median": round(median(timing.wall), 4),
        "best": round(min(timing.wall), 4),
        "CPU s/step": round(median(timing.cpu), 4),
        "ratio median": round(ratio.median, 4),
        "min": round(ratio.low, 3),
        "max": round(ratio.high, 3),
        "best/best": round(ratio.best, 4),
    }
