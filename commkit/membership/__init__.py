"""Training goes on when a worker is lost."""

from .elastic import Elastic, Step
from .errors import (
    JoinRefused,
    MembershipError,
    StepGivenUp,
    StoreLost,
    TrainingStopped,
    WorkerEvicted,
)
from .ledger import Ledger
from .member import Member
from .options import ElasticOptions
from .place import Place
from .records import Alarm, Join, Leave, Ready, Record, View, decode, encode
from .seal import Seal

__all__ = [
    "Alarm",
    "Elastic",
    "ElasticOptions",
    "Join",
    "JoinRefused",
    "Leave",
    "Ledger",
    "Member",
    "MembershipError",
    "Place",
    "Ready",
    "Record",
    "Seal",
    "Step",
    "StepGivenUp",
    "StoreLost",
    "TrainingStopped",
    "View",
    "WorkerEvicted",
    "decode",
    "encode",
]
