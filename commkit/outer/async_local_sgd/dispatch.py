"""Who trains on what, for how long, and until when: leases on shards of the data.

Pure bookkeeping with the time as an argument.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .options import AsyncOptions


@dataclass(frozen=True, slots=True)
class Lease:
    """One task of one worker.

    Args:
        number: of the lease, counting all workers' from 0.
        worker: its rank.
        shard: of the data.
        first_step: the shard's step count when the task begins.
        steps: inner steps to do.
        version: of the weights that it starts from.
        granted: when, on the server's clock.
        deadline: when it is given up.
    """

    number: int
    worker: int
    shard: int
    first_step: int
    steps: int
    version: int
    granted: float
    deadline: float


class Dispatcher:
    """The server's view of its workers and of the data.

    Args:
        options: see there.
        workers: ranks.

    Attributes:
        leases: those that are out, by number.
        speeds: steps per second of the workers that have delivered, without waiting and transfers.
    """

    def __init__(self, options: AsyncOptions, workers: Sequence[int]) -> None:
        self.options = options
        self.leases: dict[int, Lease] = {}
        self.speeds: dict[int, float] = {}
        self._seconds_per_step: dict[int, float] = {}
        shards = len(workers) if options.num_shards is None else options.num_shards
        self._visits = [0] * shards
        self._steps = [0] * shards
        self._again: deque[int] = deque()
        self._granted = 0

    def task_steps(self, worker: int) -> int:
        """H of the worker's next task."""
        options = self.options
        if not options.dynamic:
            return options.sync_every
        if worker not in self.speeds:
            return options.min_steps
        ratio = self.speeds[worker] / max(self.speeds.values())
        return max(options.min_steps, math.floor(options.sync_every * ratio))

    def grant(self, worker: int, version: int, now: float) -> Lease:
        """A task for ``worker``, on the shard that was visited least."""
        shard, steps = self._choose(), self.task_steps(worker)
        lease = Lease(
            self._granted,
            worker,
            shard,
            self._steps[shard],
            steps,
            version,
            now,
            now + self._time_to_live(worker, steps),
        )
        self._granted += 1
        self._visits[shard] += 1
        self.leases[lease.number] = lease
        return lease

    def measure(self, lease: Lease, steps: int, seconds: float, now: float) -> None:
        """The task of ``lease`` came back: ``steps`` were done in ``seconds`` on the worker's own clock."""
        ema = self.options.speed_ema
        for kept, value in (
            (self.speeds, steps / max(seconds, 1e-9)),
            (self._seconds_per_step, (now - lease.granted) / steps),
        ):
            before = kept.get(lease.worker, value)
            kept[lease.worker] = (1 - ema) * before + ema * value

    def settle(self, lease: Lease, steps: int) -> None:
        """The task's work is in the weights: its shard has moved on."""
        del self.leases[lease.number]
        self._steps[lease.shard] += steps

    def give_up(self, lease: Lease) -> None:
        """The task's work is lost: its shard is the next to be trained on, from where it was."""
        del self.leases[lease.number]
        self._visits[lease.shard] -= 1
        self._again.append(lease.shard)

    def expired(self, now: float) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.deadline <= now]

    def of_worker(self, worker: int) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.worker == worker]

    def forget(self, worker: int) -> None:
        """The worker will not come back; the fastest of the others sets the pace from now on."""
        self.speeds.pop(worker, None)
        self._seconds_per_step.pop(worker, None)

    def next_number(self) -> int:
        """A number that no lease has or will have."""
        self._granted += 1
        return self._granted - 1

    def state_dict(self) -> dict[str, Any]:
        """Tasks that are out count as never given: whoever resumes gives them anew."""
        visits = list(self._visits)
        for lease in self.leases.values():
            visits[lease.shard] -= 1
        return {"visits": visits, "steps": list(self._steps), "granted": self._granted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: another number of shards.
        """
        if len(state["visits"]) != len(self._visits):
            raise ValueError(
                f"the state has {len(state['visits'])} shards but num_shards is {len(self._visits)}; set "
                f"num_shards={len(state['visits'])}"
            )
        self._visits, self._steps = list(state["visits"]), list(state["steps"])
        self._granted = state["granted"]
        self._again.clear()

    def _choose(self) -> int:
        if self._again:
            return self._again.popleft()
        taken = {lease.shard for lease in self.leases.values()}
        free = [shard for shard in range(len(self._visits)) if shard not in taken]
        fewest = min(self._visits[shard] for shard in free)
        least = [shard for shard in free if self._visits[shard] == fewest]
        draw = zlib.crc32(f"{self.options.seed}/shard/{self._granted}".encode())
        return least[draw % len(least)]

    def _time_to_live(self, worker: int, steps: int) -> float:
        if worker not in self._seconds_per_step:
            return self.options.timeout_s
        expected = steps * self._seconds_per_step[worker]
        return max(self.options.min_lease_s, self.options.lease_factor * expected)
