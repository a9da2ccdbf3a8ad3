"""State of an attachment: that of its scheme."""

from collections.abc import Mapping
from typing import Generic, TypeVar

from torch import Tensor

from ..types import StateDict, Stateful

Kept = TypeVar("Kept", bound=Stateful)


class KeepsState(Generic[Kept]):
    """
    Attributes:
        reducer: what is kept from step to step.
    """

    reducer: Kept

    @property
    def failure(self) -> Exception | None:
        """Why the attachment can no longer be used, if so."""
        return None

    def state_dict(self) -> StateDict:
        """What the scheme keeps on this rank, by name. Call it between steps."""
        return self.reducer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.reducer.load_state_dict(dict(state))
