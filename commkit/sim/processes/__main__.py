"""Many seeds: ``python -m commkit.sim.processes --count 1000``."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ..seeds import run_seeds
from .world import METHODS, Outcome, simulate


def _tally(outcome: Outcome) -> Mapping[str, int]:
    ends = {f"workers ended: {end}": count for end, count in outcome.ends.items()}
    return ends | {"epochs": outcome.epochs, "rounds": outcome.rounds}


if __name__ == "__main__":
    sys.exit(
        run_seeds(
            "Run local updates under random faults.",
            lambda seed, args: simulate(seed, args.method),
            _tally,
            lambda parser: parser.add_argument("--method", choices=METHODS, help="by the seed"),
        )
    )
