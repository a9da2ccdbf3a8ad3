"""Named ranges in what torch's profiler shows: ``commkit.reduce``, ``commkit.compress``, ``commkit.all_reduce`` ..."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.autograd.profiler
from torch.autograd.profiler import record_function

_NOTHING: AbstractContextManager[Any] = nullcontext()


def profiler_range(verb: str) -> AbstractContextManager[Any]:
    """``with profiler_range("compress"):`` names the block ``commkit.compress`` in profiles, NVTX and ITT.

    Without a profiler it does nothing: a ``record_function`` costs tens of microseconds then too, and a step has
    many ranges. Reductions run on a thread of their own, which torch's profiler leaves out unless it is told to
    look at all threads: ``profile(experimental_config=_ExperimentalConfig(profile_all_threads=True))``.
    """
    if not torch.autograd.profiler._is_profiler_enabled:
        return _NOTHING
    return record_function(f"commkit.{verb}")
