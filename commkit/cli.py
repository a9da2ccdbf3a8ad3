"""The ``commkit`` command: ``probe``, ``advise``, ``compare``, ``simulate``, ``schemes`` and ``doctor``.

``probe`` and ``compare`` are programs of a source checkout's ``launch/``, to which their arguments go as they are; so is
the lab of ``simulate``.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from .advise import Options, Question
from .advise import advise as take_advice
from .advise import lines as advice_lines
from .config import ConfigError
from .cost.scenario import load_scenario
from .cost.simulate import Outcome, SimulationError
from .cost.simulate import simulate as run_scenario
from .inventory import SchemeCard, installation, scheme_cards
from .probe import load_probe
from .tables import aligned

_CHECKOUT = Path(__file__).resolve().parent.parent
_PROGRAMS = {
    "probe": "launch.probe",
    "compare": "launch.compare.__main__",
    "simulate --lab": "launch.compare.scenario",
}
_USAGE = """\
usage: commkit COMMAND ...

commands:
  probe     measure links, a model and compression; under torchrun
  advise    which scheme a probe asks for, and what it would give
  compare   run recipes on the same emulated network and compare them
  simulate  thousands of workers on a virtual clock
  schemes   list every scheme, with the bytes that it sends and keeps
  doctor    what is installed and what this machine can do

`commkit COMMAND --help` says more.
"""


@dataclass(frozen=True)
class Schemes:
    """List every scheme: what it is, what it works with, and its measured bytes."""

    json: bool = False
    """Print a JSON list in place of a table."""


@dataclass(frozen=True, kw_only=True)
class Advise(Options):
    """Predict every scheme's step time, and recommend one, several, or none."""

    probe: Path
    """What `commkit probe` wrote."""
    schemes: str = ""
    """To choose among, with commas; if not given all that were timed, fsdp, backup and gradient_coding."""
    json: bool = False
    """Print a JSON object in place of a table."""


@dataclass(frozen=True)
class Simulate:
    """Run a scenario's methods on a virtual clock: time, bytes, and the share of time in which workers idle."""

    scenario: Path
    """YAML file; see configs/scenarios/."""
    plot: Path | None = None
    """Draw the outcome into this file, such as out.png."""
    lab: Path | None = None
    """Run it instead, as small as the file's `lab` says, on an emulated network of this machine (root, or user namespaces), and
    write what is simulated there beside what is measured into this directory."""
    json: bool = False
    """Print a JSON list in place of a table."""


