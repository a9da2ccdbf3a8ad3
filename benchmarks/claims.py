"""The papers' claims about time and bytes, from the scenarios of configs/scenarios/ and the cost model: the paper's figure and ours.

    python benchmarks/claims.py [--json FILE]

What a scheme sends is learnt from its own code; links are those of the claim; computing takes what the scenario says, which
papers mostly leave open: where a figure hinges on it, the row says so. Figures for stragglers are those of
stragglers_simulated.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import harness
from report import Result, Target, main

from commkit.cost.cluster import Cluster, Link
from commkit.cost.collectives import hops
from commkit.cost.run import GATHERS
from commkit.cost.scenario import ComputePart, Scenario, load_scenario
from commkit.cost.sharded import flow_of
from commkit.cost.simulate import Outcome, simulate
from commkit.schemes import make_scheme
from commkit.sharded import PartitionScheme, ShardedScheme

SCENARIOS = harness.ROOT / "configs" / "scenarios"
STRAGGLERS = harness.ROOT / "benchmarks" / "results" / "stragglers_simulated.json"
QUICKEST = 60.0  # seconds: 1,024 workers x 1,000 rounds


@dataclass(frozen=True)
class Claim:
    """
    Args:
        what: is claimed, and of what.
        paper: its figure.
        ours: the same, here.
        reproduced: whether they agree in the sense of ``why``.
        why: what the agreement or its lack rests on.
    """

    what: str
    paper: str
    ours: str
    reproduced: bool
    why: str

    @property
    def row(self) -> dict[str, Any]:
        return vars(self)


def outcomes(name: str, **changes: Any) -> dict[str, Outcome]:
    """By scheme: a scenario with some fields changed."""
    scenario = load_scenario(SCENARIOS / f"{name}.yaml")
    return {one.scheme: one for one in simulate(changed(scenario, **changes))}


def changed(
    scenario: Scenario, rate: str | None = None, latency: str | None = None, **fields: Any
) -> Scenario:
    """A copy; ``rate`` and ``latency`` are the link's."""
    told = {"rate": rate, "latency": latency}
    link = {name: text for name, text in told.items() if text is not None}
    if link:
        fields["link"] = scenario.link.model_copy(update=link)
    return scenario.model_copy(update=fields)


def noloco() -> Claim:
    ratios = {}
    for nodes in (16, 64, 256, 1024):
        found = outcomes("noloco", nodes=nodes, rounds=50)
        ratios[nodes] = found["diloco"].sync_s / found["noloco"].sync_s
    told = ", ".join(f"{ratio:.1f}x at {nodes}" for nodes, ratio in ratios.items())
    return Claim(
        "NoLoCo's synchronisation against DiLoCo's all-reduce, 16 to 1,024 workers",
        "about 10x with hundreds of workers; the advantage grows as log W",
        told,
        ratios[256] >= 8 and ratios[1024] > ratios[256],
        "the all-reduce is a ring here, whose latency grows as W, while the paper's is a tree's: ours grows faster",
    )


def dilocox() -> Claim:
    """The paper gives its link's rate, not its latency, nor what a step computes."""
    found = outcomes("dilocox_107b")
    late = found["dilocox"]
    full, half = (found[name].step_s / late.step_s for name in ("ddp", "bf16"))
    compute = late.step_s * late.goodput
    waits = {name: found[name].step_s - compute for name in ("ddp", "bf16")}
    needed = {name: wait / (357 - 1) for name, wait in waits.items()}
    far, pair = outcomes("dilocox_107b", latency="10ms"), outcomes("dilocox_107b", nodes=2)
    distant, two = (one["ddp"].step_s / one["dilocox"].step_s for one in (far, pair))
    return Claim(
        "DiLoCoX, 107B over 1 Gbit/s, speed against plain all-reduce",
        "357x",
        f"{full:.0f}x against float32, {half:.0f}x against 16-bit gradients; {distant:.0f}x with 10 ms in place of 0.2 ms, "
        f"{two:.0f}x with 2 replicas in place of 20",
        0.8 * 357 <= full <= 1.2 * 357,
        "its transfers are hidden, so that the gain is an all-reduce's seconds over a step's compute, which the paper does not give: "
        f"357x is {needed['ddp']:.0f} s of compute with float32 gradients and {needed['bf16']:.0f} s with 16-bit ones (the scenario "
        f"has {compute:.0f} s; at 8 GPUs of 312 TFLOPS to a replica, 40 % used, {tokens(compute):,.0f} tokens). It does not give the "
        "latency either. Machines of one cluster whose rate is limited have 0.2 ms between them; across sites plain DDP also "
        "pays 38 messages for each bucket of 25 MiB, which larger buckets would save",
    )


def tokens(seconds: float) -> float:
    """That a replica of 107B on 8 GPUs, 40 % used, takes so long for: six operations for each parameter and token."""
    return seconds * 8 * 0.4 * 312e12 / (6 * 107e9)


