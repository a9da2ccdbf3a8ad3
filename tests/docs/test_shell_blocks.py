"""Every line of a shell block does what it says, with tiny models and few ranks; or is checked as far as that goes here.

What is checked and not run, and why:

==========================  ==============================================================================================
``make``                    minutes each; ``make -n`` says that the target is there and what it would do
``pip install``             would change the environment that the tests run in; extras are compared with pyproject.toml, and
                            tests/packaging installs what is built
``commkit compare``         needs network namespaces, and minutes; its arguments and all of its trials are checked
``commkit simulate --lab``  likewise
``launch/*.sh``, torchrun   the line's program is run by ranks of this test; each script is run with a program that writes
                            down how it was called in place of Python (tests/launchers runs them all for real)
``transport=mpi``           needs mpirun; the recipe is checked, and trained over gloo (tests/straggler has MPI)
``deepspeed.sh``            the config is planned as at a start; tests/deepspeed trains it
10.0.0.1, host0             other machines; this one takes their part
``--respawn``               wants a worker that dies: tests/membership kills one
elastic trainings           the recipe is checked; tests/launch/test_elastic.py kills workers of such runs
``commkit probe``           takes minutes; arguments and recipe are checked, and tests/probe runs it
``probe.json``              is one that was made up
==========================  ==============================================================================================
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from commkit import cli
from commkit.config import load_yaml, validate
from commkit.schemes import make_scheme
from launch.settings import ModelSettings, TrainSettings
from tests.docs.blocks import PAGES, ROOT, Block, blocks
from tests.harness import run_ranks
from tests.launch.conftest import TINY, as_launched
from tests.probe.found import probe_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RANKS, STEPS = 3, 2  # a coordinator and two workers
TRAIN = "launch/train.py"
# Notes down what it is called with.
RECORDER = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$RECORD"\n'
# What the page says that a loop brings along.
LOOP = """
import torch
from tests.docs.everyday import Net as make_model, WIDTH
def batch(number, rank, world_size): return torch.ones(2, WIDTH)
def loss_of(model, x): return model(x)
"""


def lines_of(block: Block) -> list[str]:
    """Commands, without comments."""
    joined = re.sub(r"\\\n\s*", " ", block.program)
    return [shlex.join(w) for w in (shlex.split(x, comments=True) for x in joined.split("\n")) if w]


LINES = [
    (block.place, line)
    for page in PAGES
    for block in blocks(page)
    if block.language == "sh"
    for line in lines_of(block)
]


def place_of(line: str, *starts: str) -> bool:
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    return words[: len(starts)] == list(starts)


def those(*starts: str) -> list[str]:
    return [line for _, line in LINES if place_of(line, *starts)]


MEMBERS = those("python", "-m", "launch.members")
ELASTIC = [line for line in MEMBERS if TRAIN in shlex.split(line)]
TRAINING = [line for _, line in LINES if TRAIN in shlex.split(line) and line not in ELASTIC]
PROBING = [line for _, line in LINES if "commkit.cli probe" in line]
SIMULATING = [line for _, line in LINES if " -m commkit.sim." in line]
SCRIPTS = [line for _, line in LINES if re.search(r"(^|\s)launch/\w+\.sh\s", line)]


def test_every_line_is_tried_somewhere():
    tried = TRAINING + SCRIPTS + those("make") + those("pip", "install") + those("commkit")
    tried += MEMBERS + PROBING + SIMULATING
    assert {line for _, line in LINES} == set(tried)


@pytest.mark.parametrize("line", those("make"))
def test_make_has_the_target(line):
    subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, check=True, timeout=20)


@pytest.mark.parametrize("line", sorted(set(those("pip", "install"))))
def test_extras_are_offered(line):
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [x for found in re.findall(r"\[([^\]]*)\]", line) for x in found.split(",")]
    assert extras
    assert set(extras) <= set(offered["optional-dependencies"])
    words = shlex.split(line)
    assert all((ROOT / words[at + 1]).is_file() for at, word in enumerate(words) if word == "-c")


@pytest.mark.parametrize("line", those("commkit", "compare"))
def test_comparisons_are_planned(line, monkeypatch, tmp_path):
    import tyro

    from launch.compare.__main__ import Arguments, prepare

    monkeypatch.chdir(ROOT)
    arguments = tyro.cli(Arguments, args=shlex.split(line)[2:])
    trials = prepare(dataclasses.replace(arguments, out=tmp_path))
    assert len(trials) >= 2 * arguments.seeds


IN_LAB = [line for line in those("commkit", "simulate") if "--lab" in shlex.split(line)]


@pytest.mark.parametrize("line", IN_LAB)
def test_scenarios_are_planned_for_the_lab(line, monkeypatch, tmp_path):
    from launch.compare import __main__ as comparison
    from launch.compare import scenario

    asked = []
    monkeypatch.setattr(comparison, "run", lambda *arguments: asked.append(arguments) or 130)
    monkeypatch.setattr(scenario, "enter_if_needed", lambda words: None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(at_root(shlex.split(line)[1:])) == 130
    ((_, trials, _),) = asked
    assert {trial.configuration.name for trial in trials} > {"ddp", "noop"}


@pytest.mark.parametrize("line", sorted(set(those("commkit", "simulate")) - set(IN_LAB)))
def test_scenarios_run(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(at_root(shlex.split(line)[1:])) == 0
    assert "noloco" in capsys.readouterr().out


@pytest.mark.parametrize("line", those("commkit", "advise"))
def test_advice_is_given(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe.json").write_text(probe_of().model_dump_json())
    assert cli.main(shlex.split(line)[1:]) == 0
    assert "ddp" in capsys.readouterr().out


@pytest.mark.parametrize("line", SIMULATING)
def test_simulators_take_seeds(line):
    words = shlex.split(line)
    words[words.index("--count") + 1] = "2"
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("line", PROBING)
def test_probes_are_of_recipes(line):
    import tyro

    from launch.probe import Arguments

    words = shlex.split(line)
    arguments = tyro.cli(Arguments, args=at_root(words[words.index("probe") + 1 :]))
    validate(TrainSettings, load_yaml(arguments.config), line)


@pytest.mark.parametrize("line", ELASTIC)
def test_elastic_trainings_are_recipes(line):
    import tyro

    from launch.train import Arguments, read_settings

    words = shlex.split(line)
    settings = read_settings(tyro.cli(Arguments, args=at_root(words[words.index(TRAIN) + 1 :])))
    assert settings.elastic is not None
    make_scheme(settings.scheme)


@pytest.mark.parametrize("line", SCRIPTS)
def test_scripts_hand_on_what_they_are_given(line, tmp_path):
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(".sh"))
    settings = dict(word.split("=", 1) for word in words[:at])
    recorder, record = tmp_path / "recorder", tmp_path / "record"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    stand_ins = {"PYTHON": str(recorder), "MPIRUN": str(recorder), "RECORD": str(record)}
    done = subprocess.run(
        ["bash", *words[at:]],
        cwd=ROOT,
        env={**os.environ, "MASTER_PORT": "29500", **settings, **stand_ins},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    told = record.read_text().splitlines()
    assert told[-1] == words[-1]
    assert Path(words[-1]).suffix != ".sh"


@pytest.mark.parametrize("line", [line for line in SCRIPTS if line.endswith(".json")])
def test_configs_of_deepspeed_are_plans(line):
    pytest.importorskip("deepspeed")
    from commkit.adapters.deepspeed.initialize import make_plan
    from launch.gpt import build
    from launch.optimizer import decaying_groups

    model = build(ModelSettings(layers=1, heads=2, width=32), 0)
    config = load_yaml(ROOT / shlex.split(line)[-1])
    assert make_plan(config, model, None, decaying_groups(model)).scheme is not None


def train_all(rank: int, world_size: int, runs: list[tuple[int, list[str]]]) -> None:
    """One training after another, each with a store of its own, as under a launcher."""
    from launch.train import main

    dist.barrier()  # some may not have connected yet
    dist.destroy_process_group()
    for port, words in runs:
        as_launched(rank, world_size, port)
        main(words)


def training_words(line: str, out: Path, changes: dict[str, str]) -> list[str]:
    words = shlex.split(line)
    words = [word.replace("=mpi", "=torch") for word in words[words.index(TRAIN) + 1 :]]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    words = at_root(words)
    settings = [x for item in changes.items() for x in ("--set", "=".join(item))]
    return [*words, "--out", str(out), *settings]


@pytest.mark.timeout(200)
def test_trainings_train(tmp_path):
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    tiny = {**TINY, "data.path": str(text), "device": "cpu"}
    runs, stores, steps = [], [], {}
    for line in TRAINING:
        resumed = line.endswith("--resume")  # goes on where the line before has ended
        out = list(steps)[-1] if resumed else tmp_path / str(len(steps))
        steps[out] = steps.get(out, 0) + STEPS
        words = [*training_words(line, out, tiny), "--steps", str(steps[out])]
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        runs.append((stores[-1].port, words))
    run_ranks(train_all, RANKS, runs, deadline_s=180)
    for out, number in steps.items():
        summary = load_yaml(out / "summary.json")
        assert (summary["steps"], summary["world_size"]) == (number, RANKS)


@pytest.mark.timeout(200)
def test_members_train(tmp_path):
    (program,) = (b for p in PAGES for b in blocks(p) if b.notes.get("saved as") == "train.py")
    (tmp_path / "train.py").write_text(LOOP + program.program)
    alone, respawning, first, second = (shlex.split(x) for x in MEMBERS if x not in ELASTIC)
    assert set(alone) < set(first)  # so it need not be run too
    assert set(alone) | {"--respawn", "10"} == set(respawning)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    here = {"10.0.0.1": "127.0.0.1", "29400": port}
    two = {"--nproc": "1", "--workers": "2", "--first-rank": "1"}
    commands = [
        [re.sub("|".join(here), lambda m: here[m[0]], word) for word in with_options(words, two)]
        for words in (first, second)
    ]
    started = [
        subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        told = [process.communicate(timeout=150)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told


def at_root(words: list[str]) -> list[str]:
    return [str(ROOT / word) if word.startswith("configs/") else word for word in words]


def with_options(words: list[str], values: dict[str, str]) -> list[str]:
    """With other values of those options that are there."""
    return [values.get(before, word) for before, word in zip(["", *words], words, strict=False)]
