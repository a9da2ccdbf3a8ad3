"""Labs for tests: with names of their own, skipped where the machine cannot build them."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.netlab import Lab, probe
from launch.netlab.leftovers import clean, find_labs

ROOT = Path(__file__).resolve().parents[2]
TRANSFER = Path(__file__).with_name("transfer.py")
_COUNT = itertools.count()


@pytest.fixture
def needs_namespaces() -> None:
    if probe().problem:
        pytest.skip(f"no lab can be built here: {probe().problem}")


@pytest.fixture
def lab_name(needs_namespaces: None) -> Iterator[str]:
    """A name that nobody else uses; whatever bears it is removed after the test."""
    name = f"test{os.getpid()}n{next(_COUNT)}x"
    yield name
    for record in find_labs():
        if record.name == name:
            clean(record, force=True)


@pytest.fixture
def make_lab(lab_name: str) -> Callable[..., Lab]:
    return lambda nodes, link="100mbit", **options: Lab(nodes, link, name=lab_name, **options)


def namespaces(name: str) -> list[str]:
    """Those that bear the lab's name."""
    directory = Path("/run/netns")
    return sorted(path.name for path in directory.glob(f"{name}*")) if directory.exists() else []


def transfer(lab: Lab, sender: int, receiver: int, count: int) -> float:
    """Send ``count`` bytes over TCP; bits per second of payload, as the receiver saw it."""
    port = str(lab.network.port())
    words = [sys.executable, str(TRANSFER)]
    receiving = lab.popen(receiver, [*words, "receive", port], stdout=subprocess.PIPE, text=True)
    address = lab.network.address(receiver)
    sending = lab.popen(sender, [*words, "send", address, port, str(count)])
    output, _ = receiving.communicate(timeout=30)
    assert sending.wait(timeout=10) == 0
    got, seconds = output.split()
    assert int(got) == count
    return int(got) * 8 / float(seconds)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
