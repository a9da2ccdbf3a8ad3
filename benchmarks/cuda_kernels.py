"""The CUDA side of ``kernels.py``: what fraction of the copy bandwidth of the same run each operator reaches.

The bytes of an operator are those that it cannot avoid moving, each input and output once. Kernels are timed by
events of the stream: on 25M floats, where the launches count, and on 268M, where they do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from report import Result, Target

from commkit import ops
from commkit.compressors import TopK
from commkit.ops import native, reference
from commkit.types import TensorCtx

PEERS, BLOCK, STEPS = 8, 256, 10
DGC_STEP = "DGC step"  # momentum correction, selection, masking
SMALL, LARGE = 25_000_000, 1 << 28
Arm = Callable[[], object]
MakeStep = Callable[[torch.Tensor, TensorCtx], Arm]

TARGETS = {
    "sign pack": 0.85,
    "sign pack + error feedback": 0.85,
    f"unpack-accumulate of {PEERS} peers": 0.85,
    "int8 quantise": 0.85,
    "int8 dequantise": 0.85,
    DGC_STEP: 0.6,
}
TOP_K_SPEEDUP = 5.0


def arms(module: Any, x: torch.Tensor, out: torch.Tensor) -> dict[str, tuple[Arm, float]]:
    """What is timed, with the operators of ``module``, and its bytes per element. ``out`` is written over."""
    n = x.numel()
    bits, scale = ops.encode_signs(x)
    scales = scale.repeat(PEERS)
    largest = x.abs().amax()
    ternary = ops.ternarize(x, largest, 1)
    threshold = ops.sample_threshold(x, n // 100, 1)
    found = ops.select_at_least(x, threshold)
    ones = torch.ones_like(x)
    after = torch.empty_like(x), torch.empty_like(x)
    own, size, columns = torch.empty_like(bits), scale.clone(), scales.view(PEERS, 1)

    # What was sent is taken on the way of the next step, as schemes do it.
    def sign_step() -> None:
        module.foreach_encode_signs_of_sums_(own, size, [after[0]], [ones], [x], scale)

    def sign_step_at_server() -> None:
        module.foreach_reencode_signs_(
            own, size, [after[0]], [ones], scale, [bits] * PEERS, columns
        )

    def blocks(width: int) -> dict[str, tuple[Arm, float]]:
        codes, sizes = ops.quantize_blocks(x, width, BLOCK, False, 0)
        name, coded = f"int{width}", width / 8 + 4 / BLOCK
        rows = ([codes], [sizes], width, BLOCK, 1)
        return {
            f"{name} quantise": (
                lambda: module.quantize_blocks(x, width, BLOCK, False, 0),
                4 + coded,
            ),
            f"{name} quantise, stochastic": (
                lambda: module.quantize_blocks(x, width, BLOCK, True, 1),
                4 + coded,
            ),
            f"{name} dequantise": (lambda: module.write_blocks_(out, *rows), 4 + coded),
            f"{name} dequantise-accumulate of {PEERS} peers": (
                lambda: module.accumulate_blocks_(
                    out, [codes] * PEERS, [sizes] * PEERS, width, BLOCK, PEERS
                ),
                8 + PEERS * coded,
            ),
        }

    return {
        "sign pack": (lambda: module.pack_signs(x), 4 + 1 / 8),
        "sign pack + l1": (lambda: module.encode_signs(x), 4 + 1 / 8),
        "sign pack + error feedback": (sign_step, 12 + 1 / 8),
        f"unpack {PEERS} peers, pack + error feedback": (sign_step_at_server, 8 + (PEERS + 1) / 8),
        "sign write": (lambda: module.write_signs_(out, [bits], scale), 4 + 1 / 8),
        f"unpack-accumulate of {PEERS} peers": (
            lambda: module.accumulate_signs_(out, [bits] * PEERS, scales),
            8 + PEERS / 8,
        ),
        **blocks(8),
        **blocks(4),
        "E3M0 quantise, stochastic": (
            lambda: module.quantize_e3m0(x, BLOCK, True, 1),
            4 + 1 / 2 + 4 / BLOCK,
        ),
        "ternarise": (lambda: module.ternarize(x, largest, 1), 5),
        "ternary pack": (lambda: module.pack_ternary(ternary), 1 + 1 / 4),
        "uniform noise": (lambda: module.uniform_noise(n, 1, x.device), 4),
        "select 1 %": (lambda: module.select_at_least(x, threshold), 4),
        "scatter 1 %": (
            lambda: module.scatter_accumulate_(out, found, x[: found.numel()]),
            found.numel() / n * 20,
        ),
        "momentum correction": (
            lambda: module.correct_momentum_(*after, x, out, out, 0.9, False),
            20,
        ),
        "frozen Adam": (lambda: module.frozen_adam_(out, ones, x, ones, 0.99, 1e-3), 20),
    }


def timed(arms: Mapping[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, one entry per round; arms take turns, and the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(STEPS):
                arm()
            end.record()
            end.synchronize()
            if turn:
                seconds[name].append(start.elapsed_time(end) / 1e3 / STEPS)
    return seconds


def table(result: Result, n: int, rounds: int, dgc_step: MakeStep) -> None:
    """Adds the table for n elements; targets are judged on the larger one."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(n, generator=generator, device="cuda")
    out = torch.zeros_like(x)
    mine, plain = arms(ops, x, out), arms(reference, x, out)
    mine[DGC_STEP] = dgc_step(x, TensorCtx("w", x.shape, x.dtype, x.device, 0, 0)), 20
    copy: dict[str, Arm] = {"copy": lambda: out.copy_(x)}
    fast = timed({**copy, **{name: arm for name, (arm, _) in mine.items()}}, rounds)
    slow = timed({**copy, **{name: arm for name, (arm, _) in plain.items()}}, 1)
    bandwidth = 8 * n / min(fast["copy"])
    rows: list[dict[str, Any]] = [
        {"operator": "copy", "us": round(min(fast["copy"]) * 1e6, 1), "GB/s": bandwidth / 1e9}
    ]
    for name, (_, size) in mine.items():
        best = size * n / min(fast[name]) / bandwidth
        rows.append(
            {
                "operator": name,
                "us": round(min(fast[name]) * 1e6, 1),
                "GB/s": size * n / min(fast[name]) / 1e9,
                "of the copy's, best": round(best, 3),
                "median": round(size * n / median(fast[name]) / bandwidth, 3),
                "reference": round(size * n / min(slow[name]) / bandwidth, 3)
                if name in slow
                else "",
            }
        )
        if n >= SMALL and name in TARGETS:
            what = f"{name}, {n} floats, fraction of the copy's bandwidth"
            reached = best >= TARGETS[name]
            result.targets.append(
                Target(f"{what} >= {TARGETS[name]}", None, round(best, 3), reached)
            )
    result.tables[f"{n} floats"] = rows


