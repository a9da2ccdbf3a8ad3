"""Training without waiting for the slowest: redundant work, and taking the first that arrive.

``codes`` make the gradient exact although workers are missing (``families`` are what YAML names). What plans
rounds, judges who is late and chooses how many to wait for is pure and needs no transport. :class:`Coordinator` and
:class:`Worker` train with it on real ranks; what they do about stragglers is a :class:`Method`.
"""

from .backup import DBW, BackupPolicy, StarvedWorkerError, StaticBackup, StepResult
from .codes import (
    ConditioningWarning,
    CyclicMDS,
    CyclicRandom,
    FractionalRepetition,
    GradientCode,
)
from .computation import Share
from .coordinator import Coordinator
from .families import CodeFamily, is_usable, make_code
from .methods import (
    Backup,
    Coding,
    DynamicBackup,
    Method,
    Multiplexed,
    SelectiveRepetition,
)
from .models import Arbitrary, Bursty, PerRound, StragglerModel
from .mu_rule import MuRule
from .multiplexed import MSGC
from .options import CoordinationOptions
from .partitions import BatchLayout, PartitionSampler, partition_seed
from .record import CoordinationStats, StepRecord
from .schedule import Chunk, MiniTask, NotDecodable, Schedule
from .scheme import StragglerScheme, TransportName
from .selection import Candidate, DelayProfile, Replayed, candidates, fit_slope, replay, select
from .sequential import SRSGC, GradientCoding
from .worker import Worker

__all__ = [
    "Arbitrary",
    "Backup",
    "BackupPolicy",
    "BatchLayout",
    "Bursty",
    "Candidate",
    "Chunk",
    "CodeFamily",
    "Coding",
    "ConditioningWarning",
    "CoordinationOptions",
    "CoordinationStats",
    "Coordinator",
    "CyclicMDS",
    "CyclicRandom",
    "DBW",
    "DelayProfile",
    "DynamicBackup",
    "FractionalRepetition",
    "GradientCode",
    "GradientCoding",
    "MSGC",
    "Method",
    "MiniTask",
    "MuRule",
    "Multiplexed",
    "NotDecodable",
    "PartitionSampler",
    "PerRound",
    "Replayed",
    "SRSGC",
    "Schedule",
    "SelectiveRepetition",
    "Share",
    "StarvedWorkerError",
    "StaticBackup",
    "StepRecord",
    "StepResult",
    "StragglerModel",
    "StragglerScheme",
    "TransportName",
    "Worker",
    "candidates",
    "fit_slope",
    "is_usable",
    "make_code",
    "partition_seed",
    "replay",
    "select",
]
