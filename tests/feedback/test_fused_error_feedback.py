"""Error feedback whose sums are formed while signs are packed: every bit is that of the parts one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from commkit.aggregators import TwoShot
from commkit.compressors import Sign
from commkit.feedback import ErrorFeedback
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import AddsResiduals

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
    kind: type[TwoShot], world_size: int, dtype: torch.dtype, scale: str, decay: float
) -> list[list[dict[str, Tensor]]]:
    """What each rank got in each step, and then its state."""

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
    """From the second step on, and not where the residual decays. The server's is another, in its own memory."""
    compress_sums = Sign.compress_sums
    apart, own = [], []

    def counted(self: Sign, sums: list[Tensor], residuals: list[Tensor], *rest: Any) -> Any:
        (own if sums[0] is residuals[0] else apart).append(len(sums))
        return compress_sums(self, sums, residuals, *rest)

    monkeypatch.setattr(Sign, "compress_sums", counted)
    trained(TwoShot, 1, torch.float32, "l1", decay)
    assert len(apart) == expected
    assert len(own) == STEPS - 2  # nor is it served what is not finite
