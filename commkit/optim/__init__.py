"""Optimizers that communicate: they decide what is sent in place of gradients."""

from .base import CommOptimizer, OptimizerReducer, OptimizerScheme
from .demo import DeMo
from .dgc_sgd import DGCSGD

__all__ = ["DGCSGD", "CommOptimizer", "DeMo", "OptimizerReducer", "OptimizerScheme"]
