"""``ip`` and ``tc`` as functions.

iproute2 and not pyroute2: every step is a command that can be repeated by hand when a lab puzzles,
it is on every Linux host, and a command cannot leave its namespace to the next one, while pyroute2
keeps a helper process or thread with an event loop for each namespace, which signals, forks and
clean-up would have to reckon with. Building four nodes takes a third of a second.
"""

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from launch.netlab.errors import LabError

COMMAND_DEADLINE_S = 20.0


def run(command: Sequence[str]) -> str:
    """Standard output of a command that must succeed within 20 s.

    Raises:
        LabError: it is not installed, failed or did not come back.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMMAND_DEADLINE_S,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # ctrl-C is for the lab, which still has to clean up
        )
    except FileNotFoundError as error:
        raise LabError(
            f"{command[0]} is not installed; install iproute2, or say --link none"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(command)}` did not come back within 20 s") from error
    if done.returncode:
        raise LabError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def ip(words: str, *, namespace: str | None = None) -> str:
    """``ip WORDS`` in a namespace; see :func:`run`."""
    return run(["ip", *(["-n", namespace] if namespace else []), *words.split()])


def tc(words: str, *, namespace: str) -> str:
    """``tc WORDS`` in a namespace; see :func:`run`."""
    return run(["tc", "-n", namespace, *words.split()])


def show_link(namespace: str, device: str) -> dict[str, Any]:
    """``ip -j link show``: ``ifname, flags, operstate, ifalias, ...``."""
    (link,) = json.loads(run(["ip", "-n", namespace, "-j", "link", "show", "dev", device]))
    return dict(link)


def show_queue(namespace: str, device: str) -> dict[str, Any]:
    """``tc -s -j qdisc show`` of the device's outermost queue: ``bytes, packets, drops, ...``."""
    listing = run(["tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device])
    for queue in json.loads(listing):
        if queue.get("root"):
            return dict(queue)
    raise LabError(f"{device} in namespace {namespace} has no queue; was the lab changed by hand?")


def set_alias(namespace: str, device: str, alias: str) -> None:
    """Attach a free text to a device."""
    run(["ip", "-n", namespace, "link", "set", "dev", device, "alias", alias])
