"""Every published system as a composition of parts: one short function each.

This is the page to read first. A function's name is the scheme's name in YAML (``scheme: {name: ...}``)
and its parameters are the block's other fields. Each call builds a fresh :class:`~commkit.Reducer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from .aggregators import (
    AllGather,
    AllReduce,
    Noop,
    PowerSGD,
    TernGrad,
    TwoShot,
)
from .aggregators.nodes import Nodes
from .aggregators.rank_schedule import Rank
from .compressors import (
    QSGD,
    BlockQuantize,
    Cast,
    DynamicTree,
    Natural,
    NoCompression,
    RandomK,
    Sign,
    SignVote,
    TopK,
)
from .config import ConfigError, build, load_yaml
from .feedback import EF21, EControl, ErrorFeedback, Momentum, NoFeedback
from .optim import DGCSGD, DeMo, OneBitAdam, OneBitLamb, OptimizerScheme, ZeroOneAdam
from .optim.onebit import FreezeStep
from .policy import Policy
from .reducer import Reducer
from .registry import register
from .types import Aggregator, Feedback

Scheme: TypeAlias = str | Path | Mapping[str, Any] | Reducer

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


@register("scheme", "dynamic8")
def dynamic8(
    block_size: int = 256,
    rounding: Literal["nearest", "stochastic"] = "stochastic",
    start_step: int = 0,
    min_numel: int = 1024,
) -> Reducer:
    """Dynamic 8-bit codes, two-shot (Dettmers 2016): as many bytes as int8, and seven decades of range
    inside a block, for gradients whose small elements matter.

    Args:
        block_size: elements per scale.
        rounding: "stochastic" is unbiased and keeps no state; "nearest" adds error feedback at both ends
            (4 + 4/W bytes per compressed element).
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return _block_quantised(DynamicTree(block_size, rounding), start_step, min_numel)


@register("scheme", "qsgd")
def qsgd(
    bits: Literal[2, 4, 8] = 4,
    norm: Literal["l2", "max"] = "l2",
    bucket_size: int = 512,
    start_step: int = 0,
    min_numel: int = 1024,
) -> Reducer:
    """QSGD, two-shot (Alistarh et al. 2017): unbiased rounding to 2^(bits-1) - 1 levels of each bucket's
    norm. No state.

    Args:
        bits: per element, 2, 4 or 8. If the loss is noisier than plain DDP's, double it.
        norm: "l2" is the paper's; "max" is less noisy and tried next.
        bucket_size: elements per norm; halve it against noise, down to 64.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return Reducer(TwoShot(QSGD(bits, bucket_size, norm)), policy=Policy(start_step, min_numel))


@register("scheme", "natural")
def natural(start_step: int = 0, min_numel: int = 1024) -> Reducer:
    """Natural compression, two-shot (Horvath et al. 2019): signs and exponents, 1 byte per element, unbiased
    with a variance of at most 1/8 of every element's square. No state.

    Args:
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return Reducer(TwoShot(Natural()), policy=Policy(start_step, min_numel))


