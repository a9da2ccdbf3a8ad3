"""The block ``"commkit"`` of ``ds_config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...config import validate

BLOCK = "commkit"


class Block(BaseModel):
    """What is asked of commkit. Unknown fields and wrong types are errors.

    Args:
        scheme: name of a scheme, or a mapping with its name and fields.
        optimizer: settings of a scheme that is an optimizer: lr, betas, eps, weight_decay.
        timeout_s: seconds after which a stuck collective raises.
        on_world_size_change: what ``load_checkpoint`` does with residuals that another number of ranks has saved:
            all start from their mean, or an error.
        missing_state: what it does where a checkpoint has none: an error, or residuals start at zero.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    scheme: str | dict[str, Any]
    optimizer: dict[str, Any] = {}
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1800.0
    on_world_size_change: Literal["mean", "error"] = "mean"
    missing_state: Literal["error", "fresh"] = "error"


def read_block(data: Any) -> Block:
    """
    Raises:
        ConfigError: with the dotted path of every fault.
    """
    return validate(Block, data, f"ds_config, block {BLOCK!r}")


def plain(value: Any) -> Any:
    """A copy of nested configuration in dicts and lists: parsers bring mappings of their own."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def stage_of(config: Mapping[str, Any]) -> int:
    """ZeRO's stage in a ``ds_config``; 0 without it."""
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    return int(stage)
