"""What mkdocs builds besides the pages of this folder: one page per scheme, the API reference, and the navigation.

Everything is taken from docstrings, signatures and measurements, so that nothing can be out of date.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from commkit.inventory import SchemeCard, scheme_cards
from commkit.optim import OptimizerScheme
from commkit.outer import OuterScheme
from commkit.reducer import Reducer
from commkit.registry import lookup
from commkit.schemes import make_scheme

# Pages of the API reference: what __all__ of each package names.
PACKAGES = (
    *(
        "commkit",
        "commkit.schemes",
        "commkit.compressors",
        "commkit.feedback",
        "commkit.aggregators",
    ),
    *("commkit.optim", "commkit.outer", "commkit.sharded", "commkit.straggler"),
    *("commkit.metrics", "commkit.checkpoint"),
)
FAMILIES = {
    "step": "Every step",
    "round": "Every round",
    "task": "Servers and workers",
    "step of FSDP": "Sharded models",
    "": "In Python alone",
}
_DIFFERENCES = re.compile(
    r"^Differences from the paper: (.*?)(?:\n\n|\Z)", re.MULTILINE | re.DOTALL
)
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>~?([^<]*)</code>")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, of the pages that there are."""
    frameworks = sorted(p.relative_to(HERE).as_posix() for p in (HERE / "frameworks").glob("*.md"))
    guides = [p.name for p in sorted(HERE.glob("*.md")) if p.name != "index.md"]
    by_family: dict[str, list[str]] = {}
    for card in _cards():
        by_family.setdefault(FAMILIES[card.every], []).append(_place(card.name))
    config.nav = [
        "index.md",
        {"Schemes": ["schemes/index.md", *({name: by_family[name]} for name in by_family)]},
        {"Frameworks": frameworks},
        {"Guides": guides},
        {"API": [_api_place(package) for package in PACKAGES]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"schemes/index.md": overview()}
    pages |= {_place(card.name): scheme_page(card) for card in _cards()}
    pages |= {_api_place(package): api_page(package) for package in PACKAGES}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings are written for Sphinx's roles, which mean nothing here."""
    return _ROLE.sub(r"<code>\1</code>", html)


def overview() -> str:
    """The table of all schemes."""
    lines = ["# Schemes", "", _COSTS, ""]
    for every, family in FAMILIES.items():
        cards = [card for card in _cards() if card.every == every]
        lines += [f"## {family}", "", "| scheme | what it does | paper | bytes sent | bytes kept |"]
        lines += ["|---|---|---|---|---|"]
        for card in cards:
            sent, kept = _number(card.wire_bytes, 1e-6), _number(card.state_bytes, 1)
            what = _cell(card.description)
            lines.append(
                f"| [`{card.name}`]({card.name}.md) | {what} | {card.paper} | {sent} | {kept} |"
            )
        lines.append("")
    return "\n".join(lines)


def scheme_page(card: SchemeCard) -> str:
    """What it is, when to take it, its knobs and how to tune them, what it costs, in what it is not what its paper says,
    what it is made of."""
    factory = lookup("scheme", card.name)
    text, described = _docstring(factory)
    lines = [f"# {card.name}", "", text, ""]
    apart = ["## Differences from the paper", "", differences(factory), ""]
    if not card.every:  # a name that says where else to look
        return "\n".join(lines + apart)
    lines += ["## In use", "", *_usage(card), ""]
    lines += ["## Knobs", "", *_knobs(factory, described), ""]
    lines += ["## Costs", "", _COSTS, "", *_costs(card), "", *apart]
    parts = list(_parts(card.name))
    if parts:
        lines += ["## Made of", "", "How each of them works is on its own page.", ""]
        lines += [f"- {part}" for part in parts] + [""]
    return "\n".join(lines)


_COSTS = (
    "Measured when this page was built, with two ranks and a million float32 parameters in matrices: bytes per parameter, "
    "where a plain all-reduce sends 4 in every step."
)


def _costs(card: SchemeCard) -> list[str]:
    return [
        f"| | per {card.every} |",
        "|---|---|",
        f"| bytes per parameter handed to collectives | {_number(card.payload_bytes, 1e-6)} |",
        f"| bytes per parameter sent by a rank | {_number(card.wire_bytes, 1e-6)} |",
        f"| collectives | {'-' if card.rounds is None else card.rounds} |",
        f"| bytes per parameter kept between steps | {_number(card.state_bytes, 1)} |",
        f"| works with | {', '.join(card.wrappers)} |",
    ]


def _usage(card: SchemeCard) -> list[str]:
    block = [f"scheme: {{name: {card.name}}}"]
    recipe = HERE.parent / "configs" / f"{card.name}.yaml"
    where = "In a recipe for `launch/train.py`, or as a YAML file for `commkit.attach`:"
    if recipe.is_file():
        block, where = recipe.read_text().rstrip().split("\n"), f"`configs/{recipe.name}`:"
    return [where, "", "```yaml", *block, "```"]


def _knobs(factory: Any, described: dict[str, str]) -> list[str]:
    parameters = inspect.signature(factory).parameters.values()
    if not parameters:
        return ["None."]
    lines = ["| name | default | meaning, and how to tune it |", "|---|---|---|"]
    for p in parameters:
        default = "*needed*" if p.default is p.empty else f"`{_short(p.default)}`"
        lines.append(f"| `{p.name}` | {default} | {_cell(described.get(p.name, ''))} |")
    if "" in described:
        lines += ["", _cell(described[""])]
    return lines


def differences(documented: Any) -> str:
    """In what it is not what its paper says, as its docstring has it, or that of a class which it builds; "" if neither
    says anything."""
    text = inspect.getdoc(documented) or ""
    found = _DIFFERENCES.search(text)
    if found is None:
        inner = (differences(_resolve(path)) for path in _classes(text))
        return next(filter(None, inner), "")
    told = _prose(found[1])
    return told[0].upper() + told[1:]


def _docstring(documented: Any) -> tuple[str, dict[str, str]]:
    """The text of a docstring before its sections, and what is said of each argument; under "" what is said of all.

    An argument's meaning is where the docstring says it: in its own lines, as "``x`` is ..." after "Args: those of" a
    class, at that class, at the scheme of "as for ``x``", or at a class that the text names.
    """
    text = inspect.getdoc(documented) or ""
    prose = re.split(r"^(?:Args|Raises|Attributes|Returns):", text, maxsplit=1, flags=re.MULTILINE)[
        0
    ]
    section = text.partition("Args:")[2]
    stated = ""
    if section and not section.startswith("\n"):
        stated = " ".join(section.split("\n\n")[0].split())
    found: dict[str, str] = {}
    for path in _classes(prose) + _classes(stated):
        found |= _docstring(_resolve(path))[1]
    for scheme in re.findall(r"as for ``(\w+)``", stated):
        found |= {
            k: v for k, v in _docstring(lookup("scheme", scheme))[1].items() if k not in found
        }
    for names, meaning in re.findall(r"((?:``\w+``(?:, | and )?)+) (?:is|are|has) ([^;]*)", stated):
        for name in re.findall(r"``(\w+)``", names):
            if name not in found or not meaning.startswith("its "):  # which says where it is found
                found[name] = meaning.split(". ")[0]
    found.pop("", None)
    if stated:
        found[""] = f"They are {stated}"
    return _prose(_DIFFERENCES.sub("", prose)), found | _arguments(section)


def _classes(text: str) -> list[str]:
    return re.findall(r":class:`~?(commkit\.[\w.]+)`", text)


def _arguments(text: str) -> dict[str, str]:
    """By name, of the indented lines after ``Args:``."""
    found: dict[str, str] = {}
    name = ""
    for line in text.split("\n")[1:]:
        if line and not line.startswith(" "):
            break
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name:
            found[name] += " " + line.strip()
    return found


def _prose(text: str) -> str:
    return re.sub(r":(?:class|func|meth|mod|data):`~?([^`]*)`", r"`\1`", text.strip()).replace(
        "``", "`"
    )


def _cell(text: str) -> str:
    return " ".join(_prose(text).split()).replace("|", "\\|")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.3g}"


