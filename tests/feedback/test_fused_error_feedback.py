"""Error feedback whose sums are formed while signs are packed: every bit is that of the parts one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from commkit.addends import AddsResiduals, Debt
from commkit.aggregators import TwoShot
from commkit.compressors import Sign
from commkit.feedback import ErrorFeedback, NoFeedback
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads

SHAPES = {"a": (90, 70), "b": (5000,), "c": (1,), "d": (33, 7), "empty": (0,)}
STEPS = 5
HELD, BAD = 2, 3  # a step in which a parameter was not used, and one with a NaN


class Apart(TwoShot):
    """Without the fused path."""

    @property
    def adds_residuals(self) -> bool:
        return False


def gradients(step: int, comm: ThreadComm, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + comm.rank)
    named = {key: torch.randn(s, generator=generator).to(dtype) for key, s in SHAPES.items()}
    if step == BAD and comm.rank == comm.world_size - 1:
        named["b"][17] = torch.nan
    return named


def trained(
    kind: type[TwoShot],
    world_size: int,
    dtype: torch.dtype,
    scale: str = "l1",
    decay: float = 1.0,
    asked: bool = False,
) -> list[list[dict[str, Tensor]]]:
    """What each rank got in each step, and then its state, which is ``asked`` for after each step."""

    def work(comm: ThreadComm) -> list[dict[str, Tensor]]:
        aggregator = kind(Sign(scale), ErrorFeedback(), granule=64)  # type: ignore[arg-type]
        assert isinstance(aggregator, AddsResiduals)
        reducer = Reducer(aggregator, ErrorFeedback(decay), Policy(min_numel=0))
        results = []
        for step in range(STEPS):
            hold = ["a"] if step == HELD and comm.rank == 0 else []
            named = gradients(step, comm, dtype)
            if hold:
                named["a"].zero_()
            results.append({k: x.clone() for k, x in reducer.reduce(named, comm, hold).items()})
            reducer.end_step()
            assert reducer.skipped == (step == BAD)
            if asked:
                results.append({key: x.clone() for key, x in reducer.state_dict().items()})
        return [*results, {key: x.clone() for key, x in reducer.state_dict().items()}]

    return run_threads(work, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("scale", "decay"), [("l1", 1.0), ("rms", 1.0), ("l1", 0.9)])
def test_fused_is_the_parts_one_by_one(
    world_size: int, dtype: torch.dtype, scale: str, decay: float
) -> None:
    fused, apart = (trained(kind, world_size, dtype, scale, decay) for kind in (TwoShot, Apart))
    for rank, (steps, wanted) in enumerate(zip(fused, apart, strict=True)):
        for step, (made, other) in enumerate(zip(steps, wanted, strict=True)):
            assert made.keys() == other.keys()
            for key, x in made.items():
                assert torch.equal(x.nan_to_num(7), other[key].nan_to_num(7)), (rank, step, key)


@pytest.mark.parametrize("world_size", [1, 3])
def test_state_is_that_of_the_parts_after_any_step(world_size: int) -> None:
    """What is to be taken later is taken when anybody asks, and the steps that follow are the same."""
    asked, apart, unasked = (
        trained(kind, world_size, torch.float32, asked=asked)
        for kind, asked in ((TwoShot, True), (Apart, True), (TwoShot, False))
    )
    for own, wanted, other in zip(asked, apart, unasked, strict=True):
        for made, expected in zip(own, wanted, strict=True):
            assert all(
                torch.equal(x.nan_to_num(7), expected[k].nan_to_num(7)) for k, x in made.items()
            )
        assert all(torch.equal(x, other[-1][k]) for k, x in own[-1].items())


@pytest.mark.parametrize("kind", [TwoShot, Apart])
def test_the_norm_is_of_what_is_left(kind: type[TwoShot]) -> None:
    """Also of a tensor of which nothing is left, and to ask for it changes nothing."""

    def work(comm: ThreadComm) -> None:
        reducer = Reducer(kind(Sign(), ErrorFeedback()), ErrorFeedback(), Policy(min_numel=0))
        for step in range(4):
            named = gradients(0, comm, torch.float32) | {"flat": torch.full((9000,), 0.3)}
            reducer.reduce(named, comm)
            reducer.end_step()
            norm = reducer.residual_norm
            left = [x.double().ravel() for k, x in reducer.state_dict().items() if "rank/" in k]
            wanted = float(torch.linalg.vector_norm(torch.cat(left)))
            assert norm == pytest.approx(wanted, rel=1e-5), step
            assert reducer.residual_norm == pytest.approx(wanted, rel=1e-6)

    run_threads(work, 1)


@pytest.mark.parametrize("key", ["b", "flat"])
def test_the_norm_of_one_tensor(key: str) -> None:
    feedback, residual = ErrorFeedback(), torch.full((9000,), -0.25)
    if key == "b":
        residual = torch.randn(9000, generator=torch.Generator().manual_seed(1))
    means = {0: residual[:4096].abs().mean().view(1), 4096: residual[4096:].abs().mean().view(1)}
    left = residual.clone()
    Debt(means).settle_(left)
    feedback.stage(key, residual, Debt(dict(means)))
    feedback.commit(True)
    assert feedback.norm() == pytest.approx(float(left.double().norm()), rel=1e-5)
    assert torch.equal(feedback.state_dict()[key], left)


def test_a_debt_outlives_other_shards() -> None:
    """Ranks leave: the residual has what was sent in parts of the old shards in it."""

    def trained_by_fewer(kind: type[TwoShot]) -> list[dict[str, Tensor]]:
        reducers: dict[int, Reducer] = {}

        def work(comm: ThreadComm) -> dict[str, Tensor]:
            own = reducers.setdefault(
                comm.rank,
                Reducer(
                    kind(Sign(), NoFeedback(), granule=64), ErrorFeedback(), Policy(min_numel=0)
                ),
            )
            for step in range(3):
                result = own.reduce(gradients(step, comm, torch.float32), comm)
                own.end_step()
            return {key: x.clone() for key, x in result.items()}

        return [*run_threads(work, 3), *run_threads(work, 2)]

    for made, wanted in zip(trained_by_fewer(TwoShot), trained_by_fewer(Apart), strict=True):
        assert all(torch.equal(x, wanted[key]) for key, x in made.items())


def test_what_passes_calls_on_is_not_left_out() -> None:
    class Proxy:
        def __init__(self) -> None:
            self.inner, self.calls = TwoShot(Sign(), ErrorFeedback()), 0

        def aggregate(self, *args: Any) -> Any:
            self.calls += 1
            return self.inner.aggregate(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    def work(comm: ThreadComm) -> int:
        proxy = Proxy()
        reducer = Reducer(proxy, ErrorFeedback(), Policy(min_numel=0))
        for step in range(3):
            reducer.reduce(gradients(step, comm, torch.float32), comm)
            reducer.end_step()
        return proxy.calls

    assert run_threads(work, 1) == [3]


@pytest.mark.parametrize(("decay", "expected"), [(1.0, STEPS - 1), (0.9, 0)])
def test_the_fused_path_is_taken(
    decay: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on, and not where the residual decays; at the server too, which has no decay."""
    calls: dict[str, list[int]] = {
        name: [] for name in ("compress_sums", "compress_means", "subtract_each_")
    }

    def counting(name: str) -> Callable[..., Any]:
        called = getattr(Sign, name)

        def counted(self: Sign, xs: list[Tensor], *rest: Any) -> Any:
            calls[name].append(len(xs))
            return called(self, xs, *rest)

        return counted

    for name in calls:
        monkeypatch.setattr(Sign, name, counting(name))
    trained(TwoShot, 1, torch.float32, "l1", decay)
    assert len(calls["compress_sums"]) == expected
    assert len(calls["compress_means"]) == STEPS - 2  # what is not finite is not served
    # What was sent is taken in the first step alone, where there is no path yet, of workers and servers.
    if decay == 1:
        assert len([n for n in calls["subtract_each_"] if n]) == 2