@register("scheme", "terngrad")
def terngrad(clip: float = 2.5, start_step: int = 0, min_numel: int = 1024) -> Reducer:
    """TernGrad with scaler sharing (Wen et al. 2017): 2 bits per element to the owners of shards, exact sums
    back, of 4 bits for 2 to 7 ranks and 8 for up to 127. No state.

    Args:
        clip: in root mean squares, see :class:`~commkit.aggregators.TernGrad`. Lower is less noisy and more
            biased; 0 is unbiased.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return Reducer(TernGrad(clip), policy=Policy(start_step, min_numel))


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


@register("scheme", "signsgd_vote")
def signsgd_vote(momentum: float = 0.0) -> Reducer:
    """signSGD with majority vote, two-shot (Bernstein et al. 2018): one bit per element each way, no scale.

    Every element of the result is +1 or -1: use plain SGD without momentum, and a learning rate near 1e-4 to
    1e-3, which is how far every parameter moves in a step. All tensors take part, from the first step on: a
    mean of gradients beside votes would need another learning rate. Turn gradient clipping off. One bit has no
    zero: an element whose gradient is zero on all ranks, such as an embedding no batch has used, takes a step
    to a random side.

    Args:
        momentum: beta of the momentum whose sign is voted (Signum), 4 bytes per element; 0.9 where batches
            are small. 0 votes on the gradient itself and keeps no state.
    """
    feedback = Momentum(momentum) if momentum else NoFeedback()
    return Reducer(TwoShot(SignVote()), feedback, Policy(min_numel=0))


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


@register("scheme", "onebit_adam")
def onebit_adam(
    freeze_step: FreezeStep = "auto",
    ratio_threshold: float = 0.96,
    scale: Literal["l1", "rms"] = "l1",
    max_grad_norm: float = 0.0,
    clip: Literal["momentum", "gradient"] = "momentum",
    variance_floor: float = 0.0,
    min_numel: int = 1024,
    exclude: Sequence[str] = (),
) -> OptimizerScheme:
    """1-bit Adam (Tang et al. 2021): AdamW until its variance is steady, then signs of the momentum.

    8 bytes of state per parameter as Adam, and residuals of 4 + 4/W.

    Args: those of :class:`~commkit.optim.OneBitAdam`, which it builds.
    """
    return _checked(OptimizerScheme(OneBitAdam, locals(), like="adamw"))


@register("scheme", "onebit_lamb")
def onebit_lamb(
    freeze_step: FreezeStep = "auto",
    ratio_threshold: float = 0.96,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
    coeff_beta: float = 0.9,
    factor_max: float = 4.0,
    factor_min: float = 0.5,
    factor_threshold: float = 0.1,
    scale: Literal["l1", "rms"] = "l1",
    max_grad_norm: float = 0.0,
    clip: Literal["momentum", "gradient"] = "momentum",
    variance_floor: float = 0.0,
    min_numel: int = 1024,
    exclude: Sequence[str] = (),
) -> OptimizerScheme:
    """1-bit LAMB (Li et al. 2021): LAMB until its variance is steady, then signs of the momentum.

    For large batches. 12 bytes of state per parameter, and residuals of 4 + 4/W.

    Args: those of :class:`~commkit.optim.OneBitLamb`, which it builds.
    """
    return _checked(OptimizerScheme(OneBitLamb, locals(), like="adamw"))


@register("scheme", "zero_one_adam")
def zero_one_adam(
    var_freeze_step: int = 1000,
    var_update_scaler: int = 16,
    local_step_scaler: int = 1000,
    local_step_clipper: int = 16,
    scale: Literal["l1", "rms"] = "l1",
) -> OptimizerScheme:
    """0/1 Adam (Lu et al. 2022): signs from the first step on, and ever fewer synchronisations.

    For links whose latency hurts. 16 bytes of state per parameter, and residuals of 4 + 4/W.

    Args: those of :class:`~commkit.optim.ZeroOneAdam`, which it builds.
    """
    return _checked(OptimizerScheme(ZeroOneAdam, locals(), like="adamw"))


@register("scheme", "hierarchical")
def hierarchical(
    scheme: Scheme | OptimizerScheme, local_size: int | None = None, nodes: Nodes | None = None
) -> Reducer | OptimizerScheme:
    """Full precision inside each node, any other scheme between nodes (phases of Jia et al. 2018). A node
    counts as one participant, whose residual is spread over its ranks: ``{name: hierarchical, scheme: {name:
    powersgd, rank: 4}}``.

    Tensors that the scheme's policy leaves dense take one all-reduce over all ranks. Give ``attach`` the
    whole block; a knob of the name ``scheme`` it has itself.

    Args:
        scheme: a name, a block, or a Reducer; its policy decides what is compressed. An optimizer's name
            or block gives such an optimizer, between nodes.
        local_size: ranks per node; None: the environment's LOCAL_WORLD_SIZE, which launchers set.
        nodes: the ranks of each node instead, see :func:`~commkit.aggregators.nodes_of_mesh`.

    Raises:
        ValueError: a scheme that compresses nothing, or wrong nodes.
    """
    inner = scheme if isinstance(scheme, Reducer | OptimizerScheme) else make_scheme(scheme)
    if isinstance(inner, OptimizerScheme):
        return dataclasses.replace(inner, between_nodes=(local_size, nodes))
    if inner.policy == _NEVER:
        raise ValueError(
            f"scheme={scheme!r} leaves everything dense, so nothing would go by nodes; for full precision use "
            "{name: compose, aggregator: {name: all_reduce, compressor: none}}"
        )
    inner.put_between_nodes(local_size, nodes)
    return inner


@register("scheme", "ef21")
def ef21(
    density: float = 0.01,
    momentum: float = 1.0,
    threshold: Literal["auto", "exact", "sampled"] = "auto",
    values: Literal["fp32", "bf16", "fp16"] = "fp32",
    start_step: int = 0,
    min_numel: int = 1024,
) -> Reducer:
    """EF21 with top-k by all-gather (Richtarik et al. 2021): ranks send how an estimate of their gradient
    changes. 8 bytes per compressed element, 12 with momentum.

    Args:
        density: share of elements sent; 0.01 to 0.1.
        momentum: 1 for full gradients; about 0.1 for stochastic ones (EF21-SGDM), the optimizer's own
            momentum then 0.
        threshold: how the largest are found, see :class:`~commkit.compressors.TopK`.
        values: precision of the values sent.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return Reducer(
        AllGather(TopK(density, threshold, values)), EF21(momentum), Policy(start_step, min_numel)
    )


