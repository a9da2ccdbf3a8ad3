"""When transfers of one size end that share a link."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def transferred(starts: Array, each_s: float) -> Array:
    """When transfers end that begin at ``starts`` and take ``each_s`` alone, on one link. TCP gives those that are under way
    parts of it that are neither equal nor all to the first: halfway between the two."""
    return (shared_link(starts, each_s) + queued(starts, each_s)) / 2


def queued(starts: Array, each_s: float) -> Array:
    """The same, one after another: nothing can end sooner, as many as have ended before it."""
    ends, end = np.empty_like(starts), 0.0
    for index in np.argsort(starts, kind="stable").tolist():
        end = ends[index] = max(end, float(starts[index])) + each_s
    return ends


def shared_link(starts: Array, each_s: float) -> Array:
    """The same, all that are under way having equal parts of the link. They end in the order in which they begin."""
    ends = np.empty_like(starts)
    under_way: deque[tuple[float, int]] = deque()  # what each has to get of the link in all
    now = got = 0.0  # by a transfer that was there from the start

    def end_those_before(time: float) -> None:
        nonlocal now, got
        while under_way:
            end = now + (under_way[0][0] - got) * len(under_way)
            if end > time:
                return
            now = end
            got, index = under_way.popleft()
            ends[index] = end

    for index in np.argsort(starts, kind="stable").tolist():
        start = float(starts[index])
        end_those_before(start)
        if under_way:
            got += (start - now) / len(under_way)
        now = start
        under_way.append((got + each_s, index))
    end_those_before(math.inf)
    return ends
