"""The recommendation: as little compression as reaches the utilisation that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..config import ConfigError
from ..cost.predict import Prediction, predict, smallest_sync_every
from ..cost.rounds import round_of
from ..cost.traffic import Law, law_of
from ..optim import OptimizerScheme
from ..registry import names
from ..schemes import make_scheme
from .question import Question

Kind = Literal["plain", "every step", "optimizer", "local updates"]
# What a scheme asks of a training run, least first.
_LADDER: tuple[Kind, ...] = ("plain", "every step", "optimizer", "local updates")
PLAIN = "ddp"
WORTH = 1.1  # what a scheme has to gain over plain DDP


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
        recommended: the first is the choice, others are as good within the error; ("ddp",) is "none".
        reason: why, in a sentence or two.
    """

    rows: tuple[Row, ...]
    recommended: tuple[str, ...]
    reason: str

    @property
    def choice(self) -> Row:
        return next(row for row in self.rows if row.name == self.recommended[0])

    @property
    def is_none(self) -> bool:
        """Whether plain DDP is best left alone."""
        return self.recommended == (PLAIN,)


def advise(question: Question) -> Advice:
    """
    Raises:
        ConfigError: a scheme that does not exist or has no cost model, or nothing fits memory.
    """
    candidates = list(dict.fromkeys([PLAIN, *question.candidates]))
    rows = sorted((_row(name, question) for name in candidates), key=lambda row: row.rung)
    recommended, reason = choose(rows, question.utilisation)
    return Advice(tuple(rows), recommended, reason)


def choose(rows: Sequence[Row], utilisation: float) -> tuple[tuple[str, ...], str]:
    """Names and a reason. Schemes that reach ``utilisation`` only become more as a link becomes faster, so the first of them
    on the ladder never moves towards more compression then.

    Raises:
        ConfigError: nothing fits memory.
    """
    fitting = sorted((row for row in rows if row.fits), key=lambda row: row.rung)
    if not fitting:
        raise ConfigError("memory: no scheme's state fits a rank beside the model; shard it")
    fastest = min(fitting, key=lambda row: row.prediction.step_s)
    plain = next((row for row in fitting if row.name == PLAIN), None)
    if plain is not None:
        gain = plain.prediction.step_s / fastest.prediction.step_s
        if plain.reaches:
            share = plain.prediction.utilisation
            return (PLAIN,), f"none: plain DDP computes for {share:.0%} of the time already"
        if gain <= WORTH:
            return (
                PLAIN,
            ), f"none: plain DDP; the fastest ({fastest.name}) would gain {gain - 1:.0%}"
    reaching = [row for row in fitting if row.reaches]
    choice = reaching[0] if reaching else fastest
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
            f"{choice.name}{_rounds(found)}: the fastest, but nothing computes for {utilisation:.0%} of the time "
            f"({found.utilisation:.0%}); {wait}"
        )
    if plain is not None:
        reason += f"; plain DDP takes {plain.prediction.step_s / found.step_s:.1f} times as long"
    return (choice.name, *alike), reason


def _rounds(found: Prediction) -> str:
    return f" every {found.sync_every} steps" if found.sync_every > 1 else ""


def _overlap(a: Row, b: Row) -> bool:
    return a.prediction.low_s <= b.prediction.high_s and b.prediction.low_s <= a.prediction.high_s


def _row(name: str, question: Question) -> Row:
    pace, work, cluster = question.probe.pace(name), question.work, question.cluster
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
    else:
        found = predict(law, pace, work, cluster)
    return Row(
        found,
        kind_of(name),
        found.memory_bytes <= question.memory_bytes,
        found.utilisation >= question.utilisation,
    )


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
    law = _law(name)
    if name == PLAIN:
        return "plain"
    if law.per_round:
        return "local updates"
    return (
        "optimizer" if isinstance(make_scheme(name, law.knobs), OptimizerScheme) else "every step"
    )
