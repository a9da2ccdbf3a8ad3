"""Puts runs side by side: medians, spread, and ratios inside each block of (seed, round)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from launch.compare.execute import Outcome
from launch.compare.figures import Figures, Point, middle, read_figures
from launch.compare.plan import DDP, NOOP

TOLERANCE = 0.05  # of wire_bytes against the interface


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of several runs, and how many they were."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """None if no value is known."""
        known = [value for value in values if value is not None]
        return cls(median(known), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True)
class Run:
    """One trial: how it ended and, if it finished, its figures."""

    outcome: Outcome
    figures: Figures | None


@dataclass(frozen=True)
class Row:
    """One configuration over all its runs. Units as in :class:`~launch.compare.figures.Figures`.

    Args:
        name: of the configuration.
        runs: all that were tried, in the order of trial.
        values: of each figure, over the finished runs.
        to_ddp: step time over that of plain DDP in the same block.
        to_noop: step time over that of the no-communication bound in the same block.
        curve: validation on the way, medians over the runs.
    """

    name: str
    runs: tuple[Run, ...]
    values: dict[str, Spread | None]
    to_ddp: Spread | None
    to_noop: Spread | None
    curve: tuple[Point, ...]

    @property
    def finished(self) -> int:
        """How many runs finished."""
        return sum(run.figures is not None for run in self.runs)

    @property
    def errors(self) -> list[str]:
        """Why the others did not, each reason once."""
        told = [run.outcome.error for run in self.runs if run.outcome.error]
        return list(dict.fromkeys(told))

    def middle(self, name: str) -> float | None:
        """Median of a figure over the finished runs."""
        spread = self.values[name]
        return None if spread is None else spread.median


FIGURES = tuple(n for n in Figures.__dataclass_fields__ if n not in ("curve", "in_rounds"))


def compare(outcomes: Sequence[Outcome], ranks_per_node: int = 1) -> list[Row]:
    """One row for each configuration, in the order in which they first ran, plain DDP first and
    the bound last."""
    runs = [_read(outcome, ranks_per_node) for outcome in outcomes]
    names = list(dict.fromkeys(run.outcome.trial.configuration.name for run in runs))
    names.sort(key=lambda name: (name == NOOP) - (name == DDP))
    return [_row(name, runs) for name in names]


def _read(outcome: Outcome, ranks_per_node: int) -> Run:
    if outcome.status != "finished":
        return Run(outcome, None)
    return Run(outcome, read_figures(outcome.trial.directory, ranks_per_node))


def _row(name: str, runs: Sequence[Run]) -> Row:
    own = tuple(run for run in runs if run.outcome.trial.configuration.name == name)
    finished = [run.figures for run in own if run.figures is not None]
    return Row(
        name=name,
        runs=own,
        values={key: Spread.of(getattr(f, key) for f in finished) for key in FIGURES},
        to_ddp=_ratio(own, runs, DDP),
        to_noop=_ratio(own, runs, NOOP),
        curve=_median_curve([figures.curve for figures in finished]),
    )


def _ratio(own: Sequence[Run], runs: Sequence[Run], reference: str) -> Spread | None:
    """Step times over those of ``reference``, block by block: medians, or means of runs that send in rounds."""
    others = {
        run.outcome.trial.block: run.figures
        for run in runs
        if run.outcome.trial.configuration.name == reference and run.figures is not None
    }
    ratios = []
    for run in own:
        other = others.get(run.outcome.trial.block)
        if run.figures is None or other is None:
            continue
        name = "mean_step_seconds" if run.figures.in_rounds else "step_seconds"
        mine, theirs = getattr(run.figures, name), getattr(other, name)
        if mine is not None and theirs:
            ratios.append(mine / theirs)
    return Spread.of(ratios)


def _median_curve(curves: Sequence[tuple[Point, ...]]) -> tuple[Point, ...]:
    """Point by point; runs of one configuration are evaluated at the same steps."""
    return tuple(
        Point(
            step=points[0].step,
            val_loss=middle(point.val_loss for point in points),
            seconds=median(point.seconds for point in points),
            wire_bytes=_whole(middle(point.wire_bytes for point in points)),
            tx_bytes=middle(point.tx_bytes for point in points),
        )
        for points in zip(*curves, strict=False)
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
