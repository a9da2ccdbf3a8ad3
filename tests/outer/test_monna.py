"""MoNNA, and robust aggregators under DiLoCo: faulty ranks do not get their way."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commkit.aggregators import Robust
from commkit.compressors import NoCompression
from commkit.outer import DiLoCo, MoNNA, RoundAborted, SyncOptions
from commkit.policy import Policy
from commkit.reducer import Reducer
from tests.attacks import ATTACKS
from tests.harness import ThreadComm, run_threads
from tests.outer import classification
from tests.outer.gossiping import SIZE, Point, drift, exchanges_only, still, walk
from tests.outer.lossy import LossyComm

N, FAULTY = 6, 1  # rank 5 is hostile


def _monna(num_faulty: int = 1, **knobs: Any) -> Any:
    return functools.partial(MoNNA, num_faulty=num_faulty, **knobs)


def test_hand_case() -> None:
    """Own 0, received 0.1, -0.2, 100, 0.3 and a sixth that is worse: with f = 1 of r vectors r - 1 are taken."""
    values = [0.0, 0.1, -0.2, 100.0, 0.3]

    def run(comm: ThreadComm) -> Tensor:
        return walk(
            comm,
            _monna(momentum=0.0),
            1,
            gradient=still,
            start=lambda rank: torch.full((SIZE,), values[rank]),
        )

    results = run_threads(run, 5)
    for rank in (0, 1, 2, 4):
        torch.testing.assert_close(results[rank], torch.full((SIZE,), 0.05))


def test_the_recurrence_without_faults_is_averaging_with_momentum() -> None:
    results = run_threads(lambda comm: walk(comm, _monna(0, momentum=0.8), 6), 3)
    x = torch.zeros(SIZE) + Point(0).vector
    momenta = [torch.zeros(SIZE) for _ in range(3)]
    for step in range(6):
        halves = []
        for rank in range(3):
            target = torch.linspace(-1, 1, SIZE) * (rank + 1) + 0.1 * step
            momenta[rank] = 0.8 * momenta[rank] + 0.2 * (x - target)
            halves.append(x - 0.1 * momenta[rank])
        x = torch.stack(halves).mean(0)
    for got in results:
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [1e30, -1e30, float("nan"), float("inf")])
def test_what_is_absurd_never_counts(poison: float) -> None:
    """Each of the honest has the exact mean of the honest."""

    def attack(rank: int, step: int, model: Point) -> None:
        drift(rank, step, model)
        if rank == 3:
            model.vector = torch.full((SIZE,), poison)
            model.x.grad.zero_(), model.y.grad.zero_()

    def honest(comm: ThreadComm) -> Tensor:
        return walk(comm, _monna(0), 5)

    def run(comm: ThreadComm) -> Tensor:
        return walk(comm, _monna(1), 5, gradient=attack)

    with pytest.warns(UserWarning, match="below 5f"):
        results = run_threads(run, 4)
    for got, expected in zip(results[:3], run_threads(honest, 3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wire_dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_bytes(wire_dtype: Any, width: int) -> None:
    def run(comm: ThreadComm) -> dict[str, int]:
        method = _monna(wire_dtype=wire_dtype, sync_every=2)
        return walk(comm, method, 6, after=lambda model, outer: exchanges_only(outer))

    for counted in run_threads(run, 6):
        assert counted == {"outer/exchange": 3 * 5 * SIZE * width}


def test_a_dead_rank_does_not_use_up_the_allowance_for_liars() -> None:
    """Six, one of whom is gone and one absurd: five arrive, four are taken, of the four honest."""

    def attack(rank: int, step: int, model: Point) -> None:
        drift(rank, step, model)
        if rank == 5:
            model.vector = torch.full((SIZE,), 1e6)

    def run(comm: ThreadComm) -> Tensor | None:
        lossy = LossyComm(comm, lambda rank, peer, tag: 4 in (rank, peer))
        if comm.rank == 4:
            with pytest.raises(RoundAborted, match="there are 1"):
                walk(lossy, _monna(), 4)  # type: ignore[arg-type]
            return None
        return walk(lossy, _monna(), 4, gradient=attack)  # type: ignore[arg-type]

    results = run_threads(run, 6)
    expected = run_threads(lambda comm: walk(comm, _monna(0), 4), 4)
    for got, wanted in zip(results[:4], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_merge_is_refused() -> None:
    def run(comm: ThreadComm) -> None:
        walk(comm, _monna(0), 1, after=lambda model, outer: outer.merge())

    with pytest.raises(RuntimeError, match="steered by the faulty"):
        run_threads(run, 2)


def test_bad_knobs() -> None:
    model = Point(0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"momentum=1\.0"):
        MoNNA(model, inner, num_faulty=1, momentum=1.0)
    with pytest.raises(ValueError, match="num_faulty=-1"):
        MoNNA(model, inner, num_faulty=-1)
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(model.parameters()),
    ):
        with pytest.raises(ValueError, match="momentum of its own"):
            MoNNA(model, optimizer, num_faulty=1)
        MoNNA(model, optimizer, num_faulty=1, momentum=0.0)
    with pytest.raises(ValueError, match=r"at least 3f \+ 1"):
        run_threads(lambda comm: walk(comm, _monna(1), 1), 3)


# Under attack. The hostile know the honest: they look over their shoulders.


class Spies:
    """Lets the hostile rank see what the honest are about to send."""

    def __init__(self, n: int, attack: str) -> None:
        self.vectors: list[Tensor | None] = [None] * n
        self.barrier = threading.Barrier(n, timeout=60)
        self.attack = ATTACKS[attack]

    def replace(self, rank: int, net: nn.Module, reference: Tensor) -> None:
        """Attack the displacement from ``reference``."""
        own = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        self.vectors[rank] = own - reference
        self.barrier.wait()
        if rank == N - 1:
            honest = torch.stack([v for v in self.vectors[:-1] if v is not None])
            bad = reference + self.attack(honest, 1)[0]
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(bad, net.parameters())
        self.barrier.wait()


def _attacked(comm: ThreadComm, make: Any, spies: Spies, rounds: int, inner_steps: int) -> float:
    net = classification.model()
    inner = torch.optim.SGD(net.parameters(), lr=0.3)
    with make(net, inner, process_group=comm) as outer:
        reference = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        # After the inner step, before the round: hooks run in the order in which they were added.
        hook = _first_hook(
            inner, outer, lambda: spies.replace(comm.rank, net, reference), inner_steps
        )
        for step in range(rounds * inner_steps):
            if step % inner_steps == 0:
                flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
                spies.vectors[comm.rank] = flat.clone()
                spies.barrier.wait()
                honest = spies.vectors[0]
                assert honest is not None
                reference = honest.clone()
                spies.barrier.wait()
            classification.gradient(net, comm.rank, step)
            inner.step()
        hook.remove()
    return classification.accuracy(net)


def _first_hook(inner: torch.optim.Optimizer, outer: Any, act: Any, every: int) -> Any:
    """Call ``act`` before the method sees every ``every``-th step."""
    count = [0]

    def hook(*_: Any) -> None:
        count[0] += 1
        if count[0] % every == 0:
            act()

    handle = inner.register_step_post_hook(hook)
    inner._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    return handle


def _diloco(rule: str | None) -> Any:
    reducer = None
    if rule is not None:
        reducer = functools.partial(
            Reducer,
            Robust(NoCompression(), rule, FAULTY),
            policy=Policy(min_numel=0),  # type: ignore[arg-type]
        )

    def make(*args: Any, **kwargs: Any) -> DiLoCo:
        options = SyncOptions(final_sync=False)
        return DiLoCo(
            *args,
            sync_every=5,
            reducer=None if reducer is None else reducer(),
            outer_lr=0.7,
            outer_momentum=0.5,
            options=options,
            **kwargs,
        )

    return make


@functools.cache
def _clean_accuracy() -> float:
    net = classification.model()
    inner = torch.optim.SGD(net.parameters(), lr=0.3)
    for step in range(100):
        classification.gradient(net, 0, step)
        inner.step()
    return classification.accuracy(net)


def _worst(make: Any, attack: str, rounds: int, inner_steps: int) -> float:
    spies = Spies(N, attack)
    run = functools.partial(
        _attacked, make=make, spies=spies, rounds=rounds, inner_steps=inner_steps
    )
    return min(run_threads(run, N)[:-1])


@pytest.mark.parametrize("attack", ["sign_flip", "gaussian", "little_is_enough"])
@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "multi_krum", "norm_clip"])
def test_diloco_with_a_robust_aggregator_keeps_its_accuracy(rule: str, attack: str) -> None:
    assert _worst(_diloco(rule), attack, 20, 5) > _clean_accuracy() - 0.03


@pytest.mark.parametrize("attack", ["sign_flip", "gaussian"])
def test_where_the_mean_collapses(attack: str) -> None:
    assert _worst(_diloco(None), attack, 20, 5) < _clean_accuracy() - 0.2


@pytest.mark.parametrize("attack", ["sign_flip", "gaussian", "little_is_enough"])
def test_monna_keeps_its_accuracy(attack: str) -> None:
    assert _worst(_monna(momentum=0.9), attack, 100, 1) > _clean_accuracy() - 0.03
