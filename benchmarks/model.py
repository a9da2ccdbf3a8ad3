"""The model, the text and the training step that the benchmarks share: launch's GPT at 12 million parameters,
512 bytes of Python's standard library per rank and step, AdamW."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from launch import gpt
from launch.data import Corpus, SampleOrder, Windows, load_corpus, validation_batches
from launch.optimizer import make_optimizer
from launch.settings import DataSettings, ModelSettings, OptimSettings, TrainSettings

MODEL = ModelSettings(layers=4, heads=8, width=512, context=256)
SEQUENCES = 2  # of MODEL.context bytes, per rank and step
OPTIMIZER = OptimSettings(name="adamw", lr=1e-3)
SEED = 0


def build() -> gpt.GPT:
    return gpt.build(MODEL, SEED)


def corpus() -> Corpus:
    return load_corpus(DataSettings(), MODEL.context)


def settings() -> dict[str, object]:
    """What a reader of the results wants to know of the workload."""
    return {
        "parameters": gpt.count_parameters(build()),
        "bytes_of_text_per_rank_and_step": SEQUENCES * MODEL.context,
        "optimizer": f"{OPTIMIZER.name} lr {OPTIMIZER.lr}",
        "ranks": harness.WORLD_SIZE,
        "threads_per_rank": 1,
    }


class Run:
    """One replica in training: the same weights, data and optimizer for every run of a benchmark.

    Args:
        text: what it learns from.
        bucket_cap_mb: DDP's; None is DDP's default (25 MB, after a first bucket of 1 MB).
    """

    def __init__(
        self, text: Corpus, rank: int, world_size: int, bucket_cap_mb: float | None = None
    ) -> None:
        self.ddp = DistributedDataParallel(build(), bucket_cap_mb=bucket_cap_mb)
        self.optimizer = make_optimizer(
            self.ddp, TrainSettings(optim=OPTIMIZER, scheme={"name": "ddp"})
        )
        self._batches = _batches(text, rank, world_size)
        self._text = text
        self._place = (rank, world_size)
        self.losses: list[float] = []

    def step(self) -> None:
        """Forward, backward with the reduction, optimizer."""
        tokens = next(self._batches)
        loss = self.ddp(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))

    def parameters(self) -> Tensor:
        """All weights in one vector, to compare replicas."""
        return torch.cat([p.detach().reshape(-1) for p in self.ddp.parameters()])

    @torch.no_grad()
    def validation_loss(self, batches: int = 8, batch_size: int = 8) -> float:
        """Mean over this rank's share of a fixed set of windows of the validation text."""
        rank, world_size = self._place
        share = validation_batches(
            self._text,
            MODEL.context,
            batches=batches,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
        losses = [float(self.ddp.module(x[:, :-1], x[:, 1:])) for x in share]
        return sum(losses) / len(losses)


def _batches(text: Corpus, rank: int, world_size: int) -> Iterator[Tensor]:
    windows = Windows(text.train, MODEL.context + 1)
    for starts in SampleOrder(SEED, len(windows), SEQUENCES, rank, world_size):
        yield torch.stack([windows[start] for start in starts])
