"""FSDP2: models that ``torch.distributed.fsdp.fully_shard`` was called on, through its public interface."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from ..comm import DistComm, private_comm
from ..metrics import StepStats
from ..optim import CommOptimizer
from ..registry import spec
from ..runtime.agreement import agree, mark_attached, refuse_attached, trainable_parameters
from ..runtime.alarm import Alarm
from ..runtime.meter import StepMeter
from ..runtime.worker import ReductionWorker
from ..sharded import Exchange, ShardedScheme, Unit, find_units
from ..sharded.exchange import OneHopWithFeedback
from ..sharded.gather import CompressedAllGather, CountedAllGather
from ..sharded.scatter import CompressedReduceScatter, CountedReduceScatter
from ..sharded.start import follow_first
from ..sharded.state import Place, ShardedState
from ..sharded.steps import PassCounter, StepCounter
from .kept import KeepsState
from .loss_scale import GradScaler
from .replicas import ReplicaReduction

_attachments = 0


class ShardedHandle(KeepsState[ShardedState]):
    """An attachment to a sharded model.

    Attributes:
        reducer: everything that the scheme keeps, for :mod:`commkit.checkpoint`.
        comm: collectives over all ranks that the model was attached on, for the training thread.
        units: the modules that ``fully_shard`` was called on, and what they manage.
    """

    def __init__(
        self,
        scheme: ShardedScheme,
        units: list[Unit],
        axes: Axes,
        optimizer: Optimizer | None,
        grad_scaler: GradScaler | None,
        timeout_s: float,
    ) -> None:
        global _attachments
        _attachments += 1
        self.units = units
        self.comm = DistComm(axes.everybody)
        self._steps, self._passes = StepCounter(optimizer), PassCounter()
        self._scheme = scheme
        self._shards = DistComm(axes.shards)  # FSDP's own: called by it, in its order
        self._gathers: list[CountedAllGather] = []
        self._scatters: list[CountedReduceScatter] = []
        self._meter, self._inside, self._dense_before = StepMeter(self._shards), StepStats(), 0
        self._passes.after.append(self._close_pass)
        self._replicas: ReplicaReduction | None = None
        self._worker: ReductionWorker | None = None
        exchange = self._put_on_units()
        self.reducer = ShardedState.of(
            units,
            axes.place,
            scheme.reducer,
            exchange.feedback if isinstance(exchange, OneHopWithFeedback) else None,
            self._steps,
            self._passes,
        )
        if scheme.reducer is not None:
            assert axes.replicas is not None
            weights = (p for unit in units for p in unit.parameters.values())
            follow_first(weights, DistComm(axes.replicas))
            device = next(iter(units[0].parameters.values())).device
            private = private_comm(axes.replicas, timeout_s)
            beside = private_comm(axes.shards, timeout_s)
            self._worker = ReductionWorker(
                Alarm(axes.everybody, f"sharded/{_attachments}"), timeout_s, device
            )
            self._replicas = ReplicaReduction(scheme.reducer, units, private, beside, self._worker)

    def _put_on_units(self) -> Exchange | None:
        scheme, comm = self._scheme, self._shards
        if comm.world_size == 1:
            return None
        shapes = {name: p.shape for unit in self.units for name, p in unit.parameters.items()}
        weights = scheme.gathering(shapes)
        exchange = scheme.scattering(shapes, comm)
        if isinstance(exchange, OneHopWithFeedback):
            self._passes.after.append(exchange.commit)
        for unit in self.units:
            gather = CountedAllGather(comm)
            if weights is not None:
                gather = CompressedAllGather(unit, weights, comm, self._steps)
            scatter = CountedReduceScatter(comm, self._passes)
            if exchange is not None:
                scatter = CompressedReduceScatter(unit, exchange, comm, self._passes)
            # FSDP asks for subclasses of classes that it keeps private, and takes whatever has their methods.
            unit.module.set_custom_all_gather(gather)  # type: ignore[arg-type]
            unit.module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
            self._gathers.append(gather)
            self._scatters.append(scatter)
        return exchange

    @property
    def last_step(self) -> StepStats:
        """Of the last backward pass that sent gradients, and of all gathers since the one before it.

        ``inter_node_bytes`` are those between replicas, and between nodes where gradients go node by node.
        ``dense_bytes`` are those of whole weights and gradients as they were gathered and scattered, and of the shards'
        gradients between replicas. Of gathers and scatters nothing counts as hidden: on a CPU FSDP waits for them.
        """
        inside = self._inside
        between = StepStats() if self._replicas is None else self._replicas.last_step
        replicas = 1 if self._replicas is None else between.num_contributors
        return dataclasses.replace(
            between,
            step=max(self._passes.count - 1, 0) if self._replicas is None else between.step,
            dense_bytes=inside.dense_bytes + between.dense_bytes,
            payload_bytes=inside.payload_bytes + between.payload_bytes,
            wire_bytes=inside.wire_bytes + between.wire_bytes,
            inter_node_bytes=inside.inter_node_bytes + between.wire_bytes,
            rounds=inside.rounds + between.rounds,
            comm_seconds=inside.comm_seconds + between.comm_seconds,
            exposed_comm_seconds=inside.comm_seconds + between.exposed_comm_seconds,
            residual_norm=self.reducer.residual_norm,
            num_contributors=replicas * self._shards.world_size,
        )

    def _close_pass(self) -> None:
        """What was gathered and scattered since the last pass belongs to this one."""
        dense = sum(each.dense_bytes for each in self._gathers)
        dense += sum(each.dense_bytes for each in self._scatters)
        stats = StepStats(dense_bytes=dense - self._dense_before)
        self._inside = self._meter.close(stats, exposed=0.0)
        self._dense_before = dense

    @property
    def failure(self) -> Exception | None:
        return None if self._worker is None else self._worker.failure

    def close(self) -> None:
        """Stop reducing between replicas. FSDP keeps the gathers and scatters that it was given."""
        self._steps.close()
        for scatter in self._scatters:
            scatter.close()
        if self._replicas is not None:
            self._replicas.close()
        if self._worker is not None:
            self._worker.close()


@dataclasses.dataclass(frozen=True)
class Axes:
    """The process groups of a mesh.

    Args:
        shards: the ranks of this replica.
        replicas: those that hold the same shards, if there is such an axis.
        everybody: both.
    """

    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    everybody: dist.ProcessGroup

    @property
    def place(self) -> Place:
        """This rank's."""
        replica, replicas = 0, 1
        if self.replicas is not None:
            replica, replicas = dist.get_rank(self.replicas), dist.get_world_size(self.replicas)
        return Place(
            replica, dist.get_rank(self.shards), replicas, dist.get_world_size(self.shards)
        )


