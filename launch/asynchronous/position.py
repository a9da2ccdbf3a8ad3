"""How far a run has come, for its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Position:
    """
    Args:
        digest: of the data.
        step: done, per worker.
        tokens: trained on, of all workers.
        seconds: of training, also before the last resumption.
    """

    digest: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: the run began with other data.
        """
        if state["digest"] != self.digest:
            raise ValueError(
                f"--resume: the data has digest {self.digest}, but the run began with {state['digest']}; restore the "
                "data or give another --out"
            )
        vars(self).update(state)
