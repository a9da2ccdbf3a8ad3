"""How long a synchronisation takes against the number of nodes: pairs (NoLoCo) and an all-reduce (DiLoCo).

Emulated hosts, one rank each, links of 50 Mbit/s, 12.8 million float32 parameters; the model is trained without computing, so
that rounds of one step are nothing but their synchronisation. NoLoCo's partners are drawn at random, and a round ends
for a pair when it is done; the figure is the mean over ranks of the median round.

    python benchmarks/sync_time.py [--nodes 4 8] [--rounds 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

import torch
import torch.distributed as dist
from harness import ROOT
from report import Result, Target, main
from torch import nn

from commkit.outer import DiLoCo, NoLoCo, SyncOptions

SIDE, LAYERS = 1024, 12  # 12.6 million
METHODS = {"noloco": NoLoCo, "diloco": DiLoCo}
LINK = "50mbit"


def rank(method: str, rounds: int, out: Path) -> None:
    """One rank of a lab: times its rounds and writes them to ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seconds = []
    with METHODS[method](model, optimizer, sync_every=1, options=SyncOptions()) as outer:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(rounds + 1):
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        sent = outer.comm.bytes.wire_bytes
    (out / f"{dist.get_rank()}.json").write_text(json.dumps([seconds[1:], sent]))
    dist.barrier()
    dist.destroy_process_group()


def timed(method: str, nodes: int, rounds: int) -> dict[str, float]:
    """Mean over ranks of the median round, in seconds."""
    from launch.netlab import Lab

    with tempfile.TemporaryDirectory() as folder, Lab(nodes=nodes, link=LINK) as lab:
        words = ["--rank-of", method, "--rounds", str(rounds), "--out", folder]
        environment = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        lab.torchrun(Path(__file__), words, deadline_s=900, env=environment)
        told = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    return {
        "seconds": fmean(median(seconds) for seconds, _ in told),
        "slowest": max(median(seconds) for seconds, _ in told),
    }


def measure(options: argparse.Namespace) -> Result:
    sizes = options.nodes if not options.quick else options.nodes[:1]
    rounds = 1 if options.quick else options.rounds
    parameters = SIDE * SIDE * LAYERS
    result = Result(
        "sync_time", {"link": LINK, "parameters": parameters, "rounds": rounds, "nodes": sizes}
    )
    times = {(m, n): timed(m, n, rounds) for n in sizes for m in METHODS}
    result.tables["seconds per synchronisation"] = [
        {"method": method, "nodes": nodes, **figures} for (method, nodes), figures in times.items()
    ]
    if len(sizes) > 1:
        first, last = sizes[0], sizes[-1]
        grows = {m: times[m, last]["seconds"] / times[m, first]["seconds"] for m in METHODS}
        result.targets = [
            Target.at_most(f"noloco, {last} nodes / {first}", 1.15, grows["noloco"]),
            Target(
                f"diloco, {last} nodes / {first}, more than noloco's",
                None,
                grows["diloco"],
                grows["diloco"] > grows["noloco"],
            ),
        ]
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank-of", choices=sorted(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)


if __name__ == "__main__":
    if "RANK" in os.environ:
        parser = argparse.ArgumentParser()
        add_options(parser)
        given = parser.parse_args()
        rank(given.rank_of, given.rounds, given.out)
    else:
        main(__doc__, measure, add_options)
