"""Images of handwritten digits and a small convolutional network that tells them apart.

The data is scikit-learn's bundled ``load_digits``: 1797 real images of 8 x 8 pixels, no download.
About one in five, chosen by a hash of its index, validates. A sample is one row of 65 bytes: 64
pixels from 0 to 16 and the digit. ``task: digits`` brings its own defaults for the optimizer, see
:data:`launch.settings.DIGITS_DEFAULTS`.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import (  # type: ignore[import-untyped]
    StatefulDataLoader,
)

from launch.data import SampleOrder
from launch.settings import DigitsSettings, TrainSettings

SIDE = 8  # pixels
CLASSES = 10
BRIGHTEST = 16.0
VALIDATION_SHARE = 0.2


class DigitsNet(nn.Module):
    """Three 3 x 3 convolutions with batch-norm, halving the image twice, and a linear head.

    Made by :func:`build`, which also draws the initial weights.
    """

    def __init__(self, settings: DigitsSettings) -> None:
        super().__init__()
        width = settings.width
        self.features = nn.Sequential(
            *_stage(1, width, stride=1),
            *_stage(width, 2 * width, stride=2),
            *_stage(2 * width, 4 * width, stride=2),
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[batch, 10]`` of float ``[batch, 1, 8, 8]`` with values from 0 to 1."""
        scores: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return scores

    def initialise(self, seed: int) -> None:
        """Draw every weight from a private generator; the global random state is not touched."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()


def _stage(channels: int, filters: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(filters), nn.ReLU()


def build(settings: DigitsSettings, seed: int) -> DigitsNet:
    """A network on the CPU in float32; equal settings and seed give equal bits on every rank."""
    with torch.device("meta"):  # construction on meta draws no random numbers
        model = DigitsNet(settings)
    model.to_empty(device="cpu")
    model.initialise(seed)
    return model


def load_rows() -> tuple[Tensor, Tensor]:
    """``(training, validation)`` as uint8 ``[samples, 65]``, in an order that never changes.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ValueError(
            "task: got 'digits', whose images come with scikit-learn, which is not installed; "
            "pip install 'commkit[digits]', or say --set task=gpt"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    rows = torch.from_numpy(numpy.column_stack([pixels, labels])).to(torch.uint8)
    # The images come in the order 0, 1, ... 9, 0, 1 ...: every fifth would be the same two digits.
    order = sorted(range(len(rows)), key=lambda i: hashlib.blake2b(str(i).encode()).digest())
    cut = round(len(rows) * VALIDATION_SHARE)
    return rows[order[cut:]], rows[order[:cut]]


class Rows(Dataset[Tensor]):
    """The rows of a matrix, by index."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class DigitsTask:
    """Tell handwritten digits apart; losses are nats per image, accuracy a share from 0 to 1.

    Validation is on all validation images; ``eval.batches`` has no effect.

    Raises:
        ValueError: scikit-learn is not installed.
    """

    metrics = ("val_loss", "val_accuracy")

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.train_rows, self.validation_rows = load_rows()
        both = torch.cat([self.train_rows, self.validation_rows])
        self.digest = hashlib.sha256(both.numpy().tobytes()).hexdigest()[:16]

    def build(self) -> nn.Module:
        return build(self.settings.digits, self.settings.seed)

    def loader(self, rank: int, world_size: int) -> "StatefulDataLoader[Tensor]":
        seed, batch = self.settings.seed, self.settings.batch.per_rank
        order = SampleOrder(seed, len(self.train_rows), batch, rank, world_size)
        # The loader draws a seed for its workers: from here, not from the global state.
        generator = torch.Generator().manual_seed(seed)
        return StatefulDataLoader(Rows(self.train_rows), batch_sampler=order, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean cross-entropy of uint8 ``[batch, 65]``."""
        images, labels = images_and_labels(batch)
        return F.cross_entropy(model(images).float(), labels)

    def tokens(self, batch: Tensor) -> int:
        return batch.shape[0]

    def validation(self, rank: int, world_size: int) -> Iterator[Tensor]:
        mine = self.validation_rows[rank::world_size]
        size = self.settings.eval.batch_size
        for first in range(0, len(mine), size):
            yield mine[first : first + size]

    def measure(self, model: nn.Module, batch: Tensor) -> Tensor:
        images, labels = images_and_labels(batch)
        scores = model(images).float()
        right = (scores.argmax(dim=1) == labels).double().mean()
        return torch.stack([F.cross_entropy(scores, labels).double(), right])

    def describe(self) -> dict[str, Any]:
        return {
            "source": "scikit-learn's load_digits",
            "digest": self.digest,
            "train_images": len(self.train_rows),
            "validation_images": len(self.validation_rows),
        }

    def headline(self) -> str:
        return f"{len(self.train_rows)} images of digits"


def images_and_labels(batch: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 ``[batch, 65]`` as float images ``[batch, 1, 8, 8]`` from 0 to 1 and int64 labels."""
    images = batch[:, :-1].float().div_(BRIGHTEST).view(-1, 1, SIDE, SIDE)
    return images, batch[:, -1].long()
