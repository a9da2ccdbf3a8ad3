"""commkit: training that is fast where the network is slow."""

from . import checkpoint, optim, schemes
from .adapters.alarm import RankFailure
from .adapters.at_step import StepHandle
from .adapters.attach import attach
from .adapters.ddp import Handle, ddp_comm_hook, ddp_hook
from .config import ConfigError
from .metrics import StepStats
from .policy import Policy
from .reducer import Reducer
from .version import __version__

__all__ = [
    "ConfigError",
    "Handle",
    "Policy",
    "RankFailure",
    "Reducer",
    "StepHandle",
    "StepStats",
    "__version__",
    "attach",
    "checkpoint",
    "ddp_comm_hook",
    "ddp_hook",
    "optim",
    "schemes",
]
