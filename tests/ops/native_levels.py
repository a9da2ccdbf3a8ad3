"""What the tests of compiled kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from commkit.ops import native
from commkit.ops.library import LEVELS

needs_native = pytest.mark.skipif(
    not native.served(), reason=f"compiled kernels: {native.status()['library']}"
)


def levels() -> list[str]:
    """The instruction sets of this processor."""
    found = []
    for level in LEVELS if native.served() else ():
        try:
            native.use_level(level)
        except ValueError:
            continue
        found.append(level)
    if found:
        native.use_level("")
    return found


@contextmanager
def running(level: str, threads: int = 1) -> Iterator[None]:
    """With this instruction set and so many threads."""
    before = torch.get_num_threads()
    native.use_level(level)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        native.use_level("")
