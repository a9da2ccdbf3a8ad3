"""Who meets whom in a round, when every rank meets at most one other.

A pairing is a list of partners: ``partners[i]`` is the rank that ``i`` meets, or ``i`` itself, who then
sits the round out. It is symmetric: ``partners[partners[i]] == i``.
"""

from __future__ import annotations

from collections.abc import Sequence

from .permutation import permutation


def random_groups(n: int, size: int, seed: int, *salts: int) -> list[list[int]]:
    """``n`` ranks in random groups of ``size``; those left over are a smaller group. Every rank is in
    exactly one, and its members are in the order that every rank of the group agrees on.

    Raises:
        ValueError: ``size`` below 1.
    """
    if size < 1:
        raise ValueError(f"group size {size} must be >= 1; use 2 for pairs")
    order, count = permutation(seed, *salts, n=n), n // size
    groups = [order[k : count * size : count] for k in range(count)]
    return groups + ([order[count * size :]] if n % size else [])


def random_pairs(n: int, seed: int, *salts: int) -> list[int]:
    """Partners of a random pairing (NoLoCo's); an odd rank sits out."""
    return partners_of(random_groups(n, 2, seed, *salts), n)


def round_robin(n: int, round: int) -> list[int]:
    """Partners of a tournament by the circle method: every pair meets exactly once in ``n - 1`` rounds
    (``n`` rounds if ``n`` is odd, in each of which one rank sits out), and then again."""
    if n < 2:
        return list(range(n))
    last = n - 1 if n % 2 == 0 else n  # of an odd number, nobody: who meets it sits out
    q = round % last
    pairs = [(last, q)] + [((q + k) % last, (q - k) % last) for k in range(1, (last + 1) // 2)]
    return partners_of([pair for pair in pairs if max(pair) < n], n)


def hypercube(n: int, round: int) -> list[int]:
    """Partners along dimension ``round mod log2(n)``: those whose numbers differ in that bit.

    Raises:
        ValueError: ``n`` is not a power of two.
    """
    require_power_of_two(n, "hypercube")
    dimensions = n.bit_length() - 1
    return [i ^ (1 << round % dimensions) for i in range(n)] if dimensions else [0]


def require_power_of_two(n: int, what: str) -> None:
    if n < 1 or n & (n - 1):
        raise ValueError(
            f"{what} over {n} ranks: their number must be a power of two; use round_robin or "
            "random_pairs, which take any number"
        )


def partners_of(groups: Sequence[Sequence[int]], n: int) -> list[int]:
    """The partners of groups of one or two; ranks in no group sit out."""
    partners = list(range(n))
    for group in groups:
        if len(group) == 2:
            a, b = group
            partners[a], partners[b] = b, a
    return partners
