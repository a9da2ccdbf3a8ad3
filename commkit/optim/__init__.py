"""Optimizers that communicate: they decide what is sent in place of gradients."""

from .base import CommOptimizer, OptimizerReducer, OptimizerScheme

__all__ = ["CommOptimizer", "OptimizerReducer", "OptimizerScheme"]
