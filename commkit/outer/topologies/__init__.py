"""With whom a rank mixes its parameters, and with which weights: gossip's graphs and schedules.

A :class:`Topology` is a configuration (``topology: {name: ring}`` in YAML) that knows no world size; its
:meth:`~Topology.mixing` over the ranks at hand is what a method works with.
"""

from ...registry import import_all
from .base import Mixing, Neighbours, Topology
from .graphs import DirectedGraph, Graph
from .schedules import Hypercube, OnePeerExponential, RandomPairs, RoundRobin
from .static import Complete, Ring, StaticExponential, Torus

import_all(__name__, __path__)

__all__ = [
    "Complete",
    "DirectedGraph",
    "Graph",
    "Hypercube",
    "Mixing",
    "Neighbours",
    "OnePeerExponential",
    "RandomPairs",
    "Ring",
    "RoundRobin",
    "StaticExponential",
    "Topology",
    "Torus",
]
