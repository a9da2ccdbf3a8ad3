"""Optimizer blocks that DeepSpeed has removed (0.19.7): OneBitAdam, ZeroOneAdam and OneBitLamb, as they were.

``{"type": "OneBitAdam", "params": {"lr": 4e-4, "freeze_step": 23000, "cuda_aware": false}}`` becomes commkit's
optimizer with the same meaning; every parameter that now means something else, or nothing, is noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...config import ConfigError
from ...registry import did_you_mean

_GUIDE = "see docs/migrating_from_deepspeed.md"
_SETTINGS = ("lr", "betas", "eps", "weight_decay")
_IGNORED = {
    "cuda_aware": "tensors travel as the process group's backend sends them",
    "comm_backend_name": "the engine's own data-parallel process group is used",
}
# What only one value was ever right for.
_REFUSED: dict[str, tuple[Any, str]] = {
    "amsgrad": (False, "no 1-bit optimizer has it; leave it out"),
    "eps_inside_sqrt": (False, "eps is added to the root of the variance; leave it out"),
    "max_grad_norm": (0, "DeepSpeed ignored it here; use gradient_clipping"),
}


@dataclass(frozen=True)
class _Former:
    """A former optimizer: the scheme that takes its place, and its own parameters with their former defaults."""

    scheme: str
    own: Mapping[str, Any]
    corrects_bias: str


_FORMER = {
    "onebitadam": _Former(
        "onebit_adam",
        {"freeze_step": 100_000},
        "DeepSpeed never applied it, and commkit always does, as AdamW",
    ),
    "zerooneadam": _Former(
        "zero_one_adam",
        {
            "var_freeze_step": 100_000,
            "var_update_scaler": 16,
            "local_step_scaler": 32_678,
            "local_step_clipper": 16,
        },
        "DeepSpeed never applied it, and commkit always does, as AdamW",
    ),
    "onebitlamb": _Former(
        "onebit_lamb",
        {
            "freeze_step": 100_000,
            "max_coeff": 10.0,
            "min_coeff": 0.01,
            "coeff_beta": 0.9,
            "factor_max": 4.0,
            "factor_min": 0.5,
            "factor_threshold": 0.1,
        },
        "1-bit LAMB has none, in its paper and here",
    ),
}


@dataclass(frozen=True)
class Translation:
    """A former block in today's words.

    Args:
        block: for ``"commkit"``.
        notes: one line for each parameter that is ignored or has another meaning.
    """

    block: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def is_former(optimizer: Any) -> bool:
    """Whether an ``"optimizer"`` block names an optimizer that DeepSpeed once had."""
    kind = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    return isinstance(kind, str) and kind.lower() in _FORMER


def translate(optimizer: Mapping[str, Any]) -> Translation:
    """
    Args:
        optimizer: a block for which :func:`is_former` holds.

    Raises:
        ConfigError: a parameter that it never had, or a value that nothing can stand for.
    """
    kind = optimizer["type"]
    former = _FORMER[kind.lower()]
    given = optimizer.get("params") or {}
    known = [*_SETTINGS, *former.own, "bias_correction", *_IGNORED, *_REFUSED]
    notes = [f"optimizer {kind!r} is commkit's scheme {former.scheme!r}; {_GUIDE}"]
    for name, value in given.items():
        where = f"optimizer.params.{name}"
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"{where}: unknown field{hint}; known: {', '.join(known)}")
        if name in _REFUSED and value != _REFUSED[name][0]:
            raise ConfigError(f"{where}={value!r} has no meaning for {kind}: {_REFUSED[name][1]}")
        if name in _IGNORED:
            notes.append(f"{where}={value!r} is ignored: {_IGNORED[name]}")
        if name == "bias_correction":
            notes.append(f"{where}={value!r} is ignored: {former.corrects_bias}")
    own = {name: given.get(name, default) for name, default in former.own.items()}
    settings = {name: given[name] for name in _SETTINGS if name in given}
    return Translation({"scheme": {"name": former.scheme, **own}, "optimizer": settings}, notes)
