"""Where this process stands among its peers, read from the environment that launchers set."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launch.settings import Device


@dataclass(frozen=True)
class World:
    """This process's place, before any communication."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    launched: bool  # by torchrun or a like program; otherwise this process is alone

    @classmethod
    def from_environment(cls) -> "World":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them, one process."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            size=size,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(size))),
            launched="RANK" in os.environ,
        )

    def device(self, wanted: Device) -> torch.device:
        """The device of this rank: ``auto`` is CUDA when there is a GPU for every local rank.

        Raises:
            ValueError: CUDA is asked for and there are fewer GPUs than local ranks.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if wanted == "cuda" and gpus < self.local_size:
            raise ValueError(
                f"device: got cuda with {self.local_size} ranks on this machine, but torch sees "
                f"{gpus} GPUs; start fewer ranks or say --set device=cpu"
            )
        if wanted == "cpu" or gpus < self.local_size:
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank)

    def join(self, device: torch.device) -> None:
        """Start the process group, unless that is done: NCCL for CUDA, gloo for CPU."""
        if dist.is_initialized():
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if self.launched:
            dist.init_process_group(backend)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)


def leave() -> None:
    """Let torch end this process without complaint; ranks of mpirun may have no process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class LauncherWatch:
    """Ends a rank whose launcher was killed.

    torchrun starts its ranks in sessions of their own, so they outlive ``kill -9`` of torchrun and
    would go on writing into a directory that the next run is resuming.
    """

    def __init__(self) -> None:
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def check(self) -> None:
        """Raise SystemExit if the launcher is gone."""
        if self._launcher is not None and os.getppid() != self._launcher:
            raise SystemExit("the launcher of this rank was killed; stopping")
