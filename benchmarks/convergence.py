"""The convergence table: every system trained on real data, against dense training with the same optimizer.

    python benchmarks/convergence.py --work DIR [--family local|sharded] [--only TASK/SYSTEM/RANKS/SEED ...] [--json FILE] [--markdown FILE]

Two tasks (a byte language model, images of digits), 2 and 4 ranks as real processes, three seeds; ``--family local``
is the longer language-model run with 4 and 8 replicas that train with local updates, ``--family sharded`` both tasks
with one model sharded over 4 ranks. Each trial is
``launch/train.py``; its result goes into ``--work`` at once, and a trial that has finished there with the same
recipe is not run again: stop whenever you like and go on later, or run parts with ``--only``. What failed, or was
not available, is tried again. ``--known`` takes what an earlier table has, such as
``benchmarks/results/convergence.json``. The table is made of all trials that ``--only`` chooses; with ``--show`` of
those that have finished, and nothing is run.

``--tune`` tries the learning rates of the sweeps instead, of dense training or of what ``--only`` chooses, with
2 ranks and seeds that are not the table's; what it finds is written into ``trials/tasks.py`` by hand. With
``--family local`` it tries outer rates and momenta, with 4 ranks and a seed that is not in the table; they go into
``trials/local.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness  # noqa: F401  (puts the repository on sys.path)
from report import Result, main
from tqdm import tqdm
from trials import tuning
from trials.execute import earlier, execute, recorded
from trials.local import LOCAL_SYSTEMS
from trials.plan import Trial, outer_tuning_trials, table_trials, tuning_trials
from trials.sharded import SHARDED_SYSTEMS
from trials.systems import SYSTEMS
from trials.table import LEGEND, Done, tables
from trials.tasks import TASKS, Size

FAMILIES = {"compression": SYSTEMS, "local": LOCAL_SYSTEMS, "sharded": SHARDED_SYSTEMS}
# Of a trial's result, what goes into the JSON file.
KEPT = (
    *("trial", "status", "error", "val_loss", "val_accuracy", "train_loss", "first_loss"),
    *("wire_bytes", "late_wire_bytes_per_step", "step_seconds", "seconds", "cpu_seconds"),
    *("steps", "data", "recipe_digest", "commit"),
)


@dataclass
class Convergence(Result):
    """The tables, and the trials that they were made of."""

    trials: list[dict[str, Any]] = field(default_factory=list)


def run_all(
    trials: Sequence[Trial], work: Path, deadline_s: float, table: Path | None = None
) -> list[Done]:
    """The results of all trials; those that neither ``work`` nor an earlier ``table`` has are run."""
    told = recorded(trials, table) if table else {}
    known = {trial.name: earlier(trial, work) or told.get(trial.name) for trial in trials}
    left = [trial for trial in trials if known[trial.name] is None]
    seconds = sum(trial.size.seconds[trial.ranks] for trial in left)
    print(
        f"{len(trials)} trials, {len(trials) - len(left)} of them done; about {seconds / 60:.0f} min "
        "on 2 cores for the others, if all their schemes are available",
        file=sys.stderr,
    )
    done = []
    with tqdm(total=len(left), unit="trial", mininterval=1.0, smoothing=0.1) as bar:
        for trial in trials:
            result = known[trial.name]
            if result is None:
                bar.set_description(trial.name)
                result = execute(trial, work, deadline_s)
                bar.update()
                if "error" in result:
                    bar.write(f"{trial.name}: {result['status']}: {result['error']}", sys.stderr)
            done.append(Done(trial, result))
    return done


def measure(options: argparse.Namespace) -> Result:
    tune = outer_tuning_trials if options.family == "local" else tuning_trials
    plan = tune if options.tune else table_trials
    try:
        trials = plan(FAMILIES[options.family], options.only, options.quick)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.show:
        told = recorded(trials, options.known) if options.known else {}
        trials = [t for t in trials if earlier(t, options.work) or t.name in told]
    done = run_all(trials, options.work, options.deadline, options.known)
    name = "convergence_tuning" if options.tune else "convergence"
    name += "" if options.family == "compression" else f"_{options.family}"
    result = Convergence(name, settings(done))
    result.trials = kept(done)
    result.tables = tuning.tables(done) if options.tune else tables(done)
    result.notes = [] if options.tune else LEGEND
    return result


def kept(done: Sequence[Done]) -> list[dict[str, Any]]:
    """The trials as a JSON file has them."""
    return [{key: d.result[key] for key in KEPT if key in d.result} for d in done]


def settings(done: Sequence[Done]) -> dict[str, object]:
    """What a reader of the results wants to know of the trials."""
    chosen = {d.trial.task for d in done}
    tasks = {
        name: {"steps": size.steps, "global_batch": size.batch, "optimizers": optimizers(size)}
        | dict(size.recipe)
        for name, size in TASKS.items()
        if name in chosen
    }
    commits = {str(d.result["commit"]) for d in done}
    return {
        "trials": len(done),
        "commits": sorted(commits),
        "threads_per_rank": 1,
        **tasks,
        "systems": {d.trial.system.name: dict(d.trial.system.scheme) for d in done},
    }


def optimizers(size: Size) -> dict[str, object]:
    """Settings of the optimizers, tuned learning rates among them."""
    return {name: {"lr": size.lr[name], **others} for name, others in size.optim.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, required=True, help="directory of results")
    parser.add_argument(
        "--family",
        choices=sorted(FAMILIES),
        default="compression",
        help="schemes that compress every step (2 and 4 ranks), that train with local updates (4 and 8), or that shard the model (4)",
    )
    parser.add_argument("--only", nargs="*", default=(), metavar="TASK/SYSTEM/RANKS/SEED")
    parser.add_argument("--show", action="store_true", help="run nothing: what has finished")
    parser.add_argument("--tune", action="store_true", help="sweep learning rates instead")
    parser.add_argument(
        "--known", type=Path, metavar="FILE", help="JSON of an earlier table to go on with"
    )
    parser.add_argument("--deadline", type=float, default=180.0, help="seconds of a trial")


if __name__ == "__main__":
    main(__doc__, measure, add_options)
