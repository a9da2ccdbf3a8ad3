"""F1 to F20: what is injected, the figure that is to be reached, and how it is measured; see ``faults.py``."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness  # noqa: F401  (puts the repository on sys.path)
import torch

from commkit import ElasticOptions
from commkit.runtime.wire_checksums import CheckedComm, WireDamage
from commkit.sim import ThreadComm, run_threads
from commkit.sim.membership import simulate
from tests.adapters import test_ddp_failures as failures
from tests.checkpoint import test_checkpoint as checkpoints
from tests.contract import test_numbers as numbers
from tests.harness import run_ranks
from tests.membership import test_loss as losses
from tests.membership import test_phases as phases
from tests.membership import test_rounds as rounds
from tests.membership.crew import Crew
from tests.membership.relay import Relay
from tests.membership.training import QUICK, train

HERE = "python benchmarks/faults.py --figures"
LOSSES = "python benchmarks/faults.py"
RESULTS = Path(__file__).parents[1] / "results"
PARTITION_S = 30.0
SLOW_S = 120.0
SEEDS = 10_000  # of F20


@dataclass(frozen=True)
class Figure:
    """
    Args:
        name: F1 ...
        inject: what goes wrong.
        what: the figure's meaning and unit.
        limit: that it must not exceed.
        measure: gives it.
        command: that shows it.
    """

    name: str
    inject: str
    what: str
    limit: float
    measure: Callable[[], float]
    command: str = HERE


def _stopped_then_continued() -> float:
    """Evictions by a stop below the limit."""
    with Crew(train, 3, losses.TOPK, 6, QUICK, losses.stops) as crew:
        crew.wait_for(0, 2)
        crew.pause(2.0)
        crew.signal(1, signal.SIGCONT)
        return float(max(result["epoch"] for result in crew.finish(0, 1, 2)) - 1)


def _between_phases() -> float:
    """Exchanges after whose loss residuals or weights are not those before the step."""
    wrong = 0
    for scheme, before in (("powersgd", 1), ("topk", 0), ("sign", 1)):
        with Crew(phases.exchange, 3, phases.SCHEMES[scheme], before) as crew:
            first, last = crew.finish(0, 2)
        wrong += not (first["same"] and last["same"] and first["digest"] == last["digest"])
    return float(wrong)


def _in_a_round() -> float:
    """Inner steps that a survivor does twice or loses: DiLoCo, a streamed fragment, NoLoCo's exchange."""
    lost = 0
    for scheme in (rounds.DILOCO, rounds.LATE["streaming"], rounds.GOSSIP["noloco"]):
        with Crew(rounds.train_in_rounds, 3, scheme, 12, rounds.dies_in_step_8) as crew:
            results = crew.finish(0, 2)
        lost += sum(result["numbers"] != list(range(12)) for result in results)
        lost += results[0]["digest"] != results[1]["digest"]
    return float(lost)


def _while_it_joins() -> float:
    """Steps that others lose when a joiner dies as it receives, or its source as it sends."""
    lost = 0
    with Crew(train, 2, losses.TOPK, 25, QUICK, None, 0.1, losses.dies_while_it_receives) as crew:
        crew.wait_for(0, 3)
        crew.start()
        done = crew.finish(0, 1)
    with Crew(train, 3, losses.TOPK, 25, QUICK, None, 0.1, losses.dies_while_it_sends) as crew:
        crew.wait_for(0, 3)
        late = crew.start()
        done += crew.finish(1, 2)
        (joined,) = crew.finish(late)
    for result in done:
        lost += 25 - len(result["log"])
    return float(lost + (joined["digest"] != done[-1]["digest"]))


def _store_lost() -> float:
    """Seconds until all workers say that the store is lost: the limit is that they cannot go on."""
    with Crew(train, 2, losses.TOPK, 400, QUICK, None, 0.05) as crew:
        crew.wait_for(0, 3)
        start = time.monotonic()
        crew.lose_store()
        kinds = {crew.error_of(rank)[0] for rank in range(2)}
        if kinds != {"StoreLost"}:
            raise RuntimeError(f"workers raised {kinds}")
        return time.monotonic() - start


def _two_deaths() -> float:
    """Workers that end otherwise than they should: two of four die, and then too few are left of three."""
    with Crew(train, 4, losses.TOPK, 6, QUICK, losses.two_die) as crew:
        first, last = crew.finish(0, 3)
    wrong = int(first["digest"] != last["digest"])
    options = ElasticOptions(min_workers=3, heartbeat_s=0.25, limit_s=3.0)
    with Crew(train, 3, losses.TOPK, 6, options, losses.dies) as crew:
        wrong += sum(crew.error_of(rank)[0] != "TrainingStopped" for rank in (0, 2))
    return float(wrong)


