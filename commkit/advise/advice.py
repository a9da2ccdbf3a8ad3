"""The recommendation: as little compression as reaches the utilisation that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..config import ConfigError
from ..cost.coordinated import SCHEMES as COORDINATED
from ..cost.coordinated import CoordinationError, predict_coordinated
from ..cost.predict import Prediction, predict, smallest_sync_every
from ..cost.rounds import round_of
from ..cost.sharded import FSDP, is_sharded, predict_sharded
from ..cost.traffic import Law, law_of
from ..optim import OptimizerScheme
from ..registry import names
from ..schemes import make_scheme
from .question import LEFT_OUT, Question

Kind = Literal["plain", "every step", "optimizer", "local updates", "sharded", "coordinator"]
# What a scheme asks of a training run, least first.
_LADDER: tuple[Kind, ...] = get_args(Kind)
PLAIN = "ddp"
BASES = {PLAIN: "plain DDP", FSDP: "plain FSDP"}  # "none", the first of them that fits memory
WORTH = 1.1  # what a scheme has to gain over that
TIED = 0.98  # of the fastest: as fast, as far as a prediction can tell


@dataclass(frozen=True)
class Row:
    """One scheme.

    Args:
        prediction: for local updates, with the fewest steps per round that reach the utilisation, or the most that are
            tried.
        kind: what it asks of a run.
        fits: into memory.
        reaches: the utilisation.
    """

    prediction: Prediction
    kind: Kind
    fits: bool
    reaches: bool

    @property
    def name(self) -> str:
        return self.prediction.scheme

    @property
    def rung(self) -> tuple[int, float]:
        """Of the ladder: later ones send less or ask for more."""
        return _LADDER.index(self.kind), -self.prediction.wire_bytes


@dataclass(frozen=True)
class Advice:
    """
    Args:
        rows: all schemes, in the order of the ladder.
        recommended: the first is the choice, others are as good within the error; ("ddp",) is "none", and ("fsdp",) where
            no rank has memory for a replica.
        reason: why, in a sentence or two.
        left_out: schemes that were not asked for by name and have no row, and why.
    """

    rows: tuple[Row, ...]
    recommended: tuple[str, ...]
    reason: str
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def choice(self) -> Row:
        return next(row for row in self.rows if row.name == self.recommended[0])

    @property
    def is_none(self) -> bool:
        """Whether plain DDP, or FSDP, is best left alone."""
        return self.recommended in ((PLAIN,), (FSDP,))


def advise(question: Question) -> Advice:
    """
    Raises:
        ConfigError: a scheme that does not exist or has no cost model, or nothing fits memory.
    """
    rows, left_out = [], dict(LEFT_OUT)
    for name in dict.fromkeys([PLAIN, *question.candidates]):
        try:
            rows.append(_row(name, question))
        except CoordinationError as error:
            if name in question.schemes:
                raise ConfigError(f"schemes: {error}") from None
            left_out[name] = str(error)
    rows.sort(key=lambda row: row.rung)
    smallest = min(rows, key=lambda row: row.prediction.memory_bytes)
    if not smallest.fits:
        raise ConfigError(
            f"memory: {smallest.name} needs least, {smallest.prediction.memory_bytes / 1e9:.1f} GB per rank at "
            f"bytes_per_parameter={question.bytes_per_parameter:g} and shards={question.shards}, more than "
            f"{question.memory_bytes / 1e9:.1f} GB; raise --shards or --nodes, or give --memory of the machines that are meant"
        )
    recommended, reason = choose(rows, question.utilisation)
    return Advice(tuple(rows), recommended, reason, {} if question.schemes else left_out)


def choose(rows: Sequence[Row], utilisation: float) -> tuple[tuple[str, ...], str]:
    """Names and a reason. Schemes that reach ``utilisation`` only become more as a link becomes faster, so the first of them
    on the ladder never moves towards more compression then. Steps are compared by what of them is computed for the model.

    Raises:
        ConfigError: nothing fits memory.
    """
    fitting = sorted((row for row in rows if row.fits), key=lambda row: row.rung)
    if not fitting:
        raise ConfigError("memory: no scheme's state fits a rank beside the model; shard it")
    fastest = max(fitting, key=lambda row: row.prediction.utilisation)
    base = next((row for name in BASES for row in fitting if row.name == name), None)
    if base is not None:
        plain, share = BASES[base.name], base.prediction.utilisation
        gain = fastest.prediction.utilisation / share
        if base.reaches:
            return (base.name,), f"none: {plain} computes for {share:.0%} of the time already"
        if gain <= WORTH:
            told = f"none: {plain}; the fastest ({fastest.name}) would gain {gain - 1:.0%}"
            return (base.name,), told
    reaching = [row for row in fitting if row.reaches]
    least = TIED * fastest.prediction.utilisation
    as_fast = [row for row in fitting if row.prediction.utilisation >= least]
    choice = (reaching or as_fast)[0]
    alike = [
        row.name
        for row in (reaching or fitting)
        if row is not choice and row.kind == choice.kind and _overlap(row, choice)
    ]
    found = choice.prediction
    wait = f"{found.exposed_s:.3g} s of a step's {found.step_s:.3g} s are not hidden"
    if reaching:
        reason = (
            f"{choice.name}{_rounds(found)}: the least compression that computes for {utilisation:.0%} of the time "
            f"({found.utilisation:.0%}); {wait}"
        )
    else:
        reason = (
            f"{choice.name}{_rounds(found)}: the least compression among the fastest, but nothing computes for "
            f"{utilisation:.0%} of the time "
            f"({found.utilisation:.0%}); {wait}"
        )
    if base is not None:
        slower = found.utilisation / base.prediction.utilisation
        reason += f"; {BASES[base.name]} takes {slower:.1f} times as long"
    return (choice.name, *alike), reason


def _rounds(found: Prediction) -> str:
    return f" every {found.sync_every} steps" if found.sync_every > 1 else ""


def _overlap(a: Row, b: Row) -> bool:
    return a.prediction.low_s <= b.prediction.high_s and b.prediction.low_s <= a.prediction.high_s


def _row(name: str, question: Question) -> Row:
    found = _prediction(name, question)
    return Row(
        found,
        kind_of(name),
        found.memory_bytes <= question.memory_bytes,
        found.utilisation >= question.utilisation,
    )


def _prediction(name: str, question: Question) -> Prediction:
    kind, pace, work = kind_of(name), question.pace(name), question.work
    if kind == "sharded":
        return predict_sharded(name, pace, question.whole_work, question.whole_cluster)
    cluster = question.cluster
    if kind == "coordinator":
        return predict_coordinated(name, work, cluster, question.probe.compute.spread)
    law = _law(name)

    def of_round(every: int) -> Prediction | None:
        plan = round_of(name, every)
        return None if plan is None else predict(law, pace, work, cluster, plan)

    if law.per_round:
        found = smallest_sync_every(question.utilisation, of_round, question.longest)
        found = found or _longest(of_round, question.longest)
        if found is None:
            raise ConfigError(
                f"scheme {name!r} has no round of up to {question.longest} steps; raise --longest, or leave it out"
            )
        return found
    return predict(law, pace, work, cluster)


def _longest(predicted: Callable[[int], Prediction | None], longest: int) -> Prediction | None:
    every = 1 << (longest.bit_length() - 1)
    while every:
        found = predicted(every)
        if found is not None:
            return found
        every //= 2
    return None


def _law(name: str) -> Law:
    if name not in names("scheme"):
        raise ConfigError(f"schemes: unknown scheme {name!r}; `commkit schemes` lists them")
    try:
        return law_of(name)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"schemes: {error}") from None


def kind_of(name: str) -> Kind:
    """
    Raises:
        ConfigError: the scheme does not exist or has no cost model.
    """
    if name in COORDINATED:
        return "coordinator"
    if is_sharded(name):
        return "sharded"
    law = _law(name)
    if name == PLAIN:
        return "plain"
    if law.per_round:
        return "local updates"
    return (
        "optimizer" if isinstance(make_scheme(name, law.knobs), OptimizerScheme) else "every step"
    )