def attach_fsdp2(
    model: nn.Module,
    make: Callable[[], ShardedScheme],
    optimizer: Optimizer | None,
    mesh: DeviceMesh | None,
    grad_scaler: GradScaler | None,
    timeout_s: float,
) -> ShardedHandle:
    """See :func:`commkit.attach`."""
    units = find_units(model)
    axes = axes_of(units, mesh)
    comm = DistComm(axes.everybody)
    error: Exception | None = None
    fingerprint: dict[str, Any] = {}
    try:
        refuse_attached(model)
        scheme = make()
        _check(scheme, units, axes, optimizer, grad_scaler)
        refuse_other_collectives(units, between_replicas=scheme.reducer is not None)
        trainable = trainable_parameters(model)
        owner = getattr(scheme.reducer, "optimizer", None)
        if isinstance(owner, CommOptimizer):
            assert axes.replicas is not None
            owner.bind(trainable, DistComm(axes.replicas))
        fingerprint = {
            "scheme": _spec(scheme),
            "parameters": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in trainable.items()},
        }
    except Exception as caught:
        error = caught
    agree(comm, fingerprint, error)
    if isinstance(owner, CommOptimizer):
        owner.set_up()
    handle = ShardedHandle(scheme, units, axes, optimizer, grad_scaler, timeout_s)
    mark_attached(model)
    return handle


