"""The state that all workers share: what the log says, read from its beginning.

Every worker reads the same records in the same order, so all ledgers that have read as much are equal. A record
is appended by comparing and setting the log's next place: its author has read everything before it.
"""

from __future__ import annotations

from .records import Alarm, Join, Leave, Ready, Record, View


class Ledger:
    """
    Attributes:
        view: of the present epoch; epoch 0 has no members and is over from the start.
        alarm: why the present epoch is over; None while it is not.
        ready: what each member had prepared when it stopped working in the epoch.
        waiting: workers that want to join, by their place, in the order of asking.
        left: workers that have left, and why.
        tries: epochs in a row, this one included, with these members and this step.
    """

    def __init__(self) -> None:
        self.view = View(0, (), (), 0)
        self.alarm: str | None = "training begins"
        self.ready: dict[str, int | None] = {}
        self.waiting: dict[str, int] = {}
        self.left: dict[str, str] = {}
        self.tries = 0
        self._known: set[str] = set()

    def knows(self, worker: str) -> bool:
        """Whether ``worker`` has ever asked to join."""
        return worker in self._known

    def apply(self, record: Record) -> None:
        """Read one more record. What belongs to an epoch that is past has no effect."""
        if isinstance(record, Join):
            if record.worker not in self._known:
                self._known.add(record.worker)
                self.waiting[record.worker] = record.place
        elif isinstance(record, Leave):
            self._leave(record)
        elif isinstance(record, View):
            if record.epoch == self.view.epoch + 1:
                self._begin(record)
        elif record.epoch != self.view.epoch or record.worker not in self.view.members:
            return
        elif isinstance(record, Alarm):
            if self.alarm is None:
                self.alarm = record.reason
        elif isinstance(record, Ready) and self.alarm is not None:
            self.ready.setdefault(record.worker, record.prepared)

    def _leave(self, record: Leave) -> None:
        self.left.setdefault(record.worker, record.reason)
        self.waiting.pop(record.worker, None)
        if record.reason and record.worker in self.view.members and self.alarm is None:
            self.alarm = record.reason

    def _begin(self, view: View) -> None:
        same = (view.members, view.step) == (self.view.members, self.view.step)
        self.tries = self.tries + 1 if same else 1
        self.view = view
        self.alarm = None
        self.ready = {}
        for worker in view.members:
            self.waiting.pop(worker, None)
