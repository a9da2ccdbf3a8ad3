"""Thousands of seeds: ``python -m commkit.sim.membership --count 10000``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from .judge import InvariantError
from .world import simulate


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the membership protocol under random faults.")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1000, help="how many seeds")
    parser.add_argument("--size", type=int, help="workers at the start (2 to 7, by the seed)")
    parser.add_argument("--keep-going", action="store_true", help="after a broken promise")
    args = parser.parse_args()
    start, broken = time.perf_counter(), 0
    faults: Counter[str] = Counter()
    stops = epochs = steps = 0
    for seed in range(args.first, args.first + args.count):
        try:
            outcome = simulate(seed, args.size)
        except InvariantError as error:
            print(error)
            broken += 1
            if not args.keep_going:
                return 1
            continue
        faults.update(outcome.faults)
        stops += bool(outcome.stop)
        epochs += outcome.epochs
        steps += outcome.steps
    seconds = time.perf_counter() - start
    print(f"{args.count} seeds in {seconds:.1f} s: {epochs} epochs, {steps} steps, {broken} broken")
    print(f"{stops} runs stopped early; faults: {dict(sorted(faults.items()))}")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
