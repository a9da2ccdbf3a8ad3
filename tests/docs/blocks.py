"""The code blocks of a page, and what comments above them say.

``<!-- given: NAME -->``: what it is run in, of :mod:`tests.docs.surroundings`. ``<!-- shortened: A to B, C to D -->``:
replacements before it is run. ``<!-- then: STATEMENT -->``: what is run after it, so that something is trained. ``<!-- saved
as: NAME -->``: a file that other blocks of the page read; programs in it are run by those alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NOTES = ("given", "shortened", "then", "saved as")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        place: file and line, to find it.
        language: after the fence.
        text: inside.
        notes: by their name.
    """

    place: str
    language: str
    text: str
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def program(self) -> str:
        """What is run of a block, or of a diff: the text after the change."""
        lines = self.text.split("\n")
        if self.language == "diff":
            lines = [line[1:] for line in lines if not line.startswith("-")]
        text = "\n".join(lines)
        for change in filter(None, self.notes.get("shortened", "").split(", ")):
            before, after = change.split(" to ")
            if text.count(before) != 1:
                raise ValueError(f"{self.place}: {before!r} is there {text.count(before)} times")
            text = text.replace(before, after)
        return f"{text}\n{self.notes['then']}" if "then" in self.notes else text


def blocks(page: Path) -> list[Block]:
    """All of a page, in order.

    Raises:
        ValueError: a comment above a block that is none of ``NOTES``, or a fence that is not closed.
    """
    found, notes, lines = [], {}, page.read_text(encoding="utf-8").split("\n")
    at = 0
    while at < len(lines):
        comment = re.fullmatch(r"<!-- ([a-z ]+): (.*) -->", lines[at])
        fence = re.fullmatch(r"( *)```(\w*)", lines[at])
        place = f"{page.relative_to(ROOT)}:{at + 1}"
        if comment:
            if comment[1] not in NOTES:
                raise ValueError(f"{place}: {comment[1]!r} must be one of {', '.join(NOTES)}")
            notes[comment[1]] = comment[2]
        elif fence:
            end = lines.index(fence[1] + "```", at + 1)
            inside = [line.removeprefix(fence[1]) for line in lines[at + 1 : end]]
            found.append(Block(place, fence[2], "\n".join(inside), notes))
            at, notes = end, {}
        elif lines[at].strip():
            notes = {}
        at += 1
    return found
