"""Convergence with 16 to 256 replicas in one process: the production schemes, ranks as threads, a small task.

A network of 2,762 parameters learns a fixed random network's labels. Every replica has a stream of its own and takes the same
number of steps, whatever their number; "alone" never synchronises, the others end in a synchronisation. Losses are of the mean of all replicas' weights (of
"alone": the mean of the replicas' losses), on the same held-out samples.

    python benchmarks/convergence_many.py [--replicas 16 64 256] [--steps 160] [--only ddp diloco noloco] [--json FILE]

With 256 replicas a synchronisation takes ten seconds and more of a processor, and a step of `sign`, whose ranks all decode what all
have sent, as long: there, give fewer steps and leave it out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import harness  # noqa: F401  (puts the repository on sys.path)
import torch
import torch.nn.functional as F
from report import Result, Target, main
from torch import Tensor, nn

from commkit.outer import OuterScheme
from commkit.reducer import Reducer
from commkit.schemes import make_scheme
from commkit.sim import ThreadComm, run_threads

INPUTS, WIDTH, CLASSES, BATCH, LR = 32, 64, 10, 8, 3e-3
STEPS, ROUND = 160, 20
HELD_OUT = 2048
PATIENCE_S = 600.0
# None: replicas that never meet.
METHODS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "ddp": {"name": "ddp"},
    "sign": {"name": "sign", "min_numel": 0},
    "local_sgd": {"name": "local_sgd", "sync_every": ROUND},
    "diloco": {"name": "diloco", "sync_every": ROUND},
    "noloco": {"name": "noloco", "sync_every": ROUND},
    "edit": {"name": "edit", "sync_every": ROUND},
}
NEAR = 1.1  # a method's loss over that of plain DDP: no more with many replicas than this


class Task:
    """Labels of a fixed network; equal for all."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(INPUTS, WIDTH, generator=generator) / INPUTS**0.5
        self.second = torch.randn(WIDTH, CLASSES, generator=generator)
        self.inputs, self.labels = self.samples(generator, HELD_OUT)

    def samples(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, INPUTS, generator=generator)
        return x, (torch.tanh(x @ self.first) @ self.second).argmax(dim=1)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        return float(F.cross_entropy(model(self.inputs), self.labels))


def build() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1, generator=generator)
    return model


def replica(
    comm: ThreadComm, task: Task, block: dict[str, Any] | None, steps: int
) -> tuple[Tensor, float, int]:
    """Its weights at the end, their loss, and the bytes that it sent."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)  # one call per step
    generator = torch.Generator().manual_seed(1000 + comm.rank)
    made = None if block is None else make_scheme(block)
    reducer = made if isinstance(made, Reducer) else None
    with made(model, optimizer, comm) if isinstance(made, OuterScheme) else nullcontext():
        for _ in range(steps):
            x, y = task.samples(generator, BATCH)
            F.cross_entropy(model(x), y).backward()
            if reducer is not None:
                own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                for name, mean in reducer.reduce(own, comm).items():
                    own[name].copy_(mean)
                reducer.end_step()
            optimizer.step()
            optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights, task.loss(model), comm.bytes.wire_bytes


def run(name: str, replicas: int, steps: int, task: Task) -> dict[str, Any]:
    told = run_threads(
        lambda comm: replica(comm, task, METHODS[name], steps), replicas, timeout_s=PATIENCE_S
    )
    weights = torch.stack([one for one, _, _ in told])
    mean = weights.mean(dim=0)
    model = build()
    nn.utils.vector_to_parameters(mean, model.parameters())
    each = sum(loss for _, loss, _ in told) / replicas
    return {
        "method": name,
        "replicas": replicas,
        "loss": each if METHODS[name] is None else task.loss(model),
        "loss of a replica, mean": each,
        "spread of replicas": float((weights - mean).norm(dim=1).mean() / mean.norm()),
        "kB sent per step": max(sent for _, _, sent in told) / steps / 1e3,
    }


def measure(options: argparse.Namespace) -> Result:
    torch.set_num_threads(1)
    sys.setswitchinterval(
        0.2
    )  # threads let go at every operation; hundreds that ask for it in between cost more
    steps = ROUND * 2 if options.quick else options.steps
    numbers = [4] if options.quick else options.replicas
    task = Task()
    result = Result("convergence_many", {"steps": steps, "sync_every": ROUND, "batch": BATCH})
    rows = [run(name, number, steps, task) for number in numbers for name in options.only]
    result.tables["loss after as many steps"] = rows
    losses = {(row["method"], row["replicas"]): row["loss"] for row in rows}
    for number in numbers:
        for name in compared(options.only):
            ratio = losses[name, number] / losses["ddp", number]
            result.targets.append(
                Target.at_most(f"{name} / ddp, loss, {number} replicas", NEAR, ratio)
            )
    return result


def compared(names: Sequence[str]) -> list[str]:
    """Those that have a ratio to plain DDP."""
    return [name for name in names if name not in ("alone", "ddp") and "ddp" in names]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=STEPS, help="a multiple of the rounds' 20")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))


if __name__ == "__main__":
    main(__doc__, measure, add_options)
