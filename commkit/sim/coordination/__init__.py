"""Training without the slowest, in virtual time: production coordinators and workers whose messages, clocks and threads are
simulated. Everything random comes from the seed: ``python -m commkit.sim.coordination --first 4711 --count 1``.
"""

from .world import METHODS, Outcome, simulate

__all__ = ["METHODS", "Outcome", "simulate"]
