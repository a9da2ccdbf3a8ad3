"""Finds out of what ranks have printed the line that says why a run failed."""

import re
from collections.abc import Sequence

_PREFIX = re.compile(r"^(\[\w*\d+\]:?\s*)+")  # torchrun's and torch's "[rank0]:"
_TOLD = re.compile(r"^error on rank \d+: ")  # launch/train.py's own words
_ERROR = re.compile(r"^(what\(\):|[\w.]*(Error|Exception|Failure|Interrupt)(:|$))")
_SIGNAL = re.compile(r"^traceback : (Signal \d+ \(\w+\))")  # torchrun, of a rank without words
_PLACE = re.compile(r'^File "(?:.*/)?([^/"]+)", line (\d+), in (\S+)')
# What other ranks say once the rank with the cause is gone.
_CONSEQUENCE = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|connection was|got 0 bytes|"
    r"DistNetworkError|DistStoreError|RankFailure|timed out",
    re.IGNORECASE,
)
_LAUNCHER = re.compile(r"ChildFailedError|SignalException|RendezvousConnectionError")
_LONGEST = 400  # characters


def find_error(outputs: Sequence[str]) -> str | None:
    """The line that says best why a run failed; None if there is no such line.

    What ``launch/train.py`` says itself goes first, then a cause, then the consequences of another
    rank's failure, then a signal. Of a chain of exceptions it is the last, with which the rank
    ended; one without a message gets the place where it was raised.

    Args:
        outputs: of each node, standard output and error.
    """
    told: list[str] = []
    causes: list[str] = []
    consequences: list[str] = []
    signals: list[str] = []
    for output in outputs:
        lines = [_clean(line) for line in output.splitlines()]
        errors = _errors(lines)
        signals += [found[1] for line in lines if (found := _SIGNAL.match(line))]
        told += filter(_TOLD.match, lines)
        causes += [line for line in errors if not _CONSEQUENCE.search(line)][-1:]
        consequences += [line for line in errors if _CONSEQUENCE.search(line)][-1:]
    best = next(iter([*told, *causes, *consequences, *signals]), None)
    return None if best is None else best[:_LONGEST]


def _errors(lines: Sequence[str]) -> list[str]:
    found, place = [], ""
    for line in lines:
        if where := _PLACE.match(line):
            place = f"{where[1]}:{where[2]}, {where[3]}"
        elif _ERROR.match(line) and not _LAUNCHER.search(line):
            found.append(line if ":" in line or not place else f"{line} in {place}")
    return found


def _clean(line: str) -> str:
    """Without a progress bar before it and the prefix that says which rank it is of."""
    return _PREFIX.sub("", line.rpartition("\r")[2].strip()).strip()
