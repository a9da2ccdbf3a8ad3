"""Stragglers at n = 256 on a virtual clock: full sync, backup workers, DBW, gradient coding, SR-SGC and M-SGC.

All schemes see the same times of the same workers, from a two-state model like recorded traces of cloud workers
(bursts) and from a heavy tail without memory (Pareto). Work costs time: ``--slope`` says how many seconds a whole
job would take one worker on top of what a round takes anyway.

First table: exact gradients, seconds for 480 jobs. Parameters of the coded schemes are selected on the first 40
rounds, as the paper does, and tried on the others. Schemes with more than float sums can carry only count who
arrived (``real code: NO``); the paper's own triples are among them.

Second table: seconds to a loss, on a noisy quadratic with one SGD step per job. Coded schemes with a delay of T
rounds apply gradients that are T steps old.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from typing import Any

import harness  # noqa: F401  (puts the repository on sys.path)
import numpy as np
from report import Result, Target, main

from commkit.sim import BackupClock, Bursts, DelayModel, Pareto
from commkit.straggler import (
    DBW,
    BackupPolicy,
    Candidate,
    DelayProfile,
    MuRule,
    Replayed,
    StaticBackup,
    StepResult,
    candidates,
    is_usable,
    replay,
    select,
)

N, PROBE, JOBS, DELAY, SLOPE = 256, 40, 480, 3, 16.0
MODELS: dict[str, DelayModel] = {
    "bursts": Bursts(base=1.0, enter=0.03, leave=0.75, slowdown=4.0),
    "heavy tail": Pareto(least=1.0, shape=4.0),
}
PAPER = {
    "gradient coding": Candidate("gradient_coding", 15),
    "SR-SGC": Candidate("sr_sgc", 23, burst=2, rounds=3),
    "M-SGC": Candidate("m_sgc", 27, burst=1, rounds=2),
}
NAMES = {"gradient_coding": "gradient coding", "sr_sgc": "SR-SGC", "m_sgc": "M-SGC"}
FULL = Candidate("gradient_coding", 0)
DIM, CURVATURE, NOISE, LR, TARGET = 2000, 1.0, 160.0, 0.005, 1.0


class Task:
    """f = curvature |x|^2 / 2 from |x| = 10; a worker's gradient has noise of norm NOISE."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)
        self.x = np.full(DIM, 10 / DIM**0.5)

    @property
    def loss(self) -> float:
        return CURVATURE * float(self.x @ self.x) / 2

    def mean_gradient(self, at: np.ndarray, workers: int) -> np.ndarray:
        """Mean of so many workers' gradients."""
        noise = NOISE / (workers * DIM) ** 0.5
        return CURVATURE * at + noise * self.state.standard_normal(DIM)


def run_backup(policy: BackupPolicy, seconds: np.ndarray, seed: int) -> dict[str, Any]:
    """SGD with the first k gradients until the target; gradients of a mean's workers are drawn only as far as
    their norms are needed."""
    task, clock, ks = Task(seed), BackupClock(seconds), []
    while task.loss > TARGET and clock.step < len(seconds):
        k = policy.choose()
        workers, arrivals = clock.wait(k)
        g = task.mean_gradient(task.x, k)
        # |g_j|^2 of k gradients with mean g: the spread about it is chi-squared, here by its mean and deviation.
        spread = NOISE**2 * (1 + task.state.standard_normal(k) * (2 / DIM) ** 0.5)
        norms = float(g @ g) + spread * (k - 1) / k
        losses = task.loss * (1 + 0.1 * task.state.standard_normal(k))
        policy.observe(
            StepResult(
                clock.step - 1,
                k,
                tuple(workers),
                tuple(arrivals),
                tuple(norms.tolist()),
                float(g @ g),
                tuple(losses.tolist()),
                LR,
            )
        )
        for step, late in clock.late():
            policy.observe_late(step, late)
        task.x -= LR * g
        ks.append(k)
    return {"seconds": clock.now, "steps": len(ks), "mean k": float(np.mean(ks)), "loss": task.loss}


def run_coded(replayed: Replayed, seed: int) -> dict[str, Any]:
    """SGD with exact gradients of all workers, T steps old, until the target."""
    task, now, steps = Task(seed), 0.0, 0
    past: deque[np.ndarray] = deque(maxlen=replayed.delay + 1)
    for r, seconds in enumerate(replayed.durations):
        past.append(task.x.copy())
        now += seconds
        if r >= replayed.delay:
            task.x -= LR * task.mean_gradient(past[0], N)
            steps += 1
            if task.loss <= TARGET:
                break
    return {"seconds": now, "steps": steps, "mean k": N, "loss": task.loss}


def selected(probe: DelayProfile, usable: Callable[[int, int], bool]) -> dict[str, Candidate]:
    """The fastest candidate of each scheme on the probed rounds."""
    best: dict[str, Candidate] = {}
    for replayed in select(probe, candidates(N, DELAY, 32, usable)):
        if replayed.candidate != FULL:
            best.setdefault(NAMES[replayed.candidate.scheme], replayed.candidate)
    return best


