"""Many seeds of a simulation, from the command line."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from .membership.judge import InvariantError


class Faulty(Protocol):
    """An outcome that knows how many faults of each kind there were."""

    @property
    def faults(self) -> Mapping[str, int]: ...


T = TypeVar("T", bound=Faulty)


def run_seeds(
    about: str,
    simulate: Callable[[int, argparse.Namespace], T],
    tally: Callable[[T], Mapping[str, int]],
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> int:
    """Simulate what the arguments say; 1 if a promise was broken.

    Args:
        about: for the help.
        simulate: one seed.
        tally: what to add up of an outcome besides its faults, by name.
        add_options: that ``simulate`` reads.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1000, help="how many seeds")
    parser.add_argument("--keep-going", action="store_true", help="after a broken promise")
    add_options(parser)
    args = parser.parse_args()
    start, broken = time.perf_counter(), 0
    total: Counter[str] = Counter()
    for seed in range(args.first, args.first + args.count):
        try:
            outcome = simulate(seed, args)
        except InvariantError as error:
            print(error, flush=True)
            broken += 1
            if not args.keep_going:
                return 1
        else:
            total.update({f"fault: {kind}": count for kind, count in outcome.faults.items()})
            total.update(tally(outcome))
    seconds = time.perf_counter() - start
    print(f"{args.count} seeds in {seconds:.1f} s, {broken} broken")
    print(", ".join(f"{name} {count}" for name, count in sorted(total.items())))
    return int(broken > 0)