def top_k(result: Result, n: int, rounds: int) -> None:
    """1 % by a sampled threshold, against torch.topk."""
    x = torch.randn(n, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    ctx = TensorCtx("w", x.shape, x.dtype, x.device, 0, 0)
    both: dict[str, Arm] = {
        "sampled": lambda: TopK(0.01, "sampled").compress(x, ctx),
        "torch.topk": lambda: x.abs().topk(n // 100, sorted=False),
    }
    seconds = {name: min(each) for name, each in timed(both, rounds).items()}
    speedup = seconds["torch.topk"] / seconds["sampled"]
    result.tables[f"top-k 1 % of {n} floats"] = [
        {"by": name, "us": round(each * 1e6, 1)} for name, each in seconds.items()
    ]
    if n >= SMALL:
        what = f"top-k 1 % of {n} floats, times as fast as torch.topk >= {TOP_K_SPEEDUP}"
        reached = speedup >= TOP_K_SPEEDUP
        result.targets.append(Target(what, None, round(speedup, 2), reached))


def measure(options: argparse.Namespace, dgc_step: MakeStep) -> Result:
    if not native.served("cuda"):
        raise SystemExit(f"there are no compiled CUDA kernels: {native.status()['CUDA library']}")
    result = Result("kernels-cuda", {"device": torch.cuda.get_device_name(), **native.status()})
    rounds = 2 if options.quick else 9
    for n in (1_000_000,) if options.quick else (SMALL, LARGE):
        table(result, n, rounds, dgc_step)
        top_k(result, n, rounds)
    return result
