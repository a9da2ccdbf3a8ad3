"""Messages between two ranks, with waiting for whichever comes first.

Collectives need everybody; a server that takes what arrives, or a coordinator that waits for the first k of n,
does not. :class:`Transport` is what such code asks for; :class:`TorchTransport` has it over torch.distributed,
:class:`MPITransport` over mpi4py.
"""

from .base import (
    Message,
    Network,
    PeerClosed,
    PeerFailed,
    PeerLost,
    Pending,
    Transport,
    TransportClosed,
    TransportFull,
)
from .mpi_transport import MPINetwork, MPITransport
from .torch_transport import TorchNetwork, TorchTransport

__all__ = [
    "MPINetwork",
    "MPITransport",
    "Message",
    "Network",
    "PeerClosed",
    "PeerFailed",
    "PeerLost",
    "Pending",
    "TorchNetwork",
    "TorchTransport",
    "Transport",
    "TransportClosed",
    "TransportFull",
]
