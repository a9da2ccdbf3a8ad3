"""Which schemes the contract is checked on, and how a run of one is recorded.

Every registered scheme is taken up by its name alone; ``BLOCKS`` adds settings that compress small tensors
hard, and compositions without a name of their own.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from commkit.aggregators import Hierarchical
from commkit.compressors import SignVote
from commkit.feedback import ErrorFeedback
from commkit.metrics import StepStats
from commkit.reducer import Reducer
from commkit.schemes import make_scheme
from commkit.sim import ThreadComm, run_threads
from commkit.types import Aggregated, Comm, StateDict, TensorCtx
from tests.named_schemes import REDUCERS

Tensors = dict[str, torch.Tensor]
EF = "error_feedback"
UNLAWFUL = ("compose", "hierarchical", "noop")  # no schemes of their own; no communication at all


def composed(aggregator: str, compressor: Mapping[str, Any], feedback: str, **fields: Any) -> Any:
    """Any compressor behind any aggregator, on tensors of all sizes."""
    return {
        "name": "compose",
        "aggregator": {"name": aggregator, "compressor": compressor, **fields},
        "feedback": feedback,
        "policy": {"min_numel": 0},
    }


BLOCKS: dict[str, dict[str, Any]] = {
    "int8-all": {"name": "int8", "min_numel": 0},
    "int8-nearest": {"name": "int8", "rounding": "nearest", "min_numel": 0},
    "int4-all": {"name": "int4", "min_numel": 0},
    "int4-stochastic": {"name": "int4", "rounding": "stochastic", "min_numel": 0},
    "dynamic8-all": {"name": "dynamic8", "min_numel": 0},
    "dynamic8-nearest": {"name": "dynamic8", "rounding": "nearest", "min_numel": 0},
    "qsgd-all": {"name": "qsgd", "min_numel": 0},
    "qsgd-2": {"name": "qsgd", "bits": 2, "norm": "max", "bucket_size": 64, "min_numel": 0},
    "natural-all": {"name": "natural", "min_numel": 0},
    "terngrad-all": {"name": "terngrad", "min_numel": 0},
    "terngrad-unclipped": {"name": "terngrad", "clip": 0.0, "min_numel": 0},
    "signum": {"name": "signsgd_vote", "momentum": 0.9},
    "sign-all": {"name": "sign", "min_numel": 0},
    "sign-rms": {"name": "sign", "scale": "rms", "min_numel": 0},
    "topk-all": {"name": "topk", "density": 0.1, "min_numel": 0},
    "topk-bf16": {"name": "topk", "density": 0.1, "threshold": "sampled", "values": "bf16"},
    "randomk-all": {"name": "randomk", "density": 0.1, "min_numel": 0},
    "randomk-unbiased": {"name": "randomk", "density": 0.1, "error_feedback": False},
    "powersgd-2": {"name": "powersgd", "rank": 2, "min_compression_rate": 0.0},
    "powersgd-cold": {"name": "powersgd", "rank": 2, "warm_start": False},
    "powersgd-no-ef": {"name": "powersgd", "error_feedback": False},
    "powersgd-alternating": {
        "name": "powersgd",
        "rank": 2,
        "min_compression_rate": 0.0,
        "iteration": "alternating",
    },
    "powersgd-schedule": {"name": "powersgd", "rank": [[0, 4], [1, 1], [3, 2]]},
    # One rank per node, so that any number of ranks will do: several are in tests/aggregators.
    "nodes-powersgd": {"name": "hierarchical", "local_size": 1, "scheme": "powersgd"},
    "nodes-sign": {
        "name": "hierarchical",
        "local_size": 1,
        "scheme": {"name": "sign", "min_numel": 0},
    },
    "nodes-econtrol": {
        "name": "hierarchical",
        "local_size": 1,
        "scheme": {"name": "econtrol", "density": 0.1, "min_numel": 0},
    },
    "nodes-dgc": {
        "name": "hierarchical",
        "local_size": 1,
        "scheme": {"name": "dgc", "density": 0.1, "min_numel": 0, "min_ndim": 0},
    },
    "ef21-all": {"name": "ef21", "density": 0.1, "min_numel": 0},
    "ef21-momentum": {"name": "ef21", "density": 0.1, "momentum": 0.1, "min_numel": 0},
    "econtrol-all": {"name": "econtrol", "density": 0.1, "min_numel": 0},
    "econtrol-strong": {"name": "econtrol", "density": 0.1, "eta": 0.5, "min_numel": 0},
    "dgc-all": {"name": "dgc", "density": 0.1, "min_numel": 0, "min_ndim": 0},
    "dgc-warmup": {"name": "dgc", "density": 0.01, "warmup_steps": 8, "values": "bf16"},
    "dgc-nesterov": {"name": "dgc", "density": 0.1, "nesterov": True, "masking": False},
    "demo-all": {"name": "demo", "top_k": 4, "chunk": 16, "min_numel": 0, "min_ndim": 0},
    "sign-gathered": composed("all_gather", {"name": "sign"}, EF),
    "cast-gathered": composed("all_gather", {"name": "cast"}, EF),
    "ternary": composed("two_shot", {"name": "ternary", "clip": 0.0}, "none"),
    "ternary-clipped": composed("two_shot", {"name": "ternary"}, "none", granule=64),
    "topk-two-shot": composed(
        "two_shot", {"name": "topk", "density": 0.2}, EF, server_feedback=EF, granule=64
    ),
}
BLOCKS |= {name: {"name": name} for name in (*REDUCERS, "dgc", "demo") if name not in UNLAWFUL}

# Optimizers with more of a reducer than those above; in their compressed stage from the third step on.
OPTIMIZER_BLOCKS: dict[str, dict[str, Any]] = {
    "onebit_adam": {"name": "onebit_adam", "freeze_step": 2},
    "onebit_lamb": {"name": "onebit_lamb", "freeze_step": 2},
    "zero_one_adam": {"name": "zero_one_adam"},
}

SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (64, 48),
    "vector": (2000,),
    "conv": (8, 4, 3, 3),
    "scalar": (),
    "empty": (0,),
    "one": (1,),
    "square": (40, 40),
}


def build(case: str) -> Reducer:
    """The case's reducer; if the scheme is an optimizer, that of one over parameters of SHAPES."""
    made = make_scheme(BLOCKS[case])
    if isinstance(made, Reducer):
        return made
    parameters = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in SHAPES.items()}
    optimizer = made(parameters.values(), lr=0.1)
    optimizer.bind(parameters, run_threads(lambda comm: comm, 1)[0])
    return optimizer.reducer


