"""Which cores a node runs on: hosts do not share theirs, so neither do nodes where there are enough."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def cores_of(node: int, nodes: int, cores: set[int]) -> set[int]:
    """The share of one of ``nodes`` in ``cores``: equal parts, of which each core belongs to one, or, with fewer
    cores than nodes, one core that other nodes have too. Nodes then are equally fast, and none takes what another has."""
    ordered = sorted(cores)
    if len(ordered) < nodes:
        return {ordered[node % len(ordered)]}
    return set(ordered[node::nodes])


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What this thread starts inside runs on ``cores`` alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
