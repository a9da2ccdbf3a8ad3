"""What is sent: pure maps tensor -> payload -> tensor. One file each; a decorator makes a name of it."""

from ..registry import import_all
from .block_quantize import BlockQuantize
from .cast import Cast
from .dct_topk import DCTTopK
from .dynamic_tree import DynamicTree
from .e3m0 import E3M0
from .learned_levels import LearnedLevels
from .min_max import MinMax
from .natural import Natural
from .none import NoCompression
from .qsgd import QSGD
from .randomk import RandomK
from .sign import Sign
from .ternary import Ternary
from .topk import TopK
from .vote import SignVote

import_all(__name__, __path__)

__all__ = [
    "BlockQuantize",
    "Cast",
    "DCTTopK",
    "DynamicTree",
    "E3M0",
    "LearnedLevels",
    "MinMax",
    "Natural",
    "NoCompression",
    "QSGD",
    "RandomK",
    "Sign",
    "SignVote",
    "Ternary",
    "TopK",
]
