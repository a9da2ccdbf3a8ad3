"""Minutes of training in which workers are started and killed at random; see ``faults.py --soak``."""

from __future__ import annotations

import random
import signal
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import commkit
from commkit import Elastic, ElasticOptions
from commkit.membership import Place
from tests.membership.crew import Crew
from tests.membership.training import loss_of, make_model

SCHEME = {"name": "topk", "density": 0.1, "min_numel": 0}
FEWEST, MOST, START = 2, 6, 4
PERIOD_S = 2.0
OPTIONS = ElasticOptions(min_workers=1, heartbeat_s=0.25, limit_s=3.0, start_s=30.0)
_PAUSE_S = 0.05  # what a step computes


def on_worker(place: Place, tell: Callable[[Any], None], folder: str, until: float) -> None:
    """Trains until the time is up, or it is killed. Each step that counts is a line of its own file: a queue's lock could
    die with a process that holds it."""
    model = make_model()
    with (
        Path(folder, f"{place.rank:04d}").open("w") as log,
        Elastic(OPTIONS, place) as members,
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        commkit.attach(model, SCHEME, optimizer, members=members)
        for step in members.steps(1 << 30, model=model, optimizer=optimizer):
            before = step.number
            with step:
                optimizer.zero_grad()
                loss_of(model, step.number, place.rank).backward()
                optimizer.step()
                data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
                sum_ = zlib.crc32(data)
                log.write(f"{time.time()} {before} {members.epoch} {members.world_size} {sum_}\n")
                log.flush()
            if time.time() > until:
                return
            time.sleep(_PAUSE_S)


def soak(minutes: float, seed: int = 0) -> dict[str, Any]:
    """What the logs say of so many minutes.

    Raises:
        RuntimeError: replicas that differ, or a step that counts twice.
    """
    chance, events = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        until = time.time() + 60 * minutes
        # Workers stop one by one when the time is up, each ending an epoch for the others.
        with Crew(on_worker, START, folder, until, deadline_s=60 * minutes + 60) as crew:
            living, started = set(range(START)), time.time()
            time.sleep(PERIOD_S * 2)
            gone: list[int] = []  # left out because they were late, on a busy machine
            while time.time() < until - PERIOD_S:
                gone += (ended := [rank for rank in living if not crew.is_alive(rank)])
                living.difference_update(ended)
                # The last to know the weights is never killed: that would be the end, as it should be.
                training = living & _training(Path(folder))
                kill = (
                    len(living) > FEWEST
                    and len(training) > 1
                    and (len(living) >= MOST or chance.random() < 0.5)
                )
                if kill:
                    victim = chance.choice(sorted(living))
                    crew.signal(victim, signal.SIGKILL)
                    living.remove(victim)
                    events["killed"] += 1
                elif len(living) < MOST:
                    living.add(crew.start())
                    events["started"] += 1
                time.sleep(PERIOD_S)
            how = Counter[str]()
            for rank in sorted(living.union(gone)):
                how[_end_of(crew, rank)] += 1
        logs = [_lines(path) for path in sorted(Path(folder).iterdir())]
    return (
        {"minutes": minutes, "seed": seed, **events}
        | {f"ended {end}": count for end, count in how.items()}
        | _judged(logs, started, until)
    )


def _training(folder: Path) -> set[int]:
    """Ranks that made the last step, or the one before."""
    last = {int(path.name): rows[-1][1] for path in folder.iterdir() if (rows := _lines(path))}
    newest = max(last.values(), default=0)
    return {rank for rank, number in last.items() if number >= newest - 1}


def _end_of(crew: Crew, rank: int) -> str:
    try:
        crew.finish(rank)
    except AssertionError:
        return ": ".join(crew.error_of(rank)) if rank in crew.errors else "late"
    return "well"


def _lines(path: Path) -> list[tuple[float, int, int, int, int]]:
    rows = [line.split() for line in path.read_text().split("\n")[:-1]]
    return [(float(t), int(n), int(e), int(w), int(c)) for t, n, e, w, c in rows]


def _judged(
    logs: list[list[tuple[float, int, int, int, int]]], started: float, until: float
) -> dict[str, Any]:
    sums, epochs = defaultdict[int, set[int]](set), set[int]()
    for log in logs:
        numbers = [number for _, number, _, _, _ in log]
        if numbers != sorted(set(numbers)):
            raise RuntimeError(f"a worker made a step twice or out of order: {numbers}")
        for _, number, epoch, _, sum_ in log:
            sums[number].add(sum_)
            epochs.add(epoch)
    differing = [number for number, found in sums.items() if len(found) > 1]
    if differing:
        raise RuntimeError(f"replicas differ after steps {differing[:10]}")
    times = sorted(t for log in logs for t, *_ in log if t <= until)
    gaps = [b - a for a, b in zip([started, *times], [*times, until], strict=True)]
    sizes = [size for log in logs for _, _, _, size, _ in log]
    return {
        "steps": len(sums),
        "epochs": len(epochs),
        "workers, fewest": min(sizes),
        "workers, most": max(sizes),
        "longest time without a step, s": max(gaps),
        "steps whose replicas differ": 0,
        "steps missing": max(sums) + 1 - len(sums),
    }
