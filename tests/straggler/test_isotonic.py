"""Monotone least squares, against its optimality conditions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from commkit.straggler.isotonic import isotonic, monotone_table

VALUES = st.floats(-100, 100)
WEIGHTS = st.floats(0.1, 10)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(VALUES, WEIGHTS), min_size=1, max_size=12))
def test_pooling_is_the_projection(pairs: list[tuple[float, float]]) -> None:
    x, w = map(np.array, zip(*pairs, strict=True))
    y = isotonic(x, w)
    assert (np.diff(y) >= -1e-9).all()
    assert (w * y).sum() == pytest.approx((w * x).sum(), abs=1e-6)  # the mean is kept
    assert (w * y * (x - y)).sum() == pytest.approx(
        0, abs=1e-5
    )  # and y is the foot of a perpendicular
    # No monotone direction leads nearer: those are spanned by the steps up.
    tails = np.cumsum((w * (x - y))[::-1])[::-1]
    assert (tails <= 1e-6).all()
    np.testing.assert_allclose(isotonic(y, w), y, atol=1e-9)
    np.testing.assert_allclose(isotonic(x + 3, w), y + 3, atol=1e-9)


def test_pooling_of_a_known_sequence() -> None:
    y = isotonic(np.array([1.0, 3.0, 2.0, 4.0, 0.0]), np.array([1.0, 1.0, 1.0, 1.0, 2.0]))
    np.testing.assert_allclose(y, [1, 9 / 5, 9 / 5, 9 / 5, 9 / 5])


TABLES = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        arrays(np.float64, shape, elements=VALUES), arrays(np.float64, shape, elements=WEIGHTS)
    )
)


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_tables_become_monotone_and_nearest(table: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = table
    y = monotone_table(x, w, sweeps=3000, tolerance=1e-12)
    assert (np.diff(y, axis=1) >= -1e-5).all()
    assert (np.diff(y, axis=0) <= 1e-5).all()
    assert (w * (x - y)).sum() == pytest.approx(0, abs=1e-2)
    assert (w * y * (x - y)).sum() == pytest.approx(0, abs=1)
    # Nearer than other monotone tables: a constant one, and rows then columns without corrections.
    distance = (w * (x - y) ** 2).sum()
    constant = (w * x).sum() / w.sum()
    assert distance <= (w * (x - constant) ** 2).sum() + 1e-3
    rows = np.stack([isotonic(*pair) for pair in zip(x, w, strict=True)])
    naive = -np.stack([isotonic(*pair) for pair in zip(-rows.T, w.T, strict=True)]).T
    if (np.diff(naive, axis=1) >= 0).all():
        assert distance <= (w * (x - naive) ** 2).sum() + 1e-3


def test_monotone_tables_stay_and_unknown_cells_are_left_out() -> None:
    x = np.array([[3.0, 4.0, 9.0], [1.0, 2.0, 0.0]])
    w = np.array([[1.0, 1.0, 2.0], [1.0, 5.0, 0.0]])
    y = monotone_table(x, w)
    assert np.isnan(y[1, 2])
    np.testing.assert_array_equal(y[w > 0], x[w > 0])
    assert np.isnan(monotone_table(x, np.zeros_like(x))).all()
