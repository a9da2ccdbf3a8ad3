"""A model as communication sees it: sums over the shapes of its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SMALLEST = 100_000  # parameters; below, a transformer's proportions mean nothing


@dataclass(frozen=True)
class Shapes:
    """
    Args:
        matrix_numel: elements of parameters with two dimensions or more.
        sides: sum over those of rows and columns (all but the first dimension).
        matrices: how many.
        vector_numel: elements of the others.
    """

    matrix_numel: int
    sides: int
    matrices: int
    vector_numel: int

    @property
    def numel(self) -> int:
        return self.matrix_numel + self.vector_numel

    @property
    def features(self) -> tuple[float, ...]:
        """What sizes of messages are linear in."""
        return (self.matrix_numel, self.sides, self.matrices, self.vector_numel, 1.0)

    def shard(self, ranks: int) -> Shapes:
        """Of each rank's part, rows cut among ``ranks``."""
        rows_and_columns = self.sides
        return Shapes(
            self.matrix_numel // ranks, rows_and_columns, self.matrices, self.vector_numel // ranks
        )


def shapes_of(shapes: Iterable[Sequence[int]]) -> Shapes:
    """Of a model's parameters."""
    matrix_numel = sides = matrices = vector_numel = 0
    for shape in shapes:
        numel = 1
        for length in shape:
            numel *= length
        if len(shape) < 2:
            vector_numel += numel
        elif numel:
            matrix_numel += numel
            sides += shape[0] + numel // shape[0]
            matrices += 1
    return Shapes(matrix_numel, sides, matrices, vector_numel)


def transformer(parameters: int) -> Shapes:
    """A decoder of about so many parameters in the usual proportions: ``width = 128 layers``, attention of 4 and an
    MLP of 8 squares of the width in four matrices, two norms.

    Raises:
        ValueError: fewer than 100 000 parameters.
    """
    if parameters < _SMALLEST:
        raise ValueError(
            f"model_size={parameters} must be >= {_SMALLEST}; give a probe of the model itself for a smaller one"
        )
    depth = (parameters / (12 * 128**2)) ** (1 / 3)
    layers = max(1, round(depth))
    width = round((parameters / (12 * layers)) ** 0.5)
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return shapes_of([*block, (width,), (width,)] * layers)
