"""How a method with local updates spreads its round: asked of the method itself."""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from torch import nn

from ..config import ConfigError
from ..outer import OuterScheme, OuterSync
from ..schemes import make_scheme
from ..sim.mirror import MirrorComm
from .predict import Round
from .run import MEASURED_WITH

_LAYERS, _SIDE = 24, 128  # room for the factors of low-rank schemes


@lru_cache(maxsize=1024)
def round_of(name: str, sync_every: int | None = None, settings: str = "{}") -> Round | None:
    """The units of a round and how long each may take; None if the method has no round of so many steps.

    Args:
        name: of a scheme with local updates.
        sync_every: None leaves the scheme's own.
        settings: others of the scheme, as JSON.
    """
    knobs = {**MEASURED_WITH.get(name, {}), **json.loads(settings)}
    if sync_every is not None:
        knobs["sync_every"] = sync_every
    model = nn.Sequential(*(nn.Linear(_SIDE, _SIDE, bias=False) for _ in range(_LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    try:
        made = make_scheme(name, knobs)
        assert isinstance(made, OuterScheme)
        outer: OuterSync = made(model, optimizer, MirrorComm(2))
        with outer:
            size = sum(p.numel() for p in model.parameters())
            sizes = {key: p.numel() for key, p in model.named_parameters()}
            parts = [
                (sum(sizes[key] for key in unit.parameters) / size, outer.delay(unit))
                for unit in outer.units
            ]
            return Round(outer.sync_every, parts)
    except (ConfigError, ValueError):
        return None
