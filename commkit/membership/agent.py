"""Runs one worker's state machine over a store, on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from torch._C._distributed_c10d import Store

from ..connections import ConnectionsCut, Wiring
from .errors import JoinRefused, MembershipError, StoreLost, TrainingStopped, WorkerEvicted
from .member import Member
from .records import View

T = TypeVar("T")
_JOIN_S = 5.0


class Agent:
    """Reads and writes the log, gives signs of life, and cuts the connections of an epoch that is over, so that
    whoever waits in a collective hears of it.

    Args:
        member: the state machine; touched under the agent's lock alone.
        store: that all workers reach; a connection of the thread's own.
    """

    def __init__(self, member: Member, store: Store) -> None:
        self._member = member
        self._store = store
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._stop = False
        self._lost: str | None = None
        self._wiring: tuple[int, Wiring] | None = None
        self._beat = 0
        self._next_beat = 0.0
        self._thread = threading.Thread(target=self._run, name="commkit-members", daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> float:
        """Seconds of the clock by which workers are judged."""
        return time.monotonic()

    def ask(self, question: Callable[[Member], T]) -> T:
        """``question(member)``, while nothing changes."""
        with self._changed:
            return question(self._member)

    def order(self, change: Callable[[Member], None]) -> None:
        """Have ``change(member)`` take effect at once."""
        with self._changed:
            change(self._member)
        self._wake.set()

    def wait_for(self, question: Callable[[Member], T], timeout_s: float | None = None) -> T:
        """The first true answer; or the last, when the time is up.

        Raises:
            MembershipError: there will be none, because this worker takes no part any more.
        """
        deadline = None if timeout_s is None else self.now() + timeout_s
        with self._changed:
            while True:
                answer = question(self._member)
                rest = None if deadline is None else deadline - self.now()
                if answer or (rest is not None and rest <= 0):
                    return answer
                self._require_part()
                self._changed.wait(rest)

    def require_part(self) -> None:
        """
        Raises:
            MembershipError: this worker takes no part any more.
        """
        with self._changed:
            self._require_part()

    def require_epoch(self, epoch: int, complete: bool = False) -> None:
        """
        Raises:
            MembershipError: this worker takes no part any more.
            ConnectionsCut: ``epoch`` is over; with ``complete``, or one of its members is done and gone.
        """
        with self._changed:
            self._require_part()
            view = self._member.view
            if view.epoch != epoch or not self._member.working:
                raise ConnectionsCut(f"epoch {epoch} is over: {self._member.ledger.alarm}")
            gone = [worker for worker in view.members if worker in self._member.ledger.left]
            if complete and gone:
                raise ConnectionsCut(f"worker {gone[0]} has left epoch {epoch}")

    def wired(self, view: View) -> Wiring:
        """For the connections of ``view``'s epoch; cut when it is over, also while they are made."""
        wiring = Wiring()
        with self._changed:
            self._wiring = view.epoch, wiring
        self._wake.set()
        return wiring

    def close(self, serve: bool = False) -> None:
        """Stop the thread; it writes what the member still has to say. ``serve``: first wait until all others are
        done or lost."""
        with self._changed:
            while serve and self._thread.is_alive() and not self._member.alone(self.now()):
                self._changed.wait(self._member.options.heartbeat_s)
        if serve:  # they may still read why they have to stop
            time.sleep(self._member.options.heartbeat_s)
        self._stop = True
        self._wake.set()
        self._thread.join(_JOIN_S)

    def _require_part(self) -> None:
        member = self._member
        if self._lost is not None:
            raise StoreLost(
                f"the store that workers agree through is lost ({self._lost}); start the job again from a checkpoint"
            )
        if member.refused:
            raise JoinRefused(
                f"worker {member.worker} may not take part: the log has records that it would not have sealed so, as "
                f"{member.refused}"
            )
        if member.view.stop:
            raise TrainingStopped(
                f"training stopped after {member.view.step} steps: {member.view.stop}; save what is at hand (see "
                "Elastic.remaining), and start again with enough workers"
            )
        if member.has_left:
            reason = member.ledger.left[member.worker]
            raise MembershipError(
                f"worker {member.worker} has left: {reason or 'its work is done'}"
            )
        if member.evicted:
            raise WorkerEvicted(
                f"worker {member.worker} is not in epoch {member.view.epoch}: the others went on without it, as it "
                f"gave no sign of life for limit_s={member.options.limit_s:g} s; start it again to join them"
            )

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # of the store; whatever it is, nobody may wait for this thread
            with self._changed:
                self._lost = f"{type(error).__name__}: {error}"
                self._changed.notify_all()
                if self._wiring is not None:
                    self._wiring[1].cut()

    def _turn(self) -> bool:
        """One look at the log. False: there is nothing left to do."""
        now = self.now()
        if now >= self._next_beat:
            self._exchange_beats()
            self._next_beat = now + self._member.options.heartbeat_s
        with self._changed:
            self._watch_connections()
            position, text = self._member.request(self.now())
        have = self._store.compare_set(f"log/{position}", "", text).decode()
        with self._changed:
            more = self._member.answer(position, have, self.now())
            done = self._member.is_done
            if more or self._member.refused:
                self._changed.notify_all()
            self._cut_if_over()
        if more:
            return True
        if self._stop:
            return not done  # what it was told while the store was asked, it has yet to say
        self._wake.wait(self._member.options.poll_s)
        self._wake.clear()
        return True

    def _exchange_beats(self) -> None:
        self._beat += 1
        self._store.set(f"beat/{self._member.worker}", str(self._beat))
        with self._changed:
            others = self._member.others()
        # All of them have set one before they asked to join.
        beats = self._store.multi_get([f"beat/{worker}" for worker in others]) if others else []
        with self._changed:
            heard = {w: int(beat) for w, beat in zip(others, beats, strict=True)}
            self._member.heard(heard, self.now())
            self._changed.notify_all()

    def _watch_connections(self) -> None:
        member = self._member
        if self._wiring is not None and self._wiring[0] == member.view.epoch:
            members = member.view.members
            gone = {members[rank] for rank in self._wiring[1].closed()}
            member.disconnected(member.view.epoch, gone - {member.worker})

    def _cut_if_over(self) -> None:
        """What this worker says of itself comes before what its connections say."""
        if self._wiring is None:
            return
        epoch, wiring = self._wiring
        member = self._member
        said = member.worker in member.ledger.ready or member.has_left
        if member.view.epoch != epoch or said or member.view.stop:
            wiring.cut()
            if member.view.epoch != epoch:
                self._wiring = None
