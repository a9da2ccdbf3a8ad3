"""Training with local updates: replicas train alone and meet every so often.

A method is a context manager around an ordinary training loop. ``base`` has the shape they share,
``decentralised`` that of those without a collective, and the file named for a method what is its own. Apart from
the transport is what needs none: who meets whom (``permutation``, ``pairing``, ``topologies``), which settings
converge (``stability``), the arithmetic of continuous momentum (``acid``, ``dadao``).
"""

from .a2cid2 import A2CiD2
from .a_edit import AEDiT
from .adaptive_rank import AdaptiveRank
from .adloco import AdLoCo
from .async_local_sgd import AsyncOptions, AsyncScheme, AsyncServer, AsyncStats, AsyncWorker
from .averaging import LatestWeightAverage, OuterEMA
from .base import OuterSync
from .buffers import recompute_batch_norm
from .co2 import CO2
from .dadao import Dadao
from .delayed_nesterov import DelayedNesterov, DelayedSGD, FedBuff, PushRule, StaleNesterov
from .dfedsam import DFedSAM
from .diloco import DiLoCo
from .dilocox import DiLoCoX
from .edit import EDiT
from .gossip import GossipSGD
from .gossip_schedule import GossipSchedule
from .local_sgd import LocalSGD
from .monna import MoNNA
from .noloco import NoLoCo
from .norm_test import BatchPlan, InnerProductTest, NormTest, largest_micro_batch
from .options import SyncOptions
from .penalty import Penalty
from .push_sum import PushSum
from .rounds import RoundAborted
from .scheme import OuterScheme
from .streaming import StreamingDiLoCo

__all__ = [
    "A2CiD2",
    "AEDiT",
    "AdLoCo",
    "AsyncOptions",
    "AsyncScheme",
    "AsyncServer",
    "AsyncStats",
    "AsyncWorker",
    "DelayedNesterov",
    "DelayedSGD",
    "FedBuff",
    "StaleNesterov",
    "AdaptiveRank",
    "BatchPlan",
    "CO2",
    "DFedSAM",
    "Dadao",
    "DiLoCo",
    "DiLoCoX",
    "EDiT",
    "GossipSGD",
    "GossipSchedule",
    "InnerProductTest",
    "LatestWeightAverage",
    "LocalSGD",
    "MoNNA",
    "NoLoCo",
    "NormTest",
    "OuterEMA",
    "OuterScheme",
    "OuterSync",
    "Penalty",
    "PushRule",
    "PushSum",
    "RoundAborted",
    "StreamingDiLoCo",
    "SyncOptions",
    "largest_micro_batch",
    "recompute_batch_norm",
]
