"""The threads of the compiled CPU kernels: torch's own, and none of a process that was forked from."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch

from commkit import ops

from .native_levels import needs_native, running

pytestmark = needs_native

SETUP = """
import os, signal, torch
from commkit import ops
def tasks(): return set(os.listdir("/proc/self/task"))
def codes(): return ops.quantize_blocks(x, 8, 256, False, 0)[0]
torch.set_num_threads(1)
x = torch.linspace(-1, 1, 1 << 20)
torch.set_num_threads(3)
"""


def has_openmp() -> bool:
    return hasattr(ctypes.CDLL(None), "GOMP_parallel")


def run(program: str) -> str:
    command = [sys.executable, "-c", SETUP + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.skipif(not has_openmp(), reason="this torch has no OpenMP")
def test_threads_are_those_of_torch() -> None:
    program = """
before = tasks(); codes(); kernels = tasks() - before
x.add(1); both = tasks() - before
print(len(kernels), kernels == both)
"""
    assert run(program).split() == ["2", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("before", ["codes()", "x.add(1)"])
def test_a_forked_process_has_threads_too(before: str) -> None:
    program = f"""
{before}
torch.set_num_threads(1)
wanted = codes().numpy().tobytes()
torch.set_num_threads(3)
child = os.fork()
if child == 0:  # where torch's own operators would wait for threads that there are no more
    signal.alarm(50)
    os._exit(0 if codes().numpy().tobytes() == wanted else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(program).split() == ["0"]


def test_calls_from_several_threads_at_once() -> None:
    x = torch.linspace(-1, 1, 1 << 20)
    found: list[torch.Tensor] = []
    with running("", 2):
        wanted = ops.quantize_blocks(x, 8, 256, True, 1)[0]
        calls = [
            threading.Thread(
                target=lambda: found.append(ops.quantize_blocks(x, 8, 256, True, 1)[0])
            )
            for _ in range(4)
        ]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
    assert [torch.equal(codes, wanted) for codes in found] == [True] * 4
