"""Many seeds: ``python -m commkit.sim.coordination --count 1000``."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ..seeds import run_seeds
from .world import METHODS, Outcome, simulate


def _tally(outcome: Outcome) -> Mapping[str, int]:
    return {
        f"coordinator ended: {outcome.end}": 1,
        "steps": outcome.steps,
        "late results": outcome.late,
    }


if __name__ == "__main__":
    sys.exit(
        run_seeds(
            "Train with a coordinator under random faults.",
            lambda seed, args: simulate(seed, args.method),
            _tally,
            lambda parser: parser.add_argument("--method", choices=METHODS, help="by the seed"),
        )
    )
