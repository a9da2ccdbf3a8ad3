"""commkit: training that is fast where the network is slow."""

from . import checkpoint, membership, optim, outer, schemes, sharded
from .adapters.at_step import StepHandle
from .adapters.attach import attach
from .adapters.ddp import Handle, ddp_comm_hook, ddp_hook
from .adapters.debug import Debug
from .adapters.fsdp2 import ShardedHandle
from .adapters.local_updates import ShardedReplicas
from .config import ConfigError
from .membership import Elastic, ElasticOptions
from .metrics import StepStats
from .outer import DiLoCo, LocalSGD, RoundAborted, SyncOptions
from .policy import Policy
from .reducer import Reducer
from .runtime.alarm import RankFailure
from .runtime.replica_check import ReplicasDiffer, check_replicas
from .version import __version__

__all__ = [
    "ConfigError",
    "Debug",
    "DiLoCo",
    "Elastic",
    "ElasticOptions",
    "Handle",
    "LocalSGD",
    "Policy",
    "RankFailure",
    "Reducer",
    "ReplicasDiffer",
    "RoundAborted",
    "ShardedHandle",
    "ShardedReplicas",
    "StepHandle",
    "StepStats",
    "SyncOptions",
    "__version__",
    "attach",
    "check_replicas",
    "checkpoint",
    "ddp_comm_hook",
    "ddp_hook",
    "membership",
    "optim",
    "outer",
    "schemes",
    "sharded",
]