def _cut_off() -> float:
    """Workers that end otherwise than they should, when one is cut off from the store, both ways and one way: the others go
    on without it, and it learns of that when it is back."""
    wrong = 0
    for way in ("frozen", "frozen_up"):
        relays: dict[int, Relay] = {}

        def via(rank: int, port: int, relays: dict[int, Relay] = relays) -> int:
            relays[rank] = Relay(port)
            return relays[rank].port

        options = ElasticOptions(min_workers=2)
        with Crew(
            train, 3, losses.TOPK, 1000, options, None, 0.04, deadline_s=120.0, via=via
        ) as crew:
            crew.wait_for(0, 3)
            setattr(relays[2], way, True)
            crew.pause(PARTITION_S)
            setattr(relays[2], way, False)
            # By then it may have given up to wait for the store.
            wrong += crew.error_of(2)[0] not in ("WorkerEvicted", "StoreLost")
            first, second = crew.finish(0, 1)
        wrong += first["digest"] != second["digest"] or first["epoch"] != 2
    return float(wrong)


def _partitions() -> float:
    """Broken promises in 1000 seeds of cut links, partitions, and workers and stores that stand still."""
    kinds = ("partition", "cut from a peer", "cut from the store", "pause", "store paused", "join")
    for seed in range(1000):
        simulate(seed, faults=kinds)
    return 0.0


def _slow_store() -> float:
    """Workers that are left out for nothing, while the way to the store takes 50 ms and loses a hundredth."""
    relays: list[Relay] = []

    def via(rank: int, port: int) -> int:
        relays.append(Relay(port, delay_s=0.05, loss=0.01, seed=rank))
        return relays[-1].port

    steps = int(SLOW_S / 0.1)
    with Crew(
        train, 4, losses.TOPK, steps, ElasticOptions(), None, 0.1, deadline_s=4 * SLOW_S, via=via
    ) as crew:
        return float(max(result["epoch"] for result in crew.finish(0, 1, 2, 3)) - 1)


def _told_by(file: str, target: str) -> Callable[[], float]:
    """What another program has measured."""

    def read() -> float:
        targets = json.loads((RESULTS / file).read_text())["targets"]
        return float(next(t["measured"] for t in targets if t["what"] == target))

    return read


def _bad_numbers() -> float:
    """Schemes that break a rule, of all registered ones, for NaN, inf, overflow and zeros at the first, a middle and the
    last step."""
    broken = set()
    for name in numbers.NAMED:
        for kind in numbers.SPOILS:
            try:
                run_threads(lambda c, n=name, k=kind: numbers.bad_steps(c, n, k), 2)
            except AssertionError:
                broken.add(name)
    return float(len(broken))


class _Flipping:
    """A comm that flips one bit, another each time, of what rank 0 receives of rank 1."""

    def __init__(self, comm: ThreadComm, bit: int) -> None:
        self._comm, self._bit = comm, bit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._comm.all_gather(x)
        if self._comm.rank == 0 and x.dtype == torch.uint8:
            byte, bit = divmod(self._bit % (8 * x.numel()), 8)
            rows[1, byte] ^= 1 << bit
        return rows


def _flipped_bits() -> float:
    """Of 200 flipped bits, those that nobody notices."""

    def body(comm: ThreadComm, bit: int) -> bool:
        try:
            CheckedComm(_Flipping(comm, bit)).all_gather(torch.arange(25.0))  # type: ignore[arg-type]
        except WireDamage as damage:
            return "from rank 1" in str(damage)
        return False

    found = [all(run_threads(lambda c, b=bit: body(c, b), 2)) for bit in range(0, 864, 5)]
    return float(found.count(False))


def _resumed() -> float:
    """Schemes whose next 50 steps differ in a bit after a resumption by as many ranks."""
    wrong = 0
    for scheme in ("powersgd", "sign", "topk"):
        with tempfile.TemporaryDirectory() as folder:
            told = run_ranks(checkpoints.resumes, 2, scheme, folder, 56)
        wrong += not all(same for same, _ in told)
    return float(wrong)


def _resized() -> float:
    """Largest relative change of the sum of residuals at half and at twice the number of ranks."""
    worst = 0.0
    for before, after in ((2, 1), (2, 4)):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "c"))
            saved = run_ranks(checkpoints.save_residuals, before, "topk", path)[0]
            loaded = run_ranks(checkpoints.load_residuals, after, "topk", path)[0][0]
        for name, left in saved.items():
            worst = max(worst, float((loaded[name] - left).norm() / left.norm().clamp(min=1e-30)))
    return worst


def _exception() -> float:
    """Seconds until all ranks have raised what one met."""
    return max(took for took, _, _ in run_ranks(failures.raising, 4, 2))


def _mismatches() -> float:
    """Of the configurations that only one rank has, those that are not refused by name on all."""
    cases = ("schemes differ", "knobs differ", "seeds differ", "one rank is wrong")
    told = run_ranks(failures.refusals, 2)
    return float(
        sum("disagree on" not in each[case] and "refused" not in each[case] and "rank=-1" not in each[case]
            for each in told for case in cases)
    )  # fmt: skip


def _simulated() -> float:
    """Broken promises in all kinds of faults."""
    for seed in range(SEEDS):
        simulate(seed)
    return 0.0


