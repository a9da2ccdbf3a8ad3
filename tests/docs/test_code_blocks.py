"""Every code block of README.md and docs/ works, or says why nobody tries it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from commkit.adapters.deepspeed.legacy import is_former
from commkit.adapters.deepspeed.settings import read_block
from commkit.config import validate
from commkit.schemes import make_scheme
from launch.settings import TrainSettings
from tests.docs.blocks import PAGES, ROOT, blocks, blocks_in
from tests.docs.surroundings import namespace
from tests.harness import run_ranks

PROGRAMS = ("python", "diff")
RANKS = 3  # a coordinator and as many workers as it takes to do without one


def names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_pages_have_blocks_that_somebody_runs():
    assert len(blocks_in(*PROGRAMS)) > 10
    for page in PAGES:
        for block in blocks(page):
            assert block.language in (*PROGRAMS, "yaml", "json", "sh"), block.place
            if "not run" in block.notes:
                assert len(block.notes["not run"].split()) > 2, f"{block.place}: say why"


def run_programs(rank: int, world_size: int, pages: list[Path]) -> dict[str, str]:
    """The errors of blocks that failed, by place. Ranks go on together or not at all."""
    failed = {}
    for block in (b for page in pages for b in blocks(page)):
        if block.language not in PROGRAMS or "not run" in block.notes:
            continue
        torch.manual_seed(0)
        error = ""
        try:
            program = block.program
            scope = namespace(program, block.notes.get("given", ""))
            exec(compile(program, block.place, "exec"), scope)
        except Exception:
            error = traceback.format_exc()
        told: list[str] = [""] * world_size
        dist.all_gather_object(told, error)
        if any(told):
            failed[block.place] = "\n".join(f"rank {r}: {t}" for r, t in enumerate(told) if t)
    dist.barrier()
    return failed


@pytest.mark.timeout(300)
def test_python_blocks_run():
    failed = run_ranks(run_programs, RANKS, PAGES, deadline_s=280)[0]
    assert not failed, "\n".join(f"{place}\n{error}" for place, error in failed.items())


@pytest.mark.parametrize("block", blocks_in("yaml"), ids=lambda block: block.place)
def test_yaml_blocks_are_recipes(block):
    settings = validate(TrainSettings, yaml.safe_load(block.text), block.place)
    make_scheme(settings.scheme)


@pytest.mark.parametrize("block", blocks_in("json"), ids=lambda block: block.place)
def test_json_blocks_are_configs_of_deepspeed(block):
    config = json.loads(block.text)
    if "commkit" in config:
        read_block(config["commkit"])
    else:
        assert is_former(config["optimizer"])


COMMANDS = [
    pytest.param(line, id=f"{block.place} {line[:40]}")
    for block in blocks_in("sh")
    for line in re.sub(r"\\\n\s*", " ", block.text).split("\n")
    if line.strip()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_shell_blocks_name_what_there_is(line):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
    elif program == "pip":
        offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"\[([^\]]*)\]", line):
            assert set(extra.split(",")) <= set(offered["optional-dependencies"])
    elif program == "commkit":
        check_commkit(rest)
    elif "commkit.cli" in rest:
        assert program == "torchrun"
        check_commkit(rest[rest.index("commkit.cli") + 1 :])
    elif "launch/train.py" in rest:
        assert program == "torchrun" or (ROOT / program).is_file()
        check_training(rest[rest.index("launch/train.py") + 1 :])
    else:
        assert program == "python", f"who knows {program}?"
        assert rest[0] == "-m"
        assert importlib.util.find_spec(rest[1]) is not None


def check_training(words):
    import tyro

    from launch.train import Arguments, read_settings

    arguments = tyro.cli(Arguments, args=words)
    settings = read_settings(replaced(arguments))
    make_scheme(settings.scheme)


def replaced(arguments):
    import dataclasses

    return dataclasses.replace(arguments, config=ROOT / arguments.config)


def check_commkit(words):
    """A subcommand that there is, and flags that its help knows."""
    import subprocess

    told = subprocess.run(
        [sys.executable, "-m", "commkit.cli", words[0], "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
    )
    assert told.returncode == 0, told.stderr
    for word in words[1:]:
        if word.startswith("--"):
            assert word in told.stdout, word
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()
