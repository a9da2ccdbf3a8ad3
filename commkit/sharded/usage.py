"""Which parameters of a unit backward has reached: a scattered buffer holds theirs alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layout import Segment, Unit, padded


class Usage:
    """Watches a unit's parameters between two scatters.

    FSDP shows the whole parameters to forward only; the first forward pass is when they can be watched.
    """

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._reached: set[str] = set()
        self._watched: dict[str, Tensor] = {}
        self._owners = [
            (segment.key, *_owner(unit, segment.key.removeprefix(unit.name).removeprefix(".")))
            for segment in unit.segments
        ]
        assert isinstance(unit.module, nn.Module)
        # After FSDP's own hook, which has gathered the parameters by then.
        self._registrations = [unit.module.register_forward_pre_hook(self._watch)]

    def segments(self, row: int) -> tuple[Segment, ...]:
        """Those in a buffer with rows of ``row`` elements, which hold the gradients of one backward pass.

        Raises:
            RuntimeError: they do not fit what was seen.
        """
        reached = tuple(s for s in self._unit.segments if s.key in self._reached)
        self._reached.clear()
        for segments in (reached, self._trainable):
            if padded(segments) == row:
                return segments
        raise RuntimeError(
            f"FSDP scatters rows of {row} elements for {self._unit.name!r}, but the gradients that backward made there "
            f"have {padded(reached)}, and all of its parameters {padded(self._trainable)}; run the module's forward "
            "through its __call__, and freeze or thaw parameters before attach"
        )

    def close(self) -> None:
        """Watch no more."""
        for registration in self._registrations:
            registration.remove()

    @property
    def _trainable(self) -> tuple[Segment, ...]:
        return tuple(s for s in self._unit.segments if self._unit.parameters[s.key].requires_grad)

    def _watch(self, module: nn.Module, args: Any) -> None:
        for key, owner, name in self._owners:
            p = getattr(owner, name)
            if p.requires_grad and self._watched.get(key) is not p:
                self._watched[key] = p
                self._registrations.append(
                    p.register_post_accumulate_grad_hook(lambda _, key=key: self._reached.add(key))
                )


def _owner(unit: Unit, path: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    assert isinstance(unit.module, nn.Module)
    prefix, _, name = path.rpartition(".")
    return unit.module.get_submodule(prefix), name
