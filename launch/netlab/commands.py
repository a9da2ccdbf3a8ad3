"""Running commands on the nodes of a lab."""

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.netlab import processes
from launch.netlab.cores import cores_of, on_cores
from launch.netlab.errors import DeadlineError
from launch.netlab.network import Network

TORCHRUN = Path(__file__).resolve().parents[1] / "torchrun.sh"
FAILURE_GRACE_S = 20.0  # from one node's failure until the others are ended
_POLL_S = 0.05
_TAIL_LINES = 20
OnLine = Callable[[int, str], None]


@dataclass(frozen=True)
class NodeResult:
    """How a node's command ended.

    Args:
        node: from 0.
        returncode: exit status, or minus the signal that ended it.
        output: standard output and standard error as they came.
    """

    node: int
    returncode: int
    output: str

    @property
    def status(self) -> int:
        """The exit status as a shell gives it: 128 and the signal's number after a signal."""
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    @property
    def tail(self) -> str:
        """The last 20 lines of the output."""
        return "\n".join(self.output.splitlines()[-_TAIL_LINES:])


class Commands:
    """Starts commands on the nodes of a network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.nodes = network.nodes

    def environment(self, node: int) -> dict[str, str]:
        """Variables of every command on a node, for gloo, NCCL, torchrun and launch/torchrun.sh."""
        network = self.network
        variable, host = network.marker(node)
        return {
            variable: host,
            "NNODES": str(self.nodes),
            "NODE_RANK": str(node),
            "LOCAL_ADDR": network.address(node),
            "MASTER_ADDR": network.address(0),
            "GLOO_SOCKET_IFNAME": network.interface,
            "NCCL_SOCKET_IFNAME": network.interface,
            "TP_SOCKET_IFNAME": network.interface,
            "NCCL_HOSTID": host,  # else NCCL takes the nodes for one host and goes by shared memory
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "PYTHON": sys.executable,
        }

    def popen(
        self, node: int, words: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[Any]":
        """Start a command on a node, in a session of its own, on the node's share of this process's cores.

        Args:
            node: from 0.
            words: program and arguments.
            env: added to this process's environment and to :meth:`environment`.
            options: of ``subprocess.Popen``: ``cwd``, ``stdout``, ``text`` ...
        """
        self.check_node(node)
        with on_cores(cores_of(node, self.nodes, os.sched_getaffinity(0))):
            return subprocess.Popen(
                self.network.command(node, words),
                env={**os.environ, **self.environment(node), **(env or {})},
                start_new_session=True,
                **options,
            )

    def run_all(
        self,
        command: Callable[[int], Sequence[str]],
        deadline_s: float,
        env: Mapping[str, str] | None = None,
        *,
        cwd: Path | None = None,
        logs: Path | None = None,
        on_line: OnLine | None = None,
    ) -> list[NodeResult]:
        """Run one command on each node and wait for all.

        When one fails, the others have 20 s to notice before they are ended.

        Args:
            command: gives the words of a node.
            deadline_s: seconds for all of them.
            env: as for :meth:`popen`; MASTER_PORT and RDZV_ENDPOINT are set besides.
            cwd: directory to run in.
            logs: directory for what they print, ``nodeN.log``; a temporary one if not given.
            on_line: called with node and line as lines are printed.

        Returns:
            Exit status and output of each node, in order.

        Raises:
            DeadlineError: with the last lines of every node's output; all have been ended.
        """
        run_id = ("COMMKIT_NETLAB_RUN", uuid.uuid4().hex)  # ranks inherit it and are found by it
        port = str(self.network.port())
        shared = {
            "MASTER_PORT": port,
            "RDZV_ENDPOINT": f"{self.network.address(0)}:{port}",
            **dict([run_id]),
            **(env or {}),
        }
        with _directory(logs) as folder:
            paths = [folder / f"node{node}.log" for node in range(self.nodes)]
            running: list[subprocess.Popen[Any]] = []
            try:
                for node, path in enumerate(paths):
                    running.append(self._start(node, command(node), shared, cwd, path))
                in_time = _wait(running, deadline_s, _follow(paths, on_line))
            finally:
                processes.end(processes.with_variable(*run_id))
            results = [
                NodeResult(node, process.wait(), path.read_text(errors="replace"))
                for node, (process, path) in enumerate(zip(running, paths, strict=True))
            ]
        if not in_time:
            ends = "\n".join(f"--- node {result.node}\n{result.tail}" for result in results)
            raise DeadlineError(f"deadline_s: not done after {deadline_s:g} s, so ended\n{ends}")
        return results

    def torchrun(
        self,
        script: Path | str,
        words: Sequence[str] = (),
        *,
        deadline_s: float,
        ranks_per_node: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        logs: Path | None = None,
        on_line: OnLine | None = None,
    ) -> list[NodeResult]:
        """Run a program on every node by ``launch/torchrun.sh``; node 0 has the first ranks.

        The rendezvous is c10d's on node 0. Arguments and errors are those of :meth:`run_all`.
        """
        return self.run_all(
            lambda node: ["bash", str(TORCHRUN), str(script), *words],
            deadline_s,
            {"NPROC": str(ranks_per_node), **(env or {})},
            cwd=cwd,
            logs=logs,
            on_line=on_line,
        )

    def _start(
        self, node: int, words: Sequence[str], env: Mapping[str, str], cwd: Path | None, log: Path
    ) -> "subprocess.Popen[Any]":
        with log.open("wb") as output:
            return self.popen(
                node,
                words,
                env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def check_node(self, node: int) -> None:
        """Raise ValueError if there is no such node."""
        if not 0 <= node < self.nodes:
            raise ValueError(f"node: got {node}, but nodes go from 0 to {self.nodes - 1}")


@contextmanager
def _directory(wanted: Path | None) -> Iterator[Path]:
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="netlab-") as directory:
            yield Path(directory)
    else:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted


def _wait(
    running: "Sequence[subprocess.Popen[Any]]", deadline_s: float, follow: Callable[[], None]
) -> bool:
    """Wait for all, or for one's failure and the grace after it; False at the deadline."""
    deadline = time.monotonic() + deadline_s
    grace_ends: float | None = None
    while True:
        statuses = [process.poll() for process in running]
        follow()
        now = time.monotonic()
        if None not in statuses:
            return True
        if grace_ends is None and any(statuses):
            grace_ends = now + FAILURE_GRACE_S
        if grace_ends is not None and now > grace_ends:
            return True
        if now > deadline:
            return False
        time.sleep(_POLL_S)


def _follow(paths: Sequence[Path], on_line: OnLine | None) -> Callable[[], None]:
    """A function that hands on whole lines which have been written since its last call."""
    if on_line is None:
        return lambda: None
    positions = dict.fromkeys(paths, 0)

    def follow() -> None:
        for node, path in enumerate(paths):
            with path.open("rb") as file:
                file.seek(positions[path])
                whole, newline, _ = file.read().rpartition(b"\n")
            if newline:
                positions[path] += len(whole) + 1
                for line in whole.decode(errors="replace").split("\n"):
                    on_line(node, line)

    return follow
