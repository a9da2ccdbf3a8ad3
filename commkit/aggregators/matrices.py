"""The tensors of one low-rank reduction: groups of equal matrices and the rest, and their buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..types import TensorCtx

Factors = tuple[int, int, int]
"""(rows, columns, rank) of a factorisation."""


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices of one shape in a reduction; ``members`` are their places in it. ``odd`` is the parity of
    their step."""

    rows: int
    columns: int
    rank: int
    odd: bool
    members: list[int] = field(default_factory=list)

    @property
    def p_shape(self) -> tuple[int, int, int]:
        return len(self.members), self.rows, self.rank

    @property
    def q_shape(self) -> tuple[int, int, int]:
        return len(self.members), self.rank, self.columns


class Batch:
    """Tensors of one dtype: matrices to factorise, in groups, and those that are averaged densely.

    Args:
        xs: the tensors, not modified.
        ctxs: their contexts.
        factors: how a tensor is factorised; None: it goes densely.
    """

    def __init__(
        self,
        xs: Sequence[Tensor],
        ctxs: Sequence[TensorCtx],
        factors: Callable[[TensorCtx], Factors | None],
    ) -> None:
        self.xs, self.ctxs = xs, ctxs
        self.dense: list[int] = []
        groups: dict[tuple[Factors, bool], Group] = {}
        for i, ctx in enumerate(ctxs):
            of_tensor = factors(ctx)
            if of_tensor is None:
                self.dense.append(i)
            else:
                odd = bool(ctx.step % 2)
                groups.setdefault((of_tensor, odd), Group(*of_tensor, odd)).members.append(i)
        self.groups = list(groups.values())

    def deltas(self, group: Group) -> list[Tensor]:
        """The group's tensors as matrices."""
        return [self.xs[i].reshape(group.rows, group.columns) for i in group.members]

    def buffer_with_dense(
        self, shapes: Sequence[tuple[int, int, int]]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One flat buffer; in it copies of the dense tensors (views in their shapes) and then
        uninitialised room for ``shapes``."""
        dense = [self.xs[i] for i in self.dense]
        numels = [x.numel() for x in dense]
        buffer = self.xs[0].new_empty(sum(numels) + sum(map(math.prod, shapes)))
        *flats, rest = buffer.split_with_sizes([*numels, buffer.numel() - sum(numels)])
        copies = [flat.view(x.shape).copy_(x) for flat, x in zip(flats, dense, strict=True)]
        return buffer, copies, views(rest, shapes)


def views(buffer: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """``buffer`` cut into tensors of ``shapes``, which fill it."""
    parts = buffer.split_with_sizes([math.prod(shape) for shape in shapes]) if shapes else []
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def tail(buffer: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The end of ``buffer`` that ``parts`` are views of."""
    return buffer[buffer.numel() - sum(part.numel() for part in parts) :]


def refuse_rank(rank: int, ctxs: Sequence[TensorCtx], example: int | None = None) -> None:
    """
    Args:
        example: a rank to advise; a quarter of the largest usable one if not given.

    Raises:
        ValueError: ``rank`` is one that no matrix among ``ctxs`` has.
    """
    sides = [min(c.shape[0], c.numel // c.shape[0]) for c in ctxs if len(c.shape) > 1 and c.numel]
    largest = max(sides, default=rank)
    if rank > largest:
        raise ValueError(
            f"rank={rank} is above the number of rows or columns of every matrix in the model; the largest usable "
            f"rank is {largest}, and one that compresses is far lower: use for example "
            f"rank={example or max(1, largest // 4)}"
        )
