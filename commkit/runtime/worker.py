"""Runs reductions one after another, off the training thread.

Ranks match collectives by the order of issue, so all of an attachment run on one thread, in the order in
which buckets became ready (the same everywhere), over a process group of their own.
"""

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .alarm import Alarm, NoAlarm, RankFailure

_TICK_S = 0.2
_EXIT_PATIENCE_S = 1.0  # a program that ends without close() may have peers that never answer
_log = logging.getLogger(__name__)


class ReductionWorker:
    """One ordered thread that completes Futures, with a watchdog.

    After the first failure, here or on another rank, everything in flight and everything that follows
    fails at once: ranks are out of step and nothing they would compute is right.

    Args:
        alarm: how failures travel between ranks.
        timeout_s: seconds after which a reduction counts as stuck. DDP itself waits for ever.
        device: where the gradients live; on CUDA the thread works on a stream of its own.
    """

    def __init__(self, alarm: Alarm | NoAlarm, timeout_s: float, device: torch.device) -> None:
        self._alarm = alarm
        self._timeout_s = timeout_s
        self._device = device
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pending: dict[int, _Job] = {}
        self._held: list[_Job] = []
        self._lock = threading.Lock()
        self._failure: RankFailure | None = None
        self._count = 0
        self._threads = torch.get_num_threads()
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._run, name="commkit-reduce", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="commkit-watchdog", daemon=True)
        self._closed = threading.Event()
        self._thread.start()
        self._watchdog.start()
        alarm.listen(self._fail)
        # A thread that is inside C++ when the interpreter ends aborts the process.
        atexit.register(self._exit)

    @property
    def failure(self) -> RankFailure | None:
        return self._failure

    def submit(
        self, reduce: Callable[[], Tensor], like: Tensor, uses: Sequence[Tensor] = ()
    ) -> torch.futures.Future[Tensor]:
        """Queue ``reduce``; its result must have the shape and dtype of ``like`` (DDP does not look).

        Args:
            reduce: called on the thread.
            like: the tensor that it reduces.
            uses: what else it reads and writes.

        Returns:
            A Future that completes with the result, or raises :class:`RankFailure` when it is waited on.
        """
        job = self._job(reduce, like)
        job.uses = (like, *uses)
        job.carries, self._held = self._held, []
        if self._failure is None:
            self._jobs.put(job)
        # Future.set_exception reaches DDP as a cast error, so exceptions travel as values until here.
        return job.future.then(_value_or_raise)

    def hold(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """A Future that completes with ``buffer`` when what is submitted next is done."""
        job = self._job(lambda: buffer, buffer)
        self._held.append(job)
        return job.future.then(_value_or_raise)

    def _job(self, reduce: Callable[[], Tensor], like: Tensor) -> "_Job":
        devices: list[int | str | torch.device] | None = (
            [self._device] if self._stream is not None else None
        )
        job = _Job(reduce, torch.futures.Future(devices=devices), like, self._ready_event())
        with self._lock:
            self._count += 1
            job.number = self._count
            if self._failure is None:
                self._pending[job.number] = job
        if self._failure is not None:
            job.finish(self._failure)
        return job

    def close(self) -> None:
        """Finish what is queued, then stop the threads; what is submitted later fails. After a failure the reducing thread is left alone:
        it may wait for a peer that is gone."""
        atexit.unregister(self._exit)
        self._stop(self._timeout_s)
        if self._failure is None:
            self._failure = RankFailure("the attachment is closed; wrap the model in a new DDP")

    def _exit(self) -> None:
        self._stop(_EXIT_PATIENCE_S)

    def _stop(self, patience_s: float) -> None:
        self._jobs.put(None)
        if self._failure is None:
            self._thread.join(patience_s)
        self._closed.set()
        self._watchdog.join()
        self._alarm.close()

    def _ready_event(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # a new thread starts with the machine's number
        if self._stream is not None:
            torch.cuda.set_device(self._device)
            with torch.cuda.stream(self._stream):
                self._work(self._stream)
        else:
            self._work(None)

    def _work(self, stream: "torch.cuda.Stream | None") -> None:
        while (job := self._jobs.get()) is not None:
            self._carry_out(job, stream)
            del job  # its tensors would live until the next

    def _carry_out(self, job: "_Job", stream: "torch.cuda.Stream | None") -> None:
        if self._failure is not None:
            job.finish(self._failure)
            return
        try:
            if stream is not None and job.ready is not None:
                stream.wait_event(job.ready)
                for used in (*job.uses, *(each.like for each in job.carries)):
                    used.record_stream(stream)
            result = job.reduce()
            _check(result, job.like)
        except BaseException as error:  # whatever it was, the peers must hear of it
            _log.error("a reduction failed on this rank", exc_info=error)
            failure = RankFailure(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail(self._alarm.ring(failure))
        else:
            with self._lock:
                for each in (job, *job.carries):
                    self._pending.pop(each.number, None)
            job.finish(result)
            for carried in job.carries:
                carried.finish(carried.like)

    def _fail(self, failure: RankFailure) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = failure
            pending, self._pending = list(self._pending.values()), {}
        for job in pending:
            job.finish(self._failure)

    def _watch(self) -> None:
        while not self._closed.wait(_TICK_S):
            if self._longest_wait() > self._timeout_s:
                late = RankFailure(f"a reduction took longer than timeout_s={self._timeout_s:g} s")
                self._fail(self._alarm.ring(late))

    def _longest_wait(self) -> float:
        with self._lock:
            oldest = next(iter(self._pending.values()), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.queued


class _Job:
    """A queued reduction. ``finish`` completes the Future once; later calls do nothing. ``carries`` are
    jobs whose buffers it reduces too."""

    def __init__(
        self,
        reduce: Callable[[], Tensor],
        future: "torch.futures.Future[Tensor | RankFailure]",
        like: Tensor,
        ready: "torch.cuda.Event | None",
    ) -> None:
        self.reduce = reduce
        self.future = future
        self.like = like
        self.ready = ready
        self.number = 0
        self.uses: tuple[Tensor, ...] = (like,)
        self.carries: list[_Job] = []
        self.queued = time.monotonic()
        self._lock = threading.Lock()

    def finish(self, value: "Tensor | RankFailure") -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_result(value)


def _value_or_raise(future: "torch.futures.Future[Tensor | RankFailure]") -> Tensor:
    value = future.value()
    if isinstance(value, RankFailure):
        raise value
    return value


def _check(result: Tensor, like: Tensor) -> None:
    if result.shape != like.shape or result.dtype != like.dtype:
        raise RuntimeError(
            f"the reducer returned {tuple(result.shape)} {result.dtype} for a bucket of "
            f"{tuple(like.shape)} {like.dtype}"
        )
