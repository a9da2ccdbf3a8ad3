"""What this machine can do for a lab, found by trying it in a namespace that is thrown away."""

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_NEEDED = (12, 21)  # CAP_NET_ADMIN, CAP_SYS_ADMIN
Privilege = Literal["full", "user namespace", "none"]


@dataclass(frozen=True)
class Capabilities:
    """What is there.

    Args:
        privilege: ``full`` builds a lab right away; ``user namespace`` does so after
            :mod:`launch.netlab.userns` has started the program anew; ``none`` cannot.
        bridge: the kernel has bridges.
        tbf: the kernel has the token bucket that limits rates.
        netem: the kernel has ``netem``: delay, jitter and loss.
        missing: programs that are not installed.
    """

    privilege: Privilege
    bridge: bool
    tbf: bool
    netem: bool
    missing: tuple[str, ...]

    @property
    def problem(self) -> str | None:
        """Why this process cannot build a lab, with the remedy; None if it can."""
        if self.missing:
            return f"{', '.join(self.missing)} not installed; install iproute2, or say --link none"
        if self.privilege == "none":
            return (
                "neither root (CAP_NET_ADMIN and CAP_SYS_ADMIN) nor user namespaces; run as root, "
                "allow user namespaces, or say --link none"
            )
        if self.privilege == "user namespace":
            return (
                "this process is not root, but user namespaces are allowed; enter one with "
                "launch.netlab.enter_if_needed, as `python -m launch.netlab` does, or say --link "
                "none"
            )
        lacking = [name for name in ("bridge", "tbf") if not getattr(self, name)]
        if lacking:
            return f"this kernel has no {' and no '.join(lacking)}; load it, or say --link none"
        return None

    def describe(self) -> str:
        """A few lines for people."""
        lines = [f"privilege  {self.privilege}"]
        for name in ("bridge", "tbf", "netem"):
            lines.append(f"{name:<10} {'yes' if getattr(self, name) else 'no'}")
        lines.append(f"labs       {self.problem or 'can be built in this process'}")
        if not self.netem:
            lines.append("delay, jitter and loss need netem, which this kernel lacks")
        return "\n".join(lines)


@functools.cache
def probe() -> Capabilities:
    """Try everything once per process."""
    missing = tuple(tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None)
    if missing:
        return Capabilities("none", False, False, False, missing)
    privilege: Privilege = "none"
    if has_privilege():
        privilege = "full"
    elif _try("true", user=True):
        privilege = "user namespace"
    user = privilege != "full"
    possible = privilege != "none"
    return Capabilities(
        privilege=privilege,
        bridge=possible and _try("ip link add probe type bridge", user),
        tbf=possible and _try("tc qdisc add dev lo root tbf rate 1mbit burst 2kb limit 9kb", user),
        netem=possible and _try("tc qdisc add dev lo root netem delay 1ms", user),
        missing=(),
    )


def has_privilege() -> bool:
    """Whether this process may make network namespaces now."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    if not all(effective >> bit & 1 for bit in _NEEDED) or not os.access("/run", os.W_OK):
        return False
    return shutil.which("unshare") is not None and _try("true", user=False)


def available_memory() -> int:
    """Bytes that new processes can have: the machine's, or the control group's if that is less."""
    meminfo = Path("/proc/meminfo").read_text()
    free = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no such group, or no limit ("max")
    return max(free, 0)


def _try(command: str, user: bool) -> bool:
    words = ["unshare", *(["-r"] if user else []), "-n", *command.split()]
    try:
        done = subprocess.run(
            words, capture_output=True, timeout=20, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
