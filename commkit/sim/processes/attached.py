"""What production attaches to a loop, in this world: methods with local updates, and schemes that reduce at each step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ...adapters.at_step import StepHandle
from ...aggregators import AllGather
from ...compressors import TopK
from ...feedback import ErrorFeedback
from ...outer import CO2, DiLoCo, LocalSGD, NoLoCo, OuterSync, StreamingDiLoCo
from ...outer.following import Follower
from ...outer.joining import Joined
from ...reducer import Reducer
from ...runtime.agreement import trainable_parameters
from ...runtime.alarm import NoAlarm
from ...schemes import make_scheme
from .elastic import VirtualElastic, VirtualWorker
from .turns import Process

if TYPE_CHECKING:
    from .world import World

SYNC_EVERY = 3


def _topk() -> Reducer:
    return Reducer(AllGather(TopK(density=0.3)), feedback=ErrorFeedback())


ROUNDS: dict[str, Callable[[nn.Module, Optimizer], OuterSync]] = {
    "diloco": partial(DiLoCo, sync_every=SYNC_EVERY),
    "diloco, top-k": lambda *of: DiLoCo(*of, sync_every=SYNC_EVERY, reducer=_topk()),
    "local_sgd, top-k": lambda *of: LocalSGD(*of, sync_every=SYNC_EVERY, reducer=_topk()),
    "streaming_diloco": partial(StreamingDiLoCo, sync_every=4, fragments=2, overlap=1),
    "co2": partial(CO2, sync_every=SYNC_EVERY),
    "noloco": partial(NoLoCo, sync_every=SYNC_EVERY),
}
STEPS: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "topk": {"name": "topk", "density": 0.3, "min_numel": 0},
    "sign": {"name": "sign", "min_numel": 0},
    "powersgd": {"name": "powersgd", "rank": 1, "min_compression_rate": 0.0},
}


def attach(
    world: World, process: Process, members: VirtualElastic, model: nn.Module, optimizer: Optimizer
) -> OuterSync | StepHandle:
    """What ``world`` is about, to ``model``."""
    if world.method in STEPS:
        return _at_step(world, members, model, optimizer)
    method = ROUNDS[world.method](model, optimizer)
    method.__class__ = _virtual(type(method), world, process)
    method.members = members
    members.add(Follower(method))
    return method


def _virtual(kind: type[OuterSync], world: World, process: Process) -> type[OuterSync]:
    """``kind`` in ``world``."""

    class Virtual(kind):  # type: ignore[misc,valid-type]
        def _join(self, group: Any) -> Any:
            comm = self.members.comm
            return Joined(comm, comm.split([list(range(comm.world_size))], "outer"), NoAlarm())

        def _refuse_spanning_ddp(self) -> None:
            """There are no process groups here."""

        def make_worker(self, alarm: Any) -> Any:
            return VirtualWorker(world.turns, process)

        def perform_sync(self) -> None:
            number = self._in_flight[0].number
            super().perform_sync()
            world.saw_round(process.name, number, self.anchors.values)

    Virtual.__name__ = kind.__name__
    return Virtual


def _at_step(
    world: World, members: VirtualElastic, model: nn.Module, optimizer: Optimizer
) -> StepHandle:
    class Virtual(StepHandle):
        @staticmethod
        def _default_group() -> Any:
            return None

        def _comm_of(self, group: Any) -> Any:
            return getattr(members, "comm", None)

        def _private_comm_of(self, group: Any) -> Any:
            return members.comm.split([list(range(members.world_size))], "step")

    reducer = make_scheme(STEPS[world.method])
    assert isinstance(reducer, Reducer)
    parameters = trainable_parameters(model)
    return Virtual(reducer, parameters, optimizer, None, 1800.0, members)  # type: ignore[arg-type]
