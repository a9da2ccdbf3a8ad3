"""Both transports on real processes keep the same laws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commkit.transport.wire import HEADER_BYTES
from tests.mpi import needs_mpi

from .labs import OVER

both = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("mpi", marks=[pytest.mark.mpi, needs_mpi])]
)


def outcome(law: str, backend: str, directory: Path) -> list[Any]:
    return OVER[backend](law, directory)


@both
def test_messages_arrive_whole_and_in_order_and_are_counted(backend: str, tmp_path: Path) -> None:
    for rank, (got, payload, wire) in enumerate(outcome("in_order", backend, tmp_path)):
        others = [r for r in range(3) if r != rank]
        assert got == [(peer, n, float(peer)) for peer in others for n in range(5)]
        assert payload == 2 * (4 * 100 * (0 + 1 + 2 + 3 + 4) + 5 * 8)
        assert 2 * 5 * HEADER_BYTES < wire - payload < 2 * 5 * (HEADER_BYTES + 128)


@both
def test_the_first_to_come_are_taken_and_a_passed_deadline_breaks_nothing(
    backend: str, tmp_path: Path
) -> None:
    assert outcome("first_comes", backend, tmp_path)[0] == [1, 2]


@both
def test_a_killed_peer_is_lost_and_the_others_go_on(backend: str, tmp_path: Path) -> None:
    outcome("with_a_death", backend, tmp_path)


@both
def test_an_error_reaches_the_peer_after_what_was_sent_before(backend: str, tmp_path: Path) -> None:
    outcome("ends", backend, tmp_path)


@both
def test_a_peer_that_leaves_says_so_and_does_not_wait_for_the_other(
    backend: str, tmp_path: Path
) -> None:
    outcome("leaves", backend, tmp_path)


@both
def test_a_peer_that_is_stuck_fills_the_queue_and_does_not_hold_up_the_end(
    backend: str, tmp_path: Path
) -> None:
    seconds = outcome("stuck", backend, tmp_path)[0]
    assert 0.5 <= seconds < 30  # close_s is 0.5, and the other's timeout a minute


@both
def test_a_slow_reader_holds_up_the_sender_and_loses_nothing(backend: str, tmp_path: Path) -> None:
    assert outcome("slow_reader", backend, tmp_path) == [0, 12]


@both
def test_messages_move_while_their_sender_does_something_else(backend: str, tmp_path: Path) -> None:
    outcome("moves_alone", backend, tmp_path)


@both
def test_what_is_refused(backend: str, tmp_path: Path) -> None:
    outcome("refusals", backend, tmp_path)


def test_a_missing_mpi4py_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from commkit.transport import MPITransport\n"
        "try: MPITransport()\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'commkit[mpi]'" in done.stdout
