"""Laws of rounds that are lost on their way, and made anew by those who are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from commkit.outer import CO2, DiLoCo, OuterSync, RoundAborted, StreamingDiLoCo
from commkit.outer.transfer import Transfer
from commkit.types import Comm
from tests.harness import ThreadComm, run_threads
from tests.outer.problem import Net, assert_same, inner_step, weights

STEPS = 8
METHODS: dict[str, Callable[..., OuterSync]] = {
    "diloco": lambda *of, **also: DiLoCo(*of, sync_every=4, **also),
    "co2": lambda *of, **also: CO2(*of, sync_every=4, **also),
    "streaming_diloco": lambda *of, **also: StreamingDiLoCo(
        *of, sync_every=4, fragments=2, overlap=1, **also
    ),
}


class Survivors:
    """In the place of ``Elastic``: every loss is survived, in a group of the same ranks."""

    def __init__(self, outer: OuterSync, comm: Comm, rounds_known: list[int]) -> None:
        self._outer, self._comm, self._known = outer, comm, rounds_known

    def catch_up(self) -> None:
        """Here a worker that joins would be told where the others are."""
        self._known.append(self._outer.round)

    def survive(self, error: RoundAborted) -> bool:
        self._outer.rebuild(self._comm)
        return True

    def settle_round(self, comm: Comm) -> None:
        comm.all_reduce(torch.ones(1))


def trained(
    method: Callable[..., OuterSync], lost: tuple[int, ...]
) -> tuple[dict[str, Tensor], list[tuple[int, int, float]], list[int], int]:
    """Weights, what was sent for good (number, unit, norm), rounds that others would have been told of, and the number of
    rounds, if the attempts whose places in order of all are in ``lost`` fail."""

    def run(comm: ThreadComm) -> Any:
        model, carried, known = Net(0), [], []
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = method(model, inner, process_group=comm)
        kind, attempts = type(outer), iter(range(100))

        class Lossy(kind):  # type: ignore[misc,valid-type]
            def carry_out(self, transfer: Transfer, comm: Comm) -> None:
                if next(attempts) in lost:
                    raise ConnectionError("a rank is gone")
                length = sum(float(x.square().sum()) for x in transfer.values.values())
                carried.append((transfer.number, transfer.unit.index, length))
                super().carry_out(transfer, comm)

        outer.__class__ = Lossy
        outer.members = Survivors(outer, comm, known)  # type: ignore[assignment]
        with outer:
            for step in range(STEPS):
                inner_step(model, inner, comm.rank, step)
            assert outer.at_unit is None
            assert not outer.late
        return weights(model), carried, known, outer.round

    return run_threads(run, 1)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lost", [(0,), (1,), (1, 2, 3)])
def test_a_lost_round_keeps_its_number(method: str, lost: tuple[int, ...]) -> None:
    """Each is carried out once for good, under the number that it has if nothing is lost; and whoever joins meanwhile is
    told a round that is still to be made."""
    _, carried, known, rounds = trained(METHODS[method], lost)
    _, undisturbed, _, count = trained(METHODS[method], ())
    assert rounds == count
    assert [place[:2] for place in carried] == [place[:2] for place in undisturbed]
    assert known == sorted(known)


@pytest.mark.parametrize("method", ["diloco", "co2"])
@pytest.mark.parametrize("lost", [(0,), (1,), (0, 1, 2)])
def test_a_round_made_anew_leaves_what_it_would_have_left(
    method: str, lost: tuple[int, ...]
) -> None:
    """Where nothing was trained in between, or the same is sent again: bit for bit."""
    found, carried, *_ = trained(METHODS[method], lost)
    expected, undisturbed, *_ = trained(METHODS[method], ())
    assert_same(found, expected)
    assert carried == undisturbed


def test_a_fragment_lost_in_flight_is_sent_as_it_is_by_then() -> None:
    _, carried, *_ = trained(METHODS["streaming_diloco"], (0,))
    _, undisturbed, *_ = trained(METHODS["streaming_diloco"], ())
    assert carried[0][:2] == undisturbed[0][:2]
    assert carried[0][2] != undisturbed[0][2]  # the step of the overlap is in it


def test_a_round_that_nobody_survives_stays_open() -> None:
    """All that was done since the anchors counts in the next one; the number is spent."""

    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)

        class Broken(DiLoCo):
            def carry_out(self, transfer: Transfer, comm: Comm) -> None:
                raise ConnectionError("a rank is gone")

        with Broken(model, inner, sync_every=2, process_group=comm) as outer:
            inner_step(model, inner, comm.rank, 0)
            with pytest.raises(RoundAborted, match="round 0 was aborted"):
                inner_step(model, inner, comm.rank, 1)
        assert outer.round == 1
        assert all(map(outer.is_open, outer.units))

    run_threads(run, 1)


def test_what_is_done_anew_is_done_until_nothing_is_lost() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = DiLoCo(model, inner, sync_every=2, process_group=comm)
        attempts: list[int] = []

        def attempt() -> str:
            attempts.append(len(attempts))
            if len(attempts) < 4:
                raise RoundAborted("lost")
            return "done"

        with pytest.raises(RoundAborted, match="lost"):
            outer.with_survivors(attempt)
        assert attempts == [0]  # without members, nothing is survived
        outer.members = Survivors(outer, comm, [])  # type: ignore[assignment]
        with outer:
            assert outer.with_survivors(attempt) == "done"
            assert attempts == [0, 1, 2, 3]

    run_threads(run, 1)
