"""Bytes on the wire of every scheme, relative to an fp32 all-reduce of the same gradients.

Counted by commkit's Comm from the tensors it really sends, with the collective's factor, headers left out.
The table comes from reductions of random gradients between threads; real DDP runs over gloo then confirm
that training sends the same number.
"""

from __future__ import annotations

import argparse
from typing import Any

import harness
import model
import torch
from report import Result, Target, main

import commkit
from commkit.schemes import make_scheme
from commkit.sim import ThreadComm, run_threads

SCHEMES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "noop": {},
    "fp16": {},
    "bf16": {},
    "int8": {},
    "int4": {},
    "sign": {},
    "topk": {"density": 0.001},
    "topk density 0.01": {"density": 0.01},
    "randomk": {"density": 0.01},
    "ef21": {"density": 0.01},
    "econtrol": {"density": 0.1},
    "dgc": {"density": 0.001},
    "demo": {},
    "demo top_k 8": {"top_k": 8},
    "powersgd": {"rank": 4},
    "powersgd rank 1": {"rank": 1},
}
LIMITS = {"sign": 26.0, "topk": 120.0, "int8": 3.8}
CONFIRMED = ["ddp", "int8", "sign", "topk", "powersgd"]
_STEPS = 2  # the second one, when state exists


def _knobs(name: str) -> tuple[str, dict[str, Any]]:
    return name.split()[0], SCHEMES[name]


def _reducer(name: str, comm: ThreadComm) -> commkit.Reducer:
    made = make_scheme(*_knobs(name))
    if isinstance(made, commkit.Reducer):
        return made
    parameters = dict(model.build().named_parameters())
    optimizer = made(parameters.values(), lr=0.0)
    optimizer.bind(parameters, comm)
    return optimizer.reducer


def in_threads(name: str) -> tuple[int, int]:
    """Wire and payload bytes of rank 0 in one step."""

    def body(comm: ThreadComm) -> tuple[int, int]:
        reducer = _reducer(name, comm)
        generator = torch.Generator().manual_seed(comm.rank)
        before = (0, 0)
        for _ in range(_STEPS):
            before = (comm.bytes.wire_bytes, comm.bytes.payload_bytes)
            gradients = {
                key: torch.randn(p.shape, generator=generator)
                for key, p in model.build().named_parameters()
            }
            reducer.reduce(gradients, comm)
            reducer.end_step()
        return comm.bytes.wire_bytes - before[0], comm.bytes.payload_bytes - before[1]

    return run_threads(body, harness.WORLD_SIZE, timeout_s=120)[0]


def in_training(rank: int, world_size: int, names: list[str]) -> dict[str, int]:
    sent = {}
    for name in names:
        run = model.Run(model.corpus(), rank, world_size)
        scheme, knobs = _knobs(name)
        handle = commkit.attach(run.ddp, scheme, **knobs)
        for _ in range(_STEPS):
            run.step()
        sent[name] = handle.last_step.wire_bytes
        handle.close()
    return sent


def measure(options: argparse.Namespace) -> Result:
    names = ["ddp", *LIMITS] if options.quick else list(SCHEMES)
    trained = [name for name in CONFIRMED if name in names]
    real = harness.values(harness.run_ranks(in_training, trained, deadline_s=600))[0]
    counted = {name: in_threads(name) for name in names}
    dense = counted["ddp"][0]
    result = Result("bytes", model.settings())
    result.tables["per rank and step"] = [
        {
            "scheme": name,
            "options": ", ".join(f"{k}={v}" for k, v in SCHEMES[name].items()),
            "payload bytes": payload,
            "wire bytes": wire,
            "fewer by": round(dense / wire, 2) if wire else "all",
            "in a DDP run": real.get(name, ""),
        }
        for name, (wire, payload) in counted.items()
    ]
    result.targets = [
        Target.at_most(f"{name}: bytes / fp32 all-reduce", 1 / limit, counted[name][0] / dense)
        for name, limit in LIMITS.items()
    ]
    # Every bucket is a reduction with a finite check of its own: some bytes more than one reduction.
    off = max(abs(sent / counted[name][0] - 1) for name, sent in real.items())
    result.targets.append(Target.at_most("bytes of a DDP run / of the table, off by", 0.001, off))
    return result


if __name__ == "__main__":
    main(__doc__, measure)
