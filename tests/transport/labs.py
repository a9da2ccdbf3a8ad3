"""Where the laws of transports are run: on processes over gloo, each law on its own; on ranks of MPI, all in one go."""

from __future__ import annotations

import functools
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from commkit.transport import MPITransport, TorchTransport, Transport
from commkit.transport.mpi_transport import wait_for_all
from tests.harness import run_ranks
from tests.mpi import run_mpi

from .laws import LAWS, Lab


class TorchLab:
    """The ranks of a process group, or of the default one."""

    def __init__(self, directory: Path, group: Any = None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.directory, self.group = directory, group

    def open(self, **options: Any) -> Transport:
        return TorchTransport(self.group, **options)

    def renewed(self) -> Lab:
        return TorchLab(self.directory, dist.new_group(list(range(self.world_size))))

    def barrier(self) -> None:
        dist.barrier()


class MPILab:
    """The ranks of a communicator."""

    def __init__(self, directory: Path, communicator: Any) -> None:
        self.rank, self.world_size = communicator.Get_rank(), communicator.Get_size()
        self.directory, self.communicator = directory, communicator

    def open(self, **options: Any) -> Transport:
        return MPITransport(self.communicator, **options)

    def renewed(self) -> Lab:
        return MPILab(self.directory, self.communicator.Dup())

    def barrier(self) -> None:
        wait_for_all(self.communicator)


def _one_law(rank: int, world_size: int, name: str, directory: Path) -> Any:
    return LAWS[name].body(TorchLab(directory))


def over_torch(name: str, directory: Path) -> list[Any]:
    law = LAWS[name]
    return run_ranks(_one_law, law.world_size, name, directory, dying=law.dying)


def _all_laws(rank: int, world_size: int, directory: Path) -> None:
    """Every law on ranks that none has died on before; those with a death come last. What a rank has to say it writes
    down after each law."""
    from mpi4py import MPI

    wait_for_all(MPI.COMM_WORLD)
    everybody = MPI.COMM_WORLD.Get_group()
    # As long as all are alive: afterwards MPI makes no communicator from this one.
    communicators = {
        name: MPI.COMM_WORLD.Create_group(everybody.Incl(members), tag)
        for tag, (name, members) in enumerate(_members(world_size).items())
        if rank in members
    }
    for name, communicator in communicators.items():
        try:
            outcome = (True, LAWS[name].body(MPILab(directory, communicator)))
        except BaseException:
            outcome = (False, traceback.format_exc())
        (directory / f"{name}.{communicator.Get_rank()}").write_bytes(pickle.dumps(outcome))


def _members(world_size: int) -> dict[str, list[int]]:
    """The ranks of each law."""
    alive, members = list(range(world_size)), {}
    for name, law in LAWS.items():
        members[name] = alive[: law.world_size]
        dead = [members[name][place] for place in law.dying]
        alive = [rank for rank in alive if rank not in dead]
    return members


@functools.cache
def _over_mpi() -> dict[str, Any]:
    size = max(law.world_size for law in LAWS.values())
    dying = {
        members[place] for name, members in _members(size).items() for place in LAWS[name].dying
    }
    with tempfile.TemporaryDirectory() as directory:
        run_mpi(_all_laws, size, Path(directory), dying=dying)
        return {
            file.name: pickle.loads(file.read_bytes())
            for file in Path(directory).iterdir()
            if file.name.partition(".")[0] in LAWS
        }


def over_mpi(name: str, directory: Path) -> list[Any]:
    law, told = LAWS[name], _over_mpi()
    outcomes: list[Any] = []
    for rank in range(law.world_size):
        ok, value = told.get(f"{name}.{rank}", (rank in law.dying, None))
        assert ok, f"rank {rank}:\n{value}"
        outcomes.append(value)
    return outcomes


OVER: dict[str, Callable[[str, Path], list[Any]]] = {"torch": over_torch, "mpi": over_mpi}
