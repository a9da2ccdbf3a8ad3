"""``commkit.attach``: one call for whatever the model is wrapped in."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..comm import DistComm, require_group
from ..feedback import MomentumCorrection
from ..membership import Elastic
from ..optim import CommOptimizer
from ..outer import OuterScheme, OuterSync
from ..outer.following import Follower, follow_members
from ..reducer import Reducer
from ..runtime.agreement import agree
from ..schemes import Scheme, make_reducer, make_scheme
from ..sharded import PartitionedOptimizer, ShardedScheme
from .at_step import StepHandle, attach_at_step
from .ddp import Handle, attach_ddp
from .debug import Debug, follow
from .fsdp1 import FSDP1Handle, attach_fsdp1
from .fsdp2 import ShardedHandle, attach_fsdp2, replicas_of
from .loss_scale import GradScaler
from .partition import PartitionHandle, attach_partition


def attach(
    model: nn.Module,
    scheme: "Scheme | ShardedScheme | Optimizer",
    optimizer: Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    grad_scaler: GradScaler | None = None,
    timeout_s: float = 1800.0,
    members: Elastic | None = None,
    debug: Debug | None = None,
    **knobs: Any,
) -> "Handle | StepHandle | ShardedHandle | FSDP1Handle | PartitionHandle | OuterSync":
    """Reduce a model's gradients with ``scheme`` from now on, or synchronise its weights if ``scheme`` trains
    with local updates.

    Collective over the process group. Call it once, before the first backward pass (or between two), with
    the same arguments on every rank.

    Args:
        model: a DistributedDataParallel module: reductions overlap with backward. Or a plain module:
            reductions happen when ``optimizer`` steps. Or one that ``fully_shard`` was called on: schemes for
            sharded models compress what FSDP sends, all others reduce between the replicas of ``mesh``.
            Schemes with local updates take plain and sharded modules.
        scheme: a scheme's name, a mapping ``{name: ..., ...}``, a path to a YAML file, a Reducer, or one of
            ``commkit.optim`` (also inside a ZeroRedundancyOptimizer where the class supports it).
        optimizer: the one that applies the gradients. Needed for a plain module; otherwise given to be
            checked against the scheme.
        process_group: of a plain module; None is the default group. DDP and FSDP bring their own.
        mesh: of a sharded module: the whole mesh, of whose two axes ``fully_shard`` was given one.
        grad_scaler: the GradScaler of fp16 training, so that residuals and momenta are kept in the units of
            unscaled gradients while the scale changes.
        timeout_s: seconds after which a stuck reduction raises on all ranks.
        members: workers that may be lost and joined by others; the attachment follows them. For plain modules, without
            process_group. Not collective then: workers agree when their loop begins, and again when others join.
        debug: what to check while training; see :class:`Debug`. None checks nothing that costs time.
        knobs: fields of the scheme, e.g. ``rank=4``.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
        TypeError: parts that cannot go together, or a plain module without an optimizer.
        RuntimeError: attached before, or ranks disagree (the differing field is named), or a DDP around a
            plain module reduces its gradients already.
        ValueError: sparse gradients, DDP options that use the hook themselves, or an optimizer that does
            what the scheme does too.

    If any rank is refused, every rank raises.

    Returns:
        A handle; for schemes with local updates the method itself, started: ``close()`` ends it.
    """
    debug = Debug() if debug is None else debug
    debug.refuse_sharded(model)
    if isinstance(scheme, PartitionedOptimizer):
        return attach_partition(model, scheme)
    check = debug.watch(scheme if isinstance(scheme, Optimizer) else optimizer)
    handle = _attach(
        model, scheme, optimizer, process_group, mesh, grad_scaler, timeout_s, members, debug, knobs
    )
    if check is not None:
        follow(check, model, handle)
    return handle


def _attach(
    model: nn.Module,
    scheme: "Scheme | ShardedScheme | Optimizer",
    optimizer: Optimizer | None,
    process_group: dist.ProcessGroup | None,
    mesh: DeviceMesh | None,
    grad_scaler: GradScaler | None,
    timeout_s: float,
    members: Elastic | None,
    debug: Debug,
    knobs: dict[str, Any],
) -> "Handle | StepHandle | ShardedHandle | FSDP1Handle | OuterSync":
    owner = _communicating(scheme)
    if isinstance(scheme, Optimizer):
        optimizer, scheme = scheme, _reducer_of(scheme, owner, optimizer)

    made = _made(scheme, knobs)
    _check_mesh(model, mesh)
    _check_members(members, model, process_group)
    if isinstance(made, OuterScheme):
        if mesh is not None:
            process_group = replicas_of(model, mesh)
        return _start(made, model, optimizer, process_group, members, debug)

    def make() -> Reducer:
        reducer = made if isinstance(made, Reducer) else make_reducer(scheme, knobs)  # type: ignore[arg-type]
        if optimizer is not None:
            refuse_double_momentum(reducer, optimizer)
        return reducer

    if isinstance(model, FSDPModule | FullyShardedDataParallel):
        if process_group is not None:
            raise TypeError(
                "a sharded module's groups are its own; leave process_group out, and give mesh= if it has replicas"
            )
        sharded = made if isinstance(made, ShardedScheme) else None
        if isinstance(model, FullyShardedDataParallel):
            return attach_fsdp1(model, make if sharded is None else lambda: sharded, grad_scaler)
        whole = (lambda: ShardedScheme(reducer=make())) if sharded is None else (lambda: sharded)
        return attach_fsdp2(model, whole, optimizer, mesh, grad_scaler, timeout_s)
    if isinstance(model, DistributedDataParallel):
        if process_group is not None and process_group is not model.process_group:
            raise TypeError("process_group is DDP's own; leave it out")
        return attach_ddp(model, make, grad_scaler, timeout_s, debug.wire_checksums)
    _check_plain(model, optimizer, grad_scaler)
    assert optimizer is not None
    return attach_at_step(
        model,
        make,
        optimizer if owner is None else owner,
        process_group,
        timeout_s,
        members,
        wire_checksums=debug.wire_checksums,
    )


def _check_mesh(model: nn.Module, mesh: DeviceMesh | None) -> None:
    if mesh is not None and not isinstance(model, FSDPModule):
        raise TypeError(
            f"mesh is for models that fully_shard was called on, got {type(model).__name__}; leave it out, or shard "
            "the model first"
        )


def _check_members(
    members: Elastic | None,
    model: nn.Module,
    process_group: dist.ProcessGroup | None,
) -> None:
    if members is None:
        return
    if isinstance(model, FSDPModule | FullyShardedDataParallel | DistributedDataParallel):
        raise TypeError(
            f"{type(model).__name__} cannot follow members that change, as its groups are its own; give "
            "attach(members=...) the plain module"
        )
    if process_group is not None:
        raise TypeError("with members the group is that of all of them; leave process_group out")


def _check_plain(
    model: nn.Module, optimizer: Optimizer | None, grad_scaler: GradScaler | None
) -> None:
    if optimizer is None:
        raise TypeError(
            f"attach needs a DistributedDataParallel module, got {type(model).__name__}; wrap the model "
            "in torch.nn.parallel.DistributedDataParallel first, or give the optimizer at whose step "
            "the gradients are to be reduced"
        )
    if grad_scaler is not None:
        raise TypeError(
            "a GradScaler skips the step on the rank that overflowed, where the others would wait for it; "
            "wrap the model in DistributedDataParallel, or train in bf16"
        )


def _communicating(scheme: object) -> CommOptimizer | None:
    """The optimizer of ours that ``scheme`` is, or that a ZeroRedundancyOptimizer has inside."""
    inner = getattr(scheme, "optim", scheme)
    return inner if isinstance(inner, CommOptimizer) else None


def _reducer_of(
    scheme: Optimizer, owner: CommOptimizer | None, optimizer: Optimizer | None
) -> Reducer:
    if owner is None:
        raise TypeError(
            f"attach got {type(scheme).__name__} as its scheme, which does not communicate; write "
            "attach(model, 'powersgd', optimizer), or use an optimizer of commkit.optim"
        )
    if optimizer is not None and optimizer is not scheme:
        raise TypeError(
            f"attach got two optimizers; {type(owner).__name__} steps by itself, leave the other out"
        )
    return owner.reducer


def _made(scheme: object, knobs: dict[str, Any]) -> OuterScheme | ShardedScheme | Reducer | None:
    """What a name, a mapping or a path stands for. None: it is made already, is an optimizer, or is wrong, which
    is for :func:`make_reducer` to say where every rank hears of it."""
    if isinstance(scheme, OuterScheme | ShardedScheme):
        return scheme
    if isinstance(scheme, Reducer | Optimizer):
        return None
    try:
        made = make_scheme(scheme, knobs)  # type: ignore[arg-type]
    except Exception:
        return None
    return made if isinstance(made, OuterScheme | ShardedScheme | Reducer) else None


def _start(
    scheme: OuterScheme,
    model: nn.Module,
    optimizer: Optimizer | None,
    process_group: dist.ProcessGroup | None,
    members: Elastic | None,
    debug: Debug,
) -> OuterSync:
    """The method at work; a model that it cannot take is refused on every rank."""
    if optimizer is None:
        raise TypeError(
            f"{scheme.method.__name__} follows the inner optimizer's steps; write attach(model, scheme, optimizer)"
        )
    try:
        method = scheme(model, optimizer, process_group)
        method.wire_checksums = debug.wire_checksums
        if members is not None:
            follow_members(method, members)
    except Exception as error:
        if members is None:
            agree(DistComm(require_group(process_group)), {}, error)
        raise
    if members is None:
        return method.start()
    members.add(Follower(method))
    return method


def refuse_double_momentum(reducer: Reducer, optimizer: Optimizer) -> None:
    """
    Raises:
        ValueError: the optimizer has a momentum beside one that is corrected.
    """
    if not isinstance(reducer.feedback, MomentumCorrection):
        return
    for group in optimizer.param_groups:
        momentum = group.get("momentum", 0)
        if momentum and not isinstance(optimizer, CommOptimizer):
            raise ValueError(
                f"the optimizer's momentum={momentum} and momentum correction would apply momentum twice; "
                "set the optimizer's to 0, or use commkit.optim.DGCSGD"
            )
