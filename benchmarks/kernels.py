"""Each operator's time as a ratio to one copy of the same tensor, the compiled kernel beside the reference.

One process, by turns, on one and on two threads. The copy has its memory given; so that operators which
return a new tensor have theirs too, the C library is told to keep what is freed, and each timed call follows
one that is not. The figure is the median of the rounds' ratios. With ``--device cuda``: see
``cuda_kernels.py``.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import platform
from collections.abc import Callable
from statistics import median
from typing import Any

import cuda_kernels
import torch
from harness import Ratio, interleave
from report import Result, Target, main

from commkit import ops
from commkit.compressors import TopK
from commkit.compressors.dct_topk import dct_basis
from commkit.compressors.dynamic_tree import dynamic_levels
from commkit.feedback import MomentumCorrection
from commkit.ops import native, reference
from commkit.types import TensorCtx

PEERS, BLOCK, TENSORS = 8, 256, 1000
TILE, TOP_K = 4096, 32
Arm = Callable[[], object]

TARGETS = {
    "sign pack + error feedback": 1.2,
    f"unpack-accumulate of {PEERS} peers": 0.9,
    "int8 quantise": 0.75,
    "int8 dequantise": 0.85,
    "top-k 1 %, sampled": 2.0,
    "DGC step, 1 %": 3.0,
}


def arms(module: Any, x: torch.Tensor, out: torch.Tensor) -> dict[str, Arm]:
    """What is timed, with the operators of ``module``. ``out`` is written over."""
    n = x.numel()
    bits, scale = ops.encode_signs(x)
    scales = scale.repeat(PEERS)

    residual, late = torch.zeros(n), torch.zeros(n)
    both = [torch.zeros(n), torch.zeros(n)]
    own, size = torch.zeros_like(bits), torch.ones(1)
    # Each in memory of its own, as an exchange leaves them.
    peers = list(bits.repeat(PEERS, 1))
    row_scales = scales.view(PEERS, 1)

    # What was sent is taken on the way of the next step.
    def sign_step() -> None:
        module.foreach_encode_signs_compensated_(own, size, [residual], [x], 1.0, size.clone())

    # So do schemes, whose residual stays as it was, in case that the step is given up.
    def sign_step_elsewhere() -> None:
        module.foreach_encode_signs_of_sums_(own, size, [both[0]], [both[1]], [x], size.clone())
        both.reverse()

    def sign_step_at_server() -> None:
        module.foreach_reencode_signs_(
            own, size, [both[0]], [both[1]], size.clone(), peers, row_scales
        )
        both.reverse()

    def sign_step_in_two_passes() -> None:
        packed, sent = module.encode_signs_compensated_(late, x, 1.0, None)
        module.accumulate_signs_(late, [packed], -sent)

    many = x.tensor_split(TENSORS)
    all_bits = torch.zeros(sum((part.numel() + 7) // 8 for part in many), dtype=torch.uint8)
    all_scales = torch.zeros(TENSORS)

    def blocks(width: int) -> dict[str, Arm]:
        codes, sizes = ops.quantize_blocks(x, width, BLOCK, False, 0)
        name = f"int{width}"
        return {
            f"{name} quantise": lambda: module.quantize_blocks(x, width, BLOCK, False, 0),
            f"{name} quantise, stochastic": lambda: module.quantize_blocks(
                x, width, BLOCK, True, 1
            ),
            f"{name} dequantise": lambda: module.write_blocks_(
                out, [codes], [sizes], width, BLOCK, 1
            ),
            f"{name} dequantise-accumulate": lambda: module.accumulate_blocks_(
                out, [codes], [sizes], width, BLOCK, 1
            ),
        }

    levels = dynamic_levels(x.device)
    leaves, sizes = ops.quantize_codebook(x, levels, BLOCK, False, 0)
    powers, top = ops.quantize_natural(x, 1)
    e3m0, peaks = ops.quantize_e3m0(x, BLOCK, False, 0)
    u, v, d = torch.zeros(n), torch.ones(n), x.abs().add_(0.1)
    after = torch.zeros(n), torch.zeros(n)
    tiles = x[: n // TILE * TILE].view(-1, TILE)
    places = ops.largest_of_rows(tiles, TOP_K)
    side = dct_basis(math.isqrt(TILE), x.dtype, x.device)
    sent = tiles.gather(1, places), places.to(torch.int16)

    largest = x.abs().amax()
    ternary = ops.ternarize(x, largest, 1)
    packed = list(ops.pack_ternary(ternary).repeat(PEERS, 1))
    threshold = ops.sample_threshold(x, n // 100, 1)
    found = ops.select_at_least(x, threshold)
    return {
        "sign pack": lambda: module.pack_signs(x),
        "sign pack + l1": lambda: module.encode_signs(x),
        f"sign pack + l1 of {TENSORS} tensors": lambda: module.foreach_encode_signs_(
            all_bits, all_scales, many
        ),
        "sign pack + error feedback": sign_step,
        "sign pack + error feedback, elsewhere": sign_step_elsewhere,
        "sign pack + error feedback, two passes": sign_step_in_two_passes,
        f"unpack {PEERS} peers, pack + error feedback": sign_step_at_server,
        "sign write": lambda: module.write_signs_(out, [bits], scale),
        "sign accumulate": lambda: module.accumulate_signs_(out, [bits], scale),
        f"unpack-accumulate of {PEERS} peers": lambda: module.accumulate_signs_(out, peers, scales),
        **blocks(8),
        "QSGD quantise": lambda: module.quantize_buckets(x, 127, 2 * BLOCK, True, 1),
        **blocks(4),
        "E3M0 quantise": lambda: module.quantize_e3m0(x, BLOCK, False, 0),
        "E3M0 quantise, stochastic": lambda: module.quantize_e3m0(x, BLOCK, True, 1),
        "E3M0 dequantise": lambda: module.write_e3m0_(out, [e3m0], [peaks], BLOCK, 1),
        "8-bit tree quantise": lambda: module.quantize_codebook(x, levels, BLOCK, False, 0),
        "8-bit tree quantise, stochastic": lambda: module.quantize_codebook(
            x, levels, BLOCK, True, 1
        ),
        "8-bit tree dequantise": lambda: module.dequantize_codebook(leaves, levels, sizes, BLOCK),
        "natural quantise": lambda: module.quantize_natural(x, 1),
        "natural dequantise": lambda: module.dequantize_natural(powers, top, x.dtype),
        "ternarise": lambda: module.ternarize(x, largest, 1),
        "ternary pack": lambda: module.pack_ternary(ternary),
        f"ternary unpack-accumulate of {PEERS} peers": lambda: module.accumulate_blocks_(
            out, packed, [largest.view(1)] * PEERS, 2, n, PEERS
        ),
        "uniform noise": lambda: module.uniform_noise(n, 1, x.device),
        "sampled threshold": lambda: module.sample_threshold(x, n // 100, 1),
        "select 1 %": lambda: module.select_at_least(x, threshold),
        "scatter 1 %": lambda: module.scatter_accumulate_(out, found, x[: found.numel()]),
        f"largest {TOP_K} of {TILE}": lambda: module.largest_of_rows(tiles, TOP_K),
        f"tiles from {TOP_K} of {TILE}": lambda: module.combine_tiles_(
            out[: tiles.numel()], [sent[1]], [sent[0]], side, side, 1, False
        ),
        "momentum correction": lambda: module.correct_momentum_(*after, x, u, v, 0.9, False),
        "frozen Adam": lambda: module.frozen_adam_(out, u, x, d, 0.999, 1e-3),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", metavar="WORDS", default="", help="operators with this in their name"
    )
    parser.add_argument("--no-reference", action="store_true", help="compiled kernels alone")


def dgc_step(x: torch.Tensor, ctx: TensorCtx) -> Arm:
    """Momentum correction, selection, and masking of what is sent, as the reducer has it done."""
    feedback, compressor = MomentumCorrection(), TopK(0.01)

    def step() -> None:
        if feedback.send(x, "w", compressor, ctx) is None:
            raise RuntimeError(f"{compressor} has no fused path for {ctx.numel} elements")
        feedback.commit(True)

    return step


def dgc_step_in_parts(x: torch.Tensor, ctx: TensorCtx) -> Arm:
    """The same without the fused path."""
    feedback, compressor = MomentumCorrection(), TopK(0.01)

    def step() -> None:
        total = feedback.compensate(x, "w")
        payload = compressor.compress(total, ctx)
        compressor.subtract_(total, payload, ctx)
        feedback.stage("w", total, payload[0])
        feedback.commit(True)

    return step


def keep_freed_memory() -> None:
    """Blocks up to 32 MiB, as much as glibc allows, come from memory that is never given back."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        if not (libc.mallopt(mmap_threshold, 32 << 20) and libc.mallopt(trim_threshold, 2**31 - 1)):
            raise RuntimeError("mallopt() refuses what malloc.h says that it takes")


