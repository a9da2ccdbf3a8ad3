"""PowerSGD against a single-process model of the same mathematics."""

from __future__ import annotations

import pytest
import torch

from commkit.schemes import powersgd
from commkit.sim import ThreadComm, run_threads

from .inputs import sample
from .powersgd_model import PowerSGDModel

SHAPES = {"wide": (12, 50), "tall": (40, 10), "conv": (8, 4, 3, 3), "again": (12, 50)}
STEPS = 20


def gradient(key: str, rank: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    """Half of it is common to all ranks and steps."""
    at = list(SHAPES).index(key) * 10_000
    parts = sample(SHAPES[key], at), sample(SHAPES[key], at + 100 * (rank + 1) + step)
    return (parts[0] + parts[1]).to(dtype)


def matrix(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], -1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # float32: errors of 1e-7 go through 20 power iterations, each amplifying by a ratio of singular values
    [(torch.float64, 1e-9), (torch.float32, 1e-3)],
    ids=str,
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 3])
def test_twenty_steps_follow_the_model(rank: int, world_size: int, dtype, tolerance) -> None:
    starts = {
        key: sample((rank, matrix(torch.empty(shape)).shape[1]), 77, dtype)
        for key, shape in SHAPES.items()
    }

    def body(comm: ThreadComm) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        reducer = powersgd(rank=rank, min_compression_rate=0.0)
        reducer.aggregator.load_state_dict({f"shared/{k}": q for k, q in starts.items()})
        outs = []
        for step in range(STEPS):
            own = {key: gradient(key, comm.rank, step, dtype) for key in SHAPES}
            outs.append(reducer.reduce(own, comm))
            reducer.end_step()
        return outs, reducer.state_dict()

    ranks = run_threads(body, world_size)
    models = {key: PowerSGDModel(q.double().T, world_size) for key, q in starts.items()}
    for step in range(STEPS):
        for key, model in models.items():
            expected = model.step(
                [matrix(gradient(key, r, step, dtype)) for r in range(world_size)]
            )
            out = matrix(ranks[0][0][step][key]).double()
            assert (out - expected).norm() <= tolerance * expected.norm(), (step, key)
    for key, model in models.items():
        for (_, state), expected in zip(ranks, model.residuals, strict=True):
            error = matrix(state[f"rank/{key}"]).double() - expected
            assert error.norm() <= tolerance * expected.norm(), key
