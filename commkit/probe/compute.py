"""Time of a model's own step, under DDP with a hook that sends nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean, median, pstdev

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..adapters.attach import attach
from ..cost.predict import FIRST_BUCKET
from ..cost.run import settle
from ..types import Comm
from .report import ComputeFound
from .sweep import slowest

_WARM_UP = 2  # DDP rebuilds its buckets after the first step


@dataclass(frozen=True)
class Subject:
    """What is trained. It is not of use afterwards: replicas drift apart while they are timed.

    Args:
        model: on its device, not wrapped.
        loss: forward of one micro-batch through the (wrapped) model.
        step: of the optimizer; sets gradients to zero too.
        micro_batches: backward passes in a step.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    step: Callable[[], None]
    micro_batches: int = 1

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class _Step:
    forward: float
    backward: float
    optimizer: float
    whole: float
    first_bucket: float


def probe_compute(subject: Subject, comm: Comm, steps: int) -> ComputeFound:
    """Collective over all ranks, which compute at once as they do in training."""
    device = subject.device
    ddp = DistributedDataParallel(
        subject.model, device_ids=[device] if device.type == "cuda" else None
    )
    handle = attach(ddp, "noop")
    arrivals = _Arrivals(subject.model)
    try:
        taken = [_step(subject, ddp, arrivals) for _ in range(_WARM_UP + steps)][_WARM_UP:]
    finally:
        arrivals.close()
        handle.close()
    whole = [one.whole for one in taken]

    def most(seconds: list[float]) -> float:
        return slowest(median(seconds), comm, device)

    return ComputeFound(
        step_s=most(whole),
        forward_s=most([one.forward for one in taken]),
        backward_s=most([one.backward for one in taken]),
        optimizer_s=most([one.optimizer for one in taken]),
        first_bucket_s=most([one.first_bucket for one in taken]),
        spread=slowest(pstdev(whole) / fmean(whole), comm, device),
    )


def _step(subject: Subject, ddp: DistributedDataParallel, arrivals: _Arrivals) -> _Step:
    device = subject.device

    def now() -> float:
        settle(device)
        return time.perf_counter()

    start, forward = now(), 0.0
    for left in reversed(range(subject.micro_batches)):
        with ddp.no_sync() if left else nullcontext():
            before = now()
            loss = subject.loss(ddp)
            ready = now()
            forward += ready - before
            arrivals.start()
            loss.backward()  # type: ignore[no-untyped-call]
            done = now()
    subject.step()
    end = now()
    return _Step(forward, done - ready, end - done, end - start, arrivals.first_bucket_s)


class _Arrivals:
    """When gradients are there."""

    def __init__(self, model: nn.Module) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._wanted = min(FIRST_BUCKET, sum(p.numel() * p.element_size() for p in parameters))
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
            for p in parameters
        ]
        self.start()

    def start(self) -> None:
        self._begin, self._bytes, self.first_bucket_s = time.perf_counter(), 0, 0.0

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, parameter: Tensor) -> None:
        self._bytes += parameter.numel() * parameter.element_size()
        if self._bytes >= self._wanted and not self.first_bucket_s:
            self.first_bucket_s = time.perf_counter() - self._begin
