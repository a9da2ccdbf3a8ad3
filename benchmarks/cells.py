"""What the lab measured, configuration by configuration, and what the cost model says of each.

What a step takes to compute is the measured step of ``noop`` in the same comparison; of models that are sharded inside nodes,
that of ``hsdp_noop``. The rest comes from the probe of the comparison's machine and day, see :func:`probe_for`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from trials.local import E3M0

from commkit.advise import Question
from commkit.cost.cluster import Cluster
from commkit.cost.coordinated import SCHEMES as COORDINATED
from commkit.cost.coordinated import predict_coordinated
from commkit.cost.predict import Prediction, Round, Workload, predict
from commkit.cost.rounds import round_of
from commkit.cost.sharded import is_sharded, predict_sharded
from commkit.cost.traffic import law_of
from commkit.probe import Probe, load_probe
from launch.netlab.cores import cores_of
from launch.settings import BatchSettings

NOOP = "noop"
HSDP = "hsdp_"  # so begin names of schemes between replicas that are sharded inside nodes
# The scheme of a configuration, where its name is not that.
ALIKE = {"torch:ddp": "ddp", "diloco_int8": "diloco", "streaming": "streaming_diloco"}


@dataclass(frozen=True)
class Local:
    """A recipe of local updates.

    Args:
        sync_every: steps of a round.
        settings: others of the scheme.
        reducer: what is computed besides, of what the probes timed; 4-bit floats are taken to be as fast as 4-bit integers.
    """

    sync_every: int = 16
    settings: Mapping[str, Any] = field(default_factory=dict)
    reducer: str = ""


LOCAL = {
    "local_sgd": Local(),
    "post_local_sgd": Local(),
    "diloco": Local(),
    "co2": Local(),
    "edit": Local(),
    "noloco": Local(),
    "dfedsam_mgs": Local(),
    "diloco_int8": Local(settings={"reducer": "int8"}, reducer="int8"),
    "streaming": Local(settings={"fragments": 4, "overlap": 3, "reducer": E3M0}, reducer="int4"),
    "dilocox": Local(settings={"rank": 32}),
    "gossip": Local(1),
    "push_sum": Local(1),
    "a2cid2": Local(1),
    "monna": Local(1),
    "single_merge": Local(1),
}
PROBED_BATCH = 4
FEWEST = 6  # steps of which a median means something
FEWEST_SLOW = 2  # where all are alike, as plain DDP's are that wait for the link
# They begin with dense steps.
STAGED = ("onebit_adam", "onebit_lamb", "zero_one_adam")
# The folder of the probes that were made on the machine and the day of comparisons whose names begin so.
ALONGSIDE = {
    "kinds": "kinds",
    "monna": "kinds",
    "coordinated": "kinds",
    "hsdp_2x2_1gbit": "kinds",
    "hsdp_2x2_200mbit": "kinds",
    "hsdp_2x2_50mbit": "kinds",
    "grid_again": "grid_again",
    "grid": "grid",
    "sign_2_nodes": "grid",
    "systems_again": "systems_again",
    "systems_4_nodes": "systems",
    "local_grid": "local_grid",
    "econtrol": "econtrol",
}
# Of these comparisons, configurations that were measured again, and why.
FRESH = "took fresh memory in every step then, which cost more than the arithmetic: see"
SYSTEMS = (
    ("powersgd", "onebit_adam", "dgc", "demo"),
    "over the host's TCP then, and before nodes had their share of the cores: see systems_again_4_nodes_100mbit",
)
MEASURED_AGAIN = {
    "systems_4_nodes_100mbit": SYSTEMS,
    "systems_4_nodes_100mbit_all": SYSTEMS,
    "local_updates_4_nodes_50mbit": (
        ("diloco_int8", "streaming", "co2", "dilocox", "noloco", "edit"),
        "nodes had no share of the cores yet, so that ranks out of step were faster than noop's: see local_grid_4_nodes_50mbit",
    ),
    "grid_4_nodes_50mbit": (
        ("int4", "dynamic8", "natural", "qsgd", "terngrad"),
        "the machine compiled meanwhile: see grid_again_4_nodes_50mbit",
    ),
    "grid_4_nodes_200mbit": (("econtrol",), f"{FRESH} econtrol_4_nodes_200mbit"),
    "grid_4_nodes_1gbit": (("econtrol",), f"{FRESH} econtrol_4_nodes_1gbit"),
}
SKIPPED = {
    "torch_powersgd": "torch's own hook",
    "torch:powersgd": "torch's own hook",
}


@dataclass(frozen=True)
class Cell:
    """One configuration of one comparison.

    Args:
        comparison: name of its file.
        name: of the configuration.
        setting: of the comparison.
        measured: medians by figure.
        noop_s: the comparison's step without communication.
        base_s: a step with none between nodes: the same, or that of models sharded inside them.
        cores: of the machine that all nodes are on.
    """

    comparison: str
    name: str
    setting: dict[str, Any]
    measured: dict[str, float]
    noop_s: float
    base_s: float
    cores: int

    @property
    def scheme(self) -> str:
        name = self.name.removeprefix(HSDP)
        return ALIKE.get(name, name)

    @property
    def sharded_inside(self) -> bool:
        return self.name.startswith(HSDP)

    @property
    def local(self) -> Local | None:
        """Of local updates."""
        return LOCAL.get(self.name)

    @property
    def seconds(self) -> float:
        """Of a step; the mean where steps differ."""
        if self.local is not None and self.local.sync_every > 1:
            return self.measured["mean_step_seconds"]
        return self.measured["step_seconds"]

    @property
    def wire_bytes(self) -> float | None:
        """That a rank sent in a step; None where that is not what is predicted: what goes between shards is counted too, and
        of a coordinator's ranks it is the coordinator that counts."""
        if self.sharded_inside or self.scheme in COORDINATED:
            return None
        return self.measured.get("wire_bytes")

    @property
    def note(self) -> str:
        """Why there is no prediction; empty if there is one."""
        if self.setting["steps"] < FEWEST:
            return f"{self.setting['steps']} steps, for the bytes"
        if self.measured.get("steps", FEWEST) < FEWEST_SLOW:
            return f"{self.measured['steps']:.0f} steps in its seconds"
        if self.scheme in STAGED and self.measured.get("steps", FEWEST) < FEWEST:
            return "hardly left its uncompressed stage"
        if self.sharded_inside and self.comparison.startswith("hsdp_2x2_100mbit"):
            return "sharded inside nodes, of which no probe was made"
        again, why = MEASURED_AGAIN.get(self.comparison, ((), ""))
        if self.name in again:
            return why
        return SKIPPED.get(self.name, "")

    @property
    def batch(self) -> int:
        """Sequences of a rank's step."""
        told = dict(text.split("=") for text in self.setting["overrides"])
        return int(told.get("batch.per_rank", BatchSettings().per_rank))

    @property
    def settings(self) -> str:
        """Of the scheme, as JSON."""
        return json.dumps({} if self.local is None else self.local.settings)

    @property
    def plan(self) -> Round | None:
        """Of local updates."""
        if self.local is None:
            return None
        return round_of(self.scheme, self.local.sync_every, self.settings)

    def speed(self, probe: Probe) -> float:
        """How many times as long as in the probe computing took here."""
        found = probe.compute
        each = (found.step_s - found.optimizer_s) / PROBED_BATCH
        return self.noop_s / (found.optimizer_s + each * self.batch)

    def predicted(self, probe: Probe, own_link: bool) -> Prediction:
        """
        Args:
            own_link: the probe was made over the comparison's links.
        """
        per_node = self.setting["ranks_per_node"]
        question = Question(
            probe,
            nodes=self.setting["nodes"],
            ranks_per_node=per_node,
            link=None if own_link else self.setting["link"],
            shards=per_node if self.sharded_inside else 1,
        )
        slower = self.speed(probe)

        def here(found: Cluster) -> Cluster:
            return replace(found, send_cpu_s_per_byte=slower * found.send_cpu_s_per_byte)

        work = Workload(question.work.shapes, self.base_s, units=question.work.units)
        if self.scheme in COORDINATED:
            spread = probe.compute.spread
            return predict_coordinated(
                self.scheme, work, here(question.cluster), spread, self.slowness
            )
        pace = question.pace(self.scheme) * slower
        if self.local is not None and self.local.reducer:
            pace += question.pace(self.local.reducer) * slower
        if is_sharded(self.scheme):
            return predict_sharded(self.scheme, pace, work, here(question.whole_cluster))
        law = law_of(self.scheme, settings=self.settings)
        return predict(law, pace, work, here(question.cluster), self.plan)

    @property
    def slowness(self) -> list[float]:
        """Of workers: in the lab, nodes that are on the idle coordinator's core have its part of it too."""
        nodes, cores = self.setting["nodes"], set(range(self.cores))
        homes = [cores_of(node, nodes, cores) for node in range(nodes)]
        sharing = homes.count(homes[0])
        return [(sharing - 1) / sharing if home == homes[0] else 1.0 for home in homes[1:]]

    @property
    def carried(self) -> float:
        """What a run of so few steps has of its transfers: those that end after its last step are not in it."""
        plan = self.plan
        if plan is None:
            return 1.0
        steps, every = int(self.measured["steps"]), plan.sync_every
        rounds = sum(share * ((steps - delay) // every) for share, delay in plan.parts)
        return every * rounds / steps

    def step_s(self, found: Prediction) -> float:
        """Of a run of so few steps, which waits for those transfers alone."""
        return found.compute_s + found.again_s + self.carried * found.exposed_s


def cells(path: Path) -> list[Cell]:
    """Those of a comparison that finished."""
    comparison = json.loads(path.read_text())
    medians = {
        c["name"]: {k: v["median"] for k, v in (c["figures"] or {}).items() if v is not None}
        for c in comparison["configurations"]
    }
    noop = medians.pop(NOOP)["step_seconds"]
    inside = medians.pop(HSDP + NOOP, {}).get("step_seconds", noop)
    return [
        Cell(
            path.stem,
            name,
            comparison["setting"],
            measured,
            noop,
            inside if name.startswith(HSDP) else noop,
            comparison["machine"]["cores"],
        )
        for name, measured in medians.items()
        if measured
    ]


probe_at = cache(load_probe)


def probe_for(probes: Path, cell: Cell) -> tuple[Probe, bool]:
    """The probe of the machine and the time of the cell, as near as there is one; and whether it is of its links."""
    nodes, per_node = cell.setting["nodes"], cell.setting["ranks_per_node"]
    folder = next(
        (probes / f for name, f in ALONGSIDE.items() if cell.comparison.startswith(name)), probes
    )
    # Of two ranks on each of two nodes, in want of that of four nodes.
    for ranks in (f"{nodes}x{per_node}", f"{nodes * per_node}"):
        own = folder / f"{ranks}_nodes_{cell.setting['link']}.json"
        if own.exists():
            return probe_at(own), True
    return probe_at(folder / f"{nodes * per_node}_nodes.json"), False
