"""What claims to be sharded is: no reduction between replicas makes a tensor as large as a whole parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import commkit
from commkit.optim import OneBitAdam

from .models import grid
from .together import run_each

SIDE, SHARDS = 256, 2


class Largest(TorchDispatchMode):
    """Remembers the most bytes of any storage that an operator returns."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is torch.Tensor:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


def largest(rank, world_size, scheme, knobs):
    mesh = grid(world_size // SHARDS, SHARDS)
    torch.manual_seed(0)
    model = nn.Linear(SIDE, SIDE, bias=False)
    fully_shard(model, mesh=mesh["shard"])
    if scheme == "onebit_adam":
        optimizer = OneBitAdam(model.parameters(), freeze_step=1)
        handle = commkit.attach(model, optimizer, mesh=mesh)
        reducer = optimizer.reducer
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = commkit.attach(model, scheme, mesh=mesh, **knobs)
        reducer = handle.reducer.reducer
    seen, original = [], reducer.reduce

    def watched(*args):
        with Largest() as mode:
            result = original(*args)
        seen.append(mode.nbytes)
        return result

    reducer.reduce = watched
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, SIDE, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        optimizer.step()
    handle.close()
    residuals = [x.numel() for k, x in handle.state_dict().items() if k.startswith("rank/")]
    return max(seen), residuals


CASES = [
    ("int8", {"rounding": "nearest"}),
    ("sign", {}),
    ("topk", {"density": 0.01}),
    ("powersgd", {"rank": 2}),
    ("ef21", {"density": 0.01}),
    ("onebit_adam", {}),
]


@pytest.mark.parametrize("at", range(len(CASES)), ids=[case[0] for case in CASES])
def test_nothing_is_as_large_as_the_whole(at):
    whole = 4 * SIDE * SIDE
    for most, residuals in run_each(largest, 4, CASES)[at]:
        assert 0 < most < 0.75 * whole  # a shard is half of it; messages have headers
        assert residuals
        assert max(residuals) == SIDE * SIDE // SHARDS
