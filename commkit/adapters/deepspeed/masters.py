"""What an engine's optimizer really steps: the parameters, or float32 copies of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...runtime.agreement import trainable_parameters


def stepped_by(engine: Any) -> dict[str, nn.Parameter]:
    """By the parameter's name, in the model's order, what the engine's own optimizer steps at stage 0: the
    parameters themselves in float32, DeepSpeed's float32 copies of them in bf16 and fp16.

    Raises:
        TypeError: the copies are flat, so that they are nobody's.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import (
        FP16_UnfusedOptimizer,
    )

    parameters = trainable_parameters(engine.module)
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        return parameters
    if not isinstance(wrapper, FP16_UnfusedOptimizer):
        raise TypeError(
            f"DeepSpeed keeps this model's float32 weights in a {type(wrapper).__name__}, flat, where they have no "
            'names; use an optimizer that is not fused ("torch_adam": true in its params), or train in float32'
        )
    copies = {
        low: high
        for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        for low, high in zip(lows, highs, strict=True)
    }
    return {name: cast(nn.Parameter, copies.get(p, p)) for name, p in parameters.items()}


@torch.no_grad()
def show(engine: Any, stepped: Mapping[str, Tensor]) -> None:
    """Let the model follow float32 copies that were changed behind DeepSpeed's back."""
    for name, p in trainable_parameters(engine.module).items():
        if stepped[name] is not p:
            p.copy_(stepped[name])


class Masters:
    """Float32 copies of weights, as :mod:`commkit.checkpoint` wants them."""

    def __init__(self, stepped: Mapping[str, Tensor]) -> None:
        self._stepped = stepped

    def state_dict(self) -> dict[str, Any]:
        return {name: x.detach() for name, x in self._stepped.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, x in self._stepped.items():
            x.copy_(state_dict[name])
