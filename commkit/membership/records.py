"""What workers write to the log that they all read: one line of JSON per record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Join:
    """``worker`` wants to take part; ``place`` orders those who start together."""

    worker: str
    place: int = 0


@dataclass(frozen=True, slots=True)
class Leave:
    """``worker`` takes no part any more: because of ``reason``, or, if that is empty, because its work is done."""

    worker: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Alarm:
    """``epoch`` is over, as ``worker`` has found."""

    epoch: int
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ready:
    """``worker`` does nothing more in ``epoch``. It has the outcome of all steps up to ``prepared``; None: it has not
    received the training state."""

    epoch: int
    worker: str
    prepared: int | None


@dataclass(frozen=True, slots=True)
class View:
    """Who works together in ``epoch``, in the order of ranks, after ``step`` committed steps.

    Args:
        epoch: one more than the last.
        members: workers.
        sources: those of them that have the training state; the first gives it to the others.
        step: a member that has the outcome of this step makes it real, and gives up what comes after it.
        stop: why training cannot go on; there are no members then, and ``sources`` have what can be saved.
    """

    epoch: int
    members: tuple[str, ...]
    sources: tuple[str, ...]
    step: int
    stop: str = ""


Record: TypeAlias = Join | Leave | Alarm | Ready | View
_KINDS: dict[str, Callable[..., Record]] = {
    kind.__name__: kind for kind in (Join, Leave, Alarm, Ready, View)
}


def encode(record: Record) -> str:
    return json.dumps({"record": type(record).__name__} | dataclasses.asdict(record))


def decode(text: str) -> Record:
    fields = json.loads(text)
    kind = _KINDS[fields.pop("record")]
    # JSON knows no tuples.
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