def replicas_of(model: nn.Module, mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks of ``mesh`` that hold the same shards as this one.

    Raises:
        ValueError: there is no such axis.
    """
    axes = axes_of(find_units(model), mesh)
    if axes.replicas is None:
        raise ValueError(_no_replicas(mesh))
    return axes.replicas


def axes_of(units: list[Unit], mesh: DeviceMesh | None) -> Axes:
    """Which groups there are, from the parameters and ``mesh``.

    Raises:
        ValueError: parameters on several meshes, or a mesh that does not hold theirs.
    """
    meshes = {
        p.device_mesh for unit in units for p in unit.parameters.values() if isinstance(p, DTensor)
    }
    if len(meshes) != 1:
        raise ValueError(
            f"the model is sharded over {len(meshes)} meshes; give every call of fully_shard the same one"
        )
    own = meshes.pop()
    first = next(iter(units[0].parameters.values()))
    assert isinstance(first, DTensor)
    dim = next(at for at, place in enumerate(first.placements) if isinstance(place, Shard))
    shards = own.get_group(dim)
    whole = own if mesh is None else mesh
    if mesh is not None and own.ndim > 1:
        raise ValueError(
            f"fully_shard was given a mesh of {own.ndim} dimensions, over all of which FSDP averages gradients itself; "
            'give it the shard axis alone, fully_shard(module, mesh=mesh["shard"]), and attach(..., mesh=mesh)'
        )
    if whole.ndim == 1:
        return Axes(shards, None, shards)
    ranks = dist.get_process_group_ranks(shards)
    dims = [
        d for d in range(whole.ndim) if dist.get_process_group_ranks(whole.get_group(d)) == ranks
    ]
    rest = [d for d in range(whole.ndim) if d not in dims[:1]]
    if not dims or len(rest) != 1:
        raise ValueError(
            f"mesh {_names(whole)} must have two axes, of which one is the ranks {ranks} that the model is sharded "
            'over; use init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard")) and '
            'fully_shard(module, mesh=mesh["shard"])'
        )
    everybody = dist.new_group(whole.mesh.flatten().tolist(), use_local_synchronization=True)
    assert isinstance(everybody, dist.ProcessGroup)
    return Axes(shards, whole.get_group(rest[0]) if mesh is not None else None, everybody)


def _check(
    scheme: ShardedScheme,
    units: list[Unit],
    axes: Axes,
    optimizer: Optimizer | None,
    grad_scaler: GradScaler | None,
) -> None:
    if scheme.feedback != "none":
        held = sum(s.padded for unit in units for s in unit.segments) * axes.place.shards * 4
        warnings.warn(
            f"feedback={scheme.feedback!r} keeps what whole gradients leave unsent: {held:,} bytes on every rank, however "
            "many shards there are",
            stacklevel=4,
        )
    if scheme.feedback != "none" and grad_scaler is not None:
        raise TypeError(
            f"feedback={scheme.feedback!r} keeps gradients from step to step, and a GradScaler changes their scale; train "
            "in bf16, or use feedback='none'"
        )
    if scheme.reducer is not None and axes.replicas is None:
        raise ValueError(_no_replicas(None))
    if scheme.weights is not None and optimizer is None:
        raise TypeError(
            "compressed weights are encoded anew after each optimizer step, so that forward and backward see the same; "
            "write attach(model, scheme, optimizer)"
        )


def refuse_other_collectives(units: list[Unit], between_replicas: bool) -> None:
    """
    Raises:
        RuntimeError: a torch without the interface.
        ValueError: somebody else has set collectives of a unit, or a hook that works where this scheme would.
    """
    for unit in units:
        if not hasattr(unit.module, "set_custom_all_gather"):
            raise RuntimeError(
                f"torch {torch.__version__} has no FSDPModule.set_custom_all_gather; commkit needs torch 2.11 or later"
            )
        # FSDP has no public word for what was set; only looked at, and what is not there is not known to be wrong.
        state = unit.module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in filter(None, groups):
            for what in ("_all_gather_comm", "_reduce_scatter_comm"):
                set_by = type(getattr(group, what, None)).__module__
                if not set_by.startswith(("torch.", "builtins")):
                    raise ValueError(
                        f"{unit.name or 'the root module'} has custom collectives already (of {set_by}); attach once, and "
                        "leave set_custom_all_gather and set_custom_reduce_scatter to commkit"
                    )
            if between_replicas and getattr(group, "_all_reduce_hook", None) is not None:
                raise ValueError(
                    f"{unit.name or 'the root module'} has an all-reduce hook already, and the scheme would reduce what it "
                    "has reduced; leave set_all_reduce_hook out"
                )


def _no_replicas(mesh: DeviceMesh | None) -> str:
    given = "without mesh=" if mesh is None else f"with mesh={_names(mesh)}"
    return (
        f"attach was called {given}, and the scheme reduces gradients between replicas; give the whole mesh, "
        'attach(model, scheme, mesh=mesh), where fully_shard has mesh["shard"]; to compress what FSDP itself gathers '
        "and scatters use the schemes qsdp or zeropp"
    )


def _names(mesh: DeviceMesh) -> str:
    return str(dict(zip(mesh.mesh_dim_names or range(mesh.ndim), mesh.shape, strict=True)))


def _spec(scheme: ShardedScheme) -> dict[str, Any]:
    parts = {f.name: getattr(scheme, f.name) for f in dataclasses.fields(scheme)}
    reducer = parts.pop("reducer")
    return {name: spec(part) for name, part in parts.items()} | {
        "reducer": None if reducer is None else reducer.spec()
    }