def at_once(probe: DelayProfile, rest: DelayProfile, jobs: int) -> Replayed:
    """Gradient coding that does not keep to the mu-rule, as in the paper, but closes a round as soon as it decodes."""
    usable = [Candidate("gradient_coding", s) for s in (1, 3, 7, 15, 31)]
    code = "fractional_repetition"
    best = select(probe, usable, MuRule(0), code=code)[0].candidate
    return replay(best, rest, MuRule(0), jobs, code)


def sparse_grid(n: int, s: int) -> bool:
    """Every number of stragglers up to 4, and one in four from there; no matter which code."""
    return s < n and (s <= 4 or s % 4 == 3)


def measure(options: argparse.Namespace) -> Result:
    jobs, seeds = (20, 1) if options.quick else (JOBS, 3)
    result = Result(
        "stragglers_simulated",
        {"workers": N, "jobs": jobs, "probe": PROBE, "slope": options.slope, "max_delay": DELAY},
    )
    for what, model in MODELS.items():
        times = model.seconds(PROBE + 4 * jobs, N, seed=0)
        probe = DelayProfile(times[: 8 if options.quick else PROBE], 1 / N, options.slope)
        rest = DelayProfile(times[PROBE:], 1 / N, options.slope)
        tried = {"full sync": FULL}
        for label, usable in (
            ("selected, real code", is_usable),
            ("selected, counted", sparse_grid),
        ):
            for name, candidate in selected(probe, usable).items():
                tried[f"{name}, {label}"] = candidate
        tried |= {f"{name}, as in the paper": candidate for name, candidate in PAPER.items()}
        replays = {name: replay(c, rest, MuRule(), jobs, None) for name, c in tried.items()}
        replays["gradient coding, mu=0"] = at_once(probe, rest, jobs)
        result.tables[f"{what}: seconds for {jobs} jobs, exact gradients"] = [
            exact_row(name, r, replays["full sync"]) for name, r in replays.items()
        ]
        for label in ("real code", "counted"):
            pair = [
                replays[f"{name}, selected, {label}"].total for name in ("M-SGC", "gradient coding")
            ]
            result.targets.append(
                Target.at_most(
                    f"M-SGC / gradient coding, seconds, {what}, selected, {label} (paper: 0.84)",
                    0.84,
                    pair[0] / pair[1],
                )
            )
        rows = to_the_loss(replays, times[PROBE:], seeds)
        result.tables[f"{what}: seconds to the loss {TARGET}, mean of {seeds} seeds"] = rows
        static = [row["seconds"] for row in rows if row["scheme"].startswith("static")]
        dynamic = next(row["seconds"] for row in rows if row["scheme"] == "DBW")
        result.targets.append(
            Target.at_most(f"DBW / best static k, seconds, {what}", 1.1, dynamic / min(static))
        )
        result.targets.append(
            Target.at_most(f"DBW / worst static k, seconds, {what}", 0.5, dynamic / max(static))
        )
    result.notes.append(
        "counted: decodable if n - s vectors arrived, as an ideal code would be; no code of real coefficients "
        "is usable there in floating point, except that s + 1 divides 256"
    )
    result.notes.append(
        "mu=0: gradient coding closes a round as soon as it decodes, which fractional repetition often does with many "
        "more than s late; all others keep to the mu-rule with mu=1, as in the paper"
    )
    result.notes.append("the best static k is known only afterwards")
    return result


def exact_row(name: str, replayed: Replayed, full: Replayed) -> dict[str, Any]:
    c = replayed.candidate
    parameters = f"s={c.stragglers}"
    if c.scheme != "gradient_coding":
        parameters = f"B={c.burst} W={c.rounds} lambda={c.stragglers}"
    needed = c.code_stragglers(N)
    return {
        "scheme": name,
        "parameters": parameters,
        "real code": needed is None or is_usable(N, needed),
        "load": replayed.load,
        "delay": replayed.delay,
        "seconds": replayed.total,
        "over full sync": replayed.total / full.total,
        "late per round": float(np.mean(replayed.late)),
    }


def to_the_loss(
    replays: dict[str, Replayed], times: np.ndarray, seeds: int
) -> list[dict[str, Any]]:
    runs: dict[str, Callable[[int], dict[str, Any]]] = {
        f"static k={k}": lambda seed, k=k: run_backup(  # type: ignore[misc]
            StaticBackup(N, k, min_share=0), times, seed
        )
        for k in (32, 64, 128, 192, 224, 240, 248, 256)
    }
    runs["DBW"] = lambda seed: run_backup(DBW(N, max_change=N // 8), times, seed)
    for name, replayed in replays.items():
        runs[name] = lambda seed, replayed=replayed: run_coded(replayed, seed)  # type: ignore[misc]
    rows = []
    for name, run in runs.items():
        done = [run(seed) for seed in range(seeds)]
        mean = {key: float(np.mean([d[key] for d in done])) for key in done[0]}
        rows.append({"scheme": name, **mean, "reached": all(d["loss"] <= TARGET for d in done)})
    return rows


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        lambda parser: parser.add_argument(
            "--slope",
            type=float,
            default=SLOPE,
            help="seconds for a whole job's data on one worker",
        ),
    )
