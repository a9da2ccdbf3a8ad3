"""What torchrun would have set, for ranks that the harness has started."""

from __future__ import annotations

import os
import socket


def pretend_torchrun(rank: int, world_size: int) -> None:
    """Frameworks read the launcher's environment, and find the process group there already."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
        ACCELERATE_USE_CPU="true",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )
