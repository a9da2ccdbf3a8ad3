"""The membership protocol under faults: the code that real workers run, with a virtual clock, store and network.

Everything random comes from the seed, so a failure is run again by its number:
``python -m commkit.sim.membership --first 4711 --count 1``.
"""

from .judge import InvariantError
from .world import Outcome, simulate

__all__ = ["InvariantError", "Outcome", "simulate"]