def onebit_adam() -> Claim:
    gains = {}
    for rate in ("1gbit", "4gbit", "10gbit", "40gbit", "100gbit"):
        found = outcomes("onebit_adam", rate=rate, rounds=50)
        gains[rate] = found["fp16"].step_s / found["onebit_adam"].step_s
    return Claim(
        "1-bit Adam's throughput over Adam's (fp16 gradients), BERT-Large's size, 64 nodes of 4 ranks, against bandwidth",
        "up to 3.3x on Ethernet with 4 Gbit/s effective",
        ", ".join(f"{gain:.1f}x at {rate}" for rate, gain in gains.items()),
        0.7 * 3.3 <= gains["4gbit"] <= 1.3 * 3.3,
        "compressed stage alone, against a ring that crosses each node's link once, where every rank of a node sends signs of its "
        "own; a step computes for 0.5 s in the scenario, and a shorter one, as of small batches per rank, gains more",
    )


def streaming() -> tuple[Claim, Claim]:
    found = outcomes("streaming_diloco")
    plain, whole, default = (found[name] for name in ("ddp", "diloco", "streaming_diloco"))
    parts = found["streaming_4bit"]
    halves = outcomes("streaming_diloco", compute=halved("streaming_diloco"))
    full = whole.peak_bytes_per_s
    # Of numbers as large: what fragments alone do.
    bits = whole.bytes_per_step / parts.bytes_per_step
    fewer, faster = plain.bytes_per_step / parts.bytes_per_step, plain.step_s / parts.step_s
    twice = halves["ddp"].step_s / halves["streaming_4bit"].step_s
    return (
        Claim(
            "Streaming DiLoCo's peak bandwidth against DiLoCo's, 1B",
            "8x lower",
            f"{full / parts.peak_bytes_per_s / bits:.0f}x lower with 8 fragments, {full / default.peak_bytes_per_s:.0f}x with 4, the "
            f"default; {full / parts.peak_bytes_per_s:.0f}x with 8 in 4-bit numbers",
            full / parts.peak_bytes_per_s / bits >= 7.5,
            "the peak falls with the number of fragments",
        ),
        Claim(
            "Streaming DiLoCo against data parallel, 1B over 1 Gbit/s: bits and wall clock",
            "400x fewer bits; 125x faster",
            f"{fewer:.0f}x fewer bytes; {faster:.0f}x faster, {twice:.0f}x if a step computes half as long",
            fewer >= 400 and faster >= 125,
            "the bytes are 128 times fewer by the length of rounds and 8 times again by 4-bit numbers; the wall clock's ratio is an "
            "all-reduce's seconds over a step's compute, which is 1 s in the scenario and which the paper varies",
        ),
    )


def halved(name: str) -> ComputePart:
    """Of a scenario, in half the time."""
    compute = load_scenario(SCENARIOS / f"{name}.yaml").compute
    return compute.model_copy(update={"seconds": compute.seconds / 2})


# Sharded models: FSDP gathers weights in forward and backward, and scatters gradients.


def sharded_s(made: ShardedScheme, numel: int, cluster: Cluster, gathers: int = GATHERS) -> float:
    """Seconds of a step's communication, nothing hidden, all of it in one unit; FSDP's where the scheme has no code."""
    flow = flow_of(made, cluster.world_size)
    gather, scatter = (
        flow.seconds(calls, numel, 1, cluster) for calls in (flow.gather, flow.scatter)
    )
    return gathers * gather + scatter


def qsdp() -> Claim:
    found = {rate: outcomes("qsdp", rate=f"{rate}gbit") for rate in (10, 50, 100)}
    flat = {
        name: found[10][name].step_s / found[100][name].step_s
        for name in ("fsdp", "qsdp", "zeropp")
    }
    return Claim(
        "QSDP, 1.3B on 4 nodes of 8 ranks: a step at 10 Gbit/s over one at 100 Gbit/s",
        "about 1 (flat); FSDP up to 2.2x slower than QSDP",
        f"QSDP {flat['qsdp']:.2f}, FSDP {flat['fsdp']:.2f}, ZeRO++'s two hops {flat['zeropp']:.2f}; "
        f"FSDP/QSDP at 10 Gbit/s {found[10]['fsdp'].step_s / found[10]['qsdp'].step_s:.2f}",
        flat["qsdp"] <= 1.1,
        "gradients go straight to their owners in QSDP, so that every rank of a node sends of its own over the node's link; "
        "FSDP's ring and ZeRO++ cross it once. At 4 s of compute in a step, which the paper does not give",
    )