def _parts(name: str) -> Iterator[str]:
    """Links to the classes that the scheme is made of, with default knobs."""
    try:
        made = make_scheme(name)
    except Exception:  # it has to be told its parts, or only says where else to look
        return
    if isinstance(made, Reducer):
        for label, part in (("aggregator", made.aggregator), ("feedback", made.feedback)):
            yield f"{label}: {_link(type(part))}"
            inner = getattr(part, "compressor", None)
            if inner is not None:
                yield f"compressor: {_link(type(inner))}"
    elif isinstance(made, OuterScheme):
        yield f"method: {_link(made.method)}"
    elif isinstance(made, OptimizerScheme):
        yield f"optimizer: {_link(made.optimizer)}"


def _link(part: type) -> str:
    path = f"{part.__module__}.{part.__qualname__}"
    return f"[`{part.__name__}`][{path}]" if path in _documented() else f"`{path}`"


def api_page(package: str) -> str:
    """Everything that the package exports, wherever it is written."""
    module = importlib.import_module(package)
    summary = _prose((inspect.getdoc(module) or "").split("\n\n")[0])
    blocks = [_block(path) for path in _exports(package) if _home(path) == package]
    elsewhere = [path for path in _exports(package) if _home(path) != package]
    listed = [f"- [`{path}`][{path}]" for path in elsewhere]
    return "\n\n".join([f"# {package}", summary, *blocks, "\n".join(listed)]) + "\n"


