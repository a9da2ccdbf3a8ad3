"""Memory that a scheme adds to a process, per compressed parameter, against what its docstring says.

Three looks at a DDP run of the model: the bytes of the reducer's state, the growth of the process between
steps (resident set; Linux only), and its growth at the highest point of a step. The last two are relative to
the same model after plain DDP steps, and carry some noise of the C allocator.
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
from torch.nn.parallel import DistributedDataParallel

import commkit
from commkit.aggregators import PowerSGD
from commkit.optim import OptimizerScheme
from commkit.schemes import make_scheme
from commkit.types import TensorCtx

TOLERANCE = 0.01  # bytes per compressed parameter, of state
NOISE = 0.5  # the same, of the resident set
_RANK = 4

# What the docstrings in commkit/schemes.py claim, in bytes per compressed parameter: (for W ranks, Q's share).
_Claim = Callable[[int, float], float]
CLAIMS: dict[str, tuple[dict[str, Any], _Claim]] = {
    "ddp": ({}, lambda w, q: 0.0),
    "fp16": ({}, lambda w, q: 0.0),
    "bf16": ({}, lambda w, q: 0.0),
    "int8": ({}, lambda w, q: 0.0),
    "int8 nearest": ({"rounding": "nearest"}, lambda w, q: 4 + 4 / w),
    "int4": ({}, lambda w, q: 4 + 4 / w),
    "sign": ({}, lambda w, q: 4 + 4 / w),
    "topk": ({}, lambda w, q: 4.0),
    "randomk": ({}, lambda w, q: 4.0),
    "randomk without feedback": ({"error_feedback": False}, lambda w, q: 0.0),
    "powersgd": ({"rank": _RANK}, lambda w, q: 4 + q),
    "ef21": ({}, lambda w, q: 8.0),
    "ef21 with momentum": ({"momentum": 0.1}, lambda w, q: 12.0),
    "econtrol": ({}, lambda w, q: 12.0),
    "dgc": ({}, lambda w, q: 8.0),
    "dgc with weight decay": ({}, lambda w, q: 12.0),
    "demo": ({}, lambda w, q: 4.0),
    "onebit_adam": ({"freeze_step": 1}, lambda w, q: 12 + 4 / w),
    "onebit_lamb": ({"freeze_step": 1}, lambda w, q: 16 + 4 / w),
    "zero_one_adam": ({"var_freeze_step": 1}, lambda w, q: 20 + 4 / w),
}
WITH_DECAY = "dgc with weight decay"


def on_rank(rank: int, world_size: int, names: list[str], steps: int) -> list[dict[str, Any]]:
    return [_one(rank, world_size, name, steps) for name in names]


def _one(rank: int, world_size: int, name: str, steps: int) -> dict[str, Any]:
    run = model.Run(model.corpus(), rank, world_size)
    knobs, claim = CLAIMS[name]
    made = make_scheme(name.split()[0], knobs)
    scheme: Any = made
    if isinstance(made, OptimizerScheme):  # in the place of an optimizer that keeps nothing
        run.optimizer = torch.optim.SGD(run.ddp.parameters(), 1e-4)
    plain, plain_peak = _steps(run, steps)
    if isinstance(made, OptimizerScheme):
        decay = 0.1 if name == WITH_DECAY else 0.0
        run.optimizer = scheme = made(run.ddp.parameters(), lr=1e-4, weight_decay=decay)
    handle = commkit.attach(run.ddp, scheme)
    resident, peak = _steps(run, steps)
    parameters, q_bytes = _compressed(run.ddp, handle.reducer)
    state = handle.state_dict()
    tensors = [x for key, x in state.items() if key != "shared/step"]
    if isinstance(made, OptimizerScheme):
        names = handle.reducer.compressed
        compressed = [p for name, p in run.ddp.module.named_parameters() if name in names]
        kept = (x for p in compressed for x in run.optimizer.state.get(p, {}).values())
        tensors += [x for x in kept if isinstance(x, torch.Tensor)]
    state_bytes = sum(x.numel() * x.element_size() for x in tensors)
    handle.close()
    per = max(parameters, 1)
    return {
        "scheme": name,
        "compressed": parameters,
        "claimed": claim(world_size, q_bytes / per),
        "state": state_bytes / per,
        "resident growth": (resident - plain) / per,
        "growth at peak": (peak - plain_peak) / per,
    }


def _compressed(ddp: DistributedDataParallel, reducer: commkit.Reducer) -> tuple[int, float]:
    """Elements that the scheme compresses, and bytes of PowerSGD's Q: 4 rank / rows per element."""
    total, q_bytes = 0, 0.0
    for name, p in ddp.module.named_parameters():
        ctx = TensorCtx(name, p.shape, p.dtype, p.device, reducer.step, reducer.seed)
        if isinstance(reducer.aggregator, PowerSGD):
            factors = reducer.aggregator.factors(p.shape)
            total += p.numel() if factors else 0
            q_bytes += 4 * factors[2] / factors[0] * p.numel() if factors else 0
        elif reducer.policy.compresses(ctx):
            total += p.numel()
    # `ddp` compresses nothing: its overhead is given per parameter of the model
    return total or sum(p.numel() for p in ddp.parameters()), q_bytes


def _steps(run: model.Run, steps: int) -> tuple[int, int]:
    """Train; then resident bytes between steps, and the highest during the last step."""
    for _ in range(steps - 1):
        run.step()
    _give_back()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    run.step()
    peak = _resident("VmHWM")
    _give_back()
    return _resident("VmRSS"), peak


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(options: argparse.Namespace) -> Result:
    names = ["ddp", "sign", "powersgd"] if options.quick else list(CLAIMS)
    outcomes = harness.run_ranks(
        on_rank,
        names,
        3,
        deadline_s=900,
        environment={"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed tensors go back at once
    )
    told = list(zip(*harness.values(outcomes), strict=True))
    result = Result("memory", {**model.settings(), "powersgd_rank": _RANK})
    rows, honest, quiet = [], [], []
    for both in told:
        mean = {k: sum(b[k] for b in both) / len(both) for k in both[0] if k != "scheme"}
        honest.append(abs(mean["state"] - mean["claimed"]) <= TOLERANCE)
        quiet.append(abs(mean["resident growth"] - mean["claimed"]) <= NOISE)
        rows.append(
            {
                "scheme": both[0]["scheme"],
                "compressed parameters": int(mean["compressed"]),
                "docstring B": round(mean["claimed"], 4),
                "state B": round(mean["state"], 4),
                "resident growth B": round(mean["resident growth"], 2),
                "growth at peak B": round(mean["growth at peak"], 2),
                "as said": honest[-1] and quiet[-1],
            }
        )
    result.tables["bytes per compressed parameter, mean of the ranks"] = rows
    for what, met in (
        ("state memory == the docstring's, every scheme", honest),
        (f"resident growth within {NOISE} B of the docstring's, every scheme", quiet),
    ):
        result.targets.append(Target(what, None, f"{sum(met)} of {len(met)}", all(met)))
    return result


if __name__ == "__main__":
    main(__doc__, measure)
