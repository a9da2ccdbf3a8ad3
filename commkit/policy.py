"""Which tensors are compressed, and from which step on: a function of the step and the tensor alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .types import TensorCtx


@dataclass(frozen=True, slots=True)
class Policy:
    """What the Reducer compresses. Everything else is averaged as it is, in one all-reduce per reduction; what little
    there is beside two-shot's payloads, up to 256 KiB, travels in their messages.

    Args:
        start_step: steps reduced densely first. 0 is legal (state is keyed by parameter, so DDP's bucket
            rebuild does no harm); 10 % of a run, or the learning-rate warm-up, helps biased compressors.
            Schedules of the parts (a rank of PowerSGD by the step) count from step 0, these steps included.
        min_numel: smaller tensors stay dense. Biases and norms are a fraction of a percent of a model and
            are the ones that compression hurts most.
        min_ndim: tensors with fewer dimensions stay dense; 2 keeps every bias and norm scale out.
        exclude: parameters whose name matches one of these shell patterns stay dense, e.g. ``"*embed*"``.

    Raises:
        ValueError: a negative number, or ``exclude`` is one text.
    """

    start_step: int = 0
    min_numel: int = 1024
    min_ndim: int = 0
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("start_step", "min_numel", "min_ndim"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0; use 0 for no limit")
        if isinstance(
            self.exclude, str
        ):  # its letters would be patterns, and "*" matches everything
            raise ValueError(
                f"exclude={self.exclude!r} must be a list of patterns; use exclude=[{self.exclude!r}]"
            )
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def compresses(self, ctx: TensorCtx) -> bool:
        """Whether the tensor is compressed at ``ctx.step``. Empty and non-floating tensors never are."""
        return (
            ctx.step >= self.start_step
            and ctx.numel >= max(self.min_numel, 1)
            and len(ctx.shape) >= self.min_ndim
            and ctx.dtype.is_floating_point
            and not any(fnmatchcase(ctx.key, pattern) for pattern in self.exclude)
        )

    def releases(self, ctx: TensorCtx) -> bool:
        """Whether a tensor that goes densely at ``ctx.step`` takes along what is unsent of it."""
        return True
