"""The parts of a model that are synchronised together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """The whole model, a fragment, or a layer.

    Args:
        index: its place among the method's units.
        parameters: names, in the model's order; equal on all ranks.
        buffers: names of the buffers that go with them.
    """

    index: int
    parameters: tuple[str, ...]
    buffers: tuple[str, ...] = ()
