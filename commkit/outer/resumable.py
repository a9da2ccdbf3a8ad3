"""What a method keeps between rounds, to go on from a checkpoint or in another place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..types import SHARED
from .rounds import Rounds
from .transfer import Transfer


class ResumableRounds(Rounds):
    """Rounds whose state can be saved: what is equal on all ranks in one part, what each rank has alone in another."""

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks: anchors, outer optimizer, position, and rounds in flight, which are waited
        for. Weights and the inner optimizer differ between ranks inside a round: save them per rank, and
        ``reducer`` as such, after this call: until then a transfer may be at work on it."""
        for transfer in self._in_flight:
            self._wait(transfer)
        return self._settled([transfer.state_dict() for transfer in self._in_flight])

    def _settled(self, in_flight: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "step": self.step,
            "round": self.round,
            "skipped_rounds": self.skipped_rounds,
            "begun": dict(self._begun),
            "anchors": None if self._anchors is None else self._anchors.state_dict(),
            "in_flight": in_flight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.round = state["step"], state["round"]
        self.skipped_rounds = state["skipped_rounds"]
        self._begun = dict(state["begun"])
        if self._anchors is not None:
            self._anchors.load_state_dict(state["anchors"])
        self._in_flight = deque(
            Transfer.of_state(
                one, self.units[one["unit"]], self.replica.buffers, self._round_comm.rank
            )
            for one in state["in_flight"]
        )

    @property
    def replica_state(self) -> ReplicaState:
        """What this rank alone has of the method, besides weights and the inner optimizer: give it to
        ``commkit.checkpoint`` as a ``per_rank`` item."""
        return ReplicaState(self)

    def rank_state_dict(self) -> dict[str, Any]:
        """See :attr:`replica_state`. Waits for what is in flight."""
        return {}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`rank_state_dict` gave, after :meth:`load_state_dict`."""

    def after_resize(self) -> None:
        """The state was saved by another number of ranks: local progress is gone.

        Raises:
            RuntimeError: a method that keeps no anchors to restart from.
        """
        if not self.anchored:
            raise RuntimeError(
                f"{type(self).__name__} keeps no anchors, so inside a round its state means nothing to another "
                "number of ranks; resume with as many as saved it, or give it a reducer, which brings anchors"
            )
        self.restart_from_anchors()

    def kept_tensors(self) -> list[Tensor]:
        """What is kept between rounds on this rank besides weights and the inner optimizer's state: all of
        :meth:`state_dict`, what is in flight included, and the reducer's residuals."""
        residuals = {k: v for k, v in self.reducer.state_dict().items() if not k.startswith(SHARED)}
        own = _tensors([self.state_dict(), self.rank_state_dict()])
        unique = {x.data_ptr(): x for x in own}  # common and this rank's may overlap
        for x in (*self.replica.parameters.values(), *self.replica.buffers.values()):
            unique.pop(x.data_ptr(), None)
        return [*unique.values(), *residuals.values()]


class ReplicaState:
    """What one replica alone has, as :mod:`commkit.checkpoint` wants it."""

    def __init__(self, method: ResumableRounds) -> None:
        self._method = method

    def state_dict(self) -> dict[str, Any]:
        return self._method.rank_state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._method.load_rank_state_dict(state_dict)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        if state.dim():
            yield state
    elif isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _tensors(value)
