"""What has to fit together, found before any rank has met another."""

import math
import os

from commkit.straggler import DynamicBackup, StragglerScheme
from commkit.straggler.rounds import Rounds
from launch.settings import TrainSettings
from launch.world import World

_UNDER_MPIRUN = "OMPI_COMM_WORLD_SIZE"


def number_of_ranks(world: World, scheme: StragglerScheme) -> int:
    """As the launcher says.

    Raises:
        ValueError: it is not the one that the scheme's transport needs.
    """
    if scheme.transport != "mpi":
        return world.size
    if _UNDER_MPIRUN not in os.environ:
        raise ValueError(
            "scheme.transport: got 'mpi', but these ranks were not started by mpirun; use launch/mpirun.sh, or "
            "say --set scheme.transport=torch"
        )
    return int(os.environ[_UNDER_MPIRUN])


def check(settings: TrainSettings, scheme: StragglerScheme, size: int) -> tuple[Rounds, int]:
    """The scheme for so many ranks, and its batch.

    Raises:
        ValueError: settings that do not go together.
    """
    if scheme.options.coordinators[0] != 0:
        raise ValueError(
            f"scheme.options.coordinators: got {list(scheme.options.coordinators)}, but rank 0 writes the records and "
            "has to be the first; say [0]"
        )
    method = scheme.method
    if (
        isinstance(method, DynamicBackup)
        and method.gain == "smoothness"
        and (settings.optim.name != "sgd" or settings.optim.momentum)
    ):
        raise ValueError(
            "scheme.gain: got 'smoothness', which holds for SGD without momentum, with "
            f"optim.name={settings.optim.name} and optim.momentum={settings.optim.momentum:g}; say "
            "--set scheme.gain=noise_scale"
        )
    workers = len(scheme.options.workers(size))
    rounds = method.build(workers)
    per_rank, accumulate = settings.batch.per_rank, settings.batch.accumulate
    batch, units = per_rank * accumulate * workers, rounds.num_units
    if batch % units:
        step = units // math.gcd(units, accumulate * workers)
        raise ValueError(
            f"batch.per_rank: got {per_rank}, which with batch.accumulate={accumulate} and {workers} workers is a batch of "
            f"{batch}, but {settings.scheme['name']} cuts it into {units} equal parts; say "
            f"--set batch.per_rank={-(-per_rank // step) * step}"
        )
    return rounds, batch
