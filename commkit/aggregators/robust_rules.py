"""Averages that a few ranks cannot drag away, whatever they send: pure functions of all ranks' vectors.

A vector is a rank's whole model, handed over tensor by tensor as stacks of shape (n, ...), row i from rank
i; distances are of the whole vectors. :func:`decide` looks at everything once and says who is in; its
:class:`Verdict` then combines each stack on its own, so that one tensor of all ranks is in memory at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..types import NonFiniteError

Rule: TypeAlias = Literal[
    "mean", "median", "trimmed_mean", "krum", "multi_krum", "norm_clip", "nearest"
]
Stack: TypeAlias = Callable[[], Tensor]
"""Gives one tensor of all ranks, (n, ...), afresh at each call."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What :func:`decide` found.

    Args:
        rule: by which.
        members: the ranks whose vectors are in the result, in order.
        trim: of "trimmed_mean": how many of the largest and of the smallest values are dropped.
        scales: of "norm_clip": by how much each member's difference to the median is shortened.
    """

    rule: Rule
    members: tuple[int, ...]
    trim: int = 0
    scales: tuple[float, ...] = ()

    def combine(self, stack: Tensor) -> Tensor:
        """(n, ...) -> (...), in the stack's dtype. Sums are taken in rank order."""
        if self.rule == "median":
            return _median(stack[list(self.members)])
        if self.trim:
            ordered = stack[list(self.members)].sort(0).values[self.trim : -self.trim]
            return _mean(ordered.unbind())
        if min(self.scales, default=1.0) < 1:
            centre = _median(stack[list(self.members)])
            return _mean(
                [
                    _pulled(stack[i], centre, scale)
                    for i, scale in zip(self.members, self.scales, strict=True)
                ]
            )
        return _mean([stack[i] for i in self.members])


def decide(
    stacks: Sequence[Stack],
    rule: Rule,
    num_faulty: int,
    own: int = 0,
    suspects: Collection[int] = (),
) -> Verdict:
    """Judge the vectors of all ranks.

    A vector with an inf or NaN, or one of ``suspects``, is at distance infinity: it is never in the result,
    and counts as one of the ``num_faulty``. Ties go to the lower rank. With ``num_faulty = 0`` every rule but
    the median and Krum is the mean, bit for bit.

    - ``mean``: of all; nothing may be faulty.
    - ``median``: the middle of each element's values (the mean of the two in the middle).
    - ``trimmed_mean``: the mean of each element's values without the f largest and the f smallest (Yin et al.
      2018).
    - ``krum``: the one vector with the smallest sum of squared distances to its n - f - 2 nearest
      (Blanchard et al. 2017); ``multi_krum``: the mean of the n - f with the smallest sums.
    - ``norm_clip``: the mean after every vector farther from the median than the (n - f)-th is pulled
      in to that distance (centred clipping, Karimireddy et al. 2021, with the radius set by the honest).
    - ``nearest``: the mean of the vectors nearest to ``own``, itself included, all but f of those given (MoNNA,
      Farhadkhani et al. 2023; of the n - f that arrived first these are n - 2f). Results differ between
      ranks. A rank whose own vector is not finite compares with the median.

    Args:
        stacks: all tensors.
        rule: see above.
        num_faulty: f, up to how many rows may be anything.
        own: this rank's row; of "nearest" alone.
        suspects: rows that are known to be bad.

    Raises:
        ValueError: f is too large for the rule and the rows (see :func:`check_num_faulty`, which is stricter
            for "nearest", for it knows how many ranks there are).
        NonFiniteError: more than f rows are not finite.
    """
    n = stacks[0]().shape[0] if stacks else 0
    _require_room(rule, n, num_faulty)
    members = _finite_rows(stacks, n, suspects)
    spared = n - len(members)
    if spared > num_faulty:
        raise NonFiniteError(
            f"{spared} of {n} ranks hold inf or NaN but num_faulty={num_faulty} may be faulty"
        )
    left = num_faulty - spared
    if rule == "trimmed_mean":
        return Verdict(rule, members, trim=left)
    if rule == "norm_clip":
        return Verdict(rule, members, scales=_scales(_from_median(stacks, members), left))
    if rule in ("krum", "multi_krum"):
        keep = 1 if rule == "krum" else len(members) - left
        scores = _krum_scores(_pairwise(stacks, members), left)
        return Verdict(rule, _smallest(scores, members, keep))
    if rule == "nearest" and left:
        if own in members:
            order = [own, *(i for i in members if i != own)]  # it wins ties, which are its copies
            distances = _from_own(stacks, order)
        else:
            order, distances = list(members), _from_median(stacks, members)
        return Verdict(rule, _smallest(distances, order, len(members) - left))
    return Verdict(rule, members)


def robust_mean(stack: Tensor, rule: Rule, num_faulty: int, own: int = 0) -> Tensor:
    """:func:`decide` and combine vectors that are one tensor: (n, ...) -> (...)."""
    return decide([lambda: stack], rule, num_faulty, own).combine(stack)


