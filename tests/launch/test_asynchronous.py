"""``scheme: {name: async_local_sgd}``: one rank serves, the others train, and the files are those of any run."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from launch.rundir import METRIC_KEYS, read_records
from launch.tasks import TextTask
from launch.train import Arguments, SetupError, main, prepare, role_of
from launch.world import World
from tests.harness import run_ranks
from tests.launch.conftest import ROOT, TINY, as_launched

CONFIG = ROOT / "configs" / "async_local_sgd.yaml"
QUICK = {"scheme.sync_every": "4", "scheme.min_steps": "2", "scheme.grace_s": "0.0"}


SERVERS = {
    "optim.name": "sgd",
    "optim.momentum": "0.0",
    "scheme.dynamic": "false",
    "scheme.compressor": "null",
    "scheme.servers": "[2, 0]",
    "checkpoint.every": "4",
}


def run_all(rank, world_size, runs):
    """One training after another, each with a port of its own, as under a launcher."""
    dist.destroy_process_group()
    for port, words in runs:
        if rank == 0 and "--resume" in words:  # as if it had been killed after step 8
            last = shutil.ignore_patterns("step_000012", ".lock")
            shutil.copytree(words[0], words[2], ignore=last)
        as_launched(rank, world_size, port)
        main(words[1:])


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """Three runs of three ranks: one server with two workers; two servers with one; and that one resumed."""
    base = tmp_path_factory.mktemp("asynchronous")
    text = base / "text.txt"
    text.write_text("One rank serves, the others train. " * 200)
    runs = (
        ("workers", {"eval.every": "6"}, []),
        ("servers", SERVERS, []),
        ("resumed", SERVERS, ["--resume"]),
    )
    told, stores = [], []
    for name, settings, more in runs:
        words = [str(base / "servers"), "--out", str(base / name), *more, "--steps", "12"]
        words += ["--config", str(CONFIG), "--set", f"data.path={text}", "--set", "device=cpu"]
        for item in {**TINY, **QUICK, **settings}.items():
            words += ["--set", "=".join(item)]
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        told.append((stores[-1].port, words))
    run_ranks(run_all, 3, told, deadline_s=110)
    return {name: base / name for name, _, _ in runs}


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def test_one_rank_serves_and_the_others_train(outs):
    out = outs["workers"]
    records = read_records(out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    for record in records:
        assert tuple(record) == METRIC_KEYS
        assert math.isfinite(record["loss"])
        assert record["tokens"] == record["step"] * 2 * 2 * 16  # of two workers
    summary = summary_of(out)
    assert (summary["world_size"], summary["workers"], summary["steps"]) == (3, 2, 12)
    # Tasks have four steps at most. Weights go down before each, 4 bytes per parameter.
    assert summary["pushes"] >= 2 * 12 / 4
    assert summary["total_payload_bytes"] >= 4 * summary["parameters"] * (summary["pushes"] - 2)
    validation = read_records(out / "validation.jsonl")
    assert validation[-1] == {"step": 12, "val_loss": summary["val_loss"]}


def test_a_resumed_run_is_a_whole_one(outs):
    """Bit for bit with one worker, whose pushes come in one order. Servers' parts of the model are put together."""
    whole, resumed = outs["servers"], outs["resumed"]
    assert summary_of(whole)["workers"] == 1
    losses = [[r["loss"] for r in read_records(out / "metrics.jsonl")] for out in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3  # of three tasks
    assert summary_of(whole)["val_loss"] == summary_of(resumed)["val_loss"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x" * 2000)
    return str(path)


@pytest.mark.parametrize(
    ("size", "overrides", "message"),
    [
        (1, (), r"servers=\(0,\) leaves none of 1 ranks to train; start more ranks"),
        (2, ("max_seconds=9",), r"max_seconds=9: .* 'async_local_sgd', ends by steps alone"),
        (2, ("scheme.servers=[0, 5]",), r"servers=\(0, 5\) must be ranks of a group of 2"),
        (
            3,
            ("scheme.servers=[0, 1]", "eval.every=2"),
            r"eval.every=2: each of servers=\[0, 1\] holds a part .* use eval.every=0",
        ),
        (2, ("scheme={name: dadao}",), r"call commkit.outer.Dadao"),
        (
            2,
            ("scheme.sinc_every=2",),
            r"scheme.sinc_every: unknown field, did you mean 'sync_every'",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_any_communication(
    tmp_path, data, size, overrides, message
):
    words = (*overrides, f"data.path={data}", "model.context=16")
    job = prepare(Arguments(config=CONFIG, out=tmp_path / "run", overrides=words))
    job = replace(job, world=World(0, 0, size, size, launched=True))
    assert isinstance(job.task, TextTask)
    with pytest.raises(SetupError, match=message):
        role_of(job)


def test_shards_start_anywhere(tmp_path, data):
    """A worker that takes over a shard sees the batches that its owner would have seen."""
    from launch.asynchronous import Shards

    words = (f"data.path={data}", "model.context=16", "batch.accumulate=2")
    task = prepare(Arguments(config=CONFIG, out=tmp_path / "run", overrides=words)).task
    batches = iter(task.loader(1, 3))
    owner = [[next(batches), next(batches)] for _ in range(4)]
    other = Shards(task, 3, per_step=2)
    for step in (2, 3, 0, 2):
        for mine, theirs in zip(other.batches(1, step), owner[step], strict=True):
            assert torch.equal(mine, theirs)
