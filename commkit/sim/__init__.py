"""Ranks without processes: the library's schemes run unchanged and never know."""

from .threads import ThreadComm, run_threads

__all__ = ["ThreadComm", "run_threads"]
