"""Every parameter and buffer is in exactly one fragment, and in the one that is meant."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from commkit.outer.blocks import blocks
from commkit.outer.fragments import cut, require_divides
from commkit.outer.replica import Replica
from tests.outer.problem import Net


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


class Gpt(nn.Module):
    """Embedding, blocks, norm, and a head that shares the embedding's weight."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3, 4))
        self.wte = nn.Embedding(7, 4)
        self.h = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.wte.weight
        self.head.requires_grad_(True)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.between = nn.LayerNorm(2)
        self.decoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.head = nn.Linear(2, 2)


def replica(model: nn.Module) -> Replica:
    return Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))


MODELS = {
    "gpt": lambda: Gpt(5),
    "encoder_decoder": EncoderDecoder,
    "sequential": lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.ReLU()),
    "no_lists": lambda: Net(0),
    "one_layer": lambda: nn.Linear(3, 3),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pattern", ["sequential", "strided"])
def test_every_tensor_is_in_exactly_one_fragment(model: str, pattern: Any) -> None:
    whole = replica(MODELS[model]())
    for fragments in range(1, len(blocks(whole.model)) + 1):
        units = cut(whole, fragments, pattern)
        assert [unit.index for unit in units] == list(range(fragments))
        assert Counter(n for u in units for n in u.parameters) == Counter(list(whole.parameters))
        assert Counter(n for u in units for n in u.buffers) == Counter(list(whole.buffers))
        assert all(unit.parameters for unit in units)


def places(model: nn.Module, fragments: Any, pattern: Any = "strided") -> dict[str, int]:
    units = cut(replica(model), fragments, pattern)
    return {n: u.index for u in units for n in (*u.parameters, *u.buffers)}


@pytest.mark.parametrize(
    ("pattern", "expected"), [("strided", [0, 1, 2, 0, 1]), ("sequential", [0, 0, 1, 1, 2])]
)
def test_layers_and_what_surrounds_them(pattern: Any, expected: list[int]) -> None:
    place = places(Gpt(5), 3, pattern)
    for layer, fragment in enumerate(expected):
        inside = [p for n, p in place.items() if n.startswith(f"h.{layer}.")]
        assert len(inside) == 9  # four of the two Linears, two and three of the norm
        assert set(inside) == {fragment}
    assert place["position"] == place["wte.weight"] == 0  # and with it the head's shared weight
    assert place["norm.weight"] == place["norm.running_mean"] == place["head.bias"] == 2
    assert "head.weight" not in place


def test_what_lies_between_layers_goes_with_the_one_before() -> None:
    place = places(EncoderDecoder(), 4, "sequential")
    assert place["between.weight"] == place["encoder.1.weight"] == 1
    assert place["decoder.0.weight"] == 2
    assert place["head.weight"] == 3


def test_a_list_of_names() -> None:
    place = places(Gpt(2), [["h.1", "norm", "head"], ["position", "wte", "h.0"]])
    assert place["h.1.norm.running_var"] == place["norm.weight"] == place["head.bias"] == 0
    assert place["wte.weight"] == place["position"] == place["h.0.mlp.2.bias"] == 1


def test_a_shared_weight_may_be_named_by_either_name() -> None:
    assert places(Gpt(1), [["position", "h", "norm"], ["head"]])["wte.weight"] == 1


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        (0, "fragments=0 must be at least 1"),
        (3, r"at most the model's number of layers, 2 \(h.0, h.1\)"),
        ([["h"], ["wte", "nothing"]], "name nothing, which is no module"),
        ([["h", "h.0"], ["h.0"]], "name 'h.0' twice, in 0 and 1"),
        ([["h"], ["h.0"]], r"fragments \[0, 1\] all hold 'h.0.norm.weight'"),
        ([["h"], ["wte", "position"]], "leave out head.bias, norm.weight|leave out norm.weight"),
        ([["h", "wte", "position", "norm", "head"], []], "fragment 1 holds no trainable parameter"),
    ],
)
def test_bad_fragments(fragments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(replica(Gpt(2)), fragments)


def test_bad_pattern() -> None:
    with pytest.raises(ValueError, match="pattern='random' must be"):
        cut(replica(Gpt(2)), 2, "random")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "fragments", "message"),
    [
        (100, 3, "sync_every=99 or 102, or fragments=2 or 4"),
        (10, 7, "sync_every=7 or 14, or fragments=5 or 10"),
        (2, 3, "sync_every=3, or fragments=1 or 2"),
    ],
)
def test_fragments_must_divide_the_period(steps: int, fragments: int, message: str) -> None:
    for near in (f * fragments for f in range(1, 4)):
        require_divides(near, fragments)
    with pytest.raises(ValueError, match=message):
        require_divides(steps, fragments)
