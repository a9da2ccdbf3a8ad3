"""A checkpoint is what was written, is there or is not, and runs nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import commkit
from commkit import checkpoint
from commkit.checkpoint import CheckpointError
from commkit.comm import DistComm, require_group
from commkit.runtime import checkpoint_files
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]


def _contents(value: float, comm: DistComm) -> dict[str, Any]:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    return {
        "replicated": {"model": model},
        "per_rank": {},
        "reducer": commkit.schemes.topk(),
        "comm": comm,
    }


def _value(directory: Path, comm: DistComm, **options: Any) -> float:
    contents = _contents(-1.0, comm)
    checkpoint.load(directory, **contents, **options)
    return float(contents["replicated"]["model"].weight[0, 0])


def _refusal(action: Callable[[], Any]) -> str:
    try:
        return f"accepted: {action()}"
    except CheckpointError as error:
        return str(error)


class _Unsaveable:
    def state_dict(self) -> dict[str, Any]:
        return {"hook": print}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def _cases(rank: int, world_size: int, path: str) -> dict[str, Any]:
    comm, root = DistComm(require_group(None)), Path(path)
    good = root / "good"
    checkpoint.save(good, **_contents(1.0, comm))
    found: dict[str, Any] = {"files": sorted(p.name for p in good.iterdir())}

    for name in found["files"]:
        for way in ("flipped", "missing"):
            bad = root / f"{way} {name}"
            if rank == 0:
                shutil.copytree(good, bad)
                data = bytearray((bad / name).read_bytes())
                data[len(data) // 2] ^= 4
                (bad / name).write_bytes(data)
                if way == "missing":
                    (bad / name).unlink()
            comm.barrier()
            found[f"{way} {name}"] = _refusal(lambda bad=bad: _value(bad, comm))

    # Training goes on, and what is saved is what was there when it was asked for.
    contents = _contents(2.0, comm)
    pending = checkpoint.save_async(root / "later", **contents)
    nn.init.constant_(contents["replicated"]["model"].weight, 3.0)
    pending.result(30.0)
    found["asynchronous"] = pending.done, _value(root / "later", comm)

    # What one meets is raised by the next, on all ranks, and then forgotten.
    if rank == 0:
        (root / "in the way").touch()
    comm.barrier()
    failing = checkpoint.save_async(root / "in the way" / "step", **_contents(4.0, comm))
    found["failed"] = _refusal(lambda: checkpoint.save(root / "next", **_contents(5.0, comm)))
    found["asked"] = _refusal(failing.result)
    checkpoint.save(root / "next", **_contents(5.0, comm))
    found["next"] = _value(root / "next", comm)

    # One rank has something that cannot be saved.
    odd = _contents(6.0, comm)
    odd["per_rank"] = {"odd": _Unsaveable()} if rank == 1 else {}
    try:
        checkpoint.save(root / "next", **odd)
    except (TypeError, CheckpointError) as error:
        found["odd"] = str(error)
    found["kept"] = _value(root / "next", comm)

    # No collective runs what a peer sends.
    try:
        comm.all_gather_object(_Call())
    except Exception as error:
        found["object"] = str(error)
    comm.barrier()
    return found


def test_damage_is_found_and_failures_are_told_on_every_rank(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(_cases, 2, str(tmp_path))):
        assert found["files"] == [".metadata", "SHA256SUMS", "__0_0.distcp", "__1_0.distcp"]
        for name in found["files"]:
            for way in ("flipped", "missing"):
                message = found[f"{way} {name}"]
                if (way, name) == ("missing", ".metadata"):
                    assert "no complete checkpoint" in message
                else:
                    assert name in message, (rank, way, message)
        assert found["asynchronous"] == (True, 2.0)
        assert "in the way" in found["failed"]
        assert found["asked"] == found["failed"]
        assert found["next"] == 5.0
        assert (
            "rank 1: TypeError" in found["odd"]
            if rank == 0
            else "a builtin_function" in found["odd"]
        )
        assert found["kept"] == 5.0
        assert "weights_only" in found["object"].lower() or "Weights only" in found["object"]


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying_at(point: str) -> None:
    rename, calls = Path.rename, []

    def mortal_rename(self: Path, target: Path) -> Path:
        calls.append(None)
        if point == f"rename {len(calls)}":
            _die()
        return rename(self, target)

    if point == "write":
        checkpoint.dcp_save = _die  # type: ignore[attr-defined, assignment]
    elif point == "sums":
        checkpoint_files.put_in_place = _die  # type: ignore[assignment]
    elif point == "after":
        checkpoint_files._sync = lambda path: _die() if path.name != "c.partial" else None  # type: ignore[assignment]
    else:
        Path.rename = mortal_rename  # type: ignore[assignment, method-assign]


def _killed(rank: int, world_size: int, path: str, point: str) -> None:
    comm = DistComm(require_group(None))
    checkpoint.save(path, **_contents(1.0, comm))
    _dying_at(point)
    checkpoint.save(path, **_contents(2.0, comm))


# What is there afterwards: the old one, or the new one once it is complete and in place.
_POINTS = {"write": 1.0, "sums": 1.0, "rename 1": 1.0, "rename 2": 1.0, "after": 2.0}


def _survivors(rank: int, world_size: int, path: str) -> dict[str, Any]:
    comm, values = DistComm(require_group(None)), {}
    for point in _POINTS:
        found = checkpoint.latest(Path(path, point))
        assert found is not None
        values[point] = _value(found, comm)
        checkpoint.save(found, **_contents(3.0, comm))
        names = sorted(p.name for p in found.parent.iterdir())
        values[f"{point}, saved again"] = _value(found, comm), names
    return values


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    for point in _POINTS:
        run_ranks(_killed, 1, str(tmp_path / point / "c"), point, dying={0})
    (values,) = run_ranks(_survivors, 1, str(tmp_path))
    for point, value in _POINTS.items():
        assert values[point] == value, point
        assert values[f"{point}, saved again"] == (3.0, ["c"])


class _Call:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/commkit-was-fooled",)


def _hostile(rank: int, world_size: int, path: str) -> dict[str, str]:
    comm, good = DistComm(require_group(None)), Path(path) / "good"
    checkpoint.save(good, **_contents(1.0, comm))
    attack = pickle.dumps(_Call())
    refusals = {}
    for name in (".metadata", "__0_0.distcp"):
        bad = Path(path, f"bad {name}")
        shutil.copytree(good, bad)
        (bad / name).write_bytes(attack)
        sums = (bad / "SHA256SUMS").read_text().splitlines()
        forged = [
            s if name not in s else f"{hashlib.sha256(attack).hexdigest()}  {name}" for s in sums
        ]
        (bad / "SHA256SUMS").write_text("\n".join(forged) + "\n")
        for verify in (True, False):
            try:
                _value(bad, comm, verify=verify)
            except BaseException as error:
                refusals[f"{name} {verify}"] = f"{type(error).__name__}: {error}"
    return refusals


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    (refusals,) = run_ranks(_hostile, 1, str(tmp_path))
    assert not Path("/tmp/commkit-was-fooled").exists()
    for verify in (True, False):
        message = refusals[f".metadata {verify}"]
        assert "CheckpointError: the metadata of a checkpoint wants to call" in message
        assert "mkdir" in message
        assert f"__0_0.distcp {verify}" in refusals


_BANNED = re.compile(
    r"pickle\.loads?\(|cPickle|\.(all_gather|gather|broadcast|scatter)_object(_list)?\(\w+, obj|weights_only=False"
)


@pytest.mark.parametrize("folder", ["commkit", "launch"])
def test_no_source_loads_a_pickle(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        text = file.read_text()
        assert not _BANNED.search(text), file
        for call in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 120], file
