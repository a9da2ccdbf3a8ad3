"""Nested state becomes plain tensors and comes back the same."""

from __future__ import annotations

import math

import pytest
import torch

from commkit.structure import flatten, unflatten


def test_round_trip_keeps_types_keys_and_bits() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "odd": [None, True, 1, 0.1 + 0.2, math.inf, "text", (1, 2), {3: "int key", "a.b": {}}],
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    tensors = flatten(state)
    assert all(isinstance(t, torch.Tensor) for t in tensors.values())
    back = unflatten(tensors)
    assert back["odd"] == state["odd"]
    assert [type(x) for x in back["odd"]] == [type(x) for x in state["odd"]]
    assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert list(back["optimizer"]["state"]) == [0, 1]
    for index, entry in state["optimizer"]["state"].items():
        for name, value in entry.items():
            assert torch.equal(back["optimizer"]["state"][index][name], value)
    for name in ("scalar", "empty", "bytes"):
        assert torch.equal(back[name], state[name])
        assert back[name].dtype == state[name].dtype


def test_what_cannot_be_kept_is_refused_with_its_path() -> None:
    with pytest.raises(TypeError, match=r"state\.a\.1 is a object"):
        flatten({"a": [1, object()]})
