"""An optimizer whose state is cut finer than the weights, tier by tier of a mesh."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from ..clipping import clip_coefficient, mean_norm, require_norm
from ..comm import DistComm, nbytes
from ..compressors import NoCompression
from ..metrics import StepStats, profiler_range
from ..policy import Policy
from ..registry import spec
from ..runtime.meter import StepMeter
from ..runtime.shards import local
from ..types import SHARD, WHOLE, Compressor, StateDict, section
from .exchange import OneHop
from .gather import gather_into
from .layout import Segment, padded, pieces
from .message import RowCodec
from .start import follow_first

_STATE, LAYOUT = "optimizer", "layout"
NamedGroups: TypeAlias = "Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]]"


@dataclass(frozen=True)
class PartitionScheme:
    """How gradients and weights travel over the axes of a mesh that the optimizer's state is cut over, fastest first.

    Call it with named parameters: ``scheme(model.named_parameters(), torch.optim.AdamW, mesh, lr=1e-3)``.

    Args:
        tiers: names of the axes, from the fastest on; without the one that ``fully_shard`` was given.
        gradients: codes by axis; axes without one carry full precision.
        weights: codes by axis of the updated weights.
        policy: which parameters are compressed, by their whole size.
        seed: base of shared randomness.

    Raises:
        ValueError: no tiers, or a code for an axis that is none of them.
    """

    tiers: Sequence[str] = ("local", "node")
    gradients: Mapping[str, Compressor] = field(default_factory=dict)
    weights: Mapping[str, Compressor] = field(default_factory=dict)
    policy: Policy = field(default_factory=lambda: Policy(min_ndim=2))
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tiers or isinstance(self.tiers, str):
            raise ValueError(
                f"tiers={self.tiers!r} must be a list of axes; use for example ['local', 'node']"
            )
        for name in ("gradients", "weights"):
            for axis in getattr(self, name):
                if axis not in self.tiers:
                    raise ValueError(
                        f"{name} has a code for {axis!r}, which is not among tiers={list(self.tiers)}; name one of those"
                    )

    def __call__(
        self,
        named: NamedGroups,
        optimizer: Callable[..., Optimizer],
        mesh: DeviceMesh,
        max_grad_norm: float = 0.0,
        **settings: Any,
    ) -> PartitionedOptimizer:
        return PartitionedOptimizer(named, optimizer, mesh, self, max_grad_norm, **settings)


@dataclass(frozen=True)
class _Tier:
    """One axis.

    Args:
        axis: its name.
        comm: this rank's ranks along it.
        segments: how what a rank has of each parameter before this tier is cut along it.
        scatter: how gradients go.
        gather: how weights come back.
    """

    axis: str
    comm: DistComm
    segments: tuple[Segment, ...]
    scatter: OneHop
    gather: RowCodec


class PartitionedOptimizer(Optimizer):
    """Each state at the tier where it is sent most (Xu et al. 2025): weights are cut over the fastest links, by
    ``fully_shard`` on one axis of the mesh; gradients are averaged and cut tier by tier, until each rank has one piece
    of W; it alone steps that piece; and the new weights come back the same way. With one tier it is ZeRO-1 over the
    replicas of a sharded model: the exchange of gradients ends at their owner.

    Per step and rank, of the n/d_w elements that a rank has of the weights: each tier of w ranks scatters (w-1)/w of what
    the tiers before have left, and gathers as much. State of the inner optimizer: 1/W of the model, in float32.

    Step it like any optimizer; ``zero_grad`` is of the model's gradients. It is for inner optimizers that treat every
    element alike (SGD, AdamW, Lion ...): one that needs a whole tensor sees a piece.

    Args:
        named: names and parameters, as of ``model.named_parameters()`` after ``fully_shard``, or groups of such,
            ``{"params": [(name, p), ...], "weight_decay": 0.0}``; or of a plain model, whose whole weights each rank
            then has.
        optimizer: builds the inner one, from pieces: ``torch.optim.AdamW``.
        mesh: whole, with an axis for each tier.
        scheme: tiers and codes.
        max_grad_norm: clip gradients by their whole norm, after they were averaged. 0 is off.
        settings: of the inner optimizer.

    Raises:
        ValueError: parameters without names, a mesh that lacks an axis, or parameters that are cut along another
            dimension than their first.
    """

    def __init__(
        self,
        named: NamedGroups,
        optimizer: Callable[..., Optimizer],
        mesh: DeviceMesh,
        scheme: PartitionScheme,
        max_grad_norm: float = 0.0,
        **settings: Any,
    ) -> None:
        require_norm("max_grad_norm", max_grad_norm)
        super().__init__(named, {"lr": settings.get("lr", 0.0)})
        self._named = _names_of(self.param_groups)
        names = mesh.mesh_dim_names or ()
        for axis in scheme.tiers:
            if axis not in names:
                raise ValueError(
                    f"tiers has {axis!r}, but the mesh's axes are {list(names)}; name its axes with mesh_dim_names"
                )
        self.mesh = mesh
        self._scheme = scheme
        self._max_grad_norm = max_grad_norm
        self._steps = 0
        self._starts = {name: _start_of(name, p) for name, p in self._named.items()}
        shapes = {name: p.shape for name, p in self._named.items()}
        self._tiers: list[_Tier] = []
        self._sent = DistComm(mesh.get_group(scheme.tiers[0]))  # counts for all tiers
        left = {name: local(p.detach()).numel() for name, p in self._named.items()}
        for axis in scheme.tiers:
            ranks = mesh.get_group(axis)
            comm = self._sent.joined(ranks, axis)
            cut = tuple(Segment(name, numel, 1, comm.world_size) for name, numel in left.items())

            def codec(code: Compressor | None) -> RowCodec:
                return RowCodec(code or NoCompression(), scheme.policy, shapes, scheme.seed)

            scatter = OneHop(codec(scheme.gradients.get(axis)), comm)
            self._tiers.append(_Tier(axis, comm, cut, scatter, codec(scheme.weights.get(axis))))
            weights = (p for group in self.param_groups for p in group["params"])
            follow_first(weights, DistComm(ranks))  # not counted
            for segment in cut:
                self._starts[segment.key] += comm.rank * segment.padded
            left = {segment.key: segment.valid(comm.rank) for segment in cut}
        first = next(iter(self._named.values()))
        self._shards = (
            DistComm(first.device_mesh.get_group()) if isinstance(first, DTensor) else None
        )
        self._pieces = {name: nn.Parameter(x) for name, x in self._own_pieces().items()}
        self.inner = optimizer(self._groups_of_pieces(), **settings)
        self.last_step = StepStats()
        self._meter = StepMeter(self._sent)

    def require_parameters_of(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: a trainable parameter of ``model`` is not in this optimizer under its name.
        """
        for name, p in model.named_parameters():
            if p.requires_grad and self._named.get(name) is not p:
                raise ValueError(
                    f"parameter {name!r} of the model is not in the optimizer under that name; build it from "
                    "model.named_parameters() after fully_shard"
                )

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal on all ranks."""
        return {
            "scheme": spec(self._scheme),
            "optimizer": type(self.inner).__name__,
            "parameters": {n: f"{tuple(p.shape)} {p.dtype}" for n, p in self._named.items()},
        }

    @property
    def traffic(self) -> dict[str, int]:
        """Wire bytes that this rank has sent along each axis so far, the first weights not counted."""
        return {tier.axis: self._sent.bytes.labelled(tier.axis) for tier in self._tiers}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Average the gradients, step this rank's pieces, and let everybody have the new weights. Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = time.perf_counter()
        with profiler_range("scatter_gradients"):
            for piece, gradient in zip(self._pieces.values(), self._scattered(), strict=True):
                piece.grad = gradient.to(piece.dtype)
        self._clip()
        for inner, group in zip(self.inner.param_groups, self.param_groups, strict=True):
            inner["lr"] = group["lr"]
        self.inner.step()
        with profiler_range("gather_weights"):
            self._gathered()
        self._meter.add(time.perf_counter() - start)
        stats = StepStats(
            step=self._steps,
            dense_bytes=sum(nbytes(local(p.detach())) for p in self._named.values()),
            num_contributors=self._world_size,
        )
        measured = self._meter.close(stats, exposed=0.0)
        # Nothing goes on beside the collectives.
        self.last_step = dataclasses.replace(measured, exposed_comm_seconds=measured.comm_seconds)
        self._steps += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Groups and counters, equal on all ranks; that of the pieces is :class:`PartitionState`'s."""
        return {
            "param_groups": [
                {k: v for k, v in g.items() if k != "params"} for g in self.param_groups
            ],
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self._steps = state_dict["steps"]
        # The weights were loaded by then: they are what pieces are cut from.
        for name, x in self._own_pieces().items():
            self._pieces[name].data.copy_(x)

    def _groups_of_pieces(self) -> list[dict[str, Any]]:
        kept = ("params", "param_names")
        return [
            {k: v for k, v in group.items() if k not in kept}
            | {"params": [self._pieces[n] for n in group["param_names"] if n in self._pieces]}
            for group in self.param_groups
        ]

    @property
    def layout(self) -> list[int]:
        """Ranks along each axis, fastest first."""
        shards = 1 if self._shards is None else self._shards.world_size
        return [shards, *(tier.comm.world_size for tier in self._tiers)]

    @property
    def _world_size(self) -> int:
        return math.prod(self.layout)

    @property
    def _dtype(self) -> torch.dtype:
        dtype = torch.float32
        for p in self._named.values():
            dtype = torch.promote_types(dtype, p.dtype)
        return dtype

    def _own_pieces(self) -> dict[str, Tensor]:
        """Copies of the elements that this rank steps, flat, in at least float32."""
        flats = {n: local(p.detach()).reshape(-1).to(self._dtype) for n, p in self._named.items()}
        for tier in self._tiers:
            for segment in tier.segments:
                at = tier.comm.rank * segment.padded
                flats[segment.key] = flats[segment.key][at : at + segment.valid(tier.comm.rank)]
        return {name: x.clone() for name, x in flats.items()}

    def _scattered(self) -> list[Tensor]:
        """The mean gradients of this rank's pieces."""
        flats = [_flat_gradient(p).to(self._dtype) for p in self._named.values()]
        for tier in self._tiers:
            if tier.comm.world_size == 1:
                continue
            rows = torch.cat(
                [_rows(x, s) for x, s in zip(flats, tier.segments, strict=True)], dim=1
            )
            out = rows.new_empty(rows.shape[1])
            tier.scatter.mean_into(out, rows, tier.segments, self._steps)
            flats = pieces(out, tier.segments, tier.comm.rank)
        return flats

    def _gathered(self) -> None:
        """New weights for everybody, slowest tier first."""
        flats = [piece.detach() for piece in self._pieces.values()]
        for tier in reversed(self._tiers):
            if tier.comm.world_size == 1:
                continue
            chunks = flats[0].new_zeros(padded(tier.segments))
            for own, x in zip(pieces(chunks, tier.segments, tier.comm.rank), flats, strict=True):
                own.copy_(x)
            rows = chunks.new_empty(tier.comm.world_size, chunks.numel())
            gather_into(rows, chunks, tier.segments, tier.gather, tier.comm, self._steps)
            of_ranks = [pieces(row, tier.segments, r) for r, row in enumerate(rows)]
            flats = [torch.cat(of_one) for of_one in zip(*of_ranks, strict=True)]
        for p, x in zip(self._named.values(), flats, strict=True):
            weights = local(p.detach())
            weights.copy_(x.view(weights.shape))

    def _clip(self) -> None:
        if not self._max_grad_norm:
            return
        gradients = {n: piece.grad for n, piece in self._pieces.items() if piece.grad is not None}
        square = torch.tensor([mean_norm(gradients, None) ** 2], dtype=torch.float64)
        square = square.to(next(iter(self._pieces.values())).device)
        for comm in (*(tier.comm for tier in self._tiers), self._shards):
            if comm is not None:
                square = comm.all_reduce(square)
        coefficient = clip_coefficient(float(square.sqrt()), self._max_grad_norm)
        if coefficient < 1:
            for g in gradients.values():
                g.mul_(coefficient)


class PartitionState:
    """What the ranks of a :class:`PartitionedOptimizer` keep of their pieces, for :mod:`commkit.checkpoint`: cut anew for
    any other mesh."""

    def __init__(self, optimizer: PartitionedOptimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> StateDict:
        """Plain tensors: of each piece under where it starts in its flat parameter, and numbers that all ranks share."""
        state: StateDict = {LAYOUT: torch.tensor(self._optimizer.layout)}
        for name, piece in self._optimizer._pieces.items():
            start = self._optimizer._starts[name]
            kept = {"weight": piece.detach(), **self._optimizer.inner.state[piece]}
            for what, x in kept.items():
                if isinstance(x, Tensor) and x.ndim:
                    state[f"{_STATE}/{SHARD}/{what}::{name}@{start}"] = x
                else:
                    state[f"{_STATE}/{what}::{name}"] = torch.as_tensor(x)
        return state

    def fits(self, layout: Tensor) -> bool:
        """Whether pieces saved with ``layout`` are cut as they are here."""
        return layout.tolist() == self._optimizer.layout

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state of this rank, or one that was merged of all ranks' of another mesh."""
        own = section(section(state, _STATE), SHARD)
        wholes = section(section(state, _STATE), WHOLE)
        numbers = {
            key: x for key, x in section(state, _STATE).items() if "/" not in key.partition("::")[0]
        }
        for name, piece in self._optimizer._pieces.items():
            start, kept = self._optimizer._starts[name], {}
            for key, x in own.items():
                what, _, rest = key.partition("::")
                if rest == f"{name}@{start}":
                    kept[what] = x.clone()
            for key, x in wholes.items():
                what, _, rest = key.partition("::")
                if rest == name:
                    part = x.new_zeros(piece.numel())
                    there = x[start : start + piece.numel()]
                    part[: there.numel()] = there
                    kept[what] = part
            for key, x in numbers.items():
                what, _, rest = key.partition("::")
                if rest == name:
                    kept[what] = x.clone()
            piece.data.copy_(kept.pop("weight"))
            if kept:
                self._optimizer.inner.state[piece] = {
                    what: x.to(piece.device) if x.ndim else x for what, x in kept.items()
                }


def _names_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    named: dict[str, nn.Parameter] = {}
    for group in groups:
        if "param_names" not in group:
            raise ValueError(
                "parameters have no names, by which their pieces are saved; give model.named_parameters(), or groups "
                "with tuples (name, parameter)"
            )
        named |= dict(zip(group["param_names"], group["params"], strict=True))
    return {name: p for name, p in named.items() if p.requires_grad}


def _flat_gradient(p: nn.Parameter) -> Tensor:
    """Of this rank's shard; zeros if backward did not reach it here, as it may have elsewhere."""
    if p.grad is None:
        return torch.zeros_like(local(p.detach())).reshape(-1)
    return local(p.grad.detach()).reshape(-1)


def _rows(flat: Tensor, segment: Segment) -> Tensor:
    """(n,) -> (W, padded): one chunk in each row, filled up with zeros."""
    whole = flat.new_zeros(segment.world_size * segment.padded)
    whole[: flat.numel()] = flat
    return whole.view(segment.world_size, segment.padded)


def _start_of(name: str, p: nn.Parameter) -> int:
    """Where this rank's shard begins in the flat parameter.

    Raises:
        ValueError: it is cut along another dimension than its first, or several.
    """
    if not isinstance(p, DTensor):
        return 0
    place = p.placements[0]
    if p.device_mesh.ndim != 1 or not isinstance(place, Shard) or place.dim != 0:
        raise ValueError(
            f"parameter {name!r} has placements {p.placements}; give fully_shard one axis of the mesh, and no "
            "shard_placement_fn"
        )
    each = -(-p.shape[0] // p.device_mesh.size())
    rows = min(p.device_mesh.get_local_rank() * each, p.shape[0])
    return rows * (p.numel() // max(p.shape[0], 1))
