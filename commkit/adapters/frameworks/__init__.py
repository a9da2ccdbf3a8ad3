"""What the adapters for training frameworks share: which versions, how to attach, what to save, what to log."""

from .connect import Attachment, connect
from .contents import Contents, contents_of
from .record import Totals
from .versions import LIGHTNING, PYTORCH_LIGHTNING, Requirement

__all__ = [
    "LIGHTNING",
    "PYTORCH_LIGHTNING",
    "Attachment",
    "Contents",
    "Requirement",
    "Totals",
    "connect",
    "contents_of",
]
