"""Wall clock to a loss although workers straggle: every scheme with a coordinator, on both transports.

A coordinator and eight workers, real processes on one machine, train a small network. Computing takes milliseconds; a
worker then sleeps as a recorded-style trace says: a latency, and a time in proportion to the data it was given, so
that redundancy costs what it would. Traces: "none"; "two": in each round two workers chosen at random are slow, with a heavy
tail; "one": besides, one worker is always five times slower. All arms meet the same trace, one after the other.

Sequential schemes train T + 1 models in turn, as in their paper; their time is per model: until all are below the
target, divided by T + 1. ``--transport mpi`` starts the ranks with mpirun.

    python benchmarks/stragglers.py [--transport torch|mpi] [--trace two|one] [--quick] [--json FILE]

``--only ARM... --keep FILE`` measures some of the arms and keeps their curves; without ``--only``, the arms that FILE
lacks are measured and all are judged. So a long comparison can be made in pieces.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

from harness import ROOT, run_ranks, values
from report import Result, Target, main
from trials.stragglers import BATCH, SLOPE_S, WORKERS, Arm, Curve, latencies, run

from commkit.straggler import (
    Backup,
    Coding,
    DelayProfile,
    DynamicBackup,
    Multiplexed,
    MuRule,
    SelectiveRepetition,
    candidates,
    replay,
    select,
)
from commkit.straggler.families import AutoFamily
from commkit.transport import MPINetwork, TorchNetwork

TARGET_LOSS = 0.36
LIMIT_S = 60.0  # of one arm and model
RANKS = WORKERS + 1
STATIC = range(4, WORKERS + 1)
PROBE = 40  # rounds of the trace that parameters are selected on
MU = 0.2  # well above the jitter: whoever is that late is slow
PAIR = {"burst": 1, "rounds": 4, "stragglers": 8}
MODELS = {"interleave": "models"}


def arms(trace: str) -> dict[str, Arm]:
    """By name. The first two meet no stragglers."""
    listed = [
        Arm("all, no stragglers", Backup(0), "none"),
        Arm("coding s=1, no stragglers", Coding(1), "none"),
        Arm("coding s=2, no stragglers", Coding(2), "none"),
        *(Arm(f"first {k}", Backup(k=k), trace) for k in STATIC),
        Arm("DBW", DynamicBackup("noise_scale"), trace),  # the optimizer has momentum
        Arm("coding s=1", Coding(1), trace),
        Arm("coding s=2", Coding(2), trace),
        Arm("coding s=3", Coding(3), trace),
        *(Arm(f"coding s={s}, mu-rule", Coding(s, mu=MU), trace) for s in (1, 2, 3)),
        Arm("SR-SGC", SelectiveRepetition(**PAIR, mu=MU), trace, MODELS, models=2),
        Arm("M-SGC", Multiplexed(2, 3, 8, mu=MU), trace, MODELS, models=4),
        Arm("M-SGC, one model", Multiplexed(2, 3, 8, mu=MU), trace),
        Arm("M-SGC, one model, braking", Multiplexed(2, 3, 8, mu=MU), trace, braking=1.0),
    ]
    return {arm.name: arm for arm in listed}


def over_torch(rank: int, world_size: int, names: list[str], trace: str, limit_s: float) -> Any:
    return all_arms(TorchNetwork(), names, trace, limit_s)


def all_arms(network: Any, names: list[str], trace: str, limit_s: float) -> list[Curve | None]:
    """Every arm in turn, on the same processes."""
    known, curves = arms(trace), []
    for name in names:
        arm = known[name]
        curves.append(run(arm, network, TARGET_LOSS, limit_s * arm.models))
        if network.rank == 0:
            curve = curves[-1]
            print(f"{name}: {len(curve.rounds)} steps, {curve.seconds[-1]:.1f} s", flush=True)
    return curves


def measure_torch(names: list[str], trace: str, limit_s: float) -> list[Curve]:
    outcomes = run_ranks(
        over_torch,
        names,
        trace,
        limit_s,
        deadline_s=deadline_s(names, trace, limit_s),
        world_size=RANKS,
        preload=("torch", "commkit.schemes", "trials.stragglers"),
    )
    curves: list[Curve] = values(outcomes)[0]
    return curves


def measure_mpi(names: list[str], trace: str, limit_s: float) -> list[Curve]:
    """Ranks are this program once more."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise SystemExit("mpirun is not installed; pip install 'commkit[mpi]'")
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder, "task")
        task.write_text(json.dumps([names, trace, limit_s]))
        words = [mpirun, "-n", str(RANKS), "--map-by", f"ppr:{RANKS}:node:oversubscribe"]
        words += ["--bind-to", "none", sys.executable, __file__, "--rank-of", folder]
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        environment = {**os.environ, **allowed, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(words, env=environment)
        try:
            process.wait(timeout=deadline_s(names, trace, limit_s))
        finally:
            process.terminate()  # which ends its ranks; nothing, if it has ended
            process.wait(timeout=30)
        if process.returncode:
            raise SystemExit(f"mpirun ended with status {process.returncode}")
        curves: list[Curve] = pickle.loads(Path(folder, "curves").read_bytes())
        return curves


def deadline_s(names: list[str], trace: str, limit_s: float) -> float:
    known = arms(trace)
    return sum(limit_s * known[name].models + 30 for name in names)


def be_a_rank(folder: str) -> None:
    names, trace, limit_s = json.loads(Path(folder, "task").read_text())
    network = MPINetwork()
    curves = all_arms(network, names, trace, limit_s)
    if network.rank == 0:
        Path(folder, "curves").write_bytes(pickle.dumps(curves))


def measure(options: argparse.Namespace) -> Result:
    named = arms(options.trace)
    names = options.only or list(named)
    limit_s = 3.0 if options.quick else LIMIT_S
    measure_on = measure_mpi if options.transport == "mpi" else measure_torch
    curves = kept(options.keep)
    lacking = [name for name in names if name not in curves]
    if lacking:
        curves |= zip(lacking, measure_on(lacking, options.trace, limit_s), strict=True)
    if options.keep is not None:
        texts = {name: dataclasses.asdict(curve) for name, curve in curves.items()}
        options.keep.write_text(json.dumps(texts))
    curves = {name: curves[name] for name in names}
    settings = {
        "transport": options.transport,
        "trace": options.trace,
        "workers": WORKERS,
        "target_loss": TARGET_LOSS,
    }
    result = Result("stragglers", settings)
    result.tables["wall clock to the target loss"] = [
        row(name, named[name], curve) for name, curve in curves.items()
    ]
    result.tables["predicted from the first rounds of the trace"] = predicted(options.trace)
    if not options.quick and not options.only:
        judge(result, {name: seconds(named[name], curve) for name, curve in curves.items()}, curves)
    return result


def predicted(trace: str) -> list[dict[str, Any]]:
    """The parameters of each coded scheme that are fastest when the first ``PROBE`` rounds are replayed, of those whose
    units divide the batch; and what the others take with them."""
    times = latencies(trace) + SLOPE_S / WORKERS
    parts = [
        DelayProfile(part, 1 / WORKERS, SLOPE_S)
        for part in (times[:PROBE], times[PROBE : 8 * PROBE])
    ]
    rule, best = MuRule(MU), {}
    for tried in select(parts[0], candidates(WORKERS, 3, WORKERS - 1), rule):
        units = tried.candidate.build(WORKERS, 1, AutoFamily()).num_units
        if BATCH % units == 0:
            best.setdefault(tried.candidate.scheme, tried.candidate)
    rows = []
    for scheme, candidate in best.items():
        done = replay(candidate, parts[1], rule, 6 * PROBE)
        rows.append(
            {
                "scheme": scheme,
                "B": candidate.burst,
                "W": candidate.rounds,
                "s or lambda": candidate.stragglers,
                "load": done.load,
                "delay": done.delay,
                "s/job": done.total / (6 * PROBE),
            }
        )
    return rows


def kept(file: Path | None) -> dict[str, Curve]:
    """The curves of arms that were measured before."""
    if file is None or not file.exists():
        return {}
    return {name: Curve(**fields) for name, fields in json.loads(file.read_text()).items()}


def seconds(arm: Arm, curve: Curve) -> float:
    """To the target, per model."""
    return curve.reaches(TARGET_LOSS) / arm.models


def row(name: str, arm: Arm, curve: Curve) -> dict[str, Any]:
    return {
        "arm": name,
        "seconds": round(seconds(arm, curve), 2),
        "steps": len(curve.losses),
        "s/step median": round(median(curve.rounds), 4),
        "mean": round(fmean(curve.rounds), 4),
        "gradients from": round(fmean(curve.contributors), 2),
        "late": round(fmean(curve.late), 2),
        "skipped": curve.skipped,
        "final loss": round(curve.losses[-1], 4),
    }


def judge(result: Result, took: dict[str, float], curves: dict[str, Curve]) -> None:
    static = [took[f"first {k}"] for k in STATIC]
    step = {name: fmean(curve.rounds) for name, curve in curves.items()}
    result.targets += [
        Target.at_most("DBW / best static k", 1.10, took["DBW"] / min(static)),
        Target.at_most("DBW / worst static k", 0.67, took["DBW"] / max(static)),
        *(
            Target.at_most(
                f"coding s={s}: s/step, with / without stragglers",
                1.2,
                step[f"coding s={s}"] / step[f"coding s={s}, no stragglers"],
            )
            for s in (1, 2)
        ),
        *(
            Target.at_most(
                f"M-SGC / the best coding{rule}, seconds",
                1.0,
                took["M-SGC"] / min(took[f"coding s={s}{rule}"] for s in (1, 2, 3)),
            )
            for rule in (", mu-rule", "")
        ),
    ]
    base = step["all, no stragglers"]
    times = ", ".join(
        f"{name} {step[name] / base:.2f}"
        for name in (f"first {WORKERS}", "coding s=1", "coding s=2", "SR-SGC", "M-SGC")
    )
    result.notes.append(
        f"a step of all workers takes {base:.3f} s without stragglers; with them, so many times that: {times}"
    )
    result.notes.append(
        "why M-SGC is not ahead: the paper counts, n - s vectors for a gradient, as the prediction does. Fractional "
        "repetition decodes from one copy of each block: with s=1 and 2 of 8 slow at random it has to wait in one round "
        "of seven. M-SGC waits whenever a worker is slow in 3 of 4 rounds. mu-rule: rounds stay open for (1 + mu) times "
        "the fastest worker's time; other codings close as soon as they decode"
    )
    result.notes.append(
        "M-SGC, one model: gradients are 3 steps old, which this learning rate and momentum do not bear, braked or not"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transport", choices=["torch", "mpi"], default="torch")
    parser.add_argument("--trace", choices=["two", "one"], default="two")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="of the arms, these")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="of the curves, to go on from")


if __name__ == "__main__":
    if "--rank-of" in sys.argv:
        be_a_rank(sys.argv[-1])
    else:
        main(__doc__, measure, add_options)
