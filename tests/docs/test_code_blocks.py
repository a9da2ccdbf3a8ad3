"""Every code block of README.md and docs/ works; what is for a shell is in test_shell_blocks."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from commkit.config import validate
from commkit.schemes import make_scheme
from launch.settings import TrainSettings
from tests.docs import frameworks
from tests.docs.blocks import PAGES, Block, blocks
from tests.docs.surroundings import namespace
from tests.harness import run_ranks

BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = ("python", "diff", "yaml", "json", "sh")
RANKS = 3  # a coordinator and as many workers as it takes to do without one


def is_program(block: Block) -> bool:
    """Whether ranks run it, in place of a shell or of one process that reads it."""
    if block.language == "json" or block.notes.get("given") == "the program above":
        return True
    return block.language in ("python", "diff") and "saved as" not in block.notes


def needs_framework(block: Block) -> bool:
    """Whether its ranks are those of a framework's launcher."""
    return block.language == "json" or block.notes.get("given") in frameworks.GIVEN


def test_pages_have_blocks_of_known_languages():
    assert {block.language for block in BLOCKS} == set(LANGUAGES)
    assert sum(map(is_program, BLOCKS)) > 30


def run_block(block: Block) -> None:
    if block.language == "json":
        frameworks.train_by(json.loads(block.program))
    elif block.language == "yaml":
        make_scheme(yaml.safe_load(block.program)["scheme"])
    else:
        program = block.program
        scope = namespace(program, block.notes.get("given", ""))
        exec(compile(program, block.place, "exec"), scope)


def write_files(page: str, chosen: Sequence[Block]) -> None:
    """What blocks of this page read."""
    if dist.get_rank() == 0:
        for block in chosen:
            if "saved as" in block.notes:
                Path(block.notes["saved as"]).write_text(block.program)
    dist.barrier()


def run_programs(rank: int, world_size: int, chosen: list[Block]) -> dict[str, str]:
    """The errors of blocks that failed, by place. Ranks go on together or not at all."""
    if needs_framework(chosen[0]):
        frameworks.prepare(rank, world_size)
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder, src=0)
    os.chdir(folder[0])
    failed = {}
    for page, of_page in groupby(chosen, key=lambda block: block.place.partition(":")[0]):
        here = list(of_page)
        write_files(page, here)
        for block in here:
            torch.manual_seed(0)
            error = ""
            try:
                run_block(block)
            except Exception:
                error = traceback.format_exc()
            told: list[str] = [""] * world_size
            dist.all_gather_object(told, error)
            if any(told):
                failed[block.place] = "\n".join(f"rank {r}: {t}" for r, t in enumerate(told) if t)
    dist.barrier()
    return failed


def failures(world_size: int, chosen: list[Block]) -> str:
    failed = run_ranks(run_programs, world_size, chosen, deadline_s=280)[0]
    return "\n".join(f"{place}\n{error}" for place, error in failed.items())


@pytest.mark.timeout(300)
def test_programs_run():
    chosen = [block for block in BLOCKS if is_program(block) and not needs_framework(block)]
    assert not failures(RANKS, chosen)


@pytest.mark.timeout(300)
def test_programs_and_configs_of_frameworks_train():
    for name in frameworks.NAMES:
        pytest.importorskip(name)
    chosen = [block for block in BLOCKS if is_program(block) and needs_framework(block)]
    assert len(chosen) > 15
    assert not failures(frameworks.RANKS, chosen)


RECIPES = [block for block in BLOCKS if block.language == "yaml" and not is_program(block)]


@pytest.mark.parametrize("block", RECIPES, ids=lambda block: block.place)
def test_yaml_blocks_are_recipes(block):
    settings = validate(TrainSettings, yaml.safe_load(block.text), block.place)
    make_scheme(settings.scheme)