_FIGURES = (
    Figure("F4", "SIGSTOP for 2 s, below the limit", "evictions", 0, _stopped_then_continued),
    Figure("F5", "kill between the phases of an exchange", "exchanges not undone bit for bit", 0, _between_phases),
    Figure("F6", "kill in an outer round, a fragment, a pair exchange", "steps that others lose", 0, _in_a_round),
    Figure("F7", "kill a joiner as it receives, its source as it sends", "steps that others lose", 0, _while_it_joins),
    Figure("F8", "the store's host ends", "s until all raise StoreLost, the documented limit", 5, _store_lost),
    Figure("F9", "two deaths at once; below min_workers", "workers that end otherwise", 0, _two_deaths),
    Figure("F10", f"no way to the store for {PARTITION_S:g} s, both ways and one way", "workers that end otherwise", 0, _cut_off),
    Figure("F10", "1000 seeds of partitions and stops in the simulator", "broken promises", 0, _partitions),
    Figure("F11", f"50 ms and 1 % loss each way to the store, {SLOW_S:g} s", "false evictions", 0, _slow_store),
    Figure("F12", "two of eight workers slow at times, gradient coding, s=1", "time per step over that without", 1.2,
           _told_by("stragglers_torch.json", "coding s=1: s/step, with / without stragglers"), "python benchmarks/stragglers.py"),
    Figure("F12", "the same, s=2", "time per step over that without", 1.2,
           _told_by("stragglers_torch.json", "coding s=2: s/step, with / without stragglers"), "python benchmarks/stragglers.py"),
    Figure("F13", "NaN, inf, overflow, zeros on one rank", "schemes that break a rule", 0, _bad_numbers),
    Figure("F14", "a flipped bit on the wire", "flips that nobody notices", 0, _flipped_bits),
    Figure("F15", "resume with as many ranks", "schemes of which 50 steps differ in a bit", 0, _resumed),
    Figure("F16", "resume with half and twice the ranks", "relative change of the residuals' sum", 1e-6, _resized),
    Figure("F17", "an exception in the hook of one rank", "s until all raise it", 1, _exception),
    Figure("F18", "scheme, knob, seed of one rank differ", "not refused by name on all", 0, _mismatches),
    Figure("F20", f"{SEEDS} seeds of the simulator", "broken promises", 0, _simulated, f"python -m commkit.sim.membership --count {SEEDS}"),
)  # fmt: skip


def measure_again(name: str, rows: Sequence[Mapping[str, Any]], when: str) -> list[dict[str, Any]]:
    """``rows`` of an earlier table, with those of ``name`` measured now; of F4 and later, but for F19, which is
    :func:`soak_row`'s."""
    again = [figure for figure in _FIGURES if figure.name == name]
    return exchanged(rows, [_measured(figure) | {"when": when} for figure in again])


def exchanged(
    rows: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """``rows``, in which ``new`` ones take the place of those of the same faults."""
    names = {row[""] for row in new}
    kept = [dict(row) for row in rows if row[""] not in names]
    return sorted([*kept, *map(dict, new)], key=lambda row: int(row[""][1:]))


def _measured(figure: Figure) -> dict[str, Any]:
    print(f"{figure.name}: {figure.inject}", flush=True)
    return _row(
        figure.name, figure.inject, figure.what, figure.limit, figure.measure(), figure.command
    )


def figures(
    losses_measured: Sequence[Mapping[str, Any]], soaked: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The table.

    Args:
        losses_measured: rows of ``faults.py``, which F1 to F3 are of.
        soaked: what the soak said, which F19 is of; empty: there was none.
    """
    killed = [row for row in losses_measured if row["signal"] == "SIGKILL"]
    stopped = [row for row in losses_measured if row["signal"] == "SIGSTOP"]
    rows = [
        _row("F1", "kill in an all-reduce", "s until all know", 0.1, max(r["all know"] for r in killed), LOSSES),
        _row("F1", "", "s until the step is done by those left", 1.0, max(r["step redone"] for r in killed), LOSSES),
        _row("F2", "the same, no neighbour of the dead", "s until all know", 0.1, max(r["others know"] for r in killed), LOSSES),
        _row("F3", "SIGSTOP in an all-reduce, limit_s=5", "s until all know", 6.0, max(r["all know"] for r in stopped), LOSSES),
    ]  # fmt: skip
    rows += map(_measured, _FIGURES)
    return exchanged(rows, [soak_row(soaked)]) if soaked else rows


def soak_row(soaked: Mapping[str, Any]) -> dict[str, Any]:
    """F19, of what a soak said."""
    inject = f"{soaked['minutes']:g} minutes of random kills and starts"
    longest = soaked["longest time without a step, s"]
    command = f"python benchmarks/faults.py --soak {soaked['minutes']:g}"
    return _row("F19", inject, "s without a step", 60, longest, command)


def _row(
    name: str, inject: str, what: str, limit: float, measured: float, command: str
) -> dict[str, Any]:
    return {
        "": name,
        "injected": inject,
        "figure": what,
        "limit": limit,
        "measured": measured,
        "reached": measured <= limit,
        "command": command,
    }
