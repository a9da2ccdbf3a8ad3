"""Memory that a method with local updates adds to a replica, per parameter, against what its docstring says.

Two ranks, launch's GPT at 12 million parameters, gradients drawn at random. Three looks: the bytes of the method's state
between rounds; the growth of the process between rounds (resident set; Linux only); its growth at the highest point of
a round, where pseudo-gradients are made and reduced.

With ``--device cuda`` (one rank, which has nobody to talk to) growth is that of the memory that torch has allocated on
the GPU, and each method that has anchors runs a second time with ``options.offload``: what is left on the GPU then.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import model
import torch
import torch.distributed as dist
from report import Result, Target, main

from commkit.outer import OuterScheme
from commkit.schemes import make_scheme

TOLERANCE = 0.01  # bytes per parameter, of state
NOISE = 0.5  # the same, of the process
EVERY = 2
E3M0 = {"name": "compose", "aggregator": {"name": "two_shot", "compressor": "e3m0"}}

# What the docstrings claim between rounds, in bytes per parameter, as (W ranks) -> bytes; and the scheme's block.
_Claim = Callable[[int], float]
CLAIMS: dict[str, tuple[dict[str, Any], _Claim]] = {
    "local_sgd": ({}, lambda w: 0),
    "local_sgd, bf16": ({"reducer": {"name": "bf16"}}, lambda w: 4),
    "post_local_sgd": ({"switch_step": 0}, lambda w: 0),
    "diloco": ({}, lambda w: 8),
    "diloco, int8": ({"reducer": {"name": "int8", "min_numel": 0}}, lambda w: 8),
    "diloco, int4": ({"reducer": {"name": "int4", "min_numel": 0}}, lambda w: 8 + 4 + 4 / w),
    "streaming_diloco": ({"fragments": 2, "reducer": E3M0}, lambda w: 8),
    "co2": ({}, lambda w: 12),
    "edit": ({}, lambda w: 8),
    "noloco": ({}, lambda w: 8),
    "gossip": ({}, lambda w: 0),
    "push_sum": ({}, lambda w: 4),
    "a2cid2": ({}, lambda w: 4),
    "monna": ({"num_faulty": 0}, lambda w: 4),
    "single_merge": ({"p_gossip": 1.0}, lambda w: 0),
    "dfedsam_mgs": ({"rho": 0.0, "gossip_steps": 1}, lambda w: 0),
}
ANCHORED = ("diloco", "streaming_diloco", "co2", "edit", "noloco")


def on_rank(
    rank: int, world_size: int, cases: list[tuple[str, bool]], device: str
) -> list[dict[str, Any]]:
    return [_one(rank, world_size, name, offload, torch.device(device)) for name, offload in cases]


def _one(
    rank: int, world_size: int, name: str, offload: bool, device: torch.device
) -> dict[str, Any]:
    net = model.build().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    size = sum(p.numel() for p in net.parameters())
    knobs, claim = CLAIMS[name]
    options = {"offload": offload, "final_sync": name == "single_merge"}  # which is that merge
    block = {"name": name.split(",")[0], "sync_every": EVERY, "options": options, **knobs}
    scheme = make_scheme(block)
    assert isinstance(scheme, OuterScheme)
    plain, plain_peak = _rounds(net, optimizer, device)
    with scheme(net, optimizer) as outer:
        grown, peak = _rounds(net, optimizer, device)
        state = sum(x.numel() * x.element_size() for x in outer.kept_tensors())
        on_gpu = sum(x.numel() * x.element_size() for x in outer.kept_tensors() if x.is_cuda)
    return {
        "claimed": claim(world_size),
        "state": state / size,
        "of it on the GPU": on_gpu / size,
        "growth": (grown - plain) / size,
        "growth at peak": (peak - plain_peak) / size,
    }


def _rounds(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, int]:
    """Three rounds; then bytes between rounds, and the highest in the last one."""
    token = torch.zeros(1, 2, dtype=torch.int64, device=device)
    for step in range(3 * EVERY):
        if step == 3 * EVERY - 1:
            _settle(device)
            _reset_peak(device)
        with torch.no_grad():
            net(token, token)  # EDiT synchronises in the forward pass
            for p in net.parameters():
                p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
    with torch.no_grad():
        net(token, token)
    optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")
    _settle(device)
    now = torch.cuda.memory_allocated() if device.type == "cuda" else _resident("VmRSS")
    return now, peak


def _settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    else:
        ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(options: argparse.Namespace) -> Result:
    names = ["diloco", "gossip"] if options.quick else list(CLAIMS)
    cuda = options.device == "cuda"
    cases = [(name, False) for name in names]
    cases += [(name, True) for name in ANCHORED if cuda and name in names]
    outcomes = harness.run_ranks(
        on_rank,
        cases,
        options.device,
        deadline_s=600,
        world_size=1 if cuda else harness.WORLD_SIZE,
        environment={"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed tensors go back at once
    )
    told = list(zip(*harness.values(outcomes), strict=True))
    settings = {**model.settings(), "optimizer": "sgd", "device": options.device}
    result = Result("memory_outer", settings)
    rows, honest, quiet = [], [], []
    for (name, offload), ranks in zip(cases, told, strict=True):
        mean = {key: sum(r[key] for r in ranks) / len(ranks) for key in ranks[0]}
        honest.append(abs(mean["state"] - mean["claimed"]) <= TOLERANCE)
        expected = 0.0 if offload else mean["claimed"]
        quiet.append(abs(mean["growth"] - expected) <= NOISE)
        row: dict[str, Any] = {"method": name + (", offload" if offload else "")}
        row |= {"docstring B": mean["claimed"], "state B": round(mean["state"], 3)}
        row |= {"of it on the GPU B": round(mean["of it on the GPU"], 3)} if cuda else {}
        row |= {
            "growth B": round(mean["growth"], 2),
            "growth at peak B": round(mean["growth at peak"], 2),
            "as said": honest[-1] and quiet[-1],
        }
        rows.append(row)
    result.tables["bytes per parameter, mean of the ranks"] = rows
    for what, met in (
        ("state memory == the docstring's, every method", honest),
        (f"growth within {NOISE} B of it (0 if offloaded), every method", quiet),
    ):
        result.targets.append(Target(what, None, f"{sum(met)} of {len(met)}", all(met)))
    return result


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        lambda parser: parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu"),
    )
