"""Runs a function on several ranks: as processes over gloo, or as threads of this one.

Every run has a deadline; a rank that is still alive then is killed and the test fails with what the
others printed.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist

from commkit.sim import ThreadComm, run_threads

__all__ = ["ThreadComm", "run_ranks", "run_threads"]


def _body(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    init_file: str,
    results: Any,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{init_file}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=60),
        )
        dist.barrier()  # a function without collectives may end while a peer still connects to this rank
        outcome = (rank, True, function(rank, world_size, *args))
    except BaseException:
        outcome = (rank, False, traceback.format_exc())
    results.put(pickle.dumps(outcome))  # by value: torch would share memory of a process that ends
    results.close()
    results.join_thread()
    os._exit(0)  # a rank whose peers failed may have a thread that waits for them


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    deadline_s: float = 50.0,
    dying: Collection[int] = (),
) -> list[Any]:
    """``function(rank, world_size, *args)`` on ``world_size`` processes; results in rank order. Ranks in ``dying``
    end without a result, which is then None.

    ``function`` must be importable (module level) and its results picklable.
    """
    # A server that has imported torch forks each rank: tenths of a second in place of several.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "commkit"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        init_file = os.path.join(directory, "rendezvous")
        processes = [
            context.Process(
                target=_body,
                args=(function, rank, world_size, init_file, results, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        collected: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + deadline_s
        try:
            while len(collected) < world_size:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    missing = sorted(set(range(world_size)) - set(collected))
                    raise TimeoutError(f"ranks {missing} did not finish; others: {collected}")
                try:
                    rank, ok, value = pickle.loads(results.get(timeout=min(remaining, 1.0)))
                except queue.Empty:
                    ended = [
                        rank
                        for rank, process in enumerate(processes)
                        if not process.is_alive() and rank not in collected
                    ]
                    collected |= {rank: (True, None) for rank in ended if rank in dying}
                    dead = [processes[rank] for rank in ended if rank not in dying]
                    if dead and results.empty():
                        raise RuntimeError(f"a rank died without a word: {dead}") from None
                    continue
                collected[rank] = (ok, value)
        finally:
            for process in processes:
                process.join(2.0)
                if process.is_alive():
                    process.kill()
    failed = {rank: value for rank, (ok, value) in sorted(collected.items()) if not ok}
    if failed:
        raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items()))
    return [collected[rank][1] for rank in range(world_size)]
