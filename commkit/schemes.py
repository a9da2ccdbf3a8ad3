"""Every published system as a composition of parts: one short function each.

This is the page to read first. A function's name is the scheme's name in YAML (``scheme: {name: ...}``)
and its parameters are the block's other fields. Each call builds a fresh :class:`~commkit.Reducer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .aggregators import AllGather, AllReduce, Hierarchical, Noop, PowerSGD, TwoShot
from .aggregators.nodes import Nodes
from .aggregators.rank_schedule import Rank
from .compressors import BlockQuantize, Cast, NoCompression, RandomK, Sign, TopK
from .config import ConfigError, build, load_yaml
from .feedback import ErrorFeedback, NoFeedback
from .policy import Policy
from .reducer import Reducer
from .registry import register
from .types import Aggregator, Feedback

Scheme: TypeAlias = "str | Path | Mapping[str, Any] | Reducer"

_NEVER = Policy(start_step=2**62)


@register("scheme", "ddp")
def ddp() -> Reducer:
    """Plain all-reduce: what DDP does itself, through commkit, with its bytes counted."""
    return Reducer(AllReduce(NoCompression()), policy=_NEVER)


@register("scheme", "noop")
def noop() -> Reducer:
    """No communication: the bound on speed. If this is not much faster, the network is not the problem.
    Replicas drift apart; never train with it."""
    return Reducer(Noop(), policy=Policy(min_numel=0))


@register("scheme", "fp16")
def fp16() -> Reducer:
    """float16 all-reduce. Steps that overflow are sent in full precision. No state."""
    return Reducer(AllReduce(Cast("fp16")), policy=Policy(min_numel=0))


@register("scheme", "bf16")
def bf16() -> Reducer:
    """bfloat16 all-reduce. No state."""
    return Reducer(AllReduce(Cast("bf16")), policy=Policy(min_numel=0))


@register("scheme", "int8")
def int8(
    block_size: int = 256,
    rounding: Literal["nearest", "stochastic"] = "stochastic",
    start_step: int = 0,
    min_numel: int = 1024,
) -> Reducer:
    """8-bit block quantisation, two-shot (Dettmers 2016): about 3.9 times fewer bytes than fp32.

    Args:
        block_size: elements per scale.
        rounding: "stochastic" is unbiased and keeps no state; "nearest" adds error feedback at both ends
            (4 + 4/W bytes per compressed element).
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return _block_quantised(BlockQuantize(8, block_size, rounding), start_step, min_numel)


@register("scheme", "int4")
def int4(
    block_size: int = 128,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    start_step: int = 0,
    min_numel: int = 1024,
) -> Reducer:
    """4-bit block quantisation, two-shot: about 7.5 times fewer bytes than fp32.

    Args:
        block_size: elements per scale.
        rounding: "nearest" with error feedback (4 + 4/W bytes per compressed element); "stochastic" keeps
            no state and is noisy at 15 levels.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return _block_quantised(BlockQuantize(4, block_size, rounding), start_step, min_numel)


@register("scheme", "sign")
def sign(scale: Literal["l1", "rms"] = "l1", start_step: int = 0, min_numel: int = 1024) -> Reducer:
    """EF-signSGD, two-shot (Karimireddy et al. 2019; Tang et al. 2021 figure 3): one bit per element each
    way, with error feedback at both ends (4 + 4/W bytes per compressed element).

    Args:
        scale: "l1" or "rms", see :class:`~commkit.compressors.Sign`.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return Reducer(
        TwoShot(Sign(scale), server_feedback=ErrorFeedback()),
        ErrorFeedback(),
        Policy(start_step, min_numel),
    )


@register("scheme", "topk")
def topk(
    density: float = 0.001,
    threshold: Literal["auto", "exact", "sampled"] = "auto",
    values: Literal["fp32", "bf16", "fp16"] = "fp32",
    start_step: int = 0,
    min_numel: int = 1024,
) -> Reducer:
    """Top-k with error feedback by all-gather (Stich et al. 2018). 4 bytes per compressed element.

    Momentum is the optimizer's; for momentum correction and masking use DGC.

    Args:
        density: share of elements sent; 0.001 to 0.01.
        threshold: how the largest are found, see :class:`~commkit.compressors.TopK`.
        values: precision of the values sent.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return Reducer(
        AllGather(TopK(density, threshold, values)), ErrorFeedback(), Policy(start_step, min_numel)
    )


@register("scheme", "randomk")
def randomk(
    density: float = 0.01,
    error_feedback: bool = True,
    start_step: int = 0,
    min_numel: int = 1024,
) -> Reducer:
    """Random-k by all-reduce (Stich et al. 2018): all ranks draw the same indices, so only values travel.

    Args:
        density: share of elements sent.
        error_feedback: on, residuals take 4 bytes per compressed element; off, values are scaled by n/k,
            which is unbiased and very noisy.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    feedback = ErrorFeedback() if error_feedback else NoFeedback()
    compressor = RandomK(density, unbiased=not error_feedback)
    return Reducer(AllReduce(compressor), feedback, Policy(start_step, min_numel))


