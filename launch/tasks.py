"""What a run can learn: the protocol between the loop and a task, and the text task.

A task knows data, model, loss and validation; the loop knows steps, ranks and checkpoints. Batches
are tensors, so that the loop can move them about without knowing what is in them.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from torchdata.stateful_dataloader import (  # type: ignore[import-untyped]
    StatefulDataLoader,
)

from launch import gpt
from launch.data import load_corpus, train_loader, validation_batches
from launch.settings import TrainSettings


class Task(Protocol):
    """One thing to learn.

    Attributes:
        metrics: names of what :meth:`measure` gives; the first is ``val_loss``.
        digest: of the data; equal digests are equal data.
    """

    @property
    def metrics(self) -> tuple[str, ...]: ...

    @property
    def digest(self) -> str: ...

    def build(self) -> nn.Module:
        """The model on the CPU in float32; the same bits on every rank."""

    def loader(self, rank: int, world_size: int) -> "StatefulDataLoader[Tensor]":
        """Endless batches, each a pure function of seed and step; ``state_dict`` is the position."""

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean loss of the batch, a scalar."""

    def tokens(self, batch: Tensor) -> int:
        """What the batch adds to the count of ``tokens``: bytes of text, or images."""

    def validation(self, rank: int, world_size: int) -> Iterator[Tensor]:
        """This rank's share of the validation batches; all shares together are the same for any
        world size."""

    def measure(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Means over a validation batch, float64 ``[len(metrics)]``."""

    def describe(self) -> dict[str, Any]:
        """What ``summary.json`` says of the data."""

    def headline(self) -> str:
        """A few words: what there is to learn from."""


class TextTask:
    """Predict the next byte of text with a small GPT; losses are nats per byte.

    Raises:
        ValueError: no text, or too little, where the settings say it is.
    """

    metrics = ("val_loss",)

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.corpus = load_corpus(settings.data, settings.model.context)
        self.digest = self.corpus.digest

    def build(self) -> nn.Module:
        return gpt.build(self.settings.model, self.settings.seed)

    def loader(self, rank: int, world_size: int) -> "StatefulDataLoader[Tensor]":
        return train_loader(
            self.corpus,
            self.settings.model.context,
            seed=self.settings.seed,
            batch=self.settings.batch.per_rank,
            rank=rank,
            world_size=world_size,
        )

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean loss of int64 ``[batch, context + 1]``."""
        loss: Tensor = model(batch[:, :-1], batch[:, 1:])
        return loss

    def tokens(self, batch: Tensor) -> int:
        return batch[:, 1:].numel()

    def validation(self, rank: int, world_size: int) -> Iterator[Tensor]:
        return validation_batches(
            self.corpus,
            self.settings.model.context,
            batches=self.settings.eval.batches,
            batch_size=self.settings.eval.batch_size,
            rank=rank,
            world_size=world_size,
        )

    def measure(self, model: nn.Module, batch: Tensor) -> Tensor:
        return self.loss(model, batch).double().view(1)

    def describe(self) -> dict[str, Any]:
        return self.corpus.describe()

    def headline(self) -> str:
        return f"{self.corpus.train.numel() / 1e6:.1f} MB of text from {self.corpus.source}"


def make_task(settings: TrainSettings) -> Task:
    """The task that ``settings.task`` names, its data loaded.

    Raises:
        ValueError: its data is missing or too little, or a package is not installed.
    """
    if settings.task == "digits":
        from launch.digits import DigitsTask  # scikit-learn is optional

        return DigitsTask(settings)
    return TextTask(settings)
