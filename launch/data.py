"""Bytes of text, split into train and validation, and the order in which they are read.

Three sources:

- nothing given: the ``.py`` files of Python's own standard library, which every machine has;
- a directory: every file below it that is text, hidden ones left out;
- a single file: its last 5 % are the validation text, for there are no files to split by.

A directory is split **by file**: a stable hash of the path relative to the directory sends about
one file in twenty to validation, so no file is in both, and a file keeps its side when others come
or go. The same hash gives the order of reading, so the size cap takes a fair sample of the files.
"""

import hashlib
import struct
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import (  # type: ignore[import-untyped]
    StatefulDataLoader,
)

from launch.settings import DataSettings

VALIDATION_SHARE = 0.05
# Tests repeat themselves, tables are not prose, and installed packages differ between machines.
_STDLIB_SKIPPED = frozenset(
    "test tests idle_test idlelib lib2to3 turtledemo encodings pydoc_data ensurepip "
    "site-packages dist-packages lib-dynload __pycache__".split()
)
_REMEDY = "give an existing text file or a directory of them with --set data.path=FILE_OR_DIR"


@dataclass(frozen=True)
class Corpus:
    """Text as bytes: uint8 tensors of one dimension, and what identifies them."""

    train: Tensor
    validation: Tensor
    source: str
    digest: str  # of both texts; equal digests are equal data

    def describe(self) -> dict[str, Any]:
        """What ``summary.json`` says of the data."""
        return {
            "source": self.source,
            "digest": self.digest,
            "train_bytes": self.train.numel(),
            "validation_bytes": self.validation.numel(),
        }


def load_corpus(settings: DataSettings, context: int) -> Corpus:
    """Read and split the text.

    Args:
        settings: where the text is and how much of it to read.
        context: bytes in one training window; each side must hold at least ``context + 1``.

    Raises:
        ValueError: the path does not exist, holds no text, or holds too little of it.
    """
    limit = int(settings.max_megabytes * 1e6)
    if settings.path is None:
        source = "the Python standard library"
        root = Path(sysconfig.get_paths()["stdlib"])
        train, validation = _read_directory(root, list_stdlib(root), limit)
    else:
        source = settings.path
        root = Path(settings.path).expanduser()
        if root.is_dir():
            train, validation = _read_directory(root, list_texts(root), limit)
        elif root.is_file():
            train, validation = split_by_position(root.read_bytes())
        else:
            raise ValueError(f"data.path: {source!r} does not exist; {_REMEDY}")
    for side, text in (("training", train), ("validation", validation)):
        if len(text) <= context:
            raise ValueError(
                f"data.path: {source!r} gives {len(text)} bytes of {side} text, but one window "
                f"needs model.context + 1 = {context + 1}; give more text or lower model.context"
            )
    digest = hashlib.sha256(train + b"\0split\0" + validation).hexdigest()[:16]
    return Corpus(_as_tensor(train), _as_tensor(validation), source, digest)


def list_stdlib(root: Path) -> list[PurePosixPath]:
    """Relative paths of the standard library's own sources, sorted."""
    return sorted(
        path
        for path in (PurePosixPath(p.relative_to(root).as_posix()) for p in root.rglob("*.py"))
        if not _STDLIB_SKIPPED.intersection(path.parts)
        and not path.name.startswith("_sysconfigdata")  # written when Python is built
        and not path.parts[0].startswith("config-")
    )


def list_texts(root: Path) -> list[PurePosixPath]:
    """Relative paths of the files below ``root`` that are neither hidden nor binary, sorted."""
    return sorted(
        PurePosixPath(p.relative_to(root).as_posix())
        for p in root.rglob("*")
        if p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(root).parts)
        and not _is_binary(p)
    )


def split_by_file(
    paths: list[PurePosixPath],
) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """Deal paths to ``(train, validation)``, each in reading order; at least one to each side.

    Raises:
        ValueError: there are fewer than two paths.
    """
    if len(paths) < 2:
        raise ValueError(f"paths: got {len(paths)}, but a split by file needs at least 2")
    ordered = sorted(paths, key=_path_hash)
    count = sum(_path_hash(path) < VALIDATION_SHARE * 2**64 for path in ordered)
    count = min(max(count, 1), len(ordered) - 1)
    return ordered[count:], ordered[:count]


