"""What was left unsent: the only home of residuals, and of their arithmetic."""

from ..registry import import_all
from .error_feedback import ErrorFeedback, check_error_feedback
from .momentum import Momentum
from .none import NoFeedback
from .staged import StagedTensors

import_all(__name__, __path__)

__all__ = ["ErrorFeedback", "Momentum", "NoFeedback", "StagedTensors", "check_error_feedback"]
