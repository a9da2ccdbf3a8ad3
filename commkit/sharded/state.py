"""What a scheme keeps of a sharded model, and how it is dealt anew over another mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor

from ..feedback import ErrorFeedback
from ..reducer import Reducer
from ..types import RANK, WHOLE, StateDict, parameter_of
from .layout import Segment, Unit, cut_of
from .steps import PassCounter, StepCounter

PLACE, _COUNTS = "place", "counts"
_UNSHARDED = f"{RANK}/unsharded/"


@dataclass(frozen=True)
class Place:
    """A rank's place on a mesh of replicas and shards."""

    replica: int
    shard: int
    replicas: int
    shards: int


@dataclass
class ShardedState:
    """State of the replicate axis' reducer, whose tensors are of this rank's shards, and of what is left unsent of whole
    gradients.

    Args:
        place: this rank's.
        segments: of all parameters, by name, on this mesh.
        shapes: of the whole parameters and the dimension that is cut, by name.
        reducer: of the replicate axis, if any.
        feedback: of whole gradients, if any.
        steps: of the optimizer, of which the rounding of weights depends.
        passes: backward passes, of which that of gradients does.
    """

    place: Place
    segments: Mapping[str, Segment]
    shapes: Mapping[str, tuple[torch.Size, int]]
    reducer: Reducer | None = None
    feedback: ErrorFeedback | None = None
    steps: StepCounter = field(default_factory=StepCounter)
    passes: PassCounter = field(default_factory=PassCounter)

    @classmethod
    def of(
        cls,
        units: Sequence[Unit],
        place: Place,
        reducer: Reducer | None,
        feedback: ErrorFeedback | None = None,
        steps: StepCounter | None = None,
        passes: PassCounter | None = None,
    ) -> ShardedState:
        """That of a model with ``units``."""
        segments = {segment.key: segment for unit in units for segment in unit.segments}
        shapes = {n: (p.shape, cut_of(n, p).dim) for u in units for n, p in u.parameters.items()}
        counts = steps or StepCounter(), passes or PassCounter()
        return cls(place, segments, shapes, reducer, feedback, *counts)

    def state_dict(self) -> StateDict:
        """Plain tensors by key, this rank's own."""
        state = {} if self.reducer is None else self.reducer.state_dict()
        if self.feedback is not None:
            state |= {f"{_UNSHARDED}{key}": x for key, x in self.feedback.state_dict().items()}
        state[_COUNTS] = torch.tensor([self.steps.count, self.passes.count])
        return state | {PLACE: torch.tensor(astuple(self.place))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all state by ``state``, saved by this rank on a mesh like this one, or :meth:`merged`.

        Raises:
            ValueError: saved at another place.
        """
        place = place_of(state)
        if place != self.place:
            raise ValueError(
                f"state of {place} was given to {self.place}; residuals belong to a place: load it with "
                "commkit.checkpoint, which also deals them anew"
            )
        self.steps.count, self.passes.count = state[_COUNTS].tolist()
        own = (PLACE, _COUNTS)
        rest = {k: x for k, x in state.items() if k not in own and not k.startswith(_UNSHARDED)}
        if self.reducer is not None:
            self.reducer.load_state_dict(rest)
        if self.feedback is not None:
            unsent = {
                k.removeprefix(_UNSHARDED): x for k, x in state.items() if k.startswith(_UNSHARDED)
            }
            self.feedback.load_state_dict(unsent)

    @property
    def residual_norm(self) -> float:
        """2-norm of what this rank has left unsent."""
        unsharded = 0.0 if self.feedback is None else self.feedback.norm()
        return math.hypot(unsharded, 0.0 if self.reducer is None else self.reducer.residual_norm)

    def merged(self, per_shard: Sequence[StateDict]) -> StateDict:
        """This rank's state, made of what the shards of another mesh held.

        Args:
            per_shard: for each old shard, the merged state of its replicas (:func:`commkit.checkpoint.merge`).
        """
        state: StateDict = {}
        for key in dict.fromkeys(k for each in per_shard for k in each if k != PLACE):
            values = [each.get(key) for each in per_shard]
            name = parameter_of(key)
            if key.startswith(_UNSHARDED) and name in self.segments:
                # Every rank had one of the whole gradient: the mean of all of them.
                present = [x for x in values if x is not None]
                mean = torch.stack(present).sum(0) / len(per_shard)
                state[key] = self._rechunk(mean, name)
            elif self._is_cut(key) and self._are_shards(values, name, len(per_shard)):
                state[key] = self._recut(values, name, len(per_shard))
            else:  # equal in all, or as good from any: a counter, a warm start
                state[key] = next(x for x in values if x is not None)
        return state | {PLACE: torch.tensor(astuple(self.place))}

    def _is_cut(self, key: str) -> bool:
        return parameter_of(key) in self.segments and (
            key.startswith(f"{RANK}/") or f"/{WHOLE}/" in key
        )

    def _are_shards(self, values: Sequence[Tensor | None], name: str, shards: int) -> bool:
        segment = self._segment(name, shards)
        return all(x is None or x.numel() == segment.valid(s) for s, x in enumerate(values))

    def _recut(self, values: Sequence[Tensor | None], name: str, shards: int) -> Tensor:
        """This rank's shard of what the old shards make together; what is absent counts as zero."""
        shape, dim = self.shapes[name]
        segment = self._segment(name, shards)
        like = next(x for x in values if x is not None)
        pieces = []
        for s, value in enumerate(values):
            numel = segment.valid(s)
            x = like.new_zeros(numel) if value is None else value.reshape(-1)
            pieces.append(x.view(_with(shape, dim, numel // segment.width)))
        whole = torch.cat(pieces, dim)
        each = -(-segment.rows // self.place.shards)
        start = min(self.place.shard * each, segment.rows)
        own = whole.narrow(dim, start, min(each, segment.rows - start)).contiguous()
        return own if like.ndim > 1 or len(shape) == 1 else own.view(-1)

    def _rechunk(self, rows: Tensor, name: str) -> Tensor:
        """(W, n) of one chunking to that of this mesh; of the whole gradient either way."""
        segment = self.segments[name]
        old = self._segment(name, rows.shape[0])
        flat = torch.cat([row[: old.valid(r)] for r, row in enumerate(rows)])
        out = flat.new_zeros(segment.world_size, segment.padded)
        at = 0
        for r in range(segment.world_size):
            out[r, : segment.valid(r)] = flat[at : at + segment.valid(r)]
            at += segment.valid(r)
        return out

    def _segment(self, name: str, shards: int) -> Segment:
        segment = self.segments[name]
        return Segment(name, segment.rows, segment.width, shards)


def place_of(state: Mapping[str, Tensor]) -> Place:
    """Where ``state`` was saved."""
    return Place(*state[PLACE].tolist())


def _with(shape: torch.Size, dim: int, size: int) -> list[int]:
    return [size if d == dim else n for d, n in enumerate(shape)]
