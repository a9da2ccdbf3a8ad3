"""Optimizers that communicate: they decide what is sent in place of gradients."""

from .base import CommOptimizer, OptimizerReducer, OptimizerScheme
from .onebit_adam import OneBitAdam
from .onebit_lamb import OneBitLamb
from .zero_one_adam import ZeroOneAdam

__all__ = [
    "CommOptimizer",
    "OneBitAdam",
    "OneBitLamb",
    "OptimizerReducer",
    "OptimizerScheme",
    "ZeroOneAdam",
]
