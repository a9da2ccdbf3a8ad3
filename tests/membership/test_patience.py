"""Whoever waits for others in vain is let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from commkit import connections
from commkit.connections import ConnectionsCut, Wiring
from commkit.patience import patiently


@pytest.fixture
def wiring() -> Iterator[Wiring]:
    connections.use(made := Wiring())
    yield made
    connections.use(None)


def _calls() -> int:
    return sum(thread.name == "commkit-call" for thread in threading.enumerate())


def _fail() -> None:
    raise ValueError("bad sample")


def test_without_connections_nothing_is_between() -> None:
    assert patiently(threading.get_ident) == threading.get_ident()


def test_what_comes_out_is_passed_on(wiring: Wiring) -> None:
    for _ in range(2):
        assert patiently(threading.get_ident) == patiently(threading.get_ident)
        with pytest.raises(ValueError, match="bad sample"):
            patiently(_fail)
    assert patiently(lambda: patiently(lambda: 7)) == 7


def test_who_waits_in_vain_is_let_go(wiring: Wiring) -> None:
    before, answer = _calls(), threading.Event()
    threading.Timer(0.2, wiring.cut).start()
    start = time.monotonic()
    with pytest.raises(ConnectionsCut, match="has not ended"):
        patiently(lambda: answer.wait(60.0))
    assert time.monotonic() - start < 10.0
    with pytest.raises(ConnectionsCut, match="not together any more"):
        patiently(lambda: 7)
    answer.set()  # such a thread ends when it can
    deadline = time.monotonic() + 10.0
    while _calls() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _calls() == before


def test_what_ends_after_the_cut_is_not_lost(wiring: Wiring) -> None:
    def finish() -> int:
        wiring.cut()
        return 7

    assert patiently(finish) == 7


def test_threads_do_not_wait_for_each_other(wiring: Wiring) -> None:
    meeting = threading.Barrier(2)
    other = threading.Thread(target=lambda: patiently(lambda: meeting.wait(10.0)))
    other.start()
    patiently(lambda: meeting.wait(10.0))
    other.join(10.0)
    assert not meeting.broken