@register("scheme", "powersgd")
def powersgd(
    rank: Rank = 4,
    min_compression_rate: float = 2.0,
    warm_start: bool = True,
    error_feedback: bool = True,
    start_step: int = 0,
    iteration: Literal["two_sided", "alternating"] = "two_sided",
) -> Reducer:
    """PowerSGD (Vogels et al. 2019): two all-reduces whose cost does not grow with the ranks.

    State: residual of 4 bytes per factorised element, and Q of 4 rank / rows bytes.

    Args:
        rank: 1-4 for convolutions, 4-32 for transformers; double it until the loss follows plain DDP. Or a
            schedule of [step, rank] pairs: ``[[0, 32], [2000, 8]]`` spends more while gradients change fast.
        min_compression_rate: see :class:`~commkit.aggregators.PowerSGD`.
        warm_start: keep Q from step to step.
        error_feedback: off only to see what it is worth.
        start_step: dense steps before; the learning-rate warm-up is a good choice. A schedule's steps count
            from the beginning, these included.
        iteration: "alternating" takes one all-reduce of half the bytes, for latency-bound links; see
            :class:`~commkit.aggregators.PowerSGD`.
    """
    return Reducer(
        PowerSGD(rank, min_compression_rate, warm_start, iteration),
        ErrorFeedback() if error_feedback else NoFeedback(),
        Policy(start_step, min_numel=0),
    )


@register("scheme", "hierarchical")
def hierarchical(
    scheme: Scheme, local_size: int | None = None, nodes: Nodes | None = None
) -> Reducer:
    """Full precision inside each node, any other scheme between nodes (phases of Jia et al. 2018). A node
    counts as one participant, whose residual is spread over its ranks: ``{name: hierarchical, scheme: {name:
    powersgd, rank: 4}}``.

    Tensors that the scheme's policy leaves dense take one all-reduce over all ranks. Give ``attach`` the
    whole block; a knob of the name ``scheme`` it has itself.

    Args:
        scheme: a name, a block, or a Reducer; its policy decides what is compressed.
        local_size: ranks per node; None: the environment's LOCAL_WORLD_SIZE, which launchers set.
        nodes: the ranks of each node instead, see :func:`~commkit.aggregators.nodes_of_mesh`.

    Raises:
        ValueError: a scheme that compresses nothing, or wrong nodes.
    """
    inner = make_reducer(scheme)
    if inner.policy == _NEVER:
        raise ValueError(
            f"scheme={scheme!r} leaves everything dense, so nothing would go by nodes; for full precision use "
            "{name: compose, aggregator: {name: all_reduce, compressor: none}}"
        )
    between = Hierarchical(inner.aggregator, inner.feedback, local_size, nodes)
    return Reducer(between, policy=inner.policy, seed=inner.seed)


@register("scheme", "compose")
def compose(
    aggregator: Aggregator,
    feedback: Feedback | None = None,
    policy: Policy | None = None,
) -> Reducer:
    """Any parts that go together, from YAML alone: ``{name: compose, aggregator: {name: two_shot,
    compressor: {name: sign}}, feedback: {name: error_feedback}}``.

    Raises:
        TypeError: an aggregator cannot carry its compressor's payloads.
    """
    return Reducer(aggregator, feedback, policy)


def _block_quantised(compressor: BlockQuantize, start_step: int, min_numel: int) -> Reducer:
    feedbacks = (
        (ErrorFeedback(), ErrorFeedback())
        if compressor.rounding == "nearest"
        else (NoFeedback(), NoFeedback())
    )
    return Reducer(
        TwoShot(compressor, server_feedback=feedbacks[0]),
        feedbacks[1],
        Policy(start_step, min_numel),
    )


def make_reducer(scheme: Scheme, knobs: Mapping[str, Any] | None = None) -> Reducer:
    """The Reducer that ``scheme`` stands for.

    Args:
        scheme: a scheme's name; a path to a YAML or JSON file (its ``scheme`` block, or all of it if there
            is none); such a block as a mapping; or a Reducer, which is returned as it is.
        knobs: fields that go over those of the block. ``seed`` is a field of every scheme.

    Raises:
        ConfigError: unknown scheme or field, wrong type or value.
        TypeError: parts that cannot go together, or knobs beside a Reducer.
    """
    if isinstance(scheme, Reducer):
        if knobs:
            raise TypeError(
                f"knobs {sorted(knobs)} have no effect on a Reducer; set them on its parts"
            )
        return scheme
    block = _block(scheme) | dict(knobs or {})
    seed = block.pop("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"scheme.seed={seed!r} must be an integer")
    reducer = build("scheme", block, "scheme")
    assert isinstance(reducer, Reducer)
    reducer.seed = seed
    return reducer


def _block(scheme: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(scheme, Mapping):
        return dict(scheme)
    if isinstance(scheme, Path) or Path(scheme).suffix in (".yaml", ".yml", ".json"):
        data = load_yaml(scheme)
        data = data.get("scheme", data)
        return {"name": data} if isinstance(data, str) else dict(data)
    return {"name": scheme}
