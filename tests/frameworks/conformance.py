"""Trains every scheme through every framework and says how far losses and weights are apart.

python -m tests.frameworks.conformance        prints the table
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist

from tests.harness import run_ranks

from .frameworks import FRAMEWORKS, NOT_SERVED
from .launcher import pretend_torchrun
from .setups import SAVE_AT, SETUPS, Outcome, Run


@dataclass(frozen=True)
class Cell:
    """One scheme through one framework, the largest over all ranks.

    Args:
        losses: largest difference from the plain loop's losses.
        weights: of the weights at the end.
        resumed: of losses and weights after the framework's checkpoint, from the same run uninterrupted.
        wire_bytes: of the step that sent most, on the first rank.
    """

    losses: float
    weights: float
    resumed: float
    wire_bytes: int


def pairs(frameworks: Iterable[str] = FRAMEWORKS) -> list[tuple[str, str]]:
    """(scheme, framework), scheme by scheme."""
    return [
        (scheme, framework)
        for scheme in SETUPS
        for framework in frameworks
        if (framework, scheme) not in NOT_SERVED
    ]


def _train_all(
    rank: int, world_size: int, cases: list[tuple[str, str]]
) -> list[tuple[Outcome, Outcome]]:
    pretend_torchrun(rank, world_size)
    outcomes = []
    for scheme, framework in cases:
        with tempfile.TemporaryDirectory() as own:
            shared = [own]
            dist.broadcast_object_list(shared, src=0)
            train, setup = FRAMEWORKS[framework], SETUPS[scheme]
            run = Run(rank, world_size, shared[0])
            whole = train(setup, run)
            dist.barrier()
            rest = train(setup, Run(rank, world_size, shared[0], resumed=True))
            dist.barrier()
            outcomes.append((whole, rest))
    return outcomes


@cache
def measured(frameworks: tuple[str, ...] = tuple(FRAMEWORKS)) -> dict[tuple[str, str], Cell]:
    """The table, the plain loop's rows among it; all of it in one set of processes, once."""
    cases = pairs(frameworks)
    of_ranks = run_ranks(_train_all, 2, cases, deadline_s=240.0)
    table: dict[tuple[str, str], Cell] = {}
    for at, (scheme, framework) in enumerate(cases):
        cells = []
        for outcomes in of_ranks:
            reference, _ = outcomes[cases.index((scheme, "plain"))]
            whole, rest = outcomes[at]
            tail = Outcome(whole.losses[SAVE_AT:], whole.weights)
            cells.append((*_apart(whole, reference), max(_apart(rest, tail)), whole.wire_bytes))
        losses, weights, resumed, _ = map(max, zip(*cells, strict=True))
        table[scheme, framework] = Cell(losses, weights, resumed, cells[0][3])
    return table


def _apart(a: Outcome, b: Outcome) -> tuple[float, float]:
    losses = (
        torch.tensor(a.losses, dtype=torch.float64),
        torch.tensor(b.losses, dtype=torch.float64),
    )
    if losses[0].shape != losses[1].shape:
        return float("inf"), float("inf")
    return (
        float((losses[0] - losses[1]).abs().max()),
        float((a.weights.double() - b.weights.double()).abs().max()),
    )


def main() -> None:
    asked = sys.argv[1:] or list(FRAMEWORKS)
    unknown = set(asked) - set(FRAMEWORKS)
    if unknown:
        raise SystemExit(f"unknown frameworks {sorted(unknown)}; known: {', '.join(FRAMEWORKS)}")
    table = measured(tuple(dict.fromkeys(["plain", *asked])))
    print(f"{'scheme':14}{'framework':14}{'losses':>12}{'weights':>12}{'resumed':>12}{'bytes':>10}")
    for (scheme, framework), cell in table.items():
        print(
            f"{scheme:14}{framework:14}{cell.losses:12.3g}{cell.weights:12.3g}{cell.resumed:12.3g}{cell.wire_bytes:10}"
        )


if __name__ == "__main__":
    main()