def built(case: str) -> Reducer:
    """As :func:`build`, of ``OPTIMIZER_BLOCKS`` too."""
    if case in BLOCKS:
        return build(case)
    parameters = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in SHAPES.items()}
    optimizer = make_scheme(OPTIMIZER_BLOCKS[case])(parameters.values(), lr=0.1)  # type: ignore[operator]
    optimizer.bind(parameters, run_threads(lambda comm: comm, 1)[0])
    reducer = optimizer.reducer
    assert isinstance(reducer, Reducer)
    return reducer


def finish(reducer: Reducer, outs: Mapping[str, torch.Tensor]) -> None:
    """Close the step; an optimizer applies it, unless it was not finite."""
    reducer.end_step()
    optimizer = getattr(reducer, "optimizer", None)
    if optimizer is not None and not reducer.skipped:
        for key, p in optimizer._parameters.items():
            p.grad = outs[key].clone()
        with torch.no_grad():
            optimizer.apply()


def votes(case: str) -> bool:
    """Whether results are +1 and -1, whatever the gradients' size, and zeros are decided by a coin."""
    return isinstance(getattr(build(case).aggregator, "compressor", None), SignVote)


VOTES = [case for case in BLOCKS if votes(case)]


def between_nodes(case: str) -> Any:
    """The aggregator at work: the inner one of a hierarchy."""
    aggregator = build(case).aggregator
    return aggregator.aggregator if isinstance(aggregator, Hierarchical) else aggregator


