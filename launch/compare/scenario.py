"""Run a scenario of ``commkit simulate`` small, on an emulated network, and lay what is simulated for that beside what is
measured.

    commkit simulate configs/scenarios/noloco.yaml --lab runs/noloco

The network is built as the scenario's ``lab`` says; ``commkit probe`` runs on it; the methods are simulated with the lab's
size, links and times; and they are run, by ``launch/train.py`` as in any comparison. The directory gets ``probe.json``,
``recipes/``, ``scenario.json``, ``scenario.md``, ``scenario.png``, and what ``commkit compare`` writes.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: find `launch`

import tyro
import yaml

from commkit.advise import Question
from commkit.config import ConfigError
from commkit.cost.run import MEASURED_WITH
from commkit.cost.scenario import LabPart, MethodPart, Scenario, load_scenario
from commkit.cost.sharded import FSDP, is_sharded
from commkit.cost.simulate import Outcome, Stage, simulate
from commkit.cost.traffic import NoLawError, law_of
from commkit.probe import Probe, load_probe
from launch.compare import __main__ as comparison
from launch.compare.plan import DDP, NOOP, ROOT, Trial
from launch.compare.plots import draw_beside
from launch.netlab import Lab, LabError, enter_if_needed
from launch.rundir import RunDirectory, read_records, write_atomically
from launch.tables import markdown_table

PROBE_DEADLINE_S = 900.0
# Validation is no part of what is compared. Nor is the loss: some methods are run in a stage that they enter after a
# warm-up, and one that diverges there goes on with denormal numbers, at half the speed.
_SETTINGS = {
    "eval.every": 0,
    "eval.batches": 1,
    "schedule.warmup": 1,
    "optim.lr": 1e-6,
    "schedule.min_lr": 1e-7,
}
_FSDP = {"name": "qsdp", "weight_bits": 32, "gradient_bits": 32}  # FSDP itself, bit for bit

_LEGEND = (
    "Simulated: with the probe's times, its step being that of `noop`. Adjusted: with computing as slow as in the measured `noop`, "
    "since what else the machine does changes from the probe to the runs."
)


@dataclass(frozen=True)
class Arguments:
    """Run a scenario small on an emulated network, beside its simulation."""

    scenario: Annotated[Path, tyro.conf.Positional]
    """YAML file with a ``lab``."""
    out: Path
    """Where to write; must not hold runs of an earlier comparison."""


@dataclass(frozen=True)
class Row:
    """One method; None is "not measured".

    Args:
        scheme, sync_every: which, and steps per round.
        simulated_s, measured_s: of a step; a mean where steps differ.
        adjusted_s: simulated with computing as slow as in the comparison's own ``noop``, since what else a machine does
            changes between a probe and a comparison.
        simulated_bytes, measured_bytes: that a rank sends per step.
        runs: that finished.
    """

    scheme: str
    sync_every: int
    simulated_s: float
    measured_s: float | None
    simulated_bytes: float
    measured_bytes: float | None
    runs: int
    adjusted_s: float | None = None

    def over_measured(self, seconds: float | None) -> float | None:
        return seconds / self.measured_s if seconds and self.measured_s else None


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if a method failed; 2 for bad input; 130 after ctrl-C."""
    given = list(sys.argv[1:] if words is None else words)
    arguments = tyro.cli(Arguments, args=given, prog="commkit simulate --lab")
    try:
        scenario = load_scenario(arguments.scenario)
        lab = lab_of(scenario, str(arguments.scenario))
        small, notes = in_lab(scenario, lab)
        simulate(small)  # refuses what is impossible before anything is built
        asked = comparison.Arguments(
            configs=recipes(small, arguments.out / "recipes"),
            out=arguments.out,
            nodes=lab.nodes,
            link=lab.rate,
            delay=lab.delay,
            steps=lab.steps,
            seeds=1,
            rounds=lab.repeats,
            overrides=overrides(lab),
        )
        trials = comparison.prepare(asked)
        enter_if_needed([sys.executable, str(Path(__file__).resolve()), *given])
        status = comparison.run(asked, trials, probing(small, lab, arguments.out))
        if status in (0, 1):  # not interrupted
            probe = load_probe(arguments.out / "probe.json")
            print(f"\n{conclude(small, notes, trials, probe, arguments.out)}")
        return status
    except (ValueError, LabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def lab_of(scenario: Scenario, source: str) -> LabPart:
    """
    Raises:
        ConfigError: the scenario does not say.
    """
    if scenario.lab is None:
        raise ConfigError(
            f"{source}: lab is missing, so there is no telling how small it is to run; add for example "
            "lab: {nodes: 2, rate: 100mbit, settings: {model.width: 128}}"
        )
    return scenario.lab


def in_lab(scenario: Scenario, lab: LabPart) -> tuple[Scenario, list[str]]:
    """The scenario at the lab's size, and a line for all that is left out there. Plain DDP is in it in any case."""
    methods = [MethodPart(scheme=DDP)]
    notes: list[str] = []
    for method in scenario.methods:
        if method.scheme in (DDP, NOOP):
            continue
        try:
            per_round = (
                not is_sharded(method.scheme)
                and law_of(method.scheme, settings=json.dumps(method.settings)).per_round
            )
        except NoLawError:
            notes.append(
                f"{method.scheme} is left out: its ranks are not equal, and one of a lab's few nodes would serve the others"
            )
            continue
        if method.settings:
            notes.append(f"{method.label}: what it computes is timed without its settings")
        every = min(method.sync_every or lab.sync_every, lab.sync_every) if per_round else None
        methods.append(method.model_copy(update={"sync_every": every}))
    compute = scenario.compute
    for there, what in (
        (compute.stragglers is not None, "slow phases"),
        (compute.spread > 0, "workers of unequal speed"),
        (scenario.failures is not None, "failures"),
        (scenario.link.latency_sigma > 0, "log-normal latency"),
    ):
        if there:
            notes.append(f"{what}: not in the lab, so not in its simulation either")
    changes = {
        "nodes": lab.nodes,
        "ranks_per_node": 1,
        "methods": methods,
        "rounds": lab.rounds,
        "failures": None,
        "link": scenario.link.model_copy(update={"latency_sigma": 0.0}),
        "compute": compute.model_copy(update={"jitter": 0.0, "spread": 0.0, "stragglers": None}),
    }
    return scenario.model_copy(update=changes), notes


def name_of(method: MethodPart) -> str:
    """Of its recipe and runs."""
    return method.label if method.sync_every is None else f"{method.label}_{method.sync_every}"


def recipes(small: Scenario, folder: Path) -> tuple[Path, ...]:
    """A file for each method, with the settings under which its traffic and time were learnt; plain DDP has one."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for method in small.methods:
        if method.scheme == DDP:
            continue
        block = {"name": method.scheme, **MEASURED_WITH.get(method.scheme, {}), **method.settings}
        if method.scheme == FSDP:
            block |= _FSDP
        if method.sync_every is not None:
            block["sync_every"] = method.sync_every
        path = folder / f"{name_of(method)}.yaml"
        path.write_text(yaml.safe_dump({"scheme": block}, sort_keys=False), encoding="utf-8")
        files.append(path)
    return tuple(files)


def overrides(lab: LabPart) -> tuple[str, ...]:
    """Of every recipe."""
    return tuple(f"{k}={json.dumps(v)}" for k, v in {**_SETTINGS, **lab.settings}.items())


def probing(small: Scenario, lab: LabPart, out: Path) -> Callable[[Lab], None]:
    """Probes a lab that has been built, with the model that will be trained there."""
    timed = [method.scheme for method in small.methods if method.scheme != FSDP]
    schemes = ",".join(dict.fromkeys(timed))
    words = ["commkit.cli", "probe", "--config", str(ROOT / "configs" / f"{DDP}.yaml")]
    words += ["--out", str((out / "probe.json").resolve()), "--schemes", schemes]
    words += [word for setting in overrides(lab) for word in ("--set", setting)]

    def probe(built: Lab) -> None:
        results = built.torchrun(
            "-m", words, deadline_s=PROBE_DEADLINE_S, cwd=ROOT, logs=out / "logs"
        )
        failed = [result for result in results if result.status]
        if failed:
            raise LabError(f"commkit probe failed on node {failed[0].node}: {failed[0].tail}")

    return probe


def simulated(small: Scenario, probe: Probe, slower: float = 1.0) -> list[Outcome]:
    """With the probe's links, and its times as many times as long."""
    question = Question(probe)
    work, cluster = question.work, question.cluster
    stage = Stage(
        replace(work, compute_s=slower * work.compute_s),
        replace(cluster, send_cpu_s_per_byte=slower * cluster.send_cpu_s_per_byte),
    )

    return simulate(small, lambda scheme: question.pace(scheme) * slower, stage)


def conclude(
    small: Scenario, notes: Sequence[str], trials: Sequence[Trial], probe: Probe, out: Path
) -> str:
    """Write both down; returns the text of ``scenario.md``."""
    step = probe.compute.step_s
    noop = _row(NOOP, NOOP, step, 0.0, 1, trials)
    rows, names = [replace(noop, adjusted_s=noop.measured_s)], [NOOP]
    for method, one in zip(small.methods, simulated(small, probe), strict=True):
        names.append(name_of(method))
        row = _row(names[-1], one.scheme, one.step_s, one.bytes_per_step, one.sync_every, trials)
        rows.append(row)
    if noop.measured_s is not None:
        again = simulated(small, probe, noop.measured_s / step)
        rows[1:] = [
            replace(row, adjusted_s=one.step_s) for row, one in zip(rows[1:], again, strict=True)
        ]
    notes = [*notes, *_load(out / "compare.json")]
    data = {"rows": [asdict(row) for row in rows], "notes": notes}
    write_atomically(out / "scenario.json", json.dumps(data, indent=2) + "\n")
    text = "\n\n".join([markdown(rows), _LEGEND, *(f"- {note}" for note in notes)]) + "\n"
    write_atomically(out / "scenario.md", text)
    draw_beside(
        names,
        [row.simulated_s for row in rows],
        [row.measured_s for row in rows],
        out / "scenario.png",
    )
    return text


def _load(comparison: Path) -> list[str]:
    """What the machine had to do besides, as far as the comparison says."""
    if not comparison.is_file():
        return []
    data = json.loads(comparison.read_text(encoding="utf-8"))
    loads = [run["load"] for one in data["configurations"] for run in one["runs"]]
    return [
        f"load average before the runs: {min(loads):.1f} to {max(loads):.1f} on {data['machine']['cores']} cores"
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The table. Of ``noop``, which sends nothing, the probe's own step is what was simulated."""
    header = ["scheme", "steps in a round", "measured [s/step]", "simulated [s/step]"]
    header += ["simulated / measured", "adjusted [s/step]", "adjusted / measured"]
    header += ["simulated [MB/step]", "measured [MB/step]"]
    cells = [
        [
            row.scheme,
            str(row.sync_every),
            _number(row.measured_s, ".4g"),
            _number(row.simulated_s, ".4g"),
            _number(row.over_measured(row.simulated_s), ".2f"),
            _number(row.adjusted_s, ".4g"),
            _number(row.over_measured(row.adjusted_s), ".2f"),
            _number(row.simulated_bytes / 1e6, ".4g"),
            _number(None if row.measured_bytes is None else row.measured_bytes / 1e6, ".4g"),
        ]
        for row in rows
    ]
    return markdown_table([header, *cells])


def _row(
    name: str,
    scheme: str,
    simulated_s: float,
    simulated_bytes: float,
    every: int,
    trials: Sequence[Trial],
) -> Row:
    runs = [RunDirectory(trial.directory) for trial in trials if trial.configuration.name == name]
    told = [measured(read_records(run.metrics), every) for run in runs if run.summary.is_file()]
    return Row(
        scheme,
        every,
        simulated_s,
        median(seconds for seconds, _ in told) if told else None,
        simulated_bytes,
        median(sent for _, sent in told) if told else None,
        len(told),
    )


def measured(records: Sequence[dict[str, Any]], every: int) -> tuple[float, float]:
    """Seconds and bytes of a step, without those of the first round: of whole rounds the mean, of single steps the median
    time."""
    counted = records[every if every > 1 else len(records) // 4 :]
    seconds = [record["step_seconds"] for record in counted]
    sent = fmean(record["wire_bytes"] for record in counted)
    return (fmean(seconds) if every > 1 else median(seconds)), sent


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
