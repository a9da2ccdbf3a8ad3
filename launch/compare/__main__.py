"""Compare recipes on the same emulated network.

    python -m launch.compare configs/powersgd.yaml configs/sign.yaml --nodes 4 --link 100mbit --out DIR

Plain DDP and the no-communication bound always run along. ``DIR`` gets ``compare.json``,
``compare.md``, ``loss.png`` and ``time.png``, and below ``runs/`` everything that the runs wrote.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: find `launch`

try:
    import tyro
except ModuleNotFoundError:
    sys.exit("error: comparing needs tyro, which is not installed; pip install 'commkit[train]'")

from launch.compare import plan, report
from launch.compare.analyse import compare
from launch.compare.execute import Executor, Outcome
from launch.netlab import Lab, LabError, enter_if_needed
from launch.netlab.namespaces import CONGESTION_CONTROL
from launch.netlab.rates import NO_LINK


@dataclass(frozen=True)
class Arguments:
    """Run recipes on the same emulated network, interleaved, and compare them."""

    configs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """YAML files of recipes. configs/ddp.yaml and configs/noop.yaml run in any case."""
    out: Path
    """Where to write; must not hold runs of an earlier comparison."""
    nodes: int = 2
    """Hosts."""
    link: str = "100mbit"
    """Rate of every node both ways, or one for each with commas; none is loopback."""
    steps: int = 200
    """Optimizer steps of each run."""
    seconds: float | None = None
    """Of training, after which a run ends even before its steps: losses at equal time."""
    seeds: int = 3
    """Runs of each configuration, with different data and weights."""
    rounds: int = 1
    """How often each seed runs, for steadier times."""
    baselines: str = ""
    """Torch's own hooks to run along, with commas: torch:ddp,torch:powersgd ..."""
    ranks_per_node: int = 1
    """Processes on each node."""
    overrides: Annotated[
        tuple[str, ...],
        tyro.conf.arg(name="set", metavar="A.B=VALUE"),
        tyro.conf.UseAppendAction,
    ] = ()
    """Replace one field in all recipes; VALUE is read as YAML. May be given many times."""
    delay: str | None = None
    """Of each packet, one way, such as 20ms; needs netem."""
    jitter: str | None = None
    """Of the delay, such as 2ms; needs netem."""
    loss: str | None = None
    """Share of packets lost, such as 0.1%; needs netem."""
    congestion_control: str = CONGESTION_CONTROL
    """Of TCP between nodes, by the kernel's name."""
    deadline: float | None = None
    """Seconds for one run. If not given: an hour, and once plain DDP has run, eight times its time
    and two minutes."""

    @property
    def all_overrides(self) -> tuple[str, ...]:
        """Those given, and the limit of time."""
        return *plan.limits(self.seconds), *self.overrides

    @property
    def setting(self) -> "report.Setting":
        """What the report says was compared; the network is filled in later."""
        return report.Setting(
            network=f"{self.nodes} nodes",
            link=self.link,
            nodes=self.nodes,
            ranks_per_node=self.ranks_per_node,
            steps=self.steps,
            seconds=self.seconds,
            seeds=self.seeds,
            rounds=self.rounds,
            overrides=self.overrides,
        )


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if a configuration failed; 2 for bad input; 130 after ctrl-C."""
    given = list(sys.argv[1:] if words is None else words)
    arguments = tyro.cli(Arguments, args=given, prog="commkit compare")
    try:
        trials = prepare(arguments)
        if arguments.link != NO_LINK:
            enter_if_needed([sys.executable, str(Path(__file__).resolve()), *given])
        return run(arguments, trials)
    except (ValueError, LabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def prepare(arguments: Arguments) -> list[plan.Trial]:
    """The trials, checked as far as that goes without running them.

    Raises:
        ValueError: with the argument or field, its value, the rule and the remedy.
    """
    for name in ("steps", "seeds", "rounds"):
        value = getattr(arguments, name)
        if value < 1:
            raise ValueError(f"--{name}: got {value}, but at least 1 is needed; raise it")
    for name in ("seconds", "deadline"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name}: got {value:g}; give seconds above 0")
    out = arguments.out.resolve()
    if (out / "runs").exists() or (out / "compare.json").exists():
        raise ValueError(
            f"--out: {str(arguments.out)!r} holds an earlier comparison; give another directory"
        )
    hooks = [name.strip() for name in arguments.baselines.split(",") if name.strip()]
    configurations = plan.choose(arguments.configs, hooks)
    trials = plan.order(configurations, arguments.seeds, arguments.rounds, out)
    plan.check(trials, arguments.steps, arguments.all_overrides)
    return trials


def run(
    arguments: Arguments,
    trials: Sequence[plan.Trial],
    begin: Callable[[Lab], None] = lambda lab: None,
) -> int:
    """Build the lab, run the trials, write the report; returns the exit status. ``begin`` has the lab before the trials
    do."""
    lab = Lab(
        arguments.nodes,
        arguments.link,
        delay=arguments.delay,
        jitter=arguments.jitter,
        loss=arguments.loss,
        congestion_control=arguments.congestion_control,
        name=lab_name(),
        ranks_per_node=arguments.ranks_per_node,
    )
    outcomes: list[Outcome] = []
    stopped: KeyboardInterrupt | SystemExit | None = None
    failure: Exception | None = None
    try:
        with lab:
            print(lab.describe(), file=sys.stderr)
            begin(lab)
            executor = Executor(
                lab,
                arguments.steps,
                arguments.all_overrides,
                arguments.ranks_per_node,
                arguments.deadline,
            )
            executor.run_all(trials, outcomes.append)
    except (KeyboardInterrupt, SystemExit) as signal:
        stopped = signal
    except (
        LabError,
        OSError,
    ) as error:  # the lab itself; what has finished is still worth a report
        failure = error
    if outcomes:
        text = conclude(arguments, lab, outcomes, len(outcomes) < len(trials) or bool(stopped))
        print(f"\n{text}\nWritten: {arguments.out}/compare.md, compare.json, loss.png, time.png")
    if failure is not None:
        raise failure
    if stopped is not None:
        code = stopped.code if isinstance(stopped, SystemExit) else 130
        return code if isinstance(code, int) else 130
    return 1 if any(outcome.status != "finished" for outcome in outcomes) else 0


def conclude(arguments: Arguments, lab: Lab, outcomes: Sequence[Outcome], interrupted: bool) -> str:
    """Analyse what was run and write it down; returns the text of ``compare.md``."""
    setting = replace(arguments.setting, network=lab.describe(), interrupted=interrupted)
    return report.write(compare(outcomes, arguments.ranks_per_node), setting, arguments.out)


def lab_name() -> str:
    """Different for every process, so that comparisons can run side by side."""
    letters = "".join(chr(ord("a") + int(digit)) for digit in str(os.getpid()))
    return f"compare-{letters}"


if __name__ == "__main__":
    sys.exit(main())
