"""Who is sent what, after how many rounds without an answer."""

from __future__ import annotations

import pytest

from commkit.straggler.attendance import Attendance


def send(attendance: Attendance, number: int) -> tuple[list[int], list[int]]:
    """As the coordinator does when round ``number`` begins."""
    present, back = attendance.to_tell()
    for worker in (*present, *back):
        if worker in back:
            attendance.sent_all(worker)
        attendance.sent(worker, number)
    return present, back


def test_everybody_begins_with_everything() -> None:
    attendance = Attendance(3, max_behind=4)
    assert send(attendance, 0) == ([], [0, 1, 2])
    assert send(attendance, 1) == ([0, 1, 2], [])


@pytest.mark.parametrize("max_behind", [1, 2, 4])
def test_who_is_silent_is_sent_max_behind_rounds_and_then_everything(max_behind: int) -> None:
    attendance, sent = Attendance(2, max_behind), []
    for number in range(max_behind + 3):
        present, back = send(attendance, number)
        sent.append(1 in (*present, *back))
        attendance.answered(0, number)
    assert sent == [True] * max_behind + [False] * 3
    attendance.answered(1, max_behind - 1)
    _, back = send(attendance, max_behind + 3)
    assert 1 in back
    assert attendance.was_sent(1, max_behind + 3)


def test_an_answer_stands_for_all_rounds_before_it() -> None:
    attendance = Attendance(1, max_behind=4)
    for number in range(3):
        send(attendance, number)
    attendance.answered(0, 1)
    assert not attendance.is_busy(0)
    assert [attendance.may_answer(0, number) for number in range(3)] == [False, False, True]


def test_the_dead_are_sent_nothing() -> None:
    attendance = Attendance(3, max_behind=4)
    attendance.dead.add(1)
    assert attendance.alive == [0, 2]
    assert send(attendance, 0) == ([], [0, 2])
