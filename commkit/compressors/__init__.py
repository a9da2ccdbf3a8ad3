"""What is sent: pure maps tensor -> payload -> tensor. One file each; a decorator makes a name of it."""

from ..registry import import_all
from .block_quantize import BlockQuantize
from .cast import Cast
from .dct_topk import DCTTopK
from .none import NoCompression
from .randomk import RandomK
from .sign import Sign
from .ternary import Ternary
from .topk import TopK

import_all(__name__, __path__)

__all__ = [
    "BlockQuantize",
    "Cast",
    "DCTTopK",
    "NoCompression",
    "RandomK",
    "Sign",
    "Ternary",
    "TopK",
]
