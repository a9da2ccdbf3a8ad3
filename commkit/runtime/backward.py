"""When a backward pass is over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Variable


class EndOfBackward:
    """Calls ``function`` once at the end of each backward pass in which :meth:`arm` was called.

    After what was asked for earlier in the same pass, so after FSDP's own end. What ``function`` raises, ``backward()``
    raises. A pass that fails has no end.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._armed_in = -1

    def arm(self) -> None:
        """Call it inside a backward pass, as often as you like."""
        this = torch._C._current_graph_task_id()
        if this != self._armed_in:
            self._armed_in = this
            # What DDP and FSDP use themselves; autograd has no other word for the end of a pass.
            Variable._execution_engine.queue_callback(self._function)
