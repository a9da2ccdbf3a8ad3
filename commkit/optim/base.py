"""What optimizers that communicate share: a Reducer of their own, names, and honest state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..aggregators.nodes import Nodes
from ..clipping import mean_norm
from ..feedback import NoFeedback
from ..policy import Policy
from ..reducer import Reducer
from ..runtime.shards import local, sharded_like
from ..types import RANK, Aggregator, Comm, Feedback, StateDict

Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]

_REDUCER, _RANK, _WORLD_SIZE = "reducer", "rank", "world_size"
_OWN = "optimizer::"


class CommOptimizer(Optimizer):
    """An optimizer that decides what is sent in place of gradients, and applies what arrives.

    ``commkit.attach(model, optimizer)`` connects it; from then on backward leaves in ``p.grad`` what
    :meth:`step` applies. Everything else is an ordinary optimizer: schedulers, parameter groups, closures,
    ``torch.distributed.optim.ZeroRedundancyOptimizer`` around it where the class says so.

    Args:
        params: as for any optimizer. Frozen parameters are left alone.
        defaults: of the parameter groups.
        reducer: how things travel.

    Attributes:
        reducer: the scheme at work.
        settings: what else must be equal on all ranks, as plain data; compared at attach.
        residuals_apart: somebody else saves ``reducer``, so :meth:`state_dict` leaves it out and is equal on all ranks.
            Set by adapters for frameworks, which save an optimizer once for all ranks.
    """

    supports_zero = False
    residuals_apart = False
    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, params: Parameters, defaults: dict[str, Any], reducer: OptimizerReducer
    ) -> None:
        super().__init__(params, defaults)
        self.reducer = reducer
        reducer.optimizer = self
        self.comm: Comm | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._groups: dict[str, dict[str, Any]] = {}
        self._saved_by: tuple[int, int] | None = None  # of state loaded before attach
        self._dormant = False

    @property
    def attached(self) -> bool:
        return self.comm is not None

    def bind(self, parameters: Mapping[str, nn.Parameter], comm: Comm) -> None:
        """Learn the names of all parameters whose gradients are reduced, and the ranks. Called by
        ``attach``; ``comm`` is for the training thread.

        Raises:
            ValueError: the optimizer has a trainable parameter that is not among them, lacks one that it
                must hold, or has loaded another rank's state.
        """
        groups = self._groups_of(parameters)
        ours = {id(parameters[name]) for name in groups}
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.requires_grad and id(p) not in ours:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is in the optimizer but not in the "
                    "model; build the optimizer from the model that is attached"
                )
        if len(groups) < len(parameters) and not (self.supports_zero and comm.world_size > 1):
            missing = min(set(parameters) - set(groups))
            raise ValueError(
                f"parameter {missing!r} of the model is not in the optimizer, and "
                f"{type(self).__name__} must hold all; add it, or freeze it"
            )
        if self._saved_by is not None:
            _refuse_other_rank(self._saved_by, comm)
        self._parameters, self._groups, self.comm = dict(parameters), groups, comm

    def _groups_of(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
        """The parameter group of each name, as far as it is in one."""
        names = {parameter: name for name, parameter in parameters.items()}
        return {
            names[p]: group for group in self.param_groups for p in group["params"] if p in names
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer, before it is attached.

        Raises:
            RuntimeError: attached; what is reduced was agreed upon then.
        """
        if getattr(self, "comm", None) is not None:
            raise RuntimeError(
                f"{type(self).__name__} is attached, and what is reduced was agreed upon then; add "
                "parameter groups before commkit.attach"
            )
        super().add_param_group(param_group)

    def outgoing(
        self, named: dict[str, Tensor], compressed: Collection[str], comm: Comm
    ) -> dict[str, Tensor]:
        """What is sent in place of the gradients ``named``, which may be overwritten: any shapes; a name
        left out is not sent. Called on every rank for the same names in the same order, on the reducing
        thread."""
        return named

    def incoming(
        self, results: dict[str, Tensor], named: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Results of :meth:`outgoing`'s tensors in the shapes of ``named``, all names."""
        return results

    def is_local(self, step: int) -> bool:
        """Whether nothing is sent at reduction number ``step``: gradients stay this rank's own."""
        return False

    def rank_state(self) -> StateDict:
        """State that differs between ranks, besides the reducer's; by parameter name, or ``WHAT::NAME``.
        Its mean over the ranks is what another world size starts from."""
        return {}

    def load_rank_state(self, state: StateDict) -> None:
        """Restore what :meth:`rank_state` gave."""

    def set_up(self) -> None:
        """What takes all ranks together, once, after they agreed to attach.

        Raises:
            ValueError: on every rank, a parameter is in no rank's optimizer.
        """
        if self.supports_zero:
            assert self.comm is not None
            held = {
                name for each in self.comm.all_gather_object(list(self._groups)) for name in each
            }
            missing = set(self._parameters) - held
            if missing:
                raise ValueError(
                    f"parameter {min(missing)!r} is in no rank's optimizer; add it, or freeze it"
                )

    @contextmanager
    def dormant(self) -> Iterator[None]:
        """Inside the block steps do nothing: wrappers step once when they are built, to see state appear, and
        that is before anything can be attached."""
        self._dormant = True
        try:
            yield
        finally:
            self._dormant = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply what backward left in ``p.grad``. A step whose reduction was not finite changes nothing,
        on every rank.

        Raises:
            RuntimeError: not attached.
        """
        if self._dormant:
            return None
        if not self.attached:
            raise RuntimeError(
                f"{type(self).__name__} communicates but is not attached; call "
                "commkit.attach(model, optimizer) after building both"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.reducer.skipped:
            self.apply()
        return loss

    @abstractmethod
    def apply(self) -> None:
        """One update of all parameters, from what arrived."""

    def value(self, name: str) -> Tensor:
        """The parameter to step, or this rank's shard of it, sharing its memory."""
        return local(self._parameters[name].detach())

    def gradient(self, name: str) -> Tensor | None:
        """``p.grad`` as it is, or this rank's shard of it."""
        gradient = self._parameters[name].grad
        return None if gradient is None else local(gradient)

    def norm(self, x: Tensor) -> float:
        """2-norm of ``x``; of the whole of which it is this rank's shard, if parameters are sharded. Collective then."""
        return mean_norm({"": x}, None, self.reducer.shards)

    def arrived(self, name: str) -> Tensor:
        """What the reduction of ``name`` gave, in its work dtype."""
        gradient = self.gradient(name)
        kept = self.reducer.kept_for(name, gradient)
        if kept is not None:
            return kept
        if gradient is None:  # backward did not reach it on any rank
            gradient = torch.zeros_like(self.value(name))
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))

    def shared_state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks: parameter groups and per-parameter state."""
        state = super().state_dict()
        at = (p for group in self.param_groups for p in group["params"])
        for number, p in enumerate(at):
            if number in state["state"]:
                state["state"][number] = {
                    what: sharded_like(x, p) if _is_shard(x, p) else x
                    for what, x in state["state"][number].items()
                }
        return state

    def state_dict(self) -> dict[str, Any]:
        """This rank's whole state, residuals included; save it once per rank.

        ``commkit.checkpoint`` saves :meth:`shared_state_dict` and the reducer apart, and so can load at
        another world size.
        """
        if self.residuals_apart:
            return self.shared_state_dict()
        own = {_RANK: -1, _WORLD_SIZE: 0}
        if self.comm is not None:
            own = {_RANK: self.comm.rank, _WORLD_SIZE: self.comm.world_size}
        return super().state_dict() | {_REDUCER: own | {"state": self.reducer.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of :meth:`state_dict` or :meth:`shared_state_dict`.

        Raises:
            ValueError: it was saved by another rank, whose residuals are not this one's.
        """
        state = dict(state_dict)
        state["state"] = {
            number: {what: local(x) if isinstance(x, Tensor) else x for what, x in values.items()}
            for number, values in state["state"].items()
        }
        own = state.pop(_REDUCER, None)
        if own is not None and own[_WORLD_SIZE]:
            saved_by = (own[_RANK], own[_WORLD_SIZE])
            if self.comm is not None:
                _refuse_other_rank(saved_by, self.comm)
            self._saved_by = saved_by
        super().load_state_dict(state)
        self._restore_dtypes(state)
        self._groups = self._groups_of(self._parameters)  # torch has made new ones
        if own is not None:
            self.reducer.load_state_dict(own["state"])
        self.after_load()

    def _restore_dtypes(self, state: Mapping[str, Any]) -> None:
        """State is float32 whatever the parameter is; torch casts it to the parameter's dtype."""
        loaded = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state["param_groups"] for i in group["params"]]
        for p, i in zip(loaded, saved, strict=True):
            for name, value in state["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(p.device, copy=True)

    def after_load(self) -> None:
        """Bring everything that follows from state up to date."""


def _is_shard(x: object, p: Tensor) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and x.shape == local(p.detach()).shape


def in_work_dtype(named: Mapping[str, Tensor], keys: Collection[str]) -> dict[str, Tensor]:
    """``named``, those of ``keys`` in at least float32."""
    return {
        key: x.to(torch.promote_types(x.dtype, torch.float32)) if key in keys else x
        for key, x in named.items()
    }


def _refuse_other_rank(saved_by: tuple[int, int], comm: Comm) -> None:
    here = (comm.rank, comm.world_size)
    if saved_by != here:
        raise ValueError(
            f"state of rank {saved_by[0]} of {saved_by[1]} was given to rank {here[0]} of {here[1]}; "
            "residuals belong to a rank: save and load one file per rank, or use "
            "commkit.checkpoint, which also changes the world size"
        )


class OptimizerReducer(Reducer):
    """The Reducer of a :class:`CommOptimizer`, which says what is sent in place of gradients.

    Attributes:
        optimizer: its owner.
        kept: results of the last step that ``p.grad`` does not hold: of parameters whose gradient is in
            half precision, and of those that backward did not reach here, where DDP may drop them.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        feedback: Feedback | None = None,
        policy: Policy | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(aggregator, NoFeedback() if feedback is None else feedback, policy, seed)
        self.optimizer: CommOptimizer | None = None
        self.kept: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor | None, int]] = {}  # of p.grad that backward passed by

    def spec(self) -> dict[str, Any]:
        assert self.optimizer is not None
        # The second is torch's own, and there only once state was loaded.
        skipped = ("lr", "differentiable")
        settings = {k: v for k, v in self.optimizer.defaults.items() if k not in skipped}
        return super().spec() | {
            "optimizer": {
                "name": type(self.optimizer).__name__,
                **settings,
                **self.optimizer.settings,
            },
        }

    def state_dict(self) -> StateDict:
        assert self.optimizer is not None
        own = self.optimizer.rank_state()
        return super().state_dict() | {f"{RANK}/{_OWN}{key}": x for key, x in own.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert self.optimizer is not None
        own = f"{RANK}/{_OWN}"
        super().load_state_dict({k: v for k, v in state.items() if not k.startswith(own)})
        self.optimizer.load_rank_state(
            {k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}
        )

    def reduce(
        self, named: Mapping[str, Tensor], comm: Comm, hold: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """As :meth:`Reducer.reduce`, of what the optimizer makes of ``named``."""
        assert self.optimizer is not None
        if not self._reduced:
            self.kept, self._before = {}, {}
        self._begin(named)
        if self.optimizer.is_local(self.step):
            self._contributed(1)
            return dict(named)
        compressed = self.compresses(named)
        outgoing = self.optimizer.outgoing(dict(named), compressed, comm)
        self._compressed.update(compressed)  # also those of which nothing is left to send
        results = self._reduce(outgoing, [k for k in compressed if k in outgoing], comm)
        results = self.optimizer.incoming(results, named)
        for key, result in results.items():
            if key in hold:
                self._before[key] = _version(self.optimizer.gradient(key))
            if key in hold or result.dtype != named[key].dtype:
                self.kept[key] = result.clone()
        return results

    def kept_for(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """The result of ``name`` if ``gradient``, its ``p.grad`` now, does not hold it in full."""
        kept = self.kept.get(name)
        if kept is None or gradient is None or gradient.dtype != kept.dtype:
            return kept
        then, version = self._before.get(name, (None, 0))
        # Untouched: no rank used it. Else DDP has delivered, and maybe the user has clipped, as elsewhere.
        return kept if then is gradient and gradient._version == version else None


def _version(gradient: Tensor | None) -> tuple[Tensor | None, int]:
    return gradient, 0 if gradient is None else gradient._version


@dataclass(frozen=True)
class OptimizerScheme:
    """An optimizer that communicates, still without parameters: call it with them.

    ``scheme(model.parameters(), lr=1e-3)`` builds the optimizer; ``commkit.attach(model, optimizer)``
    connects it.

    Args:
        optimizer: the class.
        knobs: its fields of the scheme.
        like: the torch optimizer whose place it takes, "adamw" or "sgd"; its settings are passed on.
        seed: base of shared randomness.
        between_nodes: (local_size, nodes) of a hierarchy, see :class:`~commkit.aggregators.Hierarchical`.
    """

    optimizer: type[CommOptimizer]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    like: str = "adamw"
    seed: int = 0
    between_nodes: tuple[int | None, Nodes | None] | None = None

    def __call__(self, params: Parameters, **settings: Any) -> CommOptimizer:
        """Build the optimizer; ``settings`` are its other arguments (lr, betas, weight_decay ...)."""
        built = self.optimizer(params, **settings, **self.knobs)
        built.reducer.seed = self.seed
        if self.between_nodes is not None:
            built.reducer.put_between_nodes(*self.between_nodes)
        return built
