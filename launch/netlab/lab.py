"""The lab: several hosts on one machine, with links of a chosen speed."""

import atexit
import os
import signal
from collections.abc import Sequence
from types import TracebackType

from launch.netlab import processes
from launch.netlab.capabilities import available_memory, probe
from launch.netlab.commands import Commands
from launch.netlab.counters import Counters
from launch.netlab.errors import LabError
from launch.netlab.faults import Slowdown
from launch.netlab.namespaces import CONGESTION_CONTROL, Namespaces
from launch.netlab.network import Loopback, Network
from launch.netlab.rates import parse_link
from launch.netlab.shaping import Impairment
from launch.netlab.signals import SignalGuard

RANK_MEGABYTES = 450  # 10^6 bytes: Python, torch, a small model and its optimizer


class Lab(Commands):
    """``with Lab(4, "100mbit") as lab:`` builds the nodes, and removes them however it is left.

    On entry: namespaces, links and limits; see :mod:`launch.netlab.namespaces`. On exit, by
    return, exception, ctrl-C, SIGTERM or SIGHUP: whatever runs on the nodes is ended (TERM, KILL
    3 s later) and the namespaces are removed. What SIGKILL leaves, ``python -m launch.netlab
    clean`` removes. Signal handlers are those of before afterwards.

    Args:
        nodes: how many hosts.
        link: rate of every node both ways (``"100mbit"``), one for each (a sequence, or text with
            commas), or ``"none"``: loopback, nothing emulated, no privilege needed.
        delay: one way (``"20ms"``). Needs netem, as jitter and loss do.
        jitter: most that the delay varies by (``"2ms"``).
        loss: share of packets lost (``"0.1%"``).
        congestion_control: of TCP between nodes; one of the kernel's ``tcp_available_congestion_control``.
        name: prefix of the namespaces; labs of different names can exist side by side.
        ranks_per_node: for the check that there is memory.
        rank_megabytes: for the same, 10^6 bytes per rank.

    Raises:
        ValueError: an argument is wrong, or the ranks need more memory than is available.
        LabError: on entry, if there is no privilege, no netem, or a leftover of that name.
    """

    def __init__(
        self,
        nodes: int,
        link: str | Sequence[str] = "1gbit",
        *,
        delay: str | None = None,
        jitter: str | None = None,
        loss: str | None = None,
        congestion_control: str = CONGESTION_CONTROL,
        name: str = "commkit",
        ranks_per_node: int = 1,
        rank_megabytes: float = RANK_MEGABYTES,
    ) -> None:
        for field, value in (("nodes", nodes), ("ranks_per_node", ranks_per_node)):
            if value < 1:
                raise ValueError(f"{field}: got {value}, but at least 1 is needed; raise it")
        self._impairment = Impairment.parse(delay, jitter, loss)
        super().__init__(_network(name, nodes, link, self._impairment, congestion_control))
        _check_memory(nodes, ranks_per_node, rank_megabytes)
        self._slowdowns: dict[int, Slowdown] = {}
        self._guard = SignalGuard()
        self._owner: int | None = None  # process that built the lab; a fork of it owns nothing

    def __enter__(self) -> "Lab":
        if isinstance(self.network, Namespaces):
            _check_capabilities(self._impairment)
        self._owner = os.getpid()
        atexit.register(self.close)
        self._guard.install()
        try:
            self.network.build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and remove the lab; nothing if that is done or this is a fork."""
        if self._owner != os.getpid():
            return
        try:
            with self._guard.held():
                self._owner = None
                for slowdown in self._slowdowns.values():
                    slowdown.end()
                self._slowdowns.clear()
                self.end_processes()
                self.network.remove()
                atexit.unregister(self.close)
        finally:
            self._guard.restore()

    def describe(self) -> str:
        """One line: nodes and links, or that nothing is emulated."""
        return self.network.describe()

    def counters(self) -> list[Counters]:
        """What crossed each node's link since the lab was built.

        Raises:
            LabError: the nodes share loopback.
        """
        return [self.network.counters(node) for node in range(self.nodes)]

    def cut(self, node: int) -> None:
        """Pull the node's cable: packets in flight are lost, connections stay open."""
        self.check_node(node)
        self.network.set_up(node, False)

    def mend(self, node: int) -> None:
        """Put the cable back. TCP tries again within twice the time that it was out."""
        self.check_node(node)
        self.network.set_up(node, True)

    def pause(self, node: int) -> None:
        """Stop the node's processes (SIGSTOP), as a hung host does: its connections stay open."""
        self.check_node(node)
        self._end_slowdown(node)
        processes.freeze(self.network.members(node))

    def slow(
        self,
        node: int,
        duty: float = 0.5,
        period_s: float = 0.1,
        *,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Let the node's processes, also later ones, run only ``duty`` of the time.

        Args:
            node: from 0.
            duty: share of the time that they run, above 0 and below 1.
            period_s: a stop and a run together, seconds.
            jitter: from 0 to 1; how much the length of stops varies.
            seed: of that variation.
        """
        self.check_node(node)
        self._end_slowdown(node)
        members = self.network.members(node)
        self._slowdowns[node] = Slowdown(members, duty, period_s, jitter, seed)

    def resume(self, node: int) -> None:
        """Undo ``pause`` and ``slow``."""
        self.check_node(node)
        self._end_slowdown(node)
        members = self.network.members(node)
        processes.send(processes.find(members), members, signal.SIGCONT)

    def end_processes(self) -> None:
        """End whatever runs on the nodes: TERM, and KILL 3 s later."""
        members = (self.network.members(node) for node in range(self.nodes))
        processes.end(processes.any_of(members))

    def _end_slowdown(self, node: int) -> None:
        slowdown = self._slowdowns.pop(node, None)
        if slowdown is not None:
            slowdown.end()


def _network(
    name: str,
    nodes: int,
    link: str | Sequence[str],
    impairment: Impairment,
    congestion_control: str,
) -> Network:
    rates = parse_link(link, nodes)
    if rates is not None:
        return Namespaces(name, rates, impairment, congestion_control)
    if impairment:
        raise ValueError(f"link: got 'none', which has no {impairment}; give a rate, or no delay")
    return Loopback(name, nodes)


def _check_memory(nodes: int, ranks_per_node: int, rank_megabytes: float) -> None:
    needed = nodes * ranks_per_node * rank_megabytes * 1e6
    available = available_memory()
    if needed > available:
        raise ValueError(
            f"nodes: got {nodes}, which need about {needed / 1e9:.1f} GB ({ranks_per_node} ranks "
            f"on each, {rank_megabytes:g} MB per rank), but {available / 1e9:.1f} GB are "
            "available; ask for fewer, or lower rank_megabytes if ranks are smaller"
        )


def _check_capabilities(impairment: Impairment) -> None:
    found = probe()
    if found.problem:
        raise LabError(f"no lab can be built: {found.problem}")
    if impairment and not found.netem:
        raise LabError(
            f"delay, jitter and loss: asked for {impairment}, but this kernel has no netem; load "
            "sch_netem or leave them out"
        )
