"""Nodes as network namespaces, joined by a bridge in a namespace of its own, the switch.

For a lab ``commkit`` of two nodes:

    commkit0          commkit-netlab            commkit1
    lab0 ------------ port0  bridge  port1 ------------ lab0
    10.77.0.100/24                          10.77.0.101/24

``tbf`` on ``lab0`` limits what a node sends and ``tbf`` on ``portN`` what it receives. The host's
own network is not touched. Removing the namespaces removes everything, and who owns the lab is
written on the switch's loopback device, so that there is no file to go stale.

TCP's congestion control is that of the nodes' routes and not the host's, whose results differ: BBR takes the
empty link's round trip, 20 us, for what the path needs, and sends at a third of the rate now and then when
data goes both ways.
"""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from launch.netlab import processes
from launch.netlab.counters import Counters, read_counters
from launch.netlab.errors import LabError
from launch.netlab.iproute import ip, set_alias, tc
from launch.netlab.leftovers import SWITCH_SUFFIX, Record, refuse_leftovers, remove_namespace
from launch.netlab.network import Network
from launch.netlab.rates import format_rate
from launch.netlab.shaping import MTU, Impairment, piece_bytes, queue_commands

MOST_NODES = 100  # addresses 10.77.0.100 to .199
FIRST_PORT = 29400
CONGESTION_CONTROL = "cubic"  # Linux's own choice
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z])?")  # no digit last: lab1 + node 0, lab + node 10


class Namespaces(Network):
    """See the module.

    Args:
        name: prefix of the namespaces' names.
        rates: bits per second of each node, both ways.
        impairment: what ``netem`` adds to what nodes send.
        congestion_control: of TCP between nodes, by the kernel's name.
    """

    interface = "lab0"

    def __init__(
        self,
        name: str,
        rates: Sequence[int],
        impairment: Impairment,
        congestion_control: str,
    ) -> None:
        super().__init__(name, len(rates))
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"name: got {name!r}; use 1 to 32 lower-case letters, digits and hyphens, with a "
                "letter first and last"
            )
        if self.nodes > MOST_NODES:
            raise ValueError(f"nodes: got {self.nodes}, but a lab has at most {MOST_NODES}")
        known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
        if congestion_control not in known:
            raise ValueError(
                f"congestion_control: got {congestion_control!r}, but this kernel has {', '.join(known)}; use one "
                "of them, or load its module (tcp_NAME)"
            )
        self.rates = list(rates)
        self.impairment = impairment
        self.congestion_control = congestion_control
        self.switch = name + SWITCH_SUFFIX
        self._made: list[str] = []
        self._ports = itertools.count(FIRST_PORT)

    def build(self) -> None:
        refuse_leftovers(self.name, self.nodes)
        self._add_namespace(self.switch)
        record = Record(self.name, self.nodes, os.getpid(), processes.start_time(os.getpid()) or 0)
        set_alias(self.switch, "lo", str(record))
        ip("link add br0 type bridge mcast_snooping 0", namespace=self.switch)
        ip("link set br0 addrgenmode none", namespace=self.switch)
        ip("link set br0 up", namespace=self.switch)
        for node in range(self.nodes):
            self._add_node(node)

    def remove(self) -> None:
        while self._made:  # the switch, which bears the record, is the last
            remove_namespace(self._made[-1])
            self._made.pop()

    def describe(self) -> str:
        rates = dict.fromkeys(format_rate(rate) for rate in self.rates)
        text = f"{self.nodes} nodes in network namespaces, links of "
        text += rates.popitem()[0] if len(rates) == 1 else ", ".join(map(format_rate, self.rates))
        return f"{text} each way, {self.impairment or 'no delay or loss'}, TCP {self.congestion_control}"

    def address(self, node: int) -> str:
        return f"10.77.0.{100 + node}"

    def command(self, node: int, words: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.host_id(node), *words]

    def port(self) -> int:
        return next(self._ports)

    def members(self, node: int) -> processes.Belongs:
        # Also by the marker: `ip netns exec` takes a moment to enter the namespace.
        inside = processes.in_namespace(self.host_id(node))
        return processes.any_of([inside, processes.with_variable(*self.marker(node))])

    def counters(self, node: int) -> Counters:
        return read_counters(self.host_id(node), self.interface, self.switch, f"port{node}")

    def set_up(self, node: int, up: bool) -> None:
        # At the switch: the node sees its carrier go, as with a cable, and keeps its address.
        ip(f"link set port{node} {'up' if up else 'down'}", namespace=self.switch)

    def _add_node(self, node: int) -> None:
        name, port, device = self.host_id(node), f"port{node}", self.interface
        self._add_namespace(name)
        size = f"mtu {MTU} gso_max_size {piece_bytes(self.rates[node])}"
        ip(
            f"link add {device} {size} netns {name} type veth peer name {port} {size} netns {self.switch}"
        )
        ip(f"link set {port} master br0 addrgenmode none", namespace=self.switch)
        ip(f"link set {device} addrgenmode none", namespace=name)  # IPv6 chatter would be counted
        ip(f"addr add {self.address(node)}/24 dev {device}", namespace=name)
        for words in queue_commands(device, self.rates[node], self.impairment):
            tc(words, namespace=name)
        for words in queue_commands(port, self.rates[node]):
            tc(words, namespace=self.switch)
        ip("link set lo up", namespace=name)
        ip(f"link set {device} up", namespace=name)
        ip(f"link set {port} up", namespace=self.switch)
        route = f"10.77.0.0/24 dev {device} proto kernel scope link src {self.address(node)}"
        ip(f"route replace {route} congctl {self.congestion_control}", namespace=name)

    def _add_namespace(self, name: str) -> None:
        self._made.append(name)  # first: a signal may come before the command has come back
        try:
            ip(f"netns add {name}")
        except LabError:
            self._made.remove(name)  # somebody else's
            raise