def partitioning() -> Claim:
    """20 billion parameters, 48 nodes of 4 pairs; link rates of the paper's machine."""
    numel, nodes = 20_000_000_000, 48
    link, inside, pair = Link(100e9, 2e-6), Link(50e9, 1e-6), Link(200e9, 1e-6)
    whole = Cluster(nodes, 8, link, inside, backend="nccl")
    zeropp = sharded("zeropp", local_size=8)
    # ZeRO++ keeps a second copy of the weights inside a node, so backward gathers there.
    between_nodes = sharded_s(zeropp, numel, whole, gathers=1)
    second = hops(
        "all_gather", "", 2 * numel / 8, Cluster(1, 8, link, inside, backend="nccl")
    ).seconds
    first = between_nodes + second

    made = make_scheme("three_level", {"tiers": ["local", "node"]})
    assert isinstance(made, PartitionScheme)
    tiers = [
        ("local", Cluster(1, 4, inside, inside, backend="nccl")),
        ("node", Cluster(nodes, 1, share(link, 8), inside, backend="nccl")),
    ]
    pairs = Cluster(1, 2, pair, pair, backend="nccl")
    # fully_shard's own axis in bfloat16: twice gathered, once scattered.
    hierarchy = (
        2 * hops("all_gather", "", numel, pairs).seconds
        + hops("reduce_scatter", "", 2 * numel, pairs).seconds
    )
    left = numel // 2
    for axis, cluster in tiers:
        hierarchy += tier_s(made, axis, left, cluster)
        left //= cluster.world_size
    ratio = first / hierarchy
    return Claim(
        "Three-level partitioning against ZeRO++, 20B on 384 ranks: communication of a step",
        "1.71x TFLOPS per GPU",
        f"{ratio:.2f}x less time in communication ({first:.2f} s against {hierarchy:.2f} s)",
        ratio >= 1.71,
        "without compute, and with nominal link rates. Updated weights travel in float32 inside a node here, which is half of the "
        "hierarchy's time; and links as fast as nominal between nodes leave little to save there",
    )


def tier_s(made: PartitionScheme, axis: str, numel: int, cluster: Cluster) -> float:
    """Gradients scattered and new weights gathered along one axis."""
    codes = ShardedScheme(made.weights.get(axis), made.gradients.get(axis))
    return sharded_s(codes, numel, cluster, gathers=1)


def share(link: Link, ranks: int) -> Link:
    """Of each of a node's ranks that send at once."""
    return Link(link.bytes_per_second / ranks, link.latency_s)


def sharded(name: str, **knobs: Any) -> ShardedScheme:
    made = make_scheme(name, knobs)
    assert isinstance(made, ShardedScheme)
    return made


def stragglers() -> list[Claim]:
    """Out of the committed simulation at 256 workers."""
    told = {t["what"]: t["measured"] for t in json.loads(STRAGGLERS.read_text())["targets"]}
    coded = {
        kind: (
            told[f"M-SGC / gradient coding, seconds, {kind}, selected, real code (paper: 0.84)"],
            told[f"M-SGC / gradient coding, seconds, {kind}, selected, counted (paper: 0.84)"],
        )
        for kind in ("bursts", "heavy tail")
    }
    best = {kind: told[f"DBW / best static k, seconds, {kind}"] for kind in coded}
    worst = {kind: told[f"DBW / worst static k, seconds, {kind}"] for kind in coded}
    return [
        Claim(
            "Sequential gradient coding (M-SGC) over gradient coding, seconds, 256 workers",
            "0.84",
            "; ".join(
                f"{kind} {real:.2f}, {counted:.2f} if undecodable codes count"
                for kind, (real, counted) in coded.items()
            ),
            all(real <= 0.84 for real, _ in coded.values()),
            "gradient coding may take any s in the second figure, also those that float32 cannot carry",
        ),
        Claim(
            "DBW over static numbers of backup workers, seconds to a loss, 256 workers",
            "up to 3x faster than the best static choice",
            "; ".join(
                f"{kind}: {1 / best[kind]:.2f}x of the best static k, {1 / worst[kind]:.1f}x of the worst"
                for kind in best
            ),
            all(1 / ratio >= 1 for ratio in best.values()),
            "delays are stationary here, so that the best static k, found by trying all, is hard to beat",
        ),
    ]


def scale() -> Target:
    scenario = changed(load_scenario(SCENARIOS / "noloco.yaml"), nodes=1024, rounds=1000)
    start = time.perf_counter()
    simulate(scenario)
    seconds = time.perf_counter() - start
    return Target.at_most("1,024 workers x 1,000 rounds, two methods, seconds", QUICKEST, seconds)


def measure(options: argparse.Namespace) -> Result:
    result = Result("claims", {})
    claims = [
        noloco(),
        dilocox(),
        onebit_adam(),
        qsdp(),
        *stragglers(),
        *streaming(),
        partitioning(),
    ]
    result.tables["claims"] = [claim.row for claim in claims]
    result.targets = [scale()]
    return result


if __name__ == "__main__":
    main(__doc__, measure)