def _block(path: str) -> str:
    """One class or function; with what it inherits from classes that have no entry of their own."""
    inherited = _inherited(_resolve(path))
    if not inherited:
        return f"::: {path}"
    return f"::: {path}\n    options:\n      inherited_members: [{', '.join(inherited)}]"


def _inherited(documented: Any) -> list[str]:
    """Public members that ``documented`` has of commkit's classes, and that no other entry shows."""
    bases = documented.__mro__[1:] if inspect.isclass(documented) else ()
    shown = {each for base in bases if _path_of(base) in _documented() for each in base.__mro__}
    silent = [b for b in bases if b not in shown and b.__module__.startswith("commkit")]
    names = dict.fromkeys(name for base in silent for name in vars(base))
    return [n for n in names if not n.startswith("_") and n not in vars(documented)]


def _path_of(x: Any) -> str:
    return f"{x.__module__}.{x.__qualname__}"


@cache
def _documented() -> frozenset[str]:
    return frozenset(path for package in PACKAGES for path in _exports(package))


@cache
def _home(path: str) -> str:
    """The most specific package that exports it; there it is documented."""
    exporting = [package for package in PACKAGES if path in _exports(package)]
    return max(exporting, key=lambda package: (path.startswith(package), len(package)))


@cache
def _exports(package: str) -> tuple[str, ...]:
    """Full paths of the classes and functions that a package exports."""
    module = importlib.import_module(package)
    own = [n for n, x in vars(module).items() if getattr(x, "__module__", "") == package]
    names = getattr(module, "__all__", None) or [n for n in own if not n.startswith("_")]
    objects = (getattr(module, name) for name in names)
    found = (
        _path_of(x)
        for x in objects
        if (inspect.isclass(x) or inspect.isfunction(x)) and x.__module__.startswith("commkit")
    )
    return tuple(dict.fromkeys(found))


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@cache
def _cards() -> tuple[SchemeCard, ...]:
    return tuple(scheme_cards())


def _place(name: str) -> str:
    return f"schemes/{name}.md"


def _api_place(package: str) -> str:
    return f"api/{package}.md"
