"""Which rounds each worker was sent, answered and was in time for: pure bookkeeping."""

from __future__ import annotations

from collections.abc import Collection


class Attendance:
    """Workers, by number, over all rounds.

    One that leaves ``max_behind`` rounds unanswered is absent: it is sent nothing more until it answers, and then
    everything. So it begins, too.

    Args:
        num_workers: how many.
        max_behind: see :class:`~commkit.straggler.CoordinationOptions`.

    Attributes:
        dead: whose process has ended.
        absent: see above.
        accepted: the last round that each was in time for; -1: none.
    """

    def __init__(self, num_workers: int, max_behind: int) -> None:
        workers = range(num_workers)
        self.dead: set[int] = set()
        self.absent = set(workers)
        self.accepted = dict.fromkeys(workers, -1)
        self._max_behind = max_behind
        self._behind = dict.fromkeys(workers, 0)  # rounds sent and not answered
        self._answered = dict.fromkeys(workers, -1)  # the last round each answered
        self._told = dict.fromkeys(workers, -1)  # the last round each was sent

    @property
    def alive(self) -> list[int]:
        return [worker for worker in self._behind if worker not in self.dead]

    def is_busy(self, worker: int) -> bool:
        """Whether it has not answered what it was sent."""
        return self._behind[worker] > 0

    def to_tell(self) -> tuple[list[int], list[int]]:
        """Who is sent the round that begins: those who are up to date, and those who need everything. Who is absent and
        busy with something long past is sent nothing."""
        present = [worker for worker in self.alive if worker not in self.absent]
        back = [w for w in self.alive if w in self.absent and not self.is_busy(w)]
        return present, back

    def sent_all(self, worker: int) -> None:
        """It was sent everything, so it is up to date."""
        self.absent.discard(worker)

    def sent(self, worker: int, number: int) -> None:
        """It was sent round ``number``."""
        self._told[worker] = number
        self._behind[worker] += 1
        if self._behind[worker] >= self._max_behind:
            self.absent.add(worker)

    def was_sent(self, worker: int, number: int) -> bool:
        """Whether ``number`` is the last round that it was sent."""
        return self._told[worker] == number

    def may_answer(self, worker: int, number: int) -> bool:
        """Whether it has answered no round as late as ``number``."""
        return number > self._answered[worker]

    def answered(self, worker: int, number: int) -> None:
        """Older rounds it will not answer any more."""
        self._behind[worker] = 0
        self._answered[worker] = number

    def accept(self, workers: Collection[int], number: int) -> None:
        """They were in time for round ``number``; -1: for none that counts."""
        self.accepted.update(dict.fromkeys(workers, number))
