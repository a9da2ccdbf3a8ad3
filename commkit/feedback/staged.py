"""Tensors by name whose changes wait until the step is known to be good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..ops import empty
from ..types import StateDict


class StagedTensors:
    """A dictionary of tensors with one level of undo.

    Between ``stage`` and ``commit`` both the old and the new tensor are alive.

    Args:
        recycle: on a CPU, where fresh memory costs more than what is written to it, the tensor that a commit
            makes useless is kept for :meth:`fresh`: twice the memory, for good. What anybody else was shown
            is never written over.
    """

    def __init__(self, recycle: bool = False) -> None:
        self._current: dict[str, Tensor] = {}
        self._staged: dict[str, Tensor | None] = {}
        self._recycle = recycle
        self._spare: dict[str, Tensor] = {}
        self._shown: set[str] = set()  # of what is current

    def get(self, key: str) -> Tensor | None:
        return self._current.get(key)

    def staged(self, key: str) -> Tensor | None:
        """What will take the place of the tensor; None: nothing was staged, or its removal."""
        return self._staged.get(key)

    def get_like(self, key: str, x: Tensor, what: str) -> Tensor | None:
        """The tensor that goes with ``x``; ``what`` it is called in the message.

        Raises:
            ValueError: it has another shape.
        """
        value = self._current.get(key)
        if value is not None and value.shape != x.shape:
            raise ValueError(
                f"{what} of {key!r} has shape {tuple(value.shape)} but the tensor has "
                f"{tuple(x.shape)}; load state of the same model, or start without it"
            )
        return value

    def fresh(self, key: str, like: Tensor) -> Tensor:
        """Memory for the next tensor of ``key``: contiguous, of the shape and the work dtype of ``like``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        spare = self._spare.pop(key, None)
        wanted = like.shape, dtype, like.device
        if spare is not None and (spare.shape, spare.dtype, spare.device) == wanted:
            return spare
        return empty(like.shape, dtype, like.device)

    def stage_sum(self, key: str, change: Tensor) -> Tensor:
        """The tensor of ``key``, if there is one, and ``change``: staged, in memory of its own."""
        before, after = self._current.get(key), self.fresh(key, change)
        after.copy_(change) if before is None else torch.add(before, change, out=after)
        self.stage(key, after)
        return after

    def stage(self, key: str, value: Tensor | None) -> None:
        """``value`` replaces the tensor at ``commit(True)``; None removes it."""
        self._staged[key] = value

    def commit(self, ok: bool) -> None:
        """Make all staged changes, or forget them."""
        for key, value in self._staged.items():
            useless = value
            if ok:
                useless = self._current.pop(key, None)
                if key in self._shown:
                    self._shown.remove(key)
                    useless = None
                if value is not None:
                    self._current[key] = value
            self._keep(key, useless if value is not None else None)
        self._staged.clear()

    def _keep(self, key: str, useless: Tensor | None) -> None:
        if useless is None:
            self._spare.pop(key, None)
        elif self._recycle and useless.device.type == "cpu" and useless.is_contiguous():
            self._spare[key] = useless

    def __contains__(self, key: str) -> bool:
        return key in self._current

    def items(self) -> Iterator[tuple[str, Tensor]]:
        self._shown.update(self._current)
        yield from self._current.items()

    def values(self) -> Iterator[Tensor]:
        yield from self._current.values()

    def state_dict(self) -> StateDict:
        return dict(self.items())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace everything by copies of ``state``'s tensors."""
        self._staged.clear()
        self._spare.clear()
        self._shown.clear()
        self._current = {key: value.detach().clone() for key, value in state.items()}


def recycled() -> StagedTensors:
    """As a default of a dataclass."""
    return StagedTensors(recycle=True)


_BETWEEN = "::"  # not a part of any parameter's name


def joined(plain: StagedTensors, others: Mapping[str, StagedTensors]) -> StateDict:
    """One state: ``plain`` under parameter names, each of ``others`` under ``WHAT::NAME``."""
    state = plain.state_dict()
    for what, tensors in others.items():
        state |= {f"{what}{_BETWEEN}{name}": value for name, value in tensors.items()}
    return state


def parted(
    state: Mapping[str, Tensor], plain: StagedTensors, others: Mapping[str, StagedTensors]
) -> None:
    """Load what :func:`joined` made.

    Raises:
        ValueError: an entry that belongs to none of them.
    """
    parts: dict[str, StateDict] = {what: {} for what in others}
    rest: StateDict = {}
    for key, value in state.items():
        what, between, name = key.partition(_BETWEEN)
        if not between:
            rest[key] = value
        elif what in parts:
            parts[what][name] = value
        else:
            raise ValueError(
                f"state {key!r} belongs to another feedback; resume with the scheme that saved it"
            )
    plain.load_state_dict(rest)
    for what, tensors in others.items():
        tensors.load_state_dict(parts[what])
