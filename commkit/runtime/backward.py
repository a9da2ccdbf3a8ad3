"""When a backward pass is over."""

from __future__ import annotations

from collections.abc import Callable

from torch.autograd import Variable


class EndOfBackward:
    """Calls ``function`` once at the end of each backward pass in which :meth:`arm` was called.

    After what was asked for earlier in the same pass, so after FSDP's own end. What ``function`` raises, ``backward()``
    raises.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._armed = False

    def arm(self) -> None:
        """Call it inside a backward pass, as often as you like."""
        if not self._armed:
            self._armed = True
            # What DDP and FSDP use themselves; autograd has no other word for the end of a pass.
            Variable._execution_engine.queue_callback(self._run)

    def _run(self) -> None:
        self._armed = False
        self._function()
