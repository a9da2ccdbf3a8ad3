"""Sharded models: what FSDP2 gathers and scatters, compressed; and what replicas exchange, sharded."""

from .exchange import Exchange, OneHop, TwoHops
from .gather import CompressedAllGather, gather_into
from .layout import Segment, Unit, find_units
from .message import RowCodec
from .partition import PartitionedOptimizer, PartitionScheme, PartitionState
from .scatter import CompressedReduceScatter
from .scheme import ShardedScheme
from .state import ShardedState

__all__ = [
    "CompressedAllGather",
    "CompressedReduceScatter",
    "Exchange",
    "OneHop",
    "PartitionScheme",
    "PartitionState",
    "PartitionedOptimizer",
    "RowCodec",
    "Segment",
    "ShardedScheme",
    "ShardedState",
    "TwoHops",
    "Unit",
    "find_units",
    "gather_into",
]
