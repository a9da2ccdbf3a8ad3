"""What a lab's nodes are joined by: an interface, and loopback, which has no links to speak of."""

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NoReturn

from launch.netlab import processes
from launch.netlab.counters import Counters
from launch.netlab.errors import LabError


class Network(ABC):
    """Where the nodes' commands run. Nodes are numbered from 0.

    Args:
        name: of the lab; tells its nodes from others'.
        nodes: how many.
    """

    interface: str  # of every node

    def __init__(self, name: str, nodes: int) -> None:
        self.name = name
        self.nodes = nodes

    @abstractmethod
    def build(self) -> None:
        """Make the nodes; an exception leaves parts behind, which ``remove`` removes."""

    @abstractmethod
    def remove(self) -> None:
        """Take away what ``build`` made and nothing else. The nodes' processes have ended."""

    @abstractmethod
    def describe(self) -> str:
        """One line: nodes, rates, and what is not emulated."""

    @abstractmethod
    def address(self, node: int) -> str:
        """Where the node is reached. Sorts as the nodes do, and so do torchrun's ranks."""

    @abstractmethod
    def command(self, node: int, words: Sequence[str]) -> list[str]:
        """``words`` as a command that runs on the node."""

    @abstractmethod
    def port(self) -> int:
        """A port that is free on node 0, another one at each call."""

    @abstractmethod
    def members(self, node: int) -> processes.Belongs:
        """Which processes are the node's."""

    @abstractmethod
    def counters(self, node: int) -> Counters:
        """What crossed the node's link."""

    @abstractmethod
    def set_up(self, node: int, up: bool) -> None:
        """Plug the node's cable in or out."""

    def host_id(self, node: int) -> str:
        """Name of the node as a host."""
        return f"{self.name}{node}"

    def marker(self, node: int) -> tuple[str, str]:
        """Name and value of a variable that all of the node's processes have."""
        return "COMMKIT_NETLAB_NODE", f"{self.host_id(node)}.{os.getpid()}"


class Loopback(Network):
    """All nodes on the host's loopback interface: real processes, an unlimited link.

    Needs no privilege. Rates, counters and cutting do not exist here.
    """

    interface = "lo"

    def build(self) -> None:
        pass

    def remove(self) -> None:
        pass

    def describe(self) -> str:
        return f"{self.nodes} nodes on loopback: no link is emulated and no bytes are counted"

    def address(self, node: int) -> str:
        return f"127.77.0.{100 + node}"  # Linux answers on all of 127.0.0.0/8

    def command(self, node: int, words: Sequence[str]) -> list[str]:
        return list(words)

    def port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def members(self, node: int) -> processes.Belongs:
        return processes.with_variable(*self.marker(node))

    def counters(self, node: int) -> Counters:
        self._refuse("counters")

    def set_up(self, node: int, up: bool) -> None:
        self._refuse("cut and mend")

    def _refuse(self, what: str) -> NoReturn:
        raise LabError(f"{what}: the nodes share loopback (link 'none'); give the lab a rate")