@dataclass(frozen=True)
class Doctor:
    """Say what is installed, which kernels run, and whether the network lab can be built."""

    json: bool = False
    """Print a JSON object in place of text."""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 for bad input, 1 if nobody reads to its end."""
    given = list(sys.argv[1:] if words is None else words)
    command, rest = (given[0], given[1:]) if given else ("", [])
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    runs: dict[str, Callable[[Sequence[str]], int]] = {
        "probe": lambda rest: _program("probe", rest),
        "advise": advise,
        "compare": lambda rest: _program("compare", rest),
        "simulate": simulate,
        "schemes": schemes,
        "doctor": doctor,
    }
    if command not in runs:
        print(f"error: unknown command {command!r}\n\n{_USAGE}", end="", file=sys.stderr)
        return 2
    try:
        status = runs[command](rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _is_unread(sys.__stdout__ or sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left at exit
        return 1
    except (MissingError, ConfigError, SimulationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe that nobody reads, as of ``commkit doctor | head -1``."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class MissingError(Exception):
    """Something that a command needs is not installed; the message says how to get it."""


def _program(name: str, words: Sequence[str]) -> int:
    """Hand over to a program of the checkout that commkit is installed from.

    Raises:
        MissingError: there is no checkout, or an optional package is missing.
    """
    if not (_CHECKOUT / "launch" / "compare").is_dir():
        raise MissingError(
            f"commkit {name} runs programs of launch/, which an installed commkit does not have; "
            "clone the repository, `pip install -e '.[train]'` there, and try again"
        )
    _tyro()
    sys.path.insert(0, str(_CHECKOUT))
    try:
        program = importlib.import_module(_PROGRAMS[name])
    except ModuleNotFoundError as error:
        raise MissingError(
            f"commkit {name} needs {error.name}, which is not installed; "
            "pip install 'commkit[train]'"
        ) from error
    status: int = program.main(list(words))
    return status


def advise(words: Sequence[str]) -> int:
    """Print what every scheme would give, and which to take.

    Raises:
        ConfigError: a file that is no probe, an unknown scheme, or nothing that fits.
    """
    asked = _tyro().cli(Advise, args=list(words), prog="commkit advise")
    options = {option.name: getattr(asked, option.name) for option in fields(Options)}
    chosen = [name.strip() for name in asked.schemes.split(",") if name.strip()]
    probe = load_probe(asked.probe)
    try:
        question = Question(probe, schemes=chosen, **options)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    advice = take_advice(question)
    if asked.json:
        rows = [
            {**asdict(row.prediction), "kind": row.kind, "fits": row.fits} for row in advice.rows
        ]
        told = {
            "recommended": advice.recommended,
            "reason": advice.reason,
            "rows": rows,
            "left_out": dict(advice.left_out),
        }
        print(json.dumps(told, indent=2))
        return 0
    print(
        f"{question.whole.numel:,} parameters on {question.cluster.nodes} nodes, "
        f"{question.cluster.link.bytes_per_second * question.shards * 8 / 1e6:.4g} Mbit/s of payload and "
        f"{question.cluster.link.latency_s * 1e3:.3g} ms between them; "
        f"{question.work.compute_s:.4g} s of compute in a step\n"
    )
    for line in aligned(advice_lines(advice), rights=range(2, 10)):
        print(line)
    print(f"\nRecommended: {advice.reason}.")
    if len(advice.recommended) > 1:
        print(f"As good within the error: {', '.join(advice.recommended[1:])}.")
    for name, why in advice.left_out.items():
        print(f"Not advised: {name}: {why}.")
    return 0


def simulate(words: Sequence[str]) -> int:
    """Print what became of a scenario's methods.

    Raises:
        ConfigError: a file that is no scenario.
        SimulationError: a method that cannot be simulated.
    """
    tyro = _tyro()
    arguments = tyro.cli(
        tyro.conf.OmitArgPrefixes[tyro.conf.PositionalRequiredArgs[Simulate]],
        args=list(words),
        prog="commkit simulate",
    )
    if arguments.lab is not None:
        if arguments.plot is not None or arguments.json:
            raise ConfigError(
                f"--lab {arguments.lab}: it writes scenario.json and pictures there; leave --plot and --json out"
            )
        return _program("simulate --lab", [str(arguments.scenario), "--out", str(arguments.lab)])
    scenario = load_scenario(arguments.scenario)
    outcomes = run_scenario(scenario)
    if arguments.plot is not None:
        _draw(arguments.scenario.stem, outcomes, arguments.plot)
    if arguments.json:
        print(json.dumps([{**asdict(one), "goodput": one.goodput} for one in outcomes], indent=2))
        return 0
    header = ("scheme", "H", "hours", "step [s]", "sync [s]", "idle", "MB/step", "peak [Mbit/s]")
    rows = [
        (
            one.scheme,
            str(one.sync_every),
            f"{one.seconds / 3600:.3f}",
            f"{one.step_s:.4g}",
            f"{one.sync_s:.4g}",
            f"{one.idle_share:.1%}",
            f"{one.bytes_per_step / 1e6:.4g}",
            f"{one.peak_bytes_per_s * 8 / 1e6:.4g}",
        )
        for one in outcomes
    ]
    for line in aligned([header, *rows], rights=range(1, len(header))):
        print(line)
    return 0


def schemes(words: Sequence[str]) -> int:
    """Print every scheme."""
    arguments = _tyro().cli(Schemes, args=list(words), prog="commkit schemes")
    cards = scheme_cards()
    if arguments.json:
        print(json.dumps([asdict(card) for card in cards], indent=2))
        return 0
    for line in _table(cards):
        print(line)
    print(
        "\nMeasured with default knobs on a 1000 x 1000 float32 tensor and two ranks: payload is "
        "handed to\nthe network in one step, round or task, wire is what a rank sends for it, state is kept "
        "in between.\nSchemes with a coordinator: what a worker sends and keeps."
    )
    return 0


def doctor(words: Sequence[str]) -> int:
    """Print what is installed and what this machine can do."""
    arguments = _tyro().cli(Doctor, args=list(words), prog="commkit doctor")
    found = installation()
    found["netlab"] = _netlab()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, facts in found.items():
        print(title)
        for name, fact in facts.items():
            print(f"  {name:<20} {_word(fact)}")
    return 0


def _table(cards: Sequence[SchemeCard]) -> list[str]:
    header = ("name", "per", "payload/M", "wire/M", "state/elem", "works with", "what it is")
    rows = [header]
    for card in cards:
        paper = f" ({card.paper})" if card.paper else ""
        rows.append(
            (
                card.name,
                card.every,
                _number(card.payload_bytes, ",d"),
                _number(card.wire_bytes, ",d"),
                _number(card.state_bytes, ".2f"),
                ", ".join(card.wrappers),
                card.description.partition(": ``")[0] + paper,
            )
        )
    return aligned(rows, rights=(1, 2, 3))  # columns of numbers


def _draw(title: str, outcomes: Sequence[Outcome], path: Path) -> None:
    try:
        plots = importlib.import_module("commkit.cost.plot")
    except ModuleNotFoundError as error:
        raise MissingError(
            f"plots need {error.name}, which is not installed; pip install 'commkit[report]'"
        ) from error
    try:
        plots.draw(title, outcomes, path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--plot {path}: {error}; give a file such as out.png") from None


def _netlab() -> dict[str, Any]:
    """What the lab finds on this machine; a reason if there is no lab."""
    if not (_CHECKOUT / "launch" / "netlab").is_dir():
        return {"labs": "no launch/ directory: commkit is not installed from a source checkout"}
    sys.path.insert(0, str(_CHECKOUT))
    found = importlib.import_module("launch.netlab.capabilities").probe()
    return {
        "labs": found.problem or "can be built",
        "privilege": found.privilege,
        "bridge": found.bridge,
        "tbf": found.tbf,
        "netem": found.netem,
    }


def _tyro() -> Any:
    try:
        return importlib.import_module("tyro")
    except ModuleNotFoundError as error:
        raise MissingError(
            "the commkit command needs tyro, which is not installed; pip install 'commkit[report]'"
        ) from error


def _word(fact: Any) -> str:
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return "not installed" if fact is None else str(fact)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
