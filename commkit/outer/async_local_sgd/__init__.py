"""Asynchronous local SGD: workers of any speed, a server that takes what comes.

``server`` and ``worker`` are the two roles; ``dispatch`` decides who trains on what and for how long, ``protocol`` is
what they say to each other. The server's arithmetic is :mod:`commkit.outer.delayed_nesterov`.
"""

from .options import AsyncOptions
from .scheme import AsyncScheme
from .server import AsyncServer
from .stats import AsyncStats, PushRecord
from .worker import AsyncWorker

__all__ = ["AsyncOptions", "AsyncScheme", "AsyncServer", "AsyncStats", "AsyncWorker", "PushRecord"]