@register("scheme", "econtrol")
def econtrol(
    density: float = 0.1,
    eta: float | None = None,
    threshold: Literal["auto", "exact", "sampled"] = "auto",
    values: Literal["fp32", "bf16", "fp16"] = "fp32",
    start_step: int = 0,
    min_numel: int = 1024,
) -> Reducer:
    """EControl with top-k by all-gather (Gao, Islamov and Stich 2024): for ranks whose data differ, where
    plain error feedback needs small steps. 12 bytes per compressed element.

    Args:
        density: share of elements sent; 0.01 to 0.1.
        eta: strength of the error's return; none is density / 4, which is critically damped. See
            :class:`~commkit.feedback.EControl`.
        threshold: how the largest are found, see :class:`~commkit.compressors.TopK`.
        values: precision of the values sent.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return Reducer(
        AllGather(TopK(density, threshold, values)),
        EControl(density / 4 if eta is None else eta),
        Policy(start_step, min_numel),
    )


@register("scheme", "dgc")
def dgc(
    density: float = 0.001,
    warmup_steps: int = 0,
    clip_norm: float = 0.0,
    nesterov: bool = False,
    masking: bool = True,
    threshold: Literal["auto", "exact", "sampled"] = "auto",
    values: Literal["fp32", "bf16", "fp16"] = "fp32",
    start_step: int = 0,
    min_numel: int = 1024,
    min_ndim: int = 2,
    exclude: Sequence[str] = (),
) -> OptimizerScheme:
    """Deep Gradient Compression, an optimizer (Lin et al. 2018): top-k of the accumulated velocity by
    all-gather, in the place of SGD with momentum. 8 bytes per compressed element, 12 with weight decay.

    Args: those of :class:`~commkit.optim.DGCSGD`; ``lr``, ``momentum`` and ``weight_decay`` are the
    optimizer's settings.
    """
    return _checked(OptimizerScheme(DGCSGD, locals(), like="sgd"))


@register("scheme", "demo")
def demo(
    decay: float = 0.999,
    top_k: int = 32,
    chunk: int = 64,
    values: Literal["fp32", "bf16", "fp16"] = "bf16",
    sign: bool = True,
    min_numel: int = 1024,
    min_ndim: int = 2,
    exclude: Sequence[str] = (),
) -> OptimizerScheme:
    """DeMo, an optimizer (Peng, Quesnelle and Kingma 2024): the largest cosine coefficients of a momentum
    of each rank's own by all-gather, then the sign. In the place of AdamW; 4 bytes per compressed element.

    Args: those of :class:`~commkit.optim.DeMo`; ``lr`` and ``weight_decay`` are the optimizer's settings.
    """
    return _checked(OptimizerScheme(DeMo, locals(), like="adamw"))


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


def _block_quantised(
    compressor: BlockQuantize | DynamicTree, start_step: int, min_numel: int
) -> Reducer:
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


def _checked(scheme: OptimizerScheme) -> OptimizerScheme:
    """Raise now what is wrong with the knobs, not when parameters come."""
    scheme([torch.zeros(0)], lr=0.0)
    return scheme


def make_reducer(scheme: Scheme, knobs: Mapping[str, Any] | None = None) -> Reducer:
    """The Reducer that ``scheme`` stands for.

    Args:
        scheme: a scheme's name; a path to a YAML or JSON file (its ``scheme`` block, or all of it if there
            is none); such a block as a mapping; or a Reducer, which is returned as it is.
        knobs: fields that go over those of the block. ``seed`` is a field of every scheme.

    Raises:
        ConfigError: unknown scheme or field, wrong type or value.
        TypeError: parts that cannot go together, knobs beside a Reducer, or a scheme that is an optimizer.
    """
    if isinstance(scheme, Reducer):
        if knobs:
            raise TypeError(
                f"knobs {sorted(knobs)} have no effect on a Reducer; set them on its parts"
            )
        return scheme
    made = make_scheme(scheme, knobs)
    if isinstance(made, OptimizerScheme):
        name = made.optimizer.__name__
        raise TypeError(
            f"scheme {_block(scheme)['name']!r} is an optimizer; build it and attach that: "
            f"optimizer = commkit.optim.{name}(model.parameters(), lr=...); "
            "commkit.attach(model, optimizer)"
        )
    return made


def make_scheme(
    scheme: str | Path | Mapping[str, Any], knobs: Mapping[str, Any] | None = None
) -> Reducer | OptimizerScheme:
    """As :func:`make_reducer`, also for schemes that are optimizers, which come still without parameters:
    ``make_scheme("onebit_adam")(model.parameters(), lr=1e-3)``.

    Raises:
        ConfigError: unknown scheme or field, wrong type or value.
        TypeError: parts that cannot go together.
    """
    block = _block(scheme) | dict(knobs or {})
    seed = block.pop("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"scheme.seed={seed!r} must be an integer")
    made = build("scheme", block, "scheme")
    if isinstance(made, OptimizerScheme):
        return dataclasses.replace(made, seed=seed)
    assert isinstance(made, Reducer)
    made.seed = seed
    return made


def _block(scheme: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(scheme, Mapping):
        return dict(scheme)
    if isinstance(scheme, Path) or Path(scheme).suffix in (".yaml", ".yml", ".json"):
        data = load_yaml(scheme)
        data = data.get("scheme", data)
        return {"name": data} if isinstance(data, str) else dict(data)
    return {"name": scheme}