def check_num_faulty(rule: Rule, world_size: int, num_faulty: int) -> None:
    """Refuse more faulty ranks than the rule can stand; warn where MoNNA's analysis no longer covers them.

    Raises:
        ValueError: n < 2f + 1 (so f >= n/2), for Krum n < 2f + 3, for "nearest" n < 3f + 1; the mean stands none.
    """
    _require_room(rule, world_size, num_faulty)
    if rule == "nearest" and world_size < 3 * num_faulty + 1:
        raise ValueError(_refusal(rule, world_size, num_faulty, "3f + 1", (world_size - 1) // 3))
    if rule == "nearest" and world_size < 5 * num_faulty + 1:
        warnings.warn(
            f"rule=nearest with num_faulty={num_faulty} of {world_size} ranks: below 5f + 1 ranks an attacker who "
            f"knows the others' vectors can slow training down; use num_faulty={(world_size - 1) // 5} or less, or "
            "more ranks",
            stacklevel=2,
        )


def _require_room(rule: Rule, n: int, f: int) -> None:
    if f < 0:
        raise ValueError(f"num_faulty={f} must be >= 0")
    if rule == "mean" and f:
        raise ValueError(
            f"rule=mean with num_faulty={f}: one faulty rank can move the mean anywhere; use another rule, "
            "for example trimmed_mean"
        )
    if rule in ("krum", "multi_krum") and n < 2 * f + 3:
        raise ValueError(_refusal(rule, n, f, "2f + 3", (n - 3) // 2))
    if n < 2 * f + 1:
        raise ValueError(_refusal(rule, n, f, "2f + 1", (n - 1) // 2))


def _refusal(rule: Rule, n: int, f: int, bound: str, most: int) -> str:
    remedy = f"num_faulty={most} or less, or more ranks" if most >= 0 else "more ranks"
    return f"rule={rule} with num_faulty={f} needs at least {bound} ranks but there are {n}; use {remedy}"


def _finite_rows(stacks: Sequence[Stack], n: int, suspects: Collection[int]) -> tuple[int, ...]:
    finite = torch.ones(n, dtype=torch.bool, device=stacks[0]().device)
    for stack in stacks:
        rows = stack()
        finite &= rows.reshape(n, rows.numel() // n).isfinite().all(1)
    return tuple(i for i, ok in enumerate(finite.tolist()) if ok and i not in suspects)


def _mean(rows: Sequence[Tensor]) -> Tensor:
    # Shares are divided first: the sum may not exist where the mean does.
    total = rows[0] / len(rows)
    for row in rows[1:]:
        total += row / len(rows)
    return total


def _pulled(row: Tensor, centre: Tensor, scale: float) -> Tensor:
    """``centre`` plus ``scale`` of the way to ``row``."""
    if scale == 1:
        return row
    # 0 is of a distance that float64 cannot hold; the difference may not be finite then.
    return centre + (row - centre) * scale if scale else centre


def _median(rows: Tensor) -> Tensor:
    ordered, n = rows.sort(0).values, len(rows)
    return ordered[n // 2] if n % 2 else ordered[n // 2 - 1] / 2 + ordered[n // 2] / 2


def _squared(difference: Tensor) -> Tensor:
    """Squared 2-norm in float64, where 1e30 has a square."""
    norm: Tensor = torch.linalg.vector_norm(difference, dtype=torch.float64)
    return norm.square()


def _total(squares: Sequence[Sequence[Tensor]]) -> list[float]:
    """Sums over the tensors of one number per row; one host synchronisation."""
    sums: list[float] = torch.stack([torch.stack(list(row)) for row in squares]).sum(0).tolist()
    return sums


def _from_median(stacks: Sequence[Stack], members: Sequence[int]) -> list[float]:
    """Each member's squared distance from the median of all members."""
    squares = []
    for stack in stacks:
        rows = stack()[list(members)]
        centre = _median(rows)
        squares.append([_squared(row - centre) for row in rows])
    return _total(squares)


def _from_own(stacks: Sequence[Stack], order: Sequence[int]) -> list[float]:
    """Squared distances from the vector of the first."""
    squares = []
    for stack in stacks:
        x = stack()
        squares.append([_squared(x[i] - x[order[0]]) for i in order])
    return _total(squares)


def _pairwise(stacks: Sequence[Stack], members: Sequence[int]) -> list[list[float]]:
    """The members' squared distances from each other, from differences: of vectors of size 1e30 a product
    would leave nothing of the honest."""
    n = len(members)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    squares = []
    for stack in stacks:
        x = stack()
        squares.append([_squared(x[members[i]] - x[members[j]]) for i, j in pairs])
    table = [[0.0] * n for _ in range(n)]
    for (i, j), square in zip(pairs, _total(squares), strict=True):
        table[i][j] = table[j][i] = square
    return table


def _krum_scores(table: Sequence[Sequence[float]], left: int) -> list[float]:
    n = len(table)
    others = [sorted(row[:i] + row[i + 1 :]) for i, row in enumerate(map(list, table))]
    return [sum(nearest[: n - left - 2]) for nearest in others]


def _smallest(values: Sequence[float], members: Sequence[int], keep: int) -> tuple[int, ...]:
    """The members with the ``keep`` smallest values, in rank order; of equals the one that comes first."""
    order = sorted(range(len(members)), key=lambda i: values[i])
    return tuple(sorted(members[i] for i in order[:keep]))


def _scales(squares: Sequence[float], left: int) -> tuple[float, ...]:
    """What brings each distance down to the ``left + 1``-th largest."""
    distances = [square**0.5 for square in squares]
    radius = sorted(distances)[len(distances) - left - 1]
    return tuple(1.0 if d <= radius else radius / d for d in distances)
