"""Measures what the cost model needs to know of a cluster and a model: links, collectives, compute, compression, memory."""

from .compute import Subject
from .measure import Extent, measure
from .report import Probe, ProbeError, fingerprint, load_probe

__all__ = ["Extent", "Probe", "ProbeError", "Subject", "fingerprint", "load_probe", "measure"]
