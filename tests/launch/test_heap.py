"""What malloc is told: memory that is freed is there for the next step."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from launch.heap import keep_freed_memory

PROGRAM = """
import resource, sys, torch
from launch.heap import keep_freed_memory
torch.set_num_threads(1)
print(keep_freed_memory())

def step():
    for _ in range(3):  # at the top of the heap, where it would be given back
        xs = [torch.empty(4_000_000).fill_(1.0) for _ in range(4)]
        del xs

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step()
before = faults()
step()
print(faults() - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def told(**environment: str) -> tuple[bool, int]:
    """What it says, and page faults of the second step."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said, faults = done.stdout.split()
    return said == "True", int(faults)


@glibc
def test_a_step_gets_the_memory_of_the_last_one() -> None:
    said, faults = told()
    assert said
    assert faults < 100  # of 15,000 pages


@glibc
@pytest.mark.parametrize(
    "settings",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
    ids=["MALLOC_", "GLIBC_TUNABLES"],
)
def test_what_the_user_has_set_stands(settings: dict[str, str]) -> None:
    said, faults = told(**settings)
    assert not said
    assert faults > 5  # huge pages, if nothing else


def test_any_variable_of_mallocs_counts() -> None:
    assert not keep_freed_memory({"MALLOC_ARENA_MAX": "2"})
