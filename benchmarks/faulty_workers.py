"""Faulty workers: what is left of accuracy where some ranks send anything, and of the loss where one trains on noise.

A small network learns handwritten digits, ranks are threads, three seeds.

- Two of eleven ranks are hostile, know all the others' weights, and send the honest mean the other way (sign flip),
  noise (Gaussian), or a vector that hides among the honest ("a little is enough"). DiLoCo with each aggregator, and
  MoNNA; the figure is the accuracy on validation images of the worst honest rank.
- Of four replicas one is fed corrupted images and labels from the middle of the run on. DiLoCo and EDiT; the figure is
  the highest loss of the healthy replicas after that, over the highest in as many steps before it.
"""

from __future__ import annotations

import argparse
import functools
import threading
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import harness  # noqa: F401  (puts the repository on sys.path)
import torch
from report import Result, Target, main
from torch import Tensor, nn
from torch.nn import functional as F

from commkit.outer import OuterSync
from commkit.schemes import make_scheme
from commkit.sim import ThreadComm, run_threads
from launch.digits import images_and_labels, load_rows
from tests.attacks import ATTACKS

RANKS, FAULTY, STEPS, EVERY, BATCH, LR = 11, 2, 100, 5, 16, 0.3
REPLICAS, SPIKE_STEPS, CORRUPTED_FROM, SPIKE_EVERY = 4, 240, 160, 4
SEEDS = 3
KEPT, COLLAPSED = 0.03, 0.5  # of accuracy: lost at most; at least lost
NO_ATTACK = "none"


def _diloco(rule: str | None = None) -> dict[str, Any]:
    block: dict[str, Any] = {
        "name": "diloco",
        "sync_every": EVERY,
        "outer_momentum": 0.5,
        "options": {"final_sync": False},
    }
    if rule is None:
        return block
    robust = {"name": "robust", "rule": rule, "num_faulty": FAULTY, "compressor": "none"}
    reducer = {"name": "compose", "aggregator": robust, "policy": {"min_numel": 0}}
    return block | {"reducer": reducer}


MEAN, PLAIN = "DiLoCo, mean", "plain averaging of weights in each step"
METHODS: dict[str, dict[str, Any]] = {
    MEAN: _diloco(),
    "DiLoCo, trimmed mean": _diloco("trimmed_mean"),
    "DiLoCo, median": _diloco("median"),
    "DiLoCo, multi-Krum": _diloco("multi_krum"),
    "DiLoCo, norm clipping": _diloco("norm_clip"),
    PLAIN: {"name": "monna", "num_faulty": 0, "momentum": 0.9},
    "MoNNA": {"name": "monna", "num_faulty": FAULTY, "momentum": 0.9},
}
SPIKED: dict[str, dict[str, Any]] = {
    "DiLoCo": {"name": "diloco", "outer_momentum": 0.8},
    "EDiT": {"name": "edit", "outer_momentum": 0.8, "penalty": {"warm_rounds": 15}},
}


