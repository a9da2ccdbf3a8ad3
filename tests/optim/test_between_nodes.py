"""Optimizers that communicate, between nodes of several ranks."""

from __future__ import annotations

import pytest

from commkit.aggregators import Hierarchical
from commkit.optim import OptimizerScheme
from commkit.schemes import make_scheme
from tests.optim import driver
from tests.optim.driver import run, same_bits

BLOCKS = {
    "onebit_adam": {"name": "onebit_adam", "freeze_step": 4, "min_numel": 0},
    "onebit_lamb": {"name": "onebit_lamb", "freeze_step": 4, "min_numel": 0},
}


def make(name: str, local_size: int) -> driver.Make:
    scheme = make_scheme({"name": "hierarchical", "scheme": BLOCKS[name], "local_size": local_size})
    assert isinstance(scheme, OptimizerScheme)
    return lambda params: scheme(params, lr=1e-2)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("world_size", "local_size"), [(4, 2), (2, 2), (3, 1)])
def test_replicas_hold_the_same_bits_and_learn(name: str, world_size: int, local_size: int) -> None:
    ranks = run(make(name, local_size), world_size, 60)
    assert isinstance(ranks[0].optimizer.reducer.aggregator, Hierarchical)
    assert same_bits(ranks)
    start = sum(float((p - 1).square().sum()) for p in driver.parameters().values())
    end = float((ranks[0].flat() - 1).square().sum())
    assert end < 0.8 * start


def test_nodes_of_one_rank_are_the_flat_optimizer() -> None:
    flat = make_scheme(BLOCKS["onebit_adam"])
    assert isinstance(flat, OptimizerScheme)
    ranks = run(make("onebit_adam", 1), 2, 30)
    others = run(lambda params: flat(params, lr=1e-2), 2, 30)
    assert same_bits([ranks[0], others[0]])


def test_a_link_between_nodes_carries_the_bits_of_one_node() -> None:
    sizes: list[int] = []

    def note(mine: driver.Replica, step: int) -> None:
        if mine.comm.rank == 0:
            sizes.append(mine.comm.bytes.labelled("inter"))

    ranks = run(make("onebit_adam", 2), 4, 8, body=note, shapes={"big": (512, 300)})
    numel = 512 * 300
    inter = sum(mine.comm.bytes.labelled("inter") for mine in ranks)
    # Both ranks of both nodes together, over the four compressed steps: two nodes' one bit each way.
    assert inter <= 4 * 2 * (numel / 8) * 1.1
    assert inter >= 4 * 2 * (numel / 8) * 0.9
