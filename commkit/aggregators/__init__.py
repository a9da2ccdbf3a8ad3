"""With whom, and how it is combined: the rounds of communication of one reduction."""

from ..registry import import_all
from .all_gather import AllGather
from .all_reduce import AllReduce
from .hierarchical import Hierarchical
from .lowrank_quantized import LowRankQuantized
from .nodes import nodes_of_mesh
from .noop import Noop
from .powersgd import PowerSGD
from .robust import Robust
from .terngrad import TernGrad
from .two_shot import TwoShot

import_all(__name__, __path__)

__all__ = [
    "AllGather",
    "AllReduce",
    "Hierarchical",
    "LowRankQuantized",
    "Noop",
    "PowerSGD",
    "Robust",
    "TernGrad",
    "TwoShot",
    "nodes_of_mesh",
]
