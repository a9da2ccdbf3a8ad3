"""Labs for tests: with names of their own, skipped where the machine cannot build them."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
    (rate,) = transfers(lab, [(sender, receiver)], count)
    return rate


def transfers(lab: Lab, pairs: Sequence[tuple[int, int]], count: int) -> list[float]:
    """The same for several at once."""
    words, started = [sys.executable, str(TRANSFER)], []
    for sender, receiver in pairs:
        port = str(lab.network.port())
        got = lab.popen(receiver, [*words, "receive", port], stdout=subprocess.PIPE, text=True)
        started.append((got, sender, [*words, "send", lab.network.address(receiver), port]))
    sending = [lab.popen(sender, [*send, str(count)]) for _, sender, send in started]
    rates = []
    for (receiving, _, _), sender in zip(started, sending, strict=True):
        output, _ = receiving.communicate(timeout=30)
        assert sender.wait(timeout=10) == 0
        got, seconds = output.split()
        assert int(got) == count
        rates.append(count * 8 / float(seconds))
    return rates


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
