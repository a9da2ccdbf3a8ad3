"""One probe, from beginning to end."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ..comm import DistComm, require_group
from ..config import ConfigError
from ..cost.pace import TIMED, pace_of
from ..cost.run import MEASURED_WITH
from ..schemes import make_scheme
from ..version import __version__
from .collectives import probe_collectives, send_cpu_s_per_byte
from .compute import Subject, probe_compute
from .links import probe_pairs
from .machine import nodes_of, probe_cluster, probe_memory
from .report import VERSION, CompressionFound, LinkFound, PairFound, Probe, model_found
from .sweep import slowest

# Of every step, of a round, of sharded models; those that `commkit advise` chooses among.
SCHEMES = (
    *("ddp", "bf16", "int8", "int4", "sign", "powersgd", "topk"),
    *("onebit_adam", "dgc", "demo"),
    *("diloco", "streaming_diloco", "noloco", "co2", "edit", "dilocox"),
    *("qsdp", "zeropp"),
)


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Args:
        message_s: what the largest message takes, seconds.
        repeats: of every message.
        steps: of the model.
        schemes: whose compression is timed.

    Raises:
        ConfigError: a scheme that does not exist, or whose compression cannot be timed alone.
        ValueError: a value that is too small.
    """

    message_s: float = 0.15
    repeats: int = 5
    steps: int = 12
    schemes: Sequence[str] = SCHEMES

    def __post_init__(self) -> None:
        for name in ("repeats", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if not self.message_s > 0:
            raise ValueError(f"message_s={self.message_s} must be > 0; use for example 0.15")
        for name in self.schemes:
            if not isinstance(make_scheme(name, MEASURED_WITH.get(name, {})), TIMED):
                raise ConfigError(
                    f"schemes: what {name!r} computes is not timed; leave it out (`commkit advise` says more about it)"
                )

    @classmethod
    def short(cls) -> Extent:
        """Seconds in place of minutes, for the start of a run."""
        return cls(message_s=0.08, repeats=4, steps=8)

    def of(self, schemes: Sequence[str]) -> Extent:
        """The same for other schemes."""
        return replace(self, schemes=schemes)


def measure(
    subject: Subject,
    extent: Extent,
    ranks_per_node: int,
    group: dist.ProcessGroup | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Probe:
    """Probe links, collectives, the model's step, compression and memory. Collective over ``group``.

    Args:
        subject: the model.
        extent: how much.
        ranks_per_node: processes of the launcher on each.
        group: None is the default group.
        say: hears what is being measured.

    Raises:
        ValueError: nodes of different sizes.

    Returns:
        The same on every rank.
    """
    comm, device = DistComm(require_group(group)), subject.device
    nodes = nodes_of(comm, ranks_per_node)
    model = model_found(subject.model)  # before DDP wraps it
    cluster = probe_cluster(comm, nodes, device)
    say("compute")
    compute = probe_compute(subject, comm, extent.steps)
    memory = probe_memory(comm, device, cluster.ranks_per_machine)  # before messages need any
    say("links")
    pairs = probe_pairs(comm, nodes, device, extent.message_s, extent.repeats)
    say("collectives")
    alone = comm.world_size == 1
    found = [] if alone else probe_collectives(comm, device, extent.message_s, extent.repeats)
    cpu = send_cpu_s_per_byte(comm, device)
    probe = Probe(
        version=VERSION,
        commkit=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        cluster=cluster,
        model=model,
        link=_slowest_of([pair for pair in pairs if not pair.inside_node]),
        local=_slowest_of([pair for pair in pairs if pair.inside_node]),
        pairs=pairs,
        collectives=found,
        send_cpu_s_per_byte=cpu,
        compute=compute,
        compression=[_timed(name, comm, device, say) for name in extent.schemes],
        memory=memory,
    )
    # Ranks decide by it alike, so all have rank 0's.
    return Probe.model_validate(comm.all_gather_object(probe.model_dump())[0])


def _timed(
    name: str, comm: DistComm, device: torch.device, say: Callable[[str], None]
) -> CompressionFound:
    """On all ranks at once, as in training: they may share processors."""
    say(f"compression of {name}")
    comm.barrier()
    pace = pace_of(name, device=device)
    return CompressionFound(
        scheme=name,
        alone=slowest(pace.alone, comm, device),
        each=slowest(pace.each, comm, device),
        step=slowest(pace.step, comm, device),
    )


def _slowest_of(pairs: Sequence[PairFound]) -> LinkFound | None:
    """A collective is as slow as the slowest of its links."""
    if not pairs:
        return None
    return LinkFound(
        latency_s=max(pair.latency_s for pair in pairs),
        bytes_per_second=min(pair.bytes_per_second for pair in pairs),
        spread=max(pair.spread for pair in pairs),
    )
