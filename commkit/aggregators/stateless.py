"""The state protocol of aggregators that have none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..types import StateDict


class Stateless:
    """``commit`` and state methods of an aggregator without state."""

    __slots__ = ()

    def commit(self, ok: bool) -> None:
        pass

    def state_dict(self) -> StateDict:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state but got {len(state)} entries (first: "
                f"{next(iter(state))!r}); resume with the scheme that saved them"
            )
