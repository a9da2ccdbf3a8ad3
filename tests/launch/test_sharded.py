"""Recipes for sharded models, and ``fsdp.shards`` for any other: trained, saved, and gone on with, on the same ranks and
on others."""

import shutil

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from launch.rundir import METRIC_KEYS, read_records
from launch.train import Arguments, SetupError, main, prepare, set_up
from tests.harness import run_ranks
from tests.launch.conftest import ROOT, TINY, as_launched

pytestmark = pytest.mark.timeout(400)
STEPS, HALF = 8, 4
QUICK = {
    **TINY,
    "batch.per_rank": "2",
    "batch.accumulate": "2",
    "device": "cpu",
    "checkpoint.every": str(HALF),
    "eval.batches": "3",
    "eval.batch_size": "3",  # nine windows for four ranks: some evaluate one fewer
}
SHARDS = {"fsdp.shards": "2"}
RECIPES = {
    "qsdp": {"scheme.min_numel": "64"},
    "hsdp": {**SHARDS, "scheme.scheme": "{name: powersgd, rank: 2}"},
    "three_level": {**SHARDS, "scheme.min_numel": "64"},
    "onebit_adam": {**SHARDS, "scheme.freeze_step": "2", "schedule.warmup": "1"},
    "edit": {**SHARDS, "scheme.sync_every": "3", "scheme.options": "{warmup_steps: 1}"},
}


def words_of(name, out, text, *more):
    words = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--out", str(out), *more]
    for item in {**QUICK, "data.path": str(text), **RECIPES[name]}.items():
        words += ["--set", "=".join(item)]
    return words


def run(rank, world_size, port, words):
    """A training as under a launcher. In processes of its own: torch keeps meshes of groups that are gone."""
    dist.barrier()  # some may not have connected yet
    dist.destroy_process_group()
    as_launched(rank, world_size, port)
    main(words)


def launch(world_size, all_words):
    for words in all_words:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        run_ranks(run, world_size, store.port, words, deadline_s=90.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Each rank holds a part, and no part is lost. " * 200)
    return path


@pytest.fixture(scope="module")
def outs(tmp_path_factory, text):
    """Every recipe: unbroken; killed after half of its steps and resumed."""
    where = tmp_path_factory.mktemp("runs")
    launch(4, [words_of(name, where / name, text, "--steps", str(STEPS)) for name in RECIPES])
    for name in RECIPES:
        ignore = shutil.ignore_patterns(f"step_{STEPS:06d}", ".lock")
        for kind in ("same", "fewer"):
            shutil.copytree(where / name, where / f"{name}-{kind}", ignore=ignore)
    more = ("--steps", str(STEPS), "--resume")
    launch(4, [words_of(name, where / f"{name}-same", text, *more) for name in RECIPES])
    launch(2, [words_of(name, where / f"{name}-fewer", text, *more) for name in RECIPES])
    return where


def losses(out):
    return {record["step"]: record["loss"] for record in read_records(out / "metrics.jsonl")}


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_and_writes_what_it_sent(outs, name):
    records = read_records(outs / name / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"]
    for record in records:
        assert tuple(record) == METRIC_KEYS
    assert sum(record["wire_bytes"] for record in records) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_it_is_the_unbroken_run(outs, name):
    unbroken, resumed = losses(outs / name), losses(outs / f"{name}-same")
    assert {s: resumed[s] for s in range(HALF + 1, STEPS + 1)} == {
        s: unbroken[s] for s in range(HALF + 1, STEPS + 1)
    }


@pytest.mark.parametrize("name", RECIPES)
def test_it_goes_on_with_half_the_ranks(outs, name):
    resumed = losses(outs / f"{name}-fewer")
    assert set(resumed) == set(range(1, STEPS + 1))
    assert resumed[STEPS] < losses(outs / name)[1]


@pytest.mark.parametrize(
    ("name", "shards", "says"),
    [("hsdp", "3", "must divide"), ("qsdp", "2", "reduces nothing between them")],
)
def test_shards_that_do_not_fit_are_refused(tmp_path, text, monkeypatch, name, shards, says):
    for what, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(what, str(value))
    overrides = (f"fsdp.shards={shards}", f"data.path={text}", "device=cpu")
    config = ROOT / "configs" / f"{name}.yaml"
    job = prepare(Arguments(config=config, overrides=overrides, out=tmp_path / "out"))
    monkeypatch.setattr("launch.world.World.join", lambda self, device: None)
    with pytest.raises(SetupError, match=says):
        set_up(job)