class Digits:
    """The images, and a network of one hidden layer."""

    def __init__(self) -> None:
        self.train, self.validation = map(images_and_labels, load_rows())

    def network(self, seed: int) -> nn.Module:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (2 / p.shape[-1]) ** 0.5)
        return net

    def batch(self, seed: int, rank: int, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((seed * 97 + rank) * 100_003 + step)
        rows = torch.randint(len(self.train[1]), (BATCH,), generator=generator)
        return self.train[0][rows], self.train[1][rows]

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        images, labels = self.validation
        scores = net(images)
        return (
            float((scores.argmax(1) == labels).float().mean()) if scores.isfinite().all() else 0.0
        )


class Conspiracy:
    """Before each round the last ranks replace their weights by what the attack makes of the others'.

    Args:
        attack: on the displacements since the last round, or None.
    """

    def __init__(self, attack: Callable[[Tensor, int], Tensor] | None) -> None:
        self.attack = attack
        self.vectors: list[Tensor] = [torch.empty(0)] * RANKS
        self.barrier = threading.Barrier(RANKS, timeout=120)
        self.start: Tensor = torch.empty(0)

    def meet(self, rank: int, net: nn.Module) -> None:
        """Called by all ranks after the last inner step of a round and before the round."""
        if self.attack is None:
            return
        self.vectors[rank] = nn.utils.parameters_to_vector(net.parameters()).detach()
        self.barrier.wait()
        if rank >= RANKS - FAULTY:
            honest = torch.stack(self.vectors[: RANKS - FAULTY]) - self.start
            bad = self.start + self.attack(honest, FAULTY)[rank - (RANKS - FAULTY)]
            with torch.no_grad():
                nn.utils.vector_to_parameters(bad, net.parameters())
        self.barrier.wait()

    def begin(self, rank: int, net: nn.Module) -> None:
        """Called by all ranks when a round begins."""
        if self.attack is not None and rank == 0:
            self.start = nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def attacked(
    comm: ThreadComm, digits: Digits, block: dict[str, Any], plot: Conspiracy, seed: int, steps: int
) -> float:
    """The accuracy in the end of this rank's own replica."""
    net = digits.network(seed)
    inner = torch.optim.SGD(net.parameters(), lr=LR)
    every = int(block.get("sync_every", 1))
    count = 0

    def before_round(*_: Any) -> None:
        nonlocal count
        count += 1
        if count % every == 0:
            plot.meet(comm.rank, net)

    inner.register_step_post_hook(before_round)  # hooks run in order: before the method's
    with _method(block, net, inner, comm):
        for step in range(steps):
            if step % every == 0:
                plot.begin(comm.rank, net)
            images, labels = digits.batch(seed, comm.rank, step)
            inner.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            inner.step()
    return digits.accuracy(net)


def spiked(
    comm: ThreadComm, digits: Digits, block: dict[str, Any], seed: int, steps: int, bad_from: int
) -> list[float]:
    """This replica's losses. The last one is fed noise with random labels from ``bad_from`` on."""
    net = digits.network(seed)
    inner = torch.optim.SGD(net.parameters(), lr=LR / 6)
    block = {**block, "sync_every": SPIKE_EVERY, "options": {"final_sync": False}}
    losses = []
    with _method(block, net, inner, comm):
        for step in range(steps):
            images, labels = digits.batch(seed, comm.rank, step)
            if comm.rank == REPLICAS - 1 and step >= bad_from:
                generator = torch.Generator().manual_seed(step)
                images = 10 * torch.randn(images.shape, generator=generator)
                labels = torch.randint(10, labels.shape, generator=generator)
            inner.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            inner.step()
            losses.append(loss.item())
    return losses


def _method(
    block: dict[str, Any], net: nn.Module, inner: torch.optim.Optimizer, comm: ThreadComm
) -> OuterSync:
    method: OuterSync = make_scheme(block)(net, inner, comm)  # type: ignore[assignment, call-arg, arg-type, operator]
    return method


def measure(options: argparse.Namespace) -> Result:
    digits = Digits()
    steps, seeds = (20, 1) if options.quick else (STEPS, SEEDS)
    attacks = {
        NO_ATTACK: None,
        **{name: ATTACKS[name] for name in ("sign_flip", "gaussian", "little_is_enough")},
    }
    accuracies: dict[tuple[str, str], list[float]] = {}
    for name, block in METHODS.items():
        for attack, function in attacks.items():
            for seed in range(seeds):
                run = functools.partial(
                    attacked,
                    digits=digits,
                    block=block,
                    plot=Conspiracy(function),
                    seed=seed,
                    steps=steps,
                )
                worst = min(run_threads(run, RANKS, 300.0)[: RANKS - FAULTY])
                accuracies.setdefault((name, attack), []).append(worst)
    result = Result(
        "faulty_workers",
        {
            "ranks": RANKS,
            "faulty": FAULTY,
            "steps": steps,
            "sync_every": EVERY,
            "replicas": REPLICAS,
            "corrupted_from": CORRUPTED_FROM,
            "seeds": seeds,
        },
    )
    result.tables["accuracy in %, of the worst honest rank: mean over seeds +- their deviation"] = [
        {"method": name, **{attack: _percent(accuracies[name, attack]) for attack in attacks}}
        for name in METHODS
    ]
    clean = fmean(accuracies[MEAN, NO_ATTACK])
    for name in METHODS:
        for attack in list(attacks)[1:]:
            lost = clean - fmean(accuracies[name, attack])
            if name not in (MEAN, PLAIN):
                target = Target.at_most(f"{name}, {attack}: accuracy lost", KEPT, lost)
                result.targets.append(target)
            elif attack != "little_is_enough":
                what = f"{name}, {attack}: collapses"
                result.targets.append(Target(what, None, round(lost, 5), lost >= COLLAPSED))
    rows, highest = _spikes(digits, seeds, options.quick)
    result.tables[
        "one replica of four on corrupted data: highest loss of the others, over before"
    ] = rows
    if not options.quick:
        result.targets.append(
            Target.at_most("EDiT: highest loss after / before", 1.5, highest["EDiT"])
        )
        spikes = highest["DiLoCo"] >= 3
        result.targets.append(
            Target("DiLoCo: spikes to 3 times or more", None, round(highest["DiLoCo"], 3), spikes)
        )
    return result


def _spikes(
    digits: Digits, seeds: int, quick: bool
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    steps, bad_from = (40, 20) if quick else (SPIKE_STEPS, CORRUPTED_FROM)
    window = steps - bad_from
    rows, highest = [], {}
    for name, block in SPIKED.items():
        ratios = []
        for seed in range(seeds):
            run = functools.partial(
                spiked, digits=digits, block=block, seed=seed, steps=steps, bad_from=bad_from
            )
            healthy = run_threads(run, REPLICAS, 300.0)[:-1]
            mean = [fmean(at_step) for at_step in zip(*healthy, strict=True)]
            before = max(mean[bad_from - window : bad_from])
            ratios.append(max(mean[bad_from:]) / before)
        # The best seed of the one that should spike, the worst of the one that should not.
        highest[name] = min(ratios) if name == "DiLoCo" else max(ratios)
        rows.append(
            {"method": name, **{f"seed {seed}": round(r, 3) for seed, r in enumerate(ratios)}}
        )
    return rows, highest


def _percent(values: list[float]) -> str:
    spread = f" +- {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


if __name__ == "__main__":
    main(__doc__, measure)
