"""Optimizers that communicate: they decide what is sent in place of gradients; and one for gradients that are
late."""

from .adaptive_braking import AdaptiveBrakingSGD
from .base import CommOptimizer, OptimizerReducer, OptimizerScheme
from .demo import DeMo
from .dgc_sgd import DGCSGD
from .onebit_adam import OneBitAdam
from .onebit_lamb import OneBitLamb
from .zero_one_adam import ZeroOneAdam

__all__ = [
    "AdaptiveBrakingSGD",
    "CommOptimizer",
    "DGCSGD",
    "DeMo",
    "OneBitAdam",
    "OneBitLamb",
    "OptimizerReducer",
    "OptimizerScheme",
    "ZeroOneAdam",
]