def split_by_position(text: bytes) -> tuple[bytes, bytes]:
    """First 95 % for training, last 5 % for validation."""
    cut = len(text) - int(len(text) * VALIDATION_SHARE)
    return text[:cut], text[cut:]


def _read_directory(root: Path, paths: list[PurePosixPath], limit: int) -> tuple[bytes, bytes]:
    if not paths:
        raise ValueError(f"data.path: {str(root)!r} holds no text file; {_REMEDY}")
    if len(paths) == 1:
        return split_by_position((root / paths[0]).read_bytes()[:limit])
    train, validation = split_by_file(paths)
    validation_limit = int(limit * VALIDATION_SHARE)
    return (
        _read_files(root, train, limit - validation_limit),
        _read_files(root, validation, validation_limit),
    )


def _read_files(root: Path, paths: list[PurePosixPath], limit: int) -> bytes:
    texts: list[bytes] = []
    left = limit
    for path in paths:
        if left <= 0:
            break
        texts.append((root / path).read_bytes()[:left])
        left -= len(texts[-1])
    return b"".join(texts)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(4096)


def _path_hash(path: PurePosixPath) -> int:
    return _hash64(str(path).encode())


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Windows(Dataset[Tensor]):
    """Every window of ``length`` consecutive bytes of a text, indexed by its first byte."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.text = text
        self.length = length

    def __len__(self) -> int:
        return self.text.numel() - self.length + 1

    def __getitem__(self, start: int) -> Tensor:
        """int64 ``[length]``."""
        return self.text[start : start + self.length].long()


class SampleOrder(Sampler[list[int]]):
    """Endless batches of window starts; the whole state is one integer, ``position``.

    Sample ``k`` of a run, counted over all ranks and steps, is a pure function of ``(seed, k)``. A
    batch takes the next ``batch * world_size`` samples, and each rank its slice of them. So the
    order does not depend on the world size, and ``position``, the number of samples used up so far,
    is the same on every rank.
    """

    def __init__(self, seed: int, population: int, batch: int, rank: int, world_size: int) -> None:
        self.seed = seed
        self.population = population
        self.batch = batch
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    def start_of(self, sample: int) -> int:
        """First byte of sample ``sample``, uniform over the text, drawn with replacement."""
        return _hash64(struct.pack("<qq", self.seed, sample)) % self.population

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            first = self.position + self.rank * self.batch
            self.position += self.batch * self.world_size
            yield [self.start_of(sample) for sample in range(first, first + self.batch)]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def train_loader(
    corpus: Corpus, context: int, *, seed: int, batch: int, rank: int, world_size: int
) -> "StatefulDataLoader[Tensor]":
    """Endless loader of int64 ``[batch, context + 1]``; its ``state_dict`` holds the position."""
    windows = Windows(corpus.train, context + 1)
    order = SampleOrder(seed, len(windows), batch, rank, world_size)
    # The loader draws a seed for its workers: from here, so that the global state stays untouched.
    generator = torch.Generator().manual_seed(seed)
    return StatefulDataLoader(windows, batch_sampler=order, generator=generator)


def validation_batches(
    corpus: Corpus, context: int, *, batches: int, batch_size: int, rank: int, world_size: int
) -> Iterator[Tensor]:
    """This rank's share, as int64 ``[<= batch_size, context + 1]``, of a fixed set of windows.

    The set is ``batches * batch_size`` windows spread evenly over the validation text, the same for
    every world size; the ranks' shares do not overlap and together are the whole set.
    """
    windows = Windows(corpus.validation, context + 1)
    total = batches * batch_size
    mine = [index * len(windows) // total for index in range(rank, total, world_size)]
    for first in range(0, len(mine), batch_size):
        yield torch.stack([windows[start] for start in mine[first : first + batch_size]])
