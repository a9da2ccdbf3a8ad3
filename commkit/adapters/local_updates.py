"""Local updates of sharded replicas, for :mod:`commkit.checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..comm import DistComm
from ..outer import OuterSync
from ..runtime.shards import cut_like, local, sharded_like
from ..sharded import ShardedState, find_units
from .fsdp2 import axes_of

_MOMENTS = ("optimizer", "state")


class ShardedReplicas:
    """What to save of a method with local updates whose replicas are sharded: anchors, outer momentum and rounds in flight
    as shards of whole tensors, by all ranks together, so that any other mesh can cut them anew.

    Give ``method`` and ``reducer`` to :func:`commkit.checkpoint.save` and ``load`` in their places, and ``comm``, of all
    ranks, where the method's own joins those of equal shards. Collective: make it once, on every rank.

    Args:
        method: attached with ``mesh``.
        mesh: whole.
    """

    def __init__(self, method: OuterSync, mesh: DeviceMesh) -> None:
        units = find_units(method.replica.model)
        axes = axes_of(units, mesh)
        self.comm = DistComm(axes.everybody)
        self.method = _MethodState(method)
        self.reducer = ShardedState.of(units, axes.place, method.reducer)


class _MethodState:
    """State of a method with what belongs to a parameter as a shard of a whole."""

    def __init__(self, method: OuterSync) -> None:
        self._method = method
        self._parameters = method.replica.parameters

    def state_dict(self) -> dict[str, Any]:
        def as_shard(x: Tensor, p: nn.Parameter) -> Tensor:
            return sharded_like(x, p) if x.shape == local(p.detach()).shape else x

        return dict(self._mapped(self._method.state_dict(), as_shard, ()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        def own(x: Tensor, p: nn.Parameter) -> Tensor:
            if isinstance(x, DTensor):
                return local(x)
            return cut_like(x, p) if x.shape == p.shape else x

        self._method.load_state_dict(self._mapped(state, own, ()))

    def after_resize(self) -> None:
        self._method.after_resize()

    def _mapped(self, value: Any, change: Any, path: tuple[Any, ...]) -> Any:
        """``value`` with tensors that go with a parameter, by its name or by its number in an optimizer, changed."""
        if isinstance(value, Tensor):
            p = self._parameter_of(path)
            return value if p is None or not value.ndim else change(value, p)
        if isinstance(value, Mapping):
            return {k: self._mapped(x, change, (*path, k)) for k, x in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._mapped(x, change, (*path, i)) for i, x in enumerate(value))
        return value

    def _parameter_of(self, path: tuple[Any, ...]) -> nn.Parameter | None:
        named = [self._parameters[key] for key in path if key in self._parameters]
        if named:
            return named[-1]
        if path[-4:-2] == _MOMENTS and isinstance(path[-2], int):
            return list(self._parameters.values())[path[-2]]
        return None
