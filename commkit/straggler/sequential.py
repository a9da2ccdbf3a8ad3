"""Gradient coding and selective repetition: schedules whose jobs are coded as a whole.

Sources: Tandon et al. 2017; Krishnan et al. 2023 (SR-SGC, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .codes import GradientCode, check_stragglers
from .masks import members
from .models import Bursty
from .requirements import check_pattern, enough, need_code, require_code, require_same
from .schedule import Chunk, MiniTask, NotDecodable, Schedule


class CodedJobs(Schedule):
    """What schedules share in which a worker sends one coded vector per job.

    Args:
        num_workers: n.
        num_stragglers: s of the code.
        num_jobs: see :class:`Schedule`.
        code: for n and at least s, whose own s counts from here on; None: plan nothing and only count, n - s
            results being enough, as in studies at sizes for which no real code is usable.

    Raises:
        ValueError: s is out of range, or the code is for other numbers.
    """

    def __init__(
        self,
        num_workers: int,
        num_stragglers: int,
        num_jobs: int | None,
        code: GradientCode | None,
    ) -> None:
        super().__init__(num_workers, num_jobs)
        check_stragglers(num_workers, num_stragglers)
        require_code(code, num_workers, num_stragglers)
        self.num_stragglers = num_stragglers if code is None else code.num_stragglers
        self.code = code
        self.num_units = num_workers if code is None else code.num_partitions
        self.load = (self.num_stragglers + 1) / num_workers
        self._chunks: dict[int, tuple[Chunk, ...]] = {}
        self._delivered: dict[int, int] = {}  # job -> workers

    def decodable(self, job: int) -> bool:
        return enough(self._of(job), self.num_workers, self.num_stragglers, self.code)

    def decode(self, job: int) -> dict[tuple[int, int], float]:
        code, delivered = need_code(self.code), self._of(job)
        terms = code.terms(members(delivered))
        if terms is None:
            raise NotDecodable(job, members(self._all & ~delivered), self.delay)
        return {(i, 0): weight for i, weight in terms}

    def missing(self, job: int) -> tuple[int, ...]:
        return tuple(members(self._all & ~self._of(job)))

    def _of(self, job: int) -> int:
        if job not in self._delivered:
            raise ValueError(f"job={job} is not under way in round {self.round}")
        return self._delivered[job]

    def _coded(self, worker: int, job: int) -> MiniTask:
        if worker not in self._chunks:
            runs = need_code(self.code).runs_of(worker)
            self._chunks[worker] = tuple(Chunk(*run) for run in runs)
        return MiniTask(job, worker, 0, True, self._chunks[worker])

    def _forget(self) -> None:
        """Drop jobs that were due before this round."""
        for job in [job for job in self._delivered if job < self.round - self.delay]:
            del self._delivered[job]

    def state_dict(self) -> dict[str, Any]:
        jobs = sorted(self._delivered.items())
        return {
            "schedule": self._identity(),
            "round": self.round,
            "delivered": [[job, members(mask)] for job, mask in jobs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require_same(state["schedule"], self._identity())
        self.round, self._plan = state["round"], None
        self._delivered = {job: sum(1 << i for i in who) for job, who in state["delivered"]}

    def _identity(self) -> list[Any]:
        return [self.name, self.num_workers, self.num_stragglers, self.delay]


class GradientCoding(CodedJobs):
    """Every job is coded and finished in its own round; with ``num_stragglers=0``, plain synchronous training.

    Load ``(s+1)/n``. A round may close as soon as the code decodes, which for fractional repetition is often with
    more than s late.
    """

    name = "gradient_coding"
    delay = 0

    def __init__(
        self,
        num_workers: int,
        num_stragglers: int,
        code: GradientCode | None,
        num_jobs: int | None = None,
    ) -> None:
        super().__init__(num_workers, num_stragglers, num_jobs, code)

    def _fork(self) -> GradientCoding:
        copy = GradientCoding(self.num_workers, self.num_stragglers, self.code, self.num_jobs)
        copy.load_state_dict(self.state_dict())
        return copy

    def _tasks(self, worker: int) -> tuple[MiniTask, ...]:
        return (self._coded(worker, self.round),) if self.has_job(self.round) else ()

    def _fits(self, late: int) -> bool:
        here = self._all & ~late
        return enough(here, self.num_workers, self.num_stragglers, self.code)

    def _record(self, late: int) -> None:
        self._forget()
        if self.has_job(self.round):
            self._delivered[self.round] = self._all & ~late


class SRSGC(CodedJobs):
    """Selective repetition: what a job lacks to be decoded is computed again ``burst`` rounds later.

    In round r, with v workers that have not delivered job r - B, the first v - s of these repeat their vector of
    it in place of that of job r, which then lacks theirs. It tolerates patterns of the (B, W, lambda)-bursty model
    with load ``(s+1)/n``, ``s = ceil(B lambda / (W-1+B))``, where a code for all lambda stragglers needs
    ``(lambda+1)/n``; and any pattern with at most s stragglers per round.

    Args:
        num_workers: n.
        burst: B, rounds that a straggler stays slow; also the delay T.
        rounds: W, the window, x B + 1 for a whole x.
        stragglers: lambda, different stragglers in a window. Larger numbers tolerate more and cost more;
            :func:`~commkit.straggler.select` chooses by recorded times.
        code: for n and at least :meth:`code_stragglers`; None only counts.
        num_jobs: see :class:`Schedule`.

    Raises:
        ValueError: W is no multiple of B plus 1, or a number is out of range.
    """

    name = "sr_sgc"

    def __init__(
        self,
        num_workers: int,
        burst: int,
        rounds: int,
        stragglers: int,
        code: GradientCode | None,
        num_jobs: int | None = None,
    ) -> None:
        s = self.code_stragglers(num_workers, burst, rounds, stragglers)
        super().__init__(num_workers, s, num_jobs, code)
        self.delay = burst
        self.model = Bursty(burst, rounds, stragglers)
        # Rounds since jobs were last repaired: what was before has no influence any more.
        self._pattern: list[int] = []
        self._is_bursty = True

    @staticmethod
    def code_stragglers(num_workers: int, burst: int, rounds: int, stragglers: int) -> int:
        """s of the code that it needs.

        Raises:
            ValueError: see the class.
        """
        check_pattern(num_workers, burst, rounds, stragglers)
        if rounds == 1 or (rounds - 1) % burst:
            nearest = burst * max(1, round((rounds - 1) / burst)) + 1
            raise ValueError(
                f"rounds={rounds} must be a multiple of burst={burst} plus 1 for sr_sgc; use rounds={nearest}"
            )
        s = -(-burst * stragglers // (rounds - 1 + burst))
        check_stragglers(num_workers, s)
        return s

    def _fork(self) -> SRSGC:
        model = self.model
        copy = SRSGC(
            self.num_workers, model.burst, model.rounds, model.stragglers, self.code, self.num_jobs
        )
        copy.load_state_dict(self.state_dict())
        return copy

    def _repeating(self) -> int:
        """Who repeats its vector of job ``round - B`` in this round."""
        job = self.round - self.delay
        if job not in self._delivered:
            return 0
        absent = self._all & ~self._delivered[job]
        excess, repeating = absent.bit_count() - self.num_stragglers, 0
        while excess > 0:
            lowest = absent & -absent
            repeating |= lowest
            absent ^= lowest
            excess -= 1
        return repeating

    def _tasks(self, worker: int) -> tuple[MiniTask, ...]:
        if self._repeating() >> worker & 1:
            return (self._coded(worker, self.round - self.delay),)
        return (self._coded(worker, self.round),) if self.has_job(self.round) else ()

    def _fits(self, late: int) -> bool:
        if not self._pattern and late.bit_count() <= self.num_stragglers:
            return True
        return self._is_bursty and self.model.admits_next(self._pattern, late)

    def _record(self, late: int) -> None:
        self._is_bursty = self._is_bursty and self.model.admits_next(self._pattern, late)
        self._pattern = [*self._pattern, late][-self.model.window :]
        repeating, here = self._repeating(), self._all & ~late
        self._forget()
        if repeating:
            self._delivered[self.round - self.delay] |= repeating & here
        if self.has_job(self.round):
            self._delivered[self.round] = here & ~repeating
        least = self.num_workers - self.num_stragglers
        waiting = (self._delivered.get(self.round - k) for k in range(self.delay))
        if all(mask is None or mask.bit_count() >= least for mask in waiting):
            self._pattern, self._is_bursty = [], True

    def state_dict(self) -> dict[str, Any]:
        pattern = [members(mask) for mask in self._pattern]
        return super().state_dict() | {"pattern": pattern, "is_bursty": self._is_bursty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._pattern = [sum(1 << i for i in who) for who in state["pattern"]]
        self._is_bursty = state["is_bursty"]

    def _identity(self) -> list[Any]:
        return [*super()._identity(), self.model.rounds, self.model.stragglers]
