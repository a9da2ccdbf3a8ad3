"""Threads that take turns in virtual time: one runs at a time, and time passes only while all of them wait."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from math import inf

from ..clock import VirtualClock


class Killed(BaseException):
    """The process of this thread has been killed."""


class Stuck(AssertionError):
    """Everybody waits, and nothing is ever going to happen."""


class Process:
    """What is killed and stopped together.

    Args:
        name: of the process.

    Attributes:
        dead: whether it was killed.
        stumbles: whether its program is to raise an exception.
        resumes: until when it is stopped.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = self.stumbles = False
        self.resumes = 0.0


class Turn:
    """One thread."""

    def __init__(self, process: Process, name: str) -> None:
        self.process, self.name = process, name
        self.ready: Callable[[], bool] = lambda: True
        self.until = inf
        self.over = False
        self.go = threading.Semaphore(0)

    def due(self, now: float) -> bool:
        process = self.process
        return process.dead or (process.resumes <= now and (self.until <= now or self.ready()))

    def wakes(self, now: float) -> float:
        """When it may be due, if nothing happens before."""
        return self.process.resumes if self.process.resumes > now else self.until


class Turns:
    """
    Args:
        clock: of the run.
        random: decides who goes first.
    """

    def __init__(self, clock: VirtualClock, random: random.Random) -> None:
        self.clock = clock
        self._random = random
        self._turns: list[Turn] = []
        self._current: Turn | None = None
        self._back = threading.Semaphore(0)
        self._errors: list[BaseException] = []

    @property
    def process(self) -> Process:
        """Whose turn it is."""
        assert self._current is not None
        return self._current.process

    def start(self, process: Process, name: str, body: Callable[[], None]) -> Turn:
        """Begin a thread, which gets its turn later."""
        turn = Turn(process, name)

        def run() -> None:
            turn.go.acquire()
            try:
                if not process.dead:
                    body()
            except Killed:
                pass
            except BaseException as error:
                self._errors.append(error)
            turn.over = True
            self._back.release()

        threading.Thread(target=run, daemon=True).start()
        self._turns.append(turn)
        return turn

    def wait(self, ready: Callable[[], bool], seconds: float = inf) -> bool:
        """Let others have their turns until ``ready()``, or for so many seconds; whether it is.

        Raises:
            Killed: the process was, meanwhile.
        """
        turn = self._current
        assert turn is not None
        turn.ready, turn.until = ready, self.clock.now + seconds
        while True:
            if turn.process.dead:
                raise Killed
            if self.clock.now >= turn.process.resumes:
                if ready():
                    return True
                if self.clock.now >= turn.until:
                    return False
            self._back.release()
            turn.go.acquire()
            self._current = turn

    def sleep(self, seconds: float) -> None:
        self.wait(lambda: False, seconds)

    def run(self, until: float) -> None:
        """Give turns until all threads are over.

        Raises:
            Stuck: they wait for ever, or up to ``until``.
            BaseException: of a thread.
        """
        while True:
            now = self.clock.now
            due = [turn for turn in self._turns if turn.due(now)]
            if due:
                turn = self._random.choice(due)
                self._current = turn
                turn.go.release()
                self._back.acquire()
                if turn.over:
                    self._turns.remove(turn)
                if self._errors:
                    self.end()
                    raise self._errors[0]
                continue
            if not self._turns:
                return
            times = [turn.wakes(now) for turn in self._turns]
            nearest = min([self.clock.next_due, *times])
            if nearest > until:
                names = [f"{turn.process.name} {turn.name}" for turn in self._turns]
                self.end()
                raise Stuck(f"{names} wait for ever")
            self.clock.run(nearest)

    def end(self) -> None:
        """Kill whoever is left."""
        for turn in list(self._turns):
            turn.process.dead = True
        while self._turns:
            turn = self._turns.pop()
            self._current = turn
            turn.go.release()
            self._back.acquire()
            if not turn.over:  # it catches everything, and waits again
                self._turns.append(turn)


class News:
    """A condition and an event of threads that take turns: nothing needs to be locked."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._version, self._set = turns, 0, False

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def notify_all(self) -> None:
        self._version += 1

    def set(self) -> None:
        self._version += 1
        self._set = True

    def clear(self) -> None:
        self._set = False

    def wait(self, seconds: float | None = None) -> bool:
        version = self._version
        ready = lambda: self._set or self._version != version
        return self._turns.wait(ready, inf if seconds is None else seconds)
