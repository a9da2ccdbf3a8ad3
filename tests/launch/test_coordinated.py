"""Recipes with a coordinator: rank 0 hands out the weights, the others train, and the files are those of any run."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from launch.rundir import METRIC_KEYS, read_records
from launch.train import Arguments, SetupError, main, prepare, role_of
from launch.world import World
from tests.harness import run_ranks
from tests.launch.conftest import ROOT, TINY, as_launched
from tests.mpi import find_mpirun, needs_mpi

RANKS, STEPS = 5, 16
QUICK = {
    **TINY,
    "batch.per_rank": "3",
    "device": "cpu",
    "optim.lr": "0.01",
    "eval.every": "5",
    "checkpoint.every": "8",
}
RECIPES = {
    "backup": {"scheme.options.compressor": "{name: topk, density: 0.1}"},
    "dbw": {"scheme.window": "2"},
    "gradient_coding": {},
    "sr_sgc": {"scheme.options.interleave": "models"},
    "m_sgc": {"scheme.options.coordinators": "[0, 1, 2]"},
}
RESUMED = "gradient_coding"  # whose bits do not depend on who was late


def recipe_of(name):
    return ROOT / "configs" / f"{name}.yaml"


def words_of(name, out, text, *more, **settings):
    words = ["--config", str(recipe_of(name)), "--out", str(out), "--steps", str(STEPS), *more]
    for item in {**QUICK, "data.path": str(text), **settings}.items():
        words += ["--set", "=".join(item)]
    return words


def run_all(rank, world_size, runs):
    """One training after another, each with a port of its own, as under a launcher."""
    dist.barrier()  # some may not have connected yet
    dist.destroy_process_group()
    for port, before, words in runs:
        if rank == 0 and before is not None:  # as if it had been killed after half of its steps
            source, target = before
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("step_000016", ".lock"))
        as_launched(rank, world_size, port)
        main(words)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("One rank hands out, the others train. " * 200)
    return path


@pytest.fixture(scope="module")
def outs(tmp_path_factory, text):
    """Every recipe on five ranks, and one of them resumed."""
    base = tmp_path_factory.mktemp("coordinated")
    jobs = [(None, words_of(name, base / name, text, **more)) for name, more in RECIPES.items()]
    before = (str(base / RESUMED), str(base / "resumed"))
    jobs.append((before, words_of(RESUMED, base / "resumed", text, "--resume")))
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in jobs]
    runs = [(store.port, *job) for store, job in zip(stores, jobs, strict=True)]
    run_ranks(run_all, RANKS, runs, deadline_s=250)
    return {path.name: path for path in base.iterdir()}


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def losses_of(out):
    return [record["loss"] for record in read_records(out / "metrics.jsonl")]


def check_complete(out, ranks, coordinators=1):
    """Records, validation, summary and checkpoints of a whole run."""
    records, workers = read_records(out / "metrics.jsonl"), ranks - coordinators
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert tuple(record) == METRIC_KEYS
        assert math.isfinite(record["loss"])
        assert 0 < record["payload_bytes"] < record["wire_bytes"]
        assert 1 <= record["num_contributors"] <= workers
        both = record["compute_seconds"] + record["exposed_comm_seconds"]
        assert math.isclose(both, record["step_seconds"])
    summary = summary_of(out)
    assert (summary["world_size"], summary["workers"]) == (ranks, workers)
    assert (summary["steps"], summary["skipped_jobs"], summary["lost_workers"]) == (STEPS, 0, [])
    assert set(summary["drop_rates"]) == {str(rank) for rank in range(coordinators, ranks)}
    assert {"python", "torch", "commkit"} <= set(summary["versions"])
    validation = read_records(out / "validation.jsonl")
    assert [record["step"] for record in validation] == [5, 10, 15]
    assert summary["val_loss"] < 0.8 * math.log(256)  # of bytes that are all equally likely
    assert (out / "config.yaml").is_file()
    newest = out / "checkpoints" / f"step_{STEPS:06d}"
    for rank in range(coordinators):
        assert (newest / f"coordinator_{rank:06d}.pt").is_file()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(outs, name):
    check_complete(outs[name], RANKS, coordinators=3 if name == "m_sgc" else 1)
    losses = losses_of(outs[name])
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.timeout(300)
def test_codes_count_every_token_and_backup_workers_those_of_the_first(outs):
    tokens = {name: read_records(outs[name] / "metrics.jsonl")[-1]["tokens"] for name in RECIPES}
    assert tokens["gradient_coding"] == STEPS * 3 * 4 * 16
    assert tokens["sr_sgc"] == 2 * STEPS * 3 * 4 * 16  # two models
    assert tokens["m_sgc"] == STEPS * 3 * 2 * 16  # two workers
    assert tokens["backup"] >= STEPS * 3 * 3 * 16


@pytest.mark.timeout(300)
def test_a_resumed_run_is_a_whole_one(outs):
    """Bit for bit, although other workers may have been late."""
    assert losses_of(outs["resumed"]) == losses_of(outs[RESUMED])
    assert summary_of(outs["resumed"])["val_loss"] == summary_of(outs[RESUMED])["val_loss"]


@pytest.mark.mpi
@needs_mpi
@pytest.mark.timeout(300)
def test_under_mpirun(tmp_path, text):
    words = words_of("dbw", tmp_path / "dbw", text, **{"scheme.transport": "mpi"})
    script, program = ROOT / "launch" / "mpirun.sh", ROOT / "launch" / "train.py"
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = subprocess.Popen(
        ["bash", str(script), "-n", "3", str(program), *words],
        cwd=ROOT,
        env={**os.environ, **allowed, "MPIRUN": find_mpirun(), "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.terminate()  # mpirun ends its ranks; nothing, if it has ended
        process.wait(timeout=30)
    assert process.returncode == 0, output
    assert "over mpi" in output
    check_complete(tmp_path / "dbw", 3)
    assert summary_of(tmp_path / "dbw")["transport"] == "mpi"


@pytest.mark.parametrize(
    ("name", "size", "overrides", "message"),
    [
        (
            "gradient_coding",
            5,
            ["scheme.num_stragglers=4"],
            r"num_stragglers=4 must be .* < num_workers=4, .*; use at most 3",
        ),
        (
            "gradient_coding",
            5,
            ["scheme.num_stragglers=2", "scheme.code={name: fractional_repetition}"],
            r"num_workers=4 must be divisible by num_stragglers \+ 1 = 3 .* use code 'cyclic_mds'",
        ),
        ("backup", 5, ["scheme.k=5"], r"k=5 must be in 1\.\.4, the number of workers; use 4"),
        ("backup", 5, ["scheme.k=0"], r"k=0 must be in 1\.\.4, the number of workers; use 1"),
        ("backup", 5, ["scheme.num_backups=4"], r"num_backups=4 must be in 0\.\.3"),
        (
            "m_sgc",
            5,
            ["batch.per_rank=2"],
            r"batch.per_rank: got 2, .* 4 workers .* cuts it into 12 equal parts; .* batch.per_rank=3",
        ),
        ("m_sgc", 5, ["scheme.rounds=1", "scheme.burst=2"], r"rounds=1 .*burst=2"),
        ("sr_sgc", 5, ["scheme.stragglers=5"], r"stragglers=5 must be <= num_workers=4"),
        ("dbw", 1, [], r"coordinators=\(0,\) leaves none of 1 ranks to train; start more ranks"),
        ("dbw", 5, ["scheme.options.coordinators=[1]"], r"rank 0 writes .* say \[0\]"),
        (
            "dbw",
            5,
            ["scheme.gain=smoothness", "optim.name=sgd", "optim.momentum=0.9"],
            r"scheme.gain: got 'smoothness', .* optim.momentum=0.9; say --set scheme.gain=noise_scale",
        ),
        (
            "dbw",
            5,
            ["scheme.transport=mpi"],
            r"scheme.transport: got 'mpi', but .* use launch/mpirun.sh, or say --set scheme.transport=torch",
        ),
        ("backup", 5, ["max_seconds=9"], r"max_seconds=9: .* 'backup', ends by steps alone"),
        ("backup", 5, ["scheme.num_backup=1"], r"scheme.num_backup: .*did you mean 'num_backups'"),
    ],
)
def test_what_does_not_fit_is_found_before_any_communication(
    tmp_path, text, name, size, overrides, message
):
    refuses(tmp_path, text, name, size, overrides, message)


def test_a_missing_mpi4py_is_found_there_too(tmp_path, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "5")
    message = r"transport='mpi' needs the packages mpi4py .*; pip install 'commkit\[mpi\]', or use"
    refuses(tmp_path, text, "dbw", 5, ["scheme.transport=mpi"], message)


def refuses(tmp_path, text, name, size, overrides, message):
    words = (f"data.path={text}", "model.context=16", "device=cpu", *overrides)
    arguments = Arguments(config=recipe_of(name), out=tmp_path / "run", overrides=words)

    def start():
        role_of(replace(prepare(arguments), world=World(0, 0, size, size, launched=True)))

    with pytest.raises(SetupError, match=message):
        start()
