"""One worker's side of the membership protocol: a deterministic state machine without clock, threads and sockets.

Workers agree through a log that is appended to by comparing and setting its next place (:mod:`.ledger`). An epoch is a
set of members. Any member that meets trouble ends it with an ``Alarm``; every member that hears of it stops and says
how far it got (``Ready``); and when all members have either said so or are lost, one of them proposes the next epoch
(``View``), of those that are ready and of workers that wait to join. The first proposal in the log counts.

A step is committed by all members or by none. A member *prepares* a step when it has its outcome, and *commits* it
when it knows that all members have prepared it (a barrier in the group). If the epoch ends in between, the view of the
next says: the last step that all ready members have prepared is committed, and what comes after it never happened.
Nobody can have committed more, since a barrier that anybody has passed was entered by all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from .ledger import Ledger
from .options import ElasticOptions
from .records import Alarm, Join, Leave, Ready, Record, View, decode, encode
from .seal import ForgedRecordError, Seal


class Member:
    """
    Times are in seconds of any clock that does not go backwards, given by the caller.

    Args:
        worker: a name that no other worker has ever had.
        options: equal for all workers.
        world_size: workers to wait for at the start.
        place: of this worker among those who start together.
        now: the time.
        seal: of all workers, so that nobody else writes to the log.

    Attributes:
        ledger: what the log says, as far as it is read.
        committed: the last step that is real here.
        prepared: the last step whose outcome is here.
        has_state: whether this worker has the training state.
        refused: why this worker does not belong to those who write to the log; empty if it does.
        forged: records that others wrote who do not belong to them. They have no effect.
        refuses: why so many workers cannot train together; empty if they can. Equal on all workers from their first step on.
    """

    def __init__(
        self,
        worker: str,
        options: ElasticOptions,
        world_size: int,
        place: int,
        now: float,
        seal: Seal | None = None,
    ) -> None:
        self.worker = worker
        self.options = options
        self.world_size = world_size
        self.ledger = Ledger()
        self.committed = self.prepared = 0
        self.refused = ""
        self.forged = 0
        self.refuses: Callable[[int], str] = lambda size: ""
        self._seal = Seal() if seal is None else seal
        self.has_state = False
        self._place = place
        self._position = 0
        self._began = now  # the present epoch, or its end
        self._step_began: float | None = None
        self._failure: str | None = None
        self._leaving: str | None = None
        self._beats: dict[str, int] = {}  # of each worker the last
        self._silent: dict[
            str, float
        ] = {}  # seconds since it changed, as far as this worker listened
        self._listened = now
        self._disconnected: set[str] = set()

    # What the driver calls.

    def request(self, now: float) -> tuple[int, str]:
        """The next place of the log, and what to append there; empty: nothing, the place is only read."""
        wish = self._wish(now)
        if wish is None:
            return self._position, ""
        return self._position, self._seal.close(self._position, encode(wish))

    def answer(self, position: int, text: str, now: float) -> bool:
        """What the log has at ``position``; empty: nothing yet. Answers may come twice. True: there may be more."""
        if position != self._position or not text or self.refused:
            return False
        try:
            record = decode(self._seal.open(position, text))
        except ForgedRecordError as error:
            return self._pass_over(str(error))
        self._position += 1
        before = self.ledger.view
        alarmed = self.ledger.alarm is not None
        self.ledger.apply(record)
        if self.ledger.view is not before:
            self._enter(self.ledger.view, now)
        elif not alarmed and self.ledger.alarm is not None:
            self._began = now
        return True

    def _pass_over(self, reason: str) -> bool:
        """A record that was not sealed as this worker would: of a stranger, or this worker is the stranger."""
        if not self.ledger.knows(self.worker):
            self.refused = reason
            return False
        self.forged += 1
        self._position += 1
        return True

    def heard(self, beats: Mapping[str, int], now: float) -> None:
        """The counters of workers' signs of life as they are now.

        Whoever has not listened for a while, because it was stopped, or the store was, knows nothing of the others' lives
        meanwhile: they may have been as unable to speak. Such a gap counts as one heartbeat.
        """
        gap, beat_s = now - self._listened, self.options.heartbeat_s
        self._listened = now
        for worker in {*beats, *self.others()}:
            last = self._beats.get(worker, -1)
            self._beats[worker] = max(last, beats.get(worker, last))
            silent = self._silent.get(worker, 0.0) + (gap if gap <= 2 * beat_s else beat_s)
            self._silent[worker] = 0.0 if self._beats[worker] > last else silent

    def disconnected(self, epoch: int, workers: Iterable[str]) -> None:
        """These members of ``epoch`` have closed their connections of it to this one. Who does so without having said
        that it is ready has ended."""
        if epoch == self.ledger.view.epoch:
            self._disconnected.update(workers)

    def others(self) -> list[str]:
        """Workers whose signs of life matter."""
        return [w for w in (*self.ledger.view.members, *self.ledger.waiting) if w != self.worker]

    # What training calls.

    @property
    def view(self) -> View:
        return self.ledger.view

    @property
    def is_member(self) -> bool:
        return self.worker in self.ledger.view.members

    @property
    def working(self) -> bool:
        """Whether this worker is a member of an epoch that is not over."""
        return self.is_member and self.ledger.alarm is None

    @property
    def evicted(self) -> bool:
        """Whether an epoch began without this worker, which had been a member."""
        known = self.ledger.knows(self.worker) and self.worker not in self.ledger.waiting
        return known and not self.is_member and not self.ledger.view.stop

    def received(self, epoch: int) -> bool:
        """The training state of ``epoch`` is here. False: the epoch is over, and it counts for nothing."""
        if not self._works_in(epoch):
            return False
        self.has_state = True
        self.committed = self.prepared = self.ledger.view.step
        return True

    def begin_step(self, now: float) -> None:
        """A step begins, or the making of a group for it; see ``step_limit_s``."""
        self._step_began = now

    def rest(self) -> None:
        """Nothing is done together with others now that would have to end in time."""
        self._step_began = None

    def prepare(self, epoch: int, step: int) -> bool:
        """The outcome of ``step`` is here, by the group of ``epoch``. False: the epoch is over; wait for the verdict."""
        if not self._works_in(epoch):
            return False
        self.prepared = step
        return True

    def commit(self, epoch: int, step: int) -> bool:
        """All members have prepared ``step``. False: the epoch is over; wait for the verdict."""
        if not self._works_in(epoch):
            return False
        self.committed = step
        self._step_began = None
        return True

    def fail(self, epoch: int, reason: str) -> None:
        """What this member did together with others in ``epoch`` has failed."""
        if epoch == self.ledger.view.epoch and self._failure is None:
            self._failure = reason

    def leave(self, reason: str = "") -> None:
        """Take no part any more; see :class:`Leave`."""
        self._leaving = reason

    @property
    def has_left(self) -> bool:
        return self.worker in self.ledger.left

    @property
    def is_done(self) -> bool:
        """Whether the others know all that this worker has to say, or do not care any more."""
        silent = self.has_left or bool(self.refused) or bool(self.view.stop)
        return silent or self._leaving is None

    def alone(self, now: float) -> bool:
        """Whether all other members are done, have left or are lost."""
        return all(
            w in self.ledger.left or self._lost(w, now)
            for w in self.ledger.view.members
            if w != self.worker
        )

    # How it is decided.

    def _works_in(self, epoch: int) -> bool:
        return self.working and epoch == self.ledger.view.epoch

    def _enter(self, view: View, now: float) -> None:
        self._began = now
        self._step_began = self._failure = None
        self._disconnected.clear()
        if view.stop:  # the verdict counts for those who are to save what they have
            if self.committed <= view.step <= self.prepared:
                self.committed = view.step
        elif self.worker in view.sources:
            self.has_state = True
            self.committed = self.prepared = view.step
        elif self.worker in view.members:
            self.has_state = False

    def _wish(self, now: float) -> Record | None:
        ledger = self.ledger
        if self.has_left or ledger.view.stop or self.refused:
            return None
        if self._leaving is not None:
            return Leave(self.worker, self._leaving)
        if not ledger.knows(self.worker):
            return Join(self.worker, self._place)
        if ledger.view.epoch == 0:
            return self._proposal(now)
        if not self.is_member:
            return self._give_up_waiting(now)
        if ledger.alarm is None:
            trouble = self._trouble(now)
            return None if trouble is None else Alarm(ledger.view.epoch, self.worker, trouble)
        if self.worker not in ledger.ready:
            prepared = self.prepared if self.has_state else None
            return Ready(ledger.view.epoch, self.worker, prepared)
        return self._proposal(now)

    def _give_up_waiting(self, now: float) -> Leave | None:
        """A worker that waits to join leaves when nobody is there any more to take it in."""
        waits = self.worker in self.ledger.waiting
        return Leave(self.worker, "nobody is left to join") if waits and self.alone(now) else None

    def _trouble(self, now: float) -> str | None:
        """Why the present epoch should end."""
        if self._failure is not None:
            return self._failure
        for worker in self.ledger.view.members:
            if worker != self.worker and worker not in self.ledger.left and self._lost(worker, now):
                return f"worker {worker} {self._how_lost(worker)}"
        limit = self.options.step_limit_s
        if limit is not None and self._step_began is not None and now - self._step_began > limit:
            return f"a step took longer than step_limit_s={limit:g}"
        present = [w for w in self.ledger.view.members if w not in self.ledger.left]
        if self._has_settled_down(now):
            for worker in self._taken_in(present, self._waiting(now)):
                return f"worker {worker} joins"
        return None

    def _has_settled_down(self, now: float) -> bool:
        """Whether the epoch may end for a worker that joins: if each did so at once, many that come one after the other
        would leave no time for a step."""
        return self.committed > self.view.step or now - self._began > self.options.limit_s

    def _waiting(self, now: float) -> list[str]:
        return [w for w in self.ledger.waiting if not self._lost(w, now)]

    def _taken_in(self, present: Sequence[str], arrived: Sequence[str]) -> Sequence[str]:
        """As many of those who ``arrived`` as make a number that can train together; the others wait until somebody is
        lost."""
        counts = range(len(arrived), 0, -1)
        fitting = (count for count in counts if not self.refuses(len(present) + count))
        return arrived[: next(fitting, 0)]

    def _lost(self, worker: str, now: float) -> bool:
        if worker == self.worker:
            return False
        if worker in self._disconnected:
            return True
        since = min(now - self._listened, self.options.heartbeat_s)
        return self._silent.get(worker, 0.0) + since > self.options.limit_s

    def _how_lost(self, worker: str) -> str:
        if worker in self._disconnected:
            return "has ended"
        return f"gave no sign of life for limit_s={self.options.limit_s:g} s"

    def _proposal(self, now: float) -> View | None:
        """The next epoch, when it is known who can be in it."""
        ledger, view = self.ledger, self.ledger.view
        present = [w for w in view.members if w not in ledger.left]
        ready = [w for w in present if w in ledger.ready]
        if any(not self._lost(w, now) for w in present if w not in ledger.ready):
            return None
        arrived = self._waiting(now)
        if view.epoch == 0:
            arrived.sort(key=ledger.waiting.__getitem__)
            if len(arrived) < self.world_size and now - self._began <= self.options.start_s:
                return None
        members = (*ready, *self._taken_in(ready, arrived))
        sources = tuple(w for w in ready if ledger.ready[w] is not None)
        steps = [s for s in map(ledger.ready.get, sources) if s is not None]
        step = min(steps, default=view.step)
        refusal = self._refusal(members, sources, step)
        if not refusal:
            # Before the first step all start alike: the first one's state is everybody's.
            return View(view.epoch + 1, members, sources or members[:1], step)
        if now - self._began <= self.options.grace_s:
            return None
        return View(view.epoch + 1, (), sources, step, stop=refusal)

    def _refusal(self, members: tuple[str, ...], sources: tuple[str, ...], step: int) -> str:
        """Why these workers cannot go on; empty if they can."""
        ledger, options = self.ledger, self.options
        done = sum(w in ledger.left and not ledger.left[w] for w in ledger.view.members)
        if not members or len(members) + done < options.min_workers:
            return f"{len(members)} workers are left, fewer than min_workers={options.min_workers}"
        if not sources and ledger.view.step > 0:
            if all(
                ledger.left.get(w, "lost") == "" for w in ledger.view.members if w not in members
            ):
                return "the others have done all steps, and are gone"
            return "no worker that is left has the training state"
        refusal = self.refuses(len(members))
        if refusal:
            return f"{len(members)} workers are left, and {refusal}"
        again = (members, step) == (ledger.view.members, ledger.view.step)
        if again and ledger.tries >= options.max_tries:
            return f"{len(members)} workers tried step {step + 1} max_tries={options.max_tries} times: {ledger.alarm}"
        return ""
