"""What a coordinator and its workers have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..policy import Policy
from ..types import Compressor

Interleave: TypeAlias = Literal["stale", "models"]


@dataclass(frozen=True, slots=True)
class CoordinationOptions:
    """Settings of coordinated training; the same on all ranks, which is checked.

    Args:
        coordinators: the ranks that hold the weights and collect gradients; the others are workers. The first one
            decides who is late; several share the parameters between them, for models that are too large for one
            host's memory or network, and give the same bits as one.
        compressor: of gradients on their way up, any. What it leaves unsent stays with the worker, where
            that converges, and is added to its next gradient. None sends gradients in full.
        broadcast: compressor of the weights on their way down, with what it leaves unsent kept by the coordinator.
            All workers decode the same bits. None sends them in full.
        policy: which parameters both compress; its steps count rounds.
        keep_dropped: what becomes of a gradient that came too late. True: it stays on its worker, which adds it to its
            next one. False: it is lost, as in the papers. None: True with backup workers whose gradients are
            compressed with error feedback, else False. Coded schemes lose nothing: the data of a late vector is in
            others.
        grace_s: seconds that a round stays open after enough has arrived, so that a worker late by a millisecond
            counts. A small part of a step; 0 closes at once. Coded rounds have the mu-rule for it.
        interrupt: a worker drops what it computes when it sees that the next round has begun: it looks between
            chunks, and whenever the user's function asks. False lets it finish, as in the paper on dynamic backup
            workers, whose estimates then know how slow the slow are.
        interleave: how schemes that finish a job only T rounds later are used. "stale": one model takes gradients
            that are T rounds old; consider adaptive braking. "models": T + 1 models are trained in turn, each
            without any staleness.
        max_behind: rounds that a worker may leave unanswered before it is sent no more; when it comes back it gets
            the weights in full, and joins the round under way. So many weights per worker may wait in memory.
        timeout_s: seconds after which silence is an error. Above the duration of the longest round.
        on_worker_error: an exception on a worker ends the training on all ranks ("raise"), or counts as the loss of
            that worker ("continue"). A worker whose process is killed is always just lost.
        seed: base of the compressors' shared randomness.

    Raises:
        ValueError: a value out of range.
    """

    coordinators: Sequence[int] = (0,)
    compressor: Compressor | None = None
    broadcast: Compressor | None = None
    policy: Policy = field(default_factory=Policy)
    keep_dropped: bool | None = None
    grace_s: float = 0.0
    interrupt: bool = True
    interleave: Interleave = "stale"
    max_behind: int = 4
    timeout_s: float = 1800.0
    on_worker_error: Literal["raise", "continue"] = "raise"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "coordinators", tuple(self.coordinators))
        if not self.coordinators or len(set(self.coordinators)) != len(self.coordinators):
            raise ValueError(
                f"coordinators={self.coordinators} must be one or more different ranks; use (0,)"
            )
        if self.grace_s < 0:
            raise ValueError(f"grace_s={self.grace_s} must be >= 0; use 0 for none")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s} must be > 0")
        if self.max_behind < 1:
            raise ValueError(f"max_behind={self.max_behind} must be >= 1; use 4")
        if self.broadcast is not None and not self.broadcast.allows_error_feedback:
            raise TypeError(
                f"broadcast={type(self.broadcast).__name__} makes errors as large as its input, so that weights "
                "would drift away; use another one, such as block_quantize"
            )

    def workers(self, world_size: int) -> list[int]:
        """The ranks that train; worker i of a schedule is the i-th of them.

        Raises:
            ValueError: no rank is left to train, or a coordinator is no rank of the group.
        """
        if not set(self.coordinators) <= set(range(world_size)):
            raise ValueError(
                f"coordinators={self.coordinators} must be ranks of a group of {world_size}"
            )
        workers = [rank for rank in range(world_size) if rank not in self.coordinators]
        if not workers:
            raise ValueError(
                f"coordinators={self.coordinators} leaves none of {world_size} ranks to train; start more ranks"
            )
        return workers
