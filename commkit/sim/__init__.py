"""Ranks without processes, and workers without clocks: the library's schemes run unchanged and never know."""

from .stragglers import BackupClock, Bursts, DelayModel, Pareto, ShiftedExponential, Trace
from .threads import ThreadComm, run_threads
from .transport import ThreadNetwork, ThreadTransport

__all__ = [
    "BackupClock",
    "Bursts",
    "DelayModel",
    "Pareto",
    "ShiftedExponential",
    "ThreadComm",
    "ThreadNetwork",
    "ThreadTransport",
    "Trace",
    "run_threads",
]