def keeps_all(case: str) -> bool:
    """Whether plain error feedback keeps what is not sent."""
    feedback = build(case).feedback
    return isinstance(feedback, ErrorFeedback) and feedback.decay == 1


WITH_FEEDBACK = [case for case in BLOCKS if build(case).feedback.needs_contraction]
# What is not sent is kept, and nothing else happens to it: the sums of plain error feedback hold.
CONSERVING = [case for case in BLOCKS if keeps_all(case)]
# Results are means of messages: neither changes of an estimate, nor means of some ranks.
AVERAGING = [
    case
    for case in BLOCKS
    if not build(case).feedback.changes_mean and BLOCKS[case]["name"] != "demo"
]


def gradients(rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """One rank's gradients: a part that all ranks and steps share, and noise."""
    grads = {}
    for key, shape in SHAPES.items():
        parts = [torch.randn(shape, generator=_generator(key, *at)) for at in ((), (rank, step))]
        grads[key] = (0.5 * parts[0] + parts[1]).to(dtype)
    return grads


def _generator(*at: Any) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(at).encode()))


class Recorder:
    """An aggregator that notes what its inner one says each rank has sent."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.sent: Tensors = {}

    def aggregate(self, xs: Any, ctxs: list[TensorCtx], comm: Comm) -> list[Aggregated]:
        return self._noted(ctxs, self.inner.aggregate(xs, ctxs, comm))

    def aggregate_sums(
        self, sums: Any, addends: Any, ctxs: list[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        return self._noted(ctxs, self.inner.aggregate_sums(sums, addends, ctxs, comm))

    def _noted(self, ctxs: list[TensorCtx], outcomes: list[Aggregated]) -> list[Aggregated]:
        self.sent = {c.key: o.sent.clone() for c, o in zip(ctxs, outcomes, strict=True)}
        return outcomes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class Trace:
    """What one rank saw of a run: one entry per step, and the state at the end."""

    grads: list[Tensors] = field(default_factory=list)
    outs: list[Tensors] = field(default_factory=list)
    sent: list[Tensors] = field(default_factory=list)
    stats: list[StepStats] = field(default_factory=list)
    state: StateDict = field(default_factory=dict)

    def residual(self, key: str) -> torch.Tensor | float:
        return self.state.get(f"rank/{key}", 0.0)


def copied(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {key: x.clone() for key, x in tensors.items()}


def run(
    make: Callable[[], Reducer],
    world_size: int,
    steps: int,
    grads: Callable[[int, int], Tensors],
) -> list[Trace]:
    """Reduce ``grads(rank, step)`` for some steps; a trace of each rank."""

    def body(comm: ThreadComm) -> Trace:
        reducer, trace = make(), Trace()
        recorder = Recorder(reducer.aggregator)
        reducer.aggregator = recorder
        for step in range(steps):
            own = grads(comm.rank, step)
            trace.grads.append(copied(own))
            trace.outs.append(copied(reducer.reduce(own, comm)))
            trace.sent.append(trace.grads[-1] | recorder.sent)
            trace.stats.append(reducer.end_step())
        trace.state = copied(reducer.state_dict())
        return trace

    return run_threads(body, world_size)


@functools.cache
def traces(case: str, world_size: int) -> list[Trace]:
    """Ten steps in float64, shared by all laws that only look."""
    return run(lambda: build(case), world_size, 10, lambda r, s: gradients(r, s, torch.float64))


def mean_residual(ranks: list[Trace], key: str, shape: torch.Size) -> torch.Tensor:
    """Everything unsent: the ranks' residuals on average, and what the servers hold."""
    total = torch.zeros(shape, dtype=torch.float64)
    for trace in ranks:
        total += trace.residual(key) / len(ranks)
        for name, value in trace.state.items():
            prefix = f"aggregator/shard/{key}@"
            if name.startswith(prefix):
                start = int(name.removeprefix(prefix))
                total.view(-1)[start : start + value.numel()] += value
    return total
