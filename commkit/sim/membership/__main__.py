"""Thousands of seeds: ``python -m commkit.sim.membership --count 10000``."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ..seeds import run_seeds
from .world import Outcome, simulate


def _tally(outcome: Outcome) -> Mapping[str, int]:
    stopped = int(bool(outcome.stop))
    return {"epochs": outcome.epochs, "steps": outcome.steps, "stopped early": stopped}


if __name__ == "__main__":
    sys.exit(
        run_seeds(
            "Run the membership protocol under random faults.",
            lambda seed, args: simulate(seed, args.size),
            _tally,
            lambda parser: parser.add_argument(
                "--size", type=int, help="workers at the start (2 to 7, by the seed)"
            ),
        )
    )
