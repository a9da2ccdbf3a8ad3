"""What server and workers have to agree on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...policy import Policy
from ...types import Compressor


@dataclass(frozen=True, slots=True)
class AsyncOptions:
    """Settings of asynchronous local SGD; the same on all ranks, which is checked.

    Args:
        sync_every: H, the inner steps of the fastest worker's tasks. As for DiLoCo: 50 to 500. Larger saves
            bandwidth and makes updates rarer, not staler.
        dynamic: dynamic local updates (DyLU): a worker of speed v gets ``max(min_steps, floor(H v / v_max))``
            steps, so that all come back after about the same time and little is stale. False gives
            everybody H: staleness then grows with the ratio of speeds.
        min_steps: of any task, and of a worker's first, which measures its speed. 5 in the paper's code. A
            worker so slow that it gets no more than this is hardly worth its traffic.
        speed_ema: weight of the newest measurement in a worker's speed, in (0, 1]. Lower it if speeds jitter,
            raise it if they drift.
        num_shards: parts of the data, each with a step count of its own; None is one per worker. A task
            trains on the shard that was visited least. More shards than workers let fast workers take more of the
            data; at least as many as workers are needed, so that no two train on one at the same time.
        grace_s: seconds that the server waits after an arrival for others, so that workers which are nearly
            simultaneous start from the same weights. A small part of a task's duration; 0 answers at once.
        lease_factor: a task that takes longer than this many times what its worker usually takes is given up: its
            shard goes to the next worker, and its result, should it come, is dropped.
        min_lease_s: but no task is given up before that. Well above the transfer of the weights.
        timeout_s: seconds after which silence is an error, and the lease of a worker's first task, whose speed is
            not known. Above the duration of the longest task.
        servers: the ranks that hold the weights; the others are workers. The first one decides the order of
            pushes; several share the parameters between them, for models that are too large for one host's
            memory or network.
        compressor: of pseudo-gradients on their way up; None sends them in full. Weights come down in full.
        policy: which parameters are compressed; its steps count tasks of all workers together.
        inner_state: the inner optimizer's state: "keep" it on the worker from task to task, or "reset" it.
        average_buffers: batch-norm statistics go up and down with the weights; each push moves the server's by
            1/W towards the worker's. Counters: the largest; other integers: the last. False leaves them alone.
        on_worker_error: an exception on a worker ends the training on all ranks ("raise"), or that worker alone
            ("continue"). A worker whose process is killed, or that leaves its ``with`` block, never ends it.
        seed: base of the compressor's shared randomness and of ties between shards.

    Raises:
        ValueError: a value out of range.
    """

    sync_every: int = 100
    dynamic: bool = True
    min_steps: int = 5
    speed_ema: float = 0.5
    num_shards: int | None = None
    grace_s: float = 0.5
    lease_factor: float = 3.0
    min_lease_s: float = 60.0
    timeout_s: float = 1800.0
    servers: tuple[int, ...] = (0,)
    compressor: Compressor | None = None
    policy: Policy = field(default_factory=Policy)
    inner_state: Literal["keep", "reset"] = "keep"
    average_buffers: bool = True
    on_worker_error: Literal["raise", "continue"] = "raise"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sync_every < 1:
            raise ValueError(f"sync_every={self.sync_every} must be >= 1")
        if self.dynamic and not 1 <= self.min_steps <= self.sync_every:
            raise ValueError(
                f"min_steps={self.min_steps} must be from 1 to sync_every={self.sync_every}; use 5"
            )
        if not 0 < self.speed_ema <= 1:
            raise ValueError(f"speed_ema={self.speed_ema} must be in (0, 1]; use 0.5")
        if self.grace_s < 0:
            raise ValueError(f"grace_s={self.grace_s} must be >= 0; use 0 for none")
        if self.lease_factor < 1:
            raise ValueError(f"lease_factor={self.lease_factor} must be >= 1; use 3")
        for name in ("min_lease_s", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        object.__setattr__(self, "servers", tuple(self.servers))
        if not self.servers or len(set(self.servers)) != len(self.servers):
            raise ValueError(
                f"servers={self.servers} must be one or more different ranks; use (0,)"
            )

    def workers(self, world_size: int) -> list[int]:
        """The ranks that train.

        Raises:
            ValueError: no rank is left to train, a server is no rank of the group, or there are fewer shards
                than workers.
        """
        if not set(self.servers) <= set(range(world_size)):
            raise ValueError(f"servers={self.servers} must be ranks of a group of {world_size}")
        workers = [rank for rank in range(world_size) if rank not in self.servers]
        if not workers:
            raise ValueError(
                f"servers={self.servers} leaves none of {world_size} ranks to train; start more ranks"
            )
        if self.num_shards is not None and self.num_shards < len(workers):
            raise ValueError(
                f"num_shards={self.num_shards} must be at least the number of workers, {len(workers)}"
            )
        return workers
