"""What lies where in the flat buffers that FSDP2 gathers and scatters, from public knowledge alone.

A module that ``fully_shard`` was called on (a unit) manages the parameters that no inner unit does, those of children
before a module's own. Each is cut along one dimension into W equal chunks, the last ones short or empty; a flat buffer
holds W rows, and row r the r-th chunk of every parameter, filled up to the size of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True, slots=True)
class Segment:
    """One parameter's place in each row.

    Args:
        key: its fully qualified name.
        rows: its size along the dimension that is cut.
        width: elements of one such row.
        world_size: into how many chunks it is cut.
    """

    key: str
    rows: int
    width: int
    world_size: int

    @property
    def padded(self) -> int:
        """Elements of every chunk, filling included."""
        return -(-self.rows // self.world_size) * self.width

    def valid(self, rank: int) -> int:
        """Elements of chunk ``rank`` that are the parameter's."""
        each = -(-self.rows // self.world_size)
        return max(0, min(each, self.rows - rank * each)) * self.width


@dataclass(frozen=True)
class Unit:
    """A module that ``fully_shard`` was called on.

    Args:
        name: its fully qualified name; "" is the root.
        module: itself.
        parameters: what it manages, by fully qualified name, in the order of its flat buffers.
        segments: their places, in the same order.
    """

    name: str
    module: FSDPModule
    parameters: dict[str, nn.Parameter]
    segments: tuple[Segment, ...]

    @property
    def padded(self) -> int:
        """Elements of a row of the flat buffer of all parameters."""
        return padded(self.segments)


def padded(segments: Sequence[Segment]) -> int:
    """Elements of a row of a flat buffer with ``segments``."""
    return sum(segment.padded for segment in segments)


def pieces(row: Tensor, segments: Sequence[Segment], rank: int) -> list[Tensor]:
    """Views of one row of a flat buffer, chunk ``rank`` of each segment without its filling."""
    parts = row.split_with_sizes([segment.padded for segment in segments])
    return [part[: s.valid(rank)] for part, s in zip(parts, segments, strict=True)]


def find_units(model: nn.Module) -> list[Unit]:
    """The units of ``model`` that manage parameters, outer ones first.

    Raises:
        TypeError: ``fully_shard`` was not called on the model itself.
        ValueError: a parameter that is not sharded along one dimension.
    """
    if not isinstance(model, FSDPModule):
        raise TypeError(
            f"{type(model).__name__} is not sharded; call torch.distributed.fsdp.fully_shard on its layers and "
            "then on the model itself"
        )
    seen: set[nn.Parameter] = set()
    units = []
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            assert isinstance(module, nn.Module)
            own: dict[str, nn.Parameter] = {}
            for key, p in _managed(name, module):
                if isinstance(p, DTensor) and p not in seen:
                    own[key] = p
                    seen.add(p)
            if own:
                segments = tuple(_segment(key, p) for key, p in own.items())
                units.append(Unit(name, module, own, segments))
    return units


def _managed(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of ``module`` that no FSDP module inside it manages, in FSDP's order."""
    dot = f"{prefix}." if prefix else ""
    for name, child in module.named_children():
        if not isinstance(child, FSDPModule):
            yield from _managed(f"{dot}{name}", child)
    yield from ((f"{dot}{name}", p) for name, p in module.named_parameters(recurse=False))


def cut_of(key: str, p: nn.Parameter) -> Shard:
    """How parameter ``key`` is sharded.

    Raises:
        ValueError: not along one dimension.
    """
    assert isinstance(p, DTensor)
    cuts = [place for place in p.placements if isinstance(place, Shard)]
    if len(cuts) != 1:
        raise ValueError(
            f"parameter {key!r} has the placements {p.placements}; commkit needs it sharded along one dimension, "
            "as by fully_shard without tensor parallelism"
        )
    return cuts[0]


def _segment(key: str, p: nn.Parameter) -> Segment:
    assert isinstance(p, DTensor)
    cut = cut_of(key, p)
    size = p.device_mesh.size(p.placements.index(cut))
    rows = p.shape[cut.dim]
    return Segment(key, rows, p.numel() // max(rows, 1), size)
