"""How often an optimizer has stepped, and how often gradients were sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..runtime.backward import EndOfBackward


class StepCounter:
    """Counts the steps of ``optimizer``; without one, it is for others to count.

    Attributes:
        count: steps so far.
    """

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self.count = 0
        self._registration: RemovableHandle | None = None
        if optimizer is not None:
            self._registration = optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.count += 1

    def close(self) -> None:
        """Count no more."""
        if self._registration is not None:
            self._registration.remove()


class PassCounter:
    """Counts the backward passes in which :meth:`mark` was called.

    Attributes:
        count: passes that are over.
        after: called at the end of each.
    """

    def __init__(self) -> None:
        self.count = 0
        self.after: list[Callable[[], None]] = []
        self._end = EndOfBackward(self._ended)

    def mark(self) -> None:
        """This pass counts. Call it inside backward, as often as you like."""
        self._end.arm()

    def _ended(self) -> None:
        self.count += 1
        for function in self.after:
            function()
