"""Averaging what a model keeps beside its parameters: batch-norm statistics above all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..types import Comm
from .roster import Roster

_COUNTER = "num_batches_tracked"


class BufferAverage:
    """A snapshot of buffers, and their average over the replicas that contribute to a round.

    Floating-point buffers become their weighted mean, in full precision; batch counters the largest, and what
    they counted since the snapshot is added; other integers and booleans those of the first replica that
    contributes.

    Args:
        buffers: by name.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self._live = dict(buffers)
        self._snapshots = {
            name: b.to(torch.promote_types(b.dtype, torch.float32), copy=True)
            if b.is_floating_point()
            else b.clone()
            for name, b in buffers.items()
        }
        self._counted = {n: b.clone() for n, b in buffers.items() if n.endswith(_COUNTER)}

    @property
    def floats(self) -> list[Tensor]:
        return [b for b in self._snapshots.values() if b.is_floating_point()]

    def average(self, comm: Comm, roster: Roster) -> None:
        """Collective over ``comm``; between the snapshot and :meth:`write`."""
        share = roster.share(comm.rank) / comm.world_size
        contributes = roster.weights[comm.rank] > 0
        for name, x in self._snapshots.items():
            if x.is_floating_point():
                x.mul_(share) if contributes else x.zero_()
                comm.all_reduce(x)
            elif name.endswith(_COUNTER):
                if not contributes:
                    x.zero_()
                comm.all_reduce(x, "max")
            else:
                comm.broadcast(x, roster.first)

    def write(self) -> None:
        """Put the outcome into the model."""
        for name, x in self._snapshots.items():
            if name in self._counted:
                self._live[name].add_(x - self._counted[name])
            else:
                self._live[name].copy_(x)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The outcome; counters as what is to be added."""
        return {
            "values": {n: x for n, x in self._snapshots.items() if n not in self._counted},
            "added": {n: self._snapshots[n] - counted for n, counted in self._counted.items()},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, value in state["values"].items():
            self._snapshots[name] = value.to(self._live[name].device).clone()
        for name, added in state["added"].items():
            self._snapshots[name] = self._counted[name] + added.to(self._live[name].device)


@torch.no_grad()
def recompute_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None
) -> None:
    """Measure the batch-norm statistics of ``model`` anew: after weights were averaged, those of any replica,
    or their mean, are of activations that no longer occur.

    Args:
        model: its batch-norm layers are changed, its weights are not.
        batches: about a hundred, on the model's device.
        forward: how to run one; None is ``model(batch)``.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    training, momenta = model.training, [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over all batches
    model.train()
    for batch in batches:
        (forward or model)(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.train(training)
