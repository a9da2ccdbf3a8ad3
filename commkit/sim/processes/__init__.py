"""Local updates among workers that are lost, stopped and joined, in virtual time.

What runs is production code: the methods with local updates, their rounds and reducers, ``Elastic``, its agent and the membership
protocol. Time, threads, sockets and the store are simulated; everything random comes from the seed:
``python -m commkit.sim.processes --first 4711 --count 1``.
"""

from .world import METHODS, Outcome, simulate

__all__ = ["METHODS", "Outcome", "simulate"]
