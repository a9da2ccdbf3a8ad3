"""A lab without root: the program starts itself anew where it is root over networks of its own.

``unshare -r -n -m`` makes a user namespace, in which this user counts as root, with a network and
a mount namespace. There, namespaces, veth pairs, bridges, ``tbf`` and ``netem`` work as for root.
What differs:

- the host's network cannot be reached, nor its loopback;
- ``/run`` is an empty one of its own, since ``ip netns`` writes there;
- nobody outside sees the namespaces, so ``list`` and ``clean`` cannot: they vanish with the last
  process in them. After SIGKILL of the owner, end the commands on the nodes and all is clean.
"""

import os
import sys
from collections.abc import Sequence

from launch.netlab.capabilities import probe

_MARK = "COMMKIT_NETLAB_USER_NAMESPACE"


def enter_if_needed(words: Sequence[str]) -> None:
    """Replace this process by ``words`` in a user namespace, if that is what a lab takes.

    Returns if this process can build labs itself, is in such a namespace already, or if user
    namespaces are not allowed.

    Args:
        words: program and arguments, as a rule this one's: ``[sys.executable, "-m", ...]``.
    """
    if os.environ.get(_MARK) or probe().privilege != "user namespace":
        return
    script = 'mount -t tmpfs tmpfs /run && exec "$@"'
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[_MARK] = "1"
    os.execvp("unshare", ["unshare", "-r", "-n", "-m", "sh", "-c", script, "sh", *words])
