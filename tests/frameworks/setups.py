"""The schemes that every framework trains with, and the problem, in pieces that frameworks take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from commkit.optim import OneBitAdam
from tests.adapters import problem

STEPS, SAVE_AT, ROWS = 8, 5, 16


@dataclass(frozen=True)
class Setup:
    """A scheme and the optimizer under it.

    Args:
        scheme: as for ``commkit.attach``; None if the optimizer is the scheme.
        optimizer: builds it over parameters.
        local: replicas train alone.
    """

    scheme: dict[str, Any] | None
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    local: bool = False


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)


def onebit_adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return OneBitAdam(parameters, lr=1e-2, freeze_step=3, min_numel=100)


SETUPS = {
    "ddp": Setup({"name": "ddp"}, adamw),
    "int8": Setup({"name": "int8"}, adamw),
    "powersgd": Setup({"name": "powersgd", "rank": 2, "start_step": 2}, adamw),
    "sign": Setup({"name": "sign"}, adamw),
    "onebit_adam": Setup(None, onebit_adam),
    "diloco": Setup({"name": "diloco", "sync_every": 3}, adamw, local=True),
}


@dataclass(frozen=True)
class Run:
    """Steps 0 to ``STEPS`` of this rank, with a checkpoint in ``directory`` after ``SAVE_AT`` of them; or the rest of
    them from that checkpoint."""

    rank: int
    world_size: int
    directory: str
    resumed: bool = False

    @property
    def steps(self) -> range:
        return range(SAVE_AT if self.resumed else 0, STEPS)


@dataclass
class Outcome:
    """What a run gave on this rank.

    Args:
        losses: of each step.
        weights: at the end, all in one vector.
        wire_bytes: of the last step that sent anything.
    """

    losses: list[float]
    weights: Tensor
    wire_bytes: int = 0


class Net(nn.Module):
    """Gives the loss, and remembers it: no framework's bookkeeping stands between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = problem.model()
        self.losses: list[float] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(self.body(x), y)
        self.losses.append(loss.item())
        return loss

    def outcome(self, wire_bytes: int = 0) -> Outcome:
        return Outcome(self.losses, problem.parameters(self), wire_bytes)


@dataclass
class Sent:
    """The largest number of bytes that a step sent."""

    most: int = field(default=0)

    def see(self, stats: Any) -> None:
        self.most = max(self.most, stats.wire_bytes)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    return problem.batch(step, rank, ROWS)
