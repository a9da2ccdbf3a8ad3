"""The files of a checkpoint: complete or not there, and what was written is what is read."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

SUMS = "SHA256SUMS"
METADATA = ".metadata"
_PARTIAL, _REPLACED = ".partial", ".replaced"
_BLOCK_BYTES = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, damaged, not what the caller asked for, or could not be written."""


def begin(directory: Path) -> Path:
    """An empty folder to write what is to become ``directory`` into; what a killed save left there is gone."""
    partial = partial_of(directory)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def partial_of(directory: Path) -> Path:
    return directory.with_name(directory.name + _PARTIAL)


def put_in_place(directory: Path, sums: Mapping[str, str]) -> None:
    """Make the complete folder of :func:`begin` ``directory``; one of that name goes only when it is there. A crash at
    any point leaves the old checkpoint or the new one for :func:`standing` to find.

    Args:
        sums: SHA-256 by file name.
    """
    partial, replaced = partial_of(directory), directory.with_name(directory.name + _REPLACED)
    # As `sha256sum --check` reads it.
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    with (partial / SUMS).open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
    partial.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def standing(directory: Path) -> Path:
    """Where the checkpoint called ``directory`` is: there, or where a save put it that was killed as it replaced it."""
    replaced = directory.with_name(directory.name + _REPLACED)
    gone = not (directory / METADATA).exists() and (replaced / METADATA).exists()
    return replaced if gone else directory


def complete(parent: Path) -> set[Path]:
    """Checkpoints in ``parent`` that a load finds."""
    return named(m.parent for m in parent.glob(f"*/{METADATA}"))


def named(folders: Iterable[Path]) -> set[Path]:
    """What complete checkpoints among ``folders`` are called, wherever they are."""
    return {
        path.with_name(path.name.removesuffix(_REPLACED))
        for path in folders
        if path.suffix != _PARTIAL
    }


def remove(directory: Path) -> None:
    """A checkpoint, and what killed saves left of it."""
    for path in (directory, directory.with_name(directory.name + _REPLACED), partial_of(directory)):
        shutil.rmtree(path, ignore_errors=True)


def sums_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256, in hexadecimal, of files in ``directory``."""
    return {name: _sum_of(directory / name) for name in names}


def written_by(directory: Path, rank: int) -> list[str]:
    """Names of the files that ``rank`` wrote into ``directory``; rank 0 wrote the metadata too."""
    names = [path.name for path in directory.glob(f"__{rank}_*")]
    return [*names, METADATA] if rank == 0 else names


def verify(directory: Path, share: int = 0, shares: int = 1) -> None:
    """Compare every ``shares``-th file, from the ``share``-th on, with what was written.

    Raises:
        CheckpointError: a file is missing, or not what it was; it is named.
    """
    try:
        lines = (directory / SUMS).read_text(encoding="ascii").splitlines()
        sums = {name: told for told, name in (line.split("  ", 1) for line in lines)}
    except OSError as error:
        raise CheckpointError(
            f"{str(directory)!r} has no {SUMS} to verify its files by; it is damaged, or not written by this version: "
            "load it with verify=False if it can be trusted"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{str(directory / SUMS)!r} is damaged; use another checkpoint"
        ) from error
    names = sorted({METADATA, *sums, *(path.name for path in directory.glob("__*"))})
    for name in names[share::shares]:
        path = directory / name
        if name not in sums:
            raise CheckpointError(f"{str(path)!r} is not in {SUMS}; use another checkpoint")
        if not path.is_file():
            raise CheckpointError(f"{str(path)!r} is missing; use another checkpoint")
        if _sum_of(path) != sums[name]:
            raise CheckpointError(
                f"{str(path)!r} is not what was written: its SHA-256 differs from that in {SUMS}; use another checkpoint"
            )


def _sum_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


def _sync(directory: Path) -> None:
    """Have renames and new files in ``directory`` survive a loss of power."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