def measure(options: argparse.Namespace) -> Result:
    if options.device == "cuda":
        return cuda_kernels.measure(options, dgc_step)
    keep_freed_memory()
    n = 250_000 if options.quick else 25_000_000
    rounds, slow_rounds = (1, 1) if options.quick else (21, 2)
    generator = torch.Generator().manual_seed(0)
    x, out = torch.randn(n, generator=generator), torch.zeros(n)
    copy = {"memcpy": lambda: out.copy_(x)}
    ctx = TensorCtx("w", x.shape, x.dtype, x.device, 0, 0)
    top_k = {
        "top-k 1 %, sampled": lambda: TopK(0.01, "sampled").compress(x, ctx),
        "DGC step, 1 %": dgc_step(x, ctx),
        "DGC step, 1 %, in parts": dgc_step_in_parts(x, ctx),
    }
    result = Result("kernels", {"elements": n, **native.status()})

    def chosen(every: dict[str, Arm]) -> dict[str, Arm]:
        return {**copy, **{name: arm for name, arm in every.items() if options.only in name}}

    for threads in (1, 2):
        torch.set_num_threads(threads)
        title = f"{threads} thread{'s' if threads > 1 else ''}"
        fast = interleave(chosen({**arms(ops, x, out), **top_k}), rounds, 1, lambda: None, lead=1)
        slow = {}
        if not options.no_reference:
            slow = interleave(chosen(arms(reference, x, out)), slow_rounds, 1, lambda: None)
        rows = []
        for name, timing in fast.items():
            ratio = Ratio.of(timing, fast["memcpy"])
            plain = Ratio.of(slow[name], slow["memcpy"]).median if name in slow else ""
            rows.append(
                {
                    "operator": name,
                    "ms, median": round(median(timing.wall) * 1e3, 2),
                    "over memcpy": round(ratio.median, 3),
                    "min": round(ratio.low, 3),
                    "max": round(ratio.high, 3),
                    "best/best": round(ratio.best, 3),
                    "reference over memcpy": round(plain, 2) if plain else "",
                }
            )
            if name in TARGETS:
                what = f"{name}, over memcpy, {title}"
                result.targets.append(Target.at_most(what, TARGETS[name], ratio.median))
        result.tables[title] = rows
    if not native.served():
        result.notes.append(f"there are no compiled kernels: {native.status()['library']}")
    return result


if __name__ == "__main__":
    main(__doc__, measure, add_options)
