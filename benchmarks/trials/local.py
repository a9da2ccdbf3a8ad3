"""The systems with local updates, at equal tokens against synchronous training.

Outer rates and momenta are the best of what ``--tune`` tried, once for each method and with the tuning seed, which is
not among the table's (``results/convergence_tuning_local.json``); the rows of a method share them.
"""

from __future__ import annotations

from typing import Any

from trials.systems import DENSE, Recipe, System

_WARMUP = {"warmup_steps": 32}  # synchronous steps, while the learning rate rises
E3M0 = {
    "name": "compose",
    "aggregator": {
        "name": "two_shot",
        "compressor": "e3m0",
        "server_feedback": "error_feedback",
    },
    "feedback": "error_feedback",
}


def _row(
    row: str,
    note: str = "",
    sweep: tuple[Recipe, ...] = (),
    ranks: tuple[int, ...] = (4,),
    /,
    **scheme: Any,
) -> System:
    return System(
        row,
        {"options": _WARMUP, **scheme},
        "adamw",
        outer_sweep=sweep,
        ranks=ranks,
        tasks=("gpt_rounds",),
        note=note,
    )


def _grid(*pairs: tuple[float, float]) -> tuple[Recipe, ...]:
    return tuple({"outer_lr": lr, "outer_momentum": momentum} for lr, momentum in pairs)


_BOTH = (4, 8)
_DILOCO = _grid((0.7, 0.9), (0.4, 0.9), (0.7, 0.5), (1.0, 0.0))
_STREAMING = _grid((0.4, 0.9), (0.7, 0.5), (1.0, 0.0))
_LATE = _grid((0.7, 0.5), (0.7, 0.0), (1.0, 0.0))
_CO2 = (
    {"staleness_gap": "adaptive"},
    {"staleness_gap": 1.0},
    {"staleness_gap": 1.0, "outer_momentum": 0.3},
)
_EDIT = _grid((0.7, 0.8), (1.0, 0.5), (1.0, 0.0))
_NOLOCO = (
    {"alpha": 0.5, "beta": 0.7},
    {"alpha": 0.3, "beta": 1.0},
    {"alpha": 0.0, "beta": 1.0},
)
_PENALTY = {"warm_rounds": 5, "weighting": "relative"}

LOCAL_SYSTEMS: tuple[System, ...] = (
    System(f"{DENSE}adamw", {"name": "ddp"}, "adamw", ranks=_BOTH, tasks=("gpt_rounds",)),
    _row("local_sgd_16", "", (), _BOTH, name="local_sgd", sync_every=16),
    _row("local_sgd_64", name="local_sgd", sync_every=64),
    _row("diloco_16", "", (), _BOTH, name="diloco", sync_every=16),
    _row("diloco_64", "", _DILOCO, _BOTH, name="diloco", sync_every=64),
    _row("diloco_256", "two rounds in all", (), _BOTH, name="diloco", sync_every=256),
    _row("diloco_64_int8", name="diloco", sync_every=64, reducer={"name": "int8"}),
    _row(
        "streaming_64",
        "2 fragments, E3M0 4-bit floats, used 2 steps late",
        _STREAMING,
        name="streaming_diloco",
        sync_every=64,
        fragments=2,
        overlap=2,
        reducer=E3M0,
    ),
    _row("co2_16", "one round late", _CO2, _BOTH, name="co2", sync_every=16),
    _row("co2_64", "one round late", name="co2", sync_every=64),
    _row(
        "dilocox_16",
        "one round late, rank 8 in 4 bits",
        _LATE,
        name="dilocox",
        sync_every=16,
        rank=8,
    ),
    _row("edit_16", "", _EDIT, _BOTH, name="edit", sync_every=16, penalty=_PENALTY),
    _row("edit_64", "", name="edit", sync_every=64, penalty=_PENALTY),
    _row("noloco_16", "pairs; merged at the end", _NOLOCO, _BOTH, name="noloco", sync_every=16),
    _row("noloco_64", "pairs; merged at the end", name="noloco", sync_every=64),
    _row(
        "gossip_1",
        "one-peer exponential graph, every step; merged at the end",
        name="gossip",
        topology="one_peer_exponential",
    ),
    _row(
        "single_merge",
        "each pair of a step meets with probability 0.2; merged at the end",
        name="single_merge",
    ),
)
