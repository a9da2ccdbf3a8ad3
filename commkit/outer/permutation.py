"""Random choices that all ranks make alike without talking: a counter-based generator and its shuffles.

Nothing here depends on the version of Python, NumPy or torch, on the machine, or on what was drawn before:
a choice is a function of (seed, salts). Salts are the round, the stage, the name of the choice, ...
"""

from __future__ import annotations

_MASK = 2**64 - 1


def splitmix64(seed: int, counter: int) -> int:
    """Number ``counter`` (from 0) of the SplitMix64 sequence of ``seed``, in [0, 2^64) (Steele, Lea and
    Flood 2014). Integers beyond 64 bits, and negative ones, are taken modulo 2^64."""
    x = (seed + 0x9E3779B97F4A7C15 * (counter + 1)) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def salted(seed: int, *salts: int) -> int:
    """A seed of its own for every sequence of salts: each is the counter under the seed so far. The order
    of the salts counts, so that (round 1, stage 2) and (round 2, stage 1) differ."""
    for salt in salts:
        seed = splitmix64(seed, salt)
    return seed


def uniform(seed: int, *salts: int) -> float:
    """A number in [0, 1), a multiple of 2^-53."""
    return (salted(seed, *salts) >> 11) * 2.0**-53


def permutation(seed: int, *salts: int, n: int) -> list[int]:
    """The numbers 0 to ``n - 1`` in random order (Fisher and Yates), equal on every rank.

    Each draw is taken modulo the number of choices left, whose bias is below ``n / 2^64``.

    Raises:
        ValueError: a negative ``n``.
    """
    if n < 0:
        raise ValueError(f"n={n} must be >= 0; it is the number of ranks to put in order")
    key, order = salted(seed, *salts), list(range(n))
    for k in range(n - 1, 0, -1):
        j = splitmix64(key, k) % (k + 1)
        order[k], order[j] = order[j], order[k]
    return order
