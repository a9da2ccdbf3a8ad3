"""What the loop needs of whatever reduces the gradients: commkit's handle or a baseline."""

from typing import Protocol

from commkit.checkpoint import SchemeState
from commkit.types import Comm


class StepCost(Protocol):
    """What one step's communication cost; the fields of :class:`commkit.StepStats` that are
    recorded. None is "not counted"."""

    @property
    def dense_bytes(self) -> int | None: ...
    @property
    def payload_bytes(self) -> int | None: ...
    @property
    def wire_bytes(self) -> int | None: ...
    @property
    def rounds(self) -> int | None: ...
    @property
    def comm_seconds(self) -> float | None: ...
    @property
    def reduce_seconds(self) -> float | None: ...
    @property
    def exposed_comm_seconds(self) -> float | None: ...
    @property
    def residual_norm(self) -> float | None: ...
    @property
    def num_contributors(self) -> int | None: ...
    @property
    def nonfinite(self) -> bool | None: ...


class Attachment(Protocol):
    """What the loop needs of a scheme at work: :class:`commkit.Handle`,
    :class:`commkit.outer.OuterSync` or :class:`launch.baselines.Baseline`."""

    @property
    def reducer(self) -> SchemeState: ...

    @property
    def comm(self) -> Comm: ...

    @property
    def last_step(self) -> StepCost: ...

    def close(self) -> None: ...
