"""What was left unsent: the only home of residuals, and of their arithmetic."""

from ..registry import import_all
from .contraction import check_contraction
from .econtrol import EControl
from .ef21 import EF21
from .error_feedback import ErrorFeedback
from .momentum import Momentum
from .momentum_correction import MomentumCorrection
from .none import NoFeedback
from .staged import StagedTensors

import_all(__name__, __path__)

__all__ = [
    "EF21",
    "EControl",
    "ErrorFeedback",
    "Momentum",
    "MomentumCorrection",
    "NoFeedback",
    "StagedTensors",
    "check_contraction",
]
