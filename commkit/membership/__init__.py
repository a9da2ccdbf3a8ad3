"""Training goes on when a worker is lost."""

from .ledger import Ledger
from .member import Member
from .options import ElasticOptions
from .records import Alarm, Join, Leave, Ready, Record, View, decode, encode

__all__ = [
    "Alarm",
    "ElasticOptions",
    "Join",
    "Leave",
    "Ledger",
    "Member",
    "Ready",
    "Record",
    "View",
    "decode",
    "encode",
]
