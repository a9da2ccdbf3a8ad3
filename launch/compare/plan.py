"""What a comparison runs, and in which order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from commkit.config import ConfigError
from commkit.registry import did_you_mean
from launch import baselines
from launch.train import Arguments, read_settings

ROOT = Path(__file__).resolve().parents[2]
DDP, NOOP = "ddp", "noop"  # always run: what others are compared with, and the bound on speed
CURVE_POINTS = 10  # evaluations on the way of a run


@dataclass(frozen=True)
class Configuration:
    """One thing to compare.

    Args:
        name: of its rows and directories; a recipe's file name, or ``torch:...``.
        recipe: the YAML file.
        overrides: fields replaced in it, ``a.b=c``.
    """

    name: str
    recipe: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One run of one configuration.

    Args:
        configuration: what runs.
        seed: of the run; equal seeds see the same data from the same weights.
        round: from 0; rounds repeat a seed.
        directory: where it writes.
    """

    configuration: Configuration
    seed: int
    round: int
    directory: Path

    @property
    def block(self) -> tuple[int, int]:
        """Trials of one block ran close to each other in time; ratios are taken inside it."""
        return self.seed, self.round


def choose(recipes: Sequence[Path], hooks: Sequence[str]) -> list[Configuration]:
    """The configurations: plain DDP, the recipes, torch's own hooks, and the bound.

    Args:
        recipes: YAML files.
        hooks: names of torch's own, ``torch:...``, with default knobs.

    Raises:
        ConfigError: no such file or hook, or two files of one name.
    """
    chosen: dict[str, Configuration] = {}
    for path in [_standard(DDP), *recipes]:
        if not path.is_file():
            near = did_you_mean(path.stem, [p.stem for p in (ROOT / "configs").glob("*.yaml")])
            raise ConfigError(
                f"config: {str(path)!r} does not exist{near}; give YAML files such as "
                "configs/powersgd.yaml"
            )
        path = path.resolve()
        other = chosen.setdefault(path.stem, Configuration(path.stem, path))
        if other.recipe != path:
            raise ConfigError(
                f"config: {str(path)!r} and {str(other.recipe)!r} would both be called "
                f"{path.stem!r}; rename one of the files"
            )
    for hook in hooks:
        baselines.check({"name": hook}, resume=False)
        if not baselines.is_baseline({"name": hook}):
            raise ConfigError(
                f"baselines: got {hook!r}; known: {', '.join(baselines.NAMES)}; give commkit's own "
                "schemes as YAML files"
            )
        chosen[hook] = Configuration(hook, _standard(DDP), (f"scheme={{name: '{hook}'}}",))
    chosen.setdefault(NOOP, Configuration(NOOP, _standard(NOOP)))
    return list(chosen.values())


def order(
    configurations: Sequence[Configuration], seeds: int, rounds: int, out: Path
) -> list[Trial]:
    """Trials, interleaved: all configurations once per block of (seed, round).

    Each block begins with another configuration, so that what a machine does over time (warming up,
    other load) falls on all of them alike.
    """
    trials = []
    for block in range(seeds * rounds):
        turn = block % len(configurations)
        for configuration in [*configurations[turn:], *configurations[:turn]]:
            seed, again = block % seeds, block // seeds
            name = configuration.name.replace(":", "_")
            directory = out / "runs" / f"{name}-seed{seed}-round{again}"
            trials.append(Trial(configuration, seed, again, directory))
    return trials


def limits(seconds: float | None) -> tuple[str, ...]:
    """Overrides that end a run after so many seconds of training, if it has not done its steps by then."""
    return () if seconds is None else (f"max_seconds={float(seconds)}",)


def words(trial: Trial, steps: int, overrides: Sequence[str]) -> list[str]:
    """Arguments of ``launch/train.py`` for a trial.

    Args:
        trial: what runs.
        steps: of the run.
        overrides: fields to replace in every recipe; they go before our own but for the seed.
    """
    settings = _settings(trial, steps, overrides)
    options = [word for setting in settings for word in ("--set", setting)]
    recipe, out = str(trial.configuration.recipe), str(trial.directory)
    return ["--config", recipe, "--out", out, "--steps", str(steps), *options]


def check(trials: Sequence[Trial], steps: int, overrides: Sequence[str]) -> None:
    """Refuse recipes and overrides that no run could start with.

    Raises:
        ConfigError: with the file, the field, the value and the rule.
    """
    for trial in trials:
        if trial.block == trials[0].block:
            arguments = Arguments(
                config=trial.configuration.recipe,
                overrides=_settings(trial, steps, overrides),
                steps=steps,
            )
            baselines.check(read_settings(arguments).scheme, resume=False)


def _settings(trial: Trial, steps: int, overrides: Sequence[str]) -> tuple[str, ...]:
    return (
        "checkpoint.every=0",
        f"eval.every={max(1, steps // CURVE_POINTS)}",
        *trial.configuration.overrides,
        *overrides,
        f"seed={trial.seed}",
    )


def _standard(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"
