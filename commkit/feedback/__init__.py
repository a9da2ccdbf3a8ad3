"""What was left unsent: the only home of residuals, and of their arithmetic."""

from ..registry import import_all
from .error_feedback import ErrorFeedback
from .none import NoFeedback
from .staged import StagedTensors

import_all(__name__, __path__)

__all__ = ["ErrorFeedback", "NoFeedback", "StagedTensors"]
