"""Cutting a model into layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from commkit.outer.layers import layers_of
from commkit.outer.replica import Replica
from tests.outer.deep import LAYERS, Deep
from tests.outer.problem import Net


def replica_of(model: nn.Module) -> Replica:
    return Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_stem_layers_and_head_in_forward_order() -> None:
    model = Deep(0)
    layers = layers_of(replica_of(model))
    assert [list(unit.parameters) for unit in layers.units] == LAYERS
    assert [unit.index for unit in layers.units] == list(range(5))
    assert layers.needs[model] == layers.needs[model.stem] == 0
    assert layers.needs[model.blocks[1]] == 2
    assert layers.needs[model.head] == 4


class Odd(nn.Module):
    """A tied head, a list of parameters, a frozen layer with statistics, and layers in a Sequential in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.prompts = nn.ParameterList([torch.zeros(4)])
        self.first = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)]
        )
        self.frozen = nn.BatchNorm1d(4).requires_grad_(False)
        self.second = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("model", [Deep(0), Odd(), Net(0), nn.Linear(2, 2)])
def test_everything_is_in_one_unit(model: nn.Module) -> None:
    replica = replica_of(model)
    units = layers_of(replica).units
    assert sorted(n for u in units for n in u.parameters) == sorted(replica.parameters)
    assert sorted(n for u in units for n in u.buffers) == sorted(replica.buffers)
    assert all(unit.parameters for unit in units)


def test_shared_weights_lists_and_frozen_statistics() -> None:
    model = Odd()
    layers = layers_of(replica_of(model))
    assert [unit.parameters[0] for unit in layers.units] == [
        "embed.weight",
        "first.0.0.weight",
        "first.1.weight",
        "second.0.weight",
        "second.1.weight",
        "head.bias",
    ]
    assert "prompts.0" in layers.units[0].parameters
    assert layers.needs[model] == 0  # for its prompts
    assert layers.needs[model.head] == 5
    assert layers.units[2].buffers[0].startswith("frozen.")


def test_named_layers() -> None:
    replica = replica_of(Deep(0))
    units = layers_of(replica, ["blocks.2", "head"]).units
    assert [unit.parameters[0] for unit in units] == [
        "scale",
        "blocks.2.up.weight",
        "norm.weight",
        "head.weight",
    ]
    with pytest.raises(
        ValueError, match=r"layers name 'tail', which is not in model\.named_modules"
    ):
        layers_of(replica, ["tail"])
