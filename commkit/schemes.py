"""Every published system as a composition of parts: one short function each.

This is the page to read first. A function's name is the scheme's name in YAML (``scheme: {name: ...}``)
and its parameters are the block's other fields. Each call builds a fresh :class:`~commkit.Reducer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

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
    LearnedLevels,
    MinMax,
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
from .outer import (
    CO2,
    A2CiD2,
    AdaptiveRank,
    AdLoCo,
    AEDiT,
    AsyncOptions,
    AsyncScheme,
    DelayedNesterov,
    DFedSAM,
    DiLoCo,
    DiLoCoX,
    EDiT,
    GossipSchedule,
    GossipSGD,
    LocalSGD,
    MoNNA,
    NoLoCo,
    NormTest,
    OuterScheme,
    OuterSync,
    Penalty,
    PushRule,
    PushSum,
    StreamingDiLoCo,
    SyncOptions,
)
from .outer.adloco import LrRule
from .outer.dilocox import low_rank_int4
from .outer.flat import WireDtype
from .outer.fragments import Fragments, Pattern
from .outer.gossip_schedule import Mode
from .outer.penalty import PAPER
from .outer.sign_agreement import Majority
from .outer.topologies import Topology
from .outer.trainers import Pairing
from .policy import Policy
from .reducer import Reducer
from .registry import register
from .sharded import PartitionScheme, ShardedScheme
from .straggler import (
    Backup,
    CodeFamily,
    Coding,
    CoordinationOptions,
    DynamicBackup,
    Multiplexed,
    SelectiveRepetition,
    StragglerScheme,
    TransportName,
)
from .straggler.families import AutoFamily
from .types import Aggregator, Compressor, Feedback

Scheme: TypeAlias = str | Path | Mapping[str, Any] | Reducer

_NEVER = Policy(start_step=2**62)


@register("scheme", "ddp")
def ddp() -> Reducer:
    """Plain all-reduce: what DDP does itself, through commkit, with its bytes counted.

    Differences from the paper: no paper describes it.
    """
    return Reducer(AllReduce(NoCompression()), policy=_NEVER)


@register("scheme", "noop")
def noop() -> Reducer:
    """No communication: the bound on speed. If this is not much faster, the network is not the problem.
    Replicas drift apart; never train with it.

    Differences from the paper: no paper describes it.
    """
    return Reducer(Noop(), policy=Policy(min_numel=0))


@register("scheme", "fp16")
def fp16() -> Reducer:
    """float16 all-reduce. Steps that overflow are sent in full precision. No state.

    Differences from the paper: no paper describes it.
    """
    return Reducer(AllReduce(Cast("fp16")), policy=Policy(min_numel=0))


@register("scheme", "bf16")
def bf16() -> Reducer:
    """bfloat16 all-reduce. No state.

    Differences from the paper: no paper describes it.
    """
    return Reducer(AllReduce(Cast("bf16")), policy=Policy(min_numel=0))


@register("scheme", "int8")
def int8(
    block_size: int = 256,
    rounding: Literal["nearest", "stochastic"] = "stochastic",
    start_step: int = 0,
    min_numel: int = 1024,
) -> Reducer:
    """8-bit block quantisation, two-shot (Dettmers 2016): about 3.9 times fewer bytes than fp32.

    Differences from the paper: one scale per block in place of one per tensor; unbiased rounding by default,
    where the paper rounds to the nearest code; the mean is quantised again on its way back (two-shot). The
    paper's own 8-bit code is ``dynamic8``.

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

    Differences from the paper: no paper describes it; it is ``int8`` with 15 levels, and error feedback at both
    ends, because nearest rounding is biased.

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

    Differences from the paper: the 256 levels are those of later 8-bit optimizers, not the paper's bit pattern;
    one scale per block in place of one per tensor; unbiased rounding by default; the mean is quantised again on
    its way back.

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

    Differences from the paper: codes of fixed width in place of Elias codes; servers in place of everybody's
    message to everybody, so the mean is quantised a second time, without bias too.

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

    Differences from the paper: an exponent of 7 bits, counted down from the tensor's largest, in place of the 8
    of float32: 1 byte per element in place of 9 bits. The mean is compressed again on its way back, as the
    paper does with a master.

    Args:
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return Reducer(TwoShot(Natural()), policy=Policy(start_step, min_numel))


@register("scheme", "terngrad")
def terngrad(clip: float = 2.5, start_step: int = 0, min_numel: int = 1024) -> Reducer:
    """TernGrad with scaler sharing (Wen et al. 2017): 2 bits per element to the owners of shards, exact sums
    back, of 4 bits for 2 to 7 ranks and 8 for up to 127. No state.

    Differences from the paper: every rank serves a share of the tensors in place of a parameter server, and
    exact sums come back. Clipping measures by the root mean square. Tensors below ``min_numel`` stay dense.

    Args:
        clip: in root mean squares, see :class:`~commkit.aggregators.TernGrad`. Lower is less noisy and more
            biased; 0 is unbiased.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
    """
    return Reducer(TernGrad(clip), policy=Policy(start_step, min_numel))


@register("scheme", "sign")
def sign(
    scale: Literal["l1", "rms"] = "l1",
    start_step: int = 0,
    min_numel: int = 1024,
    max_grad_norm: float = 0.0,
) -> Reducer:
    """EF-signSGD, two-shot (Karimireddy et al. 2019; Tang et al. 2021 figure 3): one bit per element each
    way, with error feedback at both ends (4 + 4/W bytes per compressed element).

    Differences from the paper: residuals are in units of gradients, not of steps: a learning rate that changes
    applies to what was saved up, too. The return path is signs with feedback of its own (Tang et al.), with one
    scale for each rank's share of a tensor.

    Args:
        scale: "l1" or "rms", see :class:`~commkit.compressors.Sign`.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
        max_grad_norm: clip gradients before they are compressed, where ``clip_grad_norm_`` would cut what
            feedback has saved up; see :class:`~commkit.Reducer`. 0 is off.
    """
    return Reducer(
        TwoShot(Sign(scale), server_feedback=ErrorFeedback()),
        ErrorFeedback(),
        Policy(start_step, min_numel),
        max_grad_norm=max_grad_norm,
    )


@register("scheme", "signsgd_vote")
def signsgd_vote(momentum: float = 0.0) -> Reducer:
    """signSGD with majority vote, two-shot (Bernstein et al. 2018): one bit per element each way, no scale.

    Every element of the result is +1 or -1: use plain SGD without momentum, and a learning rate near 1e-4 to
    1e-3, which is how far every parameter moves in a step. All tensors take part, from the first step on: a
    mean of gradients beside votes would need another learning rate. Turn gradient clipping off. One bit has no
    zero: an element whose gradient is zero on all ranks, such as an embedding no batch has used, takes a step
    to a random side.

    Differences from the paper: every rank counts the votes for a share of each tensor, in place of one server;
    a tie, or a gradient of exactly 0, is decided by a coin that all ranks share. Weight decay is the
    optimizer's.

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
    max_grad_norm: float = 0.0,
) -> Reducer:
    """Top-k with error feedback by all-gather (Stich et al. 2018). 4 bytes per compressed element.

    Momentum is the optimizer's; for momentum correction and masking use DGC.

    Differences from the paper: residuals are in units of gradients, not of steps; all tensors have the same
    density, each on its own.

    Args:
        density: share of elements sent; 0.001 to 0.01.
        threshold: how the largest are found, see :class:`~commkit.compressors.TopK`.
        values: precision of the values sent.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
        max_grad_norm: clip gradients before they are compressed, where ``clip_grad_norm_`` would cut what
            feedback has saved up; see :class:`~commkit.Reducer`. 0 is off.
    """
    return Reducer(
        AllGather(TopK(density, threshold, values)),
        ErrorFeedback(),
        Policy(start_step, min_numel),
        max_grad_norm=max_grad_norm,
    )


@register("scheme", "randomk")
def randomk(
    density: float = 0.01,
    error_feedback: bool = True,
    start_step: int = 0,
    min_numel: int = 1024,
    max_grad_norm: float = 0.0,
) -> Reducer:
    """Random-k by all-reduce (Stich et al. 2018): all ranks draw the same indices, so only values travel.

    Differences from the paper: residuals are in units of gradients, not of steps; one element of each of k
    equal stretches is drawn, in place of k of all.

    Args:
        density: share of elements sent.
        error_feedback: on, residuals take 4 bytes per compressed element; off, values are scaled by n/k,
            which is unbiased and very noisy.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
        max_grad_norm: clip gradients before they are compressed, where ``clip_grad_norm_`` would cut what
            feedback has saved up; see :class:`~commkit.Reducer`. 0 is off.
    """
    feedback = ErrorFeedback() if error_feedback else NoFeedback()
    compressor = RandomK(density, unbiased=not error_feedback)
    policy = Policy(start_step, min_numel)
    return Reducer(AllReduce(compressor), feedback, policy, max_grad_norm=max_grad_norm)


@register("scheme", "powersgd")
def powersgd(
    rank: Rank = 4,
    min_compression_rate: float = 2.0,
    warm_start: bool = True,
    error_feedback: bool = True,
    start_step: int = 0,
    iteration: Literal["two_sided", "alternating"] = "two_sided",
    max_grad_norm: float = 0.0,
) -> Reducer:
    """PowerSGD (Vogels et al. 2019): two all-reduces whose cost does not grow with the ranks.

    State: residual of 4 bytes per factorised element, and Q of 4 rank / rows bytes.

    Differences from the paper: none in the steps of algorithm 1. The residual is the local one of the paper's
    text, not that of its code, which grows with the square root of the steps; bases are orthogonal by QR in
    place of Gram-Schmidt. Momentum is the optimizer's, after compression. ``iteration`` and schedules of the
    rank are additions.

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
        max_grad_norm: clip gradients before they are compressed, where ``clip_grad_norm_`` would cut what
            feedback has saved up; see :class:`~commkit.Reducer`. 0 is off.
    """
    return Reducer(
        PowerSGD(rank, min_compression_rate, warm_start, iteration),
        ErrorFeedback() if error_feedback else NoFeedback(),
        Policy(start_step, min_numel=0),
        max_grad_norm=max_grad_norm,
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

    Differences from the paper: bias correction, and decoupled weight decay that stays out of the momentum; a
    scale of mean absolute value in place of root mean square; tensors below ``min_numel`` stay with Adam;
    "auto" asks the ratio of variances for an upper bound, too. Elements whose variance is 0 at the freeze stay
    where they are.

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

    Differences from the paper: one scale per tensor, so tensors need not be brought to a common magnitude
    before they are sent; that scale is the mean absolute value; tensors below ``min_numel`` stay with LAMB.

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

    Differences from the paper: as in its authors' implementation, gradients travel until ``var_freeze_step``
    and accumulated updates after it; residuals start anew at that switch. Bias correction; weight decay stays
    out of what is accumulated; a scale of mean absolute value.

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

    Differences from the paper: the phase between nodes compresses, with feedback of the node's mean. Inside a
    node each rank serves whole parameters, in place of one master for all; tensors are not cut.

    Args:
        scheme: a name, a block, or a Reducer; its policy decides what is compressed. An optimizer's name
            or block gives such an optimizer, between nodes.
        local_size: ranks per node; None: the environment's LOCAL_WORLD_SIZE, which launchers set.
        nodes: the ranks of each node instead, see :func:`~commkit.aggregators.nodes_of_mesh`.

    Raises:
        ValueError: a scheme that compresses nothing, or wrong nodes.
    """
    inner = scheme if isinstance(scheme, Reducer | OptimizerScheme) else make_scheme(scheme)
    if isinstance(inner, ShardedScheme | PartitionScheme):
        raise TypeError(
            f"scheme={scheme!r} is for sharded models; put the scheme of the slow axis into hsdp: {{name: hsdp, scheme: "
            "...}"
        )
    if isinstance(inner, StragglerScheme):
        raise TypeError(f"scheme={scheme!r} has a coordinator and knows no nodes; use it as it is")
    if isinstance(inner, AsyncScheme):
        raise TypeError(f"scheme={scheme!r} has servers and knows no nodes; use it as it is")
    if isinstance(inner, OuterScheme):
        raise TypeError(
            f"scheme={scheme!r} trains with local updates and knows no nodes; give it the process group that "
            "joins the nodes, and a model in a DistributedDataParallel over the ranks of one node"
        )
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
    max_grad_norm: float = 0.0,
) -> Reducer:
    """EF21 with top-k by all-gather (Richtarik et al. 2021): ranks send how an estimate of their gradient
    changes. 8 bytes per compressed element, 12 with momentum.

    Differences from the paper: none at ``momentum=1``: estimates start at 0, so the first message is that of
    the gradient itself. Tensors below ``min_numel`` are averaged densely.

    Args:
        density: share of elements sent; 0.01 to 0.1.
        momentum: 1 for full gradients; about 0.1 for stochastic ones (EF21-SGDM), the optimizer's own
            momentum then 0.
        threshold: how the largest are found, see :class:`~commkit.compressors.TopK`.
        values: precision of the values sent.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
        max_grad_norm: clip gradients before they are compressed, where ``clip_grad_norm_`` would cut what
            feedback has saved up; see :class:`~commkit.Reducer`. 0 is off.
    """
    return Reducer(
        AllGather(TopK(density, threshold, values)),
        EF21(momentum),
        Policy(start_step, min_numel),
        max_grad_norm=max_grad_norm,
    )


@register("scheme", "econtrol")
def econtrol(
    density: float = 0.1,
    eta: float | None = None,
    threshold: Literal["auto", "exact", "sampled"] = "auto",
    values: Literal["fp32", "bf16", "fp16"] = "fp32",
    start_step: int = 0,
    min_numel: int = 1024,
    max_grad_norm: float = 0.0,
) -> Reducer:
    """EControl with top-k by all-gather (Gao, Islamov and Stich 2024): for ranks whose data differ, where
    plain error feedback needs small steps. 12 bytes per compressed element.

    Differences from the paper: estimates start at 0, in place of a dense first exchange of gradients; ``eta``
    is density / 4 by default, which is the library's own choice. Tensors below ``min_numel`` are averaged
    densely.

    Args:
        density: share of elements sent; 0.01 to 0.1.
        eta: strength of the error's return; none is density / 4, which is critically damped. See
            :class:`~commkit.feedback.EControl`.
        threshold: how the largest are found, see :class:`~commkit.compressors.TopK`.
        values: precision of the values sent.
        start_step: dense steps before.
        min_numel: smaller tensors stay dense.
        max_grad_norm: clip gradients before they are compressed, where ``clip_grad_norm_`` would cut what
            feedback has saved up; see :class:`~commkit.Reducer`. 0 is off.
    """
    return Reducer(
        AllGather(TopK(density, threshold, values)),
        EControl(density / 4 if eta is None else eta),
        Policy(start_step, min_numel),
        max_grad_norm=max_grad_norm,
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
    max_grad_norm: float = 0.0,
) -> Reducer:
    """Any parts that go together, from YAML alone: ``{name: compose, aggregator: {name: two_shot,
    compressor: {name: sign}}, feedback: {name: error_feedback}}``. ``max_grad_norm`` is that of the
    :class:`~commkit.Reducer`.

    Differences from the paper: no paper describes it.

    Raises:
        TypeError: an aggregator cannot carry its compressor's payloads.
    """
    return Reducer(aggregator, feedback, policy, max_grad_norm=max_grad_norm)


@register("scheme", "local_sgd")
def local_sgd(
    sync_every: int = 16, reducer: Reducer | None = None, options: SyncOptions | None = None
) -> OuterScheme:
    """Local SGD (Stich 2019): weights are averaged every so often. No state; 4 bytes per parameter with a
    ``reducer``.

    Differences from the paper: any optimizer inside, not SGD alone; a replica that is not finite is left out of
    its round. With a ``reducer`` differences to the last mean are sent.

    Args: those of :class:`~commkit.outer.LocalSGD`.
    """
    return OuterScheme(LocalSGD, locals()).checked()


@register("scheme", "post_local_sgd")
def post_local_sgd(
    switch_step: int,
    sync_every: int = 16,
    reducer: Reducer | None = None,
    options: SyncOptions | None = None,
) -> OuterScheme:
    """Post-local SGD (Lin et al. 2020): gradients are averaged in every step as DDP does, and from ``switch_step``
    on weights every so often. No state; 4 bytes per parameter with a ``reducer``.

    Differences from the paper: any optimizer inside; the rest as for ``local_sgd``.

    Args: those of :class:`~commkit.outer.LocalSGD`; ``switch_step`` is its ``options.warmup_steps``: the step of the
        first learning-rate decay in the paper.
    """
    options = SyncOptions() if options is None else options
    if options.warmup_steps:
        raise ValueError(
            f"options.warmup_steps={options.warmup_steps} and switch_step={switch_step} say the same thing; give "
            "switch_step alone"
        )
    if switch_step < 0:
        raise ValueError(f"switch_step={switch_step} must be >= 0; use 0 for local SGD")
    options = dataclasses.replace(options, warmup_steps=switch_step)
    knobs = {"sync_every": sync_every, "reducer": reducer, "options": options}
    return OuterScheme(LocalSGD, knobs).checked()


@register("scheme", "diloco")
def diloco(
    sync_every: int = 100,
    reducer: Reducer | None = None,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    options: SyncOptions | None = None,
) -> OuterScheme:
    """DiLoCo (Douillard et al. 2023): rounds of local steps, then a step of Nesterov momentum on the mean
    pseudo-gradient. 8 bytes per parameter, and the reducer's.

    Differences from the paper: rounds of 100 steps by default, where the paper has 500; a replica that is not
    finite is left out of its round. The outer step is that of the paper.

    Args: those of :class:`~commkit.outer.DiLoCo`.
    """
    return OuterScheme(DiLoCo, locals()).checked()


@register("scheme", "streaming_diloco")
def streaming_diloco(
    sync_every: int = 100,
    fragments: Fragments = 4,
    pattern: Pattern = "strided",
    overlap: int = 0,
    mixing: float | None = None,
    reducer: Reducer | None = None,
    outer_lr: float | None = None,
    outer_momentum: float = 0.9,
    options: SyncOptions | None = None,
) -> OuterScheme:
    """Streaming DiLoCo (Douillard et al. 2025): one fragment of the model after another, each on its way while
    training goes on. 8 bytes per parameter, and the reducer's.

    Args: those of :class:`~commkit.outer.StreamingDiLoCo`.
    """
    scheme = OuterScheme(StreamingDiLoCo, locals())
    # Named fragments are checked against the model that has them.
    return scheme.checked(layers=fragments) if isinstance(fragments, int) else scheme


@register("scheme", "co2")
def co2(
    sync_every: int = 48,
    reducer: Reducer | None = None,
    outer_lr: float = 1.0,
    outer_momentum: float | None = None,
    staleness_gap: float | Literal["adaptive"] = "adaptive",
    clip: float = 10.0,
    clip_unit: Literal["rms", "absolute"] = "rms",
    normalise_lr: bool = False,
    options: SyncOptions | None = None,
) -> OuterScheme:
    """CO2 (Sun et al. 2024): rounds whose mean arrives one round late, so that nothing waits for it. 12 bytes per
    parameter, and the reducer's.

    Differences from the paper: ``staleness_gap`` is the library's own formula; the momentum is clipped to
    multiples of the root mean square, where the authors' code has an absolute bound.

    Args: those of :class:`~commkit.outer.CO2`.
    """
    return OuterScheme(CO2, locals()).checked()


@register("scheme", "dilocox")
def dilocox(
    sync_every: int = 125,
    rank: int = 32,
    reducer: Reducer | None = None,
    adaptive_rank: AdaptiveRank | Literal["auto"] | None = "auto",
    eager: bool = False,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.5,
    options: SyncOptions | None = None,
) -> OuterScheme:
    """DiLoCoX (Qi et al. 2025): DiLoCo one round late, in low-rank factors of 4 bits whose rank adapts. 16 bytes
    per parameter.

    Differences from the paper: the rule by which rank and round length shrink is the library's own; outer
    momentum is 0.5, since a round of delay takes the stability of DiLoCo's 0.9. ``eager`` is of Kale et al.
    (2025).

    Args: those of :class:`~commkit.outer.DiLoCoX`; ``rank`` is the factors', unless a ``reducer`` takes their
        place: a twentieth of the width to begin with.
    """
    knobs = {key: value for key, value in locals().items() if key != "rank"}
    if reducer is None:
        knobs["reducer"] = low_rank_int4(rank)
    return OuterScheme(DiLoCoX, knobs).checked()


@register("scheme", "adloco")
def adloco(
    initial_batch: int = 8,
    max_micro_batch: int = 8,
    sync_every: int = 100,
    eta: float = 0.1,
    switch_at: float = 2.0,
    max_batch: int | None = None,
    lr_rule: LrRule = "none",
    trainers: int = 1,
    merge_every: int = 2,
    merge: Pairing = "worst+worst",
    reducer: Reducer | None = None,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    options: SyncOptions | None = None,
) -> OuterScheme:
    """AdLoCo (Kutuzov et al. 2025): DiLoCo whose batch grows with the noise of the gradients, by several
    trainers that merge. 8 bytes per parameter, and the reducer's.

    Args: those of :class:`~commkit.outer.AdLoCo`; ``eta`` is that of its
        :class:`~commkit.outer.NormTest`.
    """
    knobs = {key: value for key, value in locals().items() if key != "eta"}
    return OuterScheme(AdLoCo, knobs | {"test": NormTest(eta)}).checked()


@register("scheme", "edit")
def edit(
    sync_every: int = 128,
    reducer: Reducer | None = None,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.8,
    penalty: Penalty | None = PAPER,
    prefetch: int = 1,
    majority: Majority | None = None,
    layers: Sequence[str] | None = None,
    options: SyncOptions | None = None,
) -> OuterScheme:
    """EDiT (Cheng et al. 2025): layers are synchronised one by one inside the forward pass, and replicas whose
    pseudo-gradient is anomalous do not count. 8 bytes per parameter, and the reducer's.

    Differences from the paper: all layers' norms are exchanged in one message before the first layer; the
    running mean starts at the first norm, and what is anomalous or not finite weighs exactly 0 and never enters
    the statistics. Layers that forward leaves out are synchronised before the next step.

    Args: those of :class:`~commkit.outer.EDiT`.
    """
    return OuterScheme(EDiT, locals()).checked()


@register("scheme", "a_edit")
def a_edit(
    sync_seconds: float = 600.0,
    min_total_steps: int = 100,
    step_share: float = 0.5,
    reducer: Reducer | None = None,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.8,
    penalty: Penalty | None = PAPER,
    prefetch: int = 1,
    majority: Majority | None = None,
    layers: Sequence[str] | None = None,
    options: SyncOptions | None = None,
) -> OuterScheme:
    """A-EDiT (Cheng et al. 2025): EDiT by the clock, so that fast replicas do more steps in a round. 8 bytes per
    parameter, and the reducer's.

    Differences from the paper: those of ``edit``. A replica that is left out has no share of steps either, and
    the others' add up to 1; clocks are each replica's own and never compared.

    Args: those of :class:`~commkit.outer.AEDiT`.
    """
    return OuterScheme(AEDiT, locals()).checked()


@register("scheme", "noloco")
def noloco(
    sync_every: int = 50,
    alpha: float = 0.5,
    beta: float = 0.7,
    gamma: float | None = None,
    pairing: Literal["random", "round_robin"] = "random",
    compressor: Compressor | None = None,
    wire_dtype: WireDtype = "fp32",
    strict: bool = False,
    pairing_seed: int = 0,
    options: SyncOptions | None = None,
) -> OuterScheme:
    """NoLoCo (Kolehmainen et al. 2025): every so often each replica meets one other, and nobody waits for all.
    8 bytes per parameter.

    Differences from the paper: heavy-ball momentum, as in the authors' code, where the text says Nesterov; with
    ``gamma`` equal to ``beta`` weights travel alone, to the same effect; an odd replica steps alone; a
    ``gamma`` at which replicas drift apart is refused.

    Args: those of :class:`~commkit.outer.NoLoCo`; ``pairing_seed`` is its ``seed``.
    """
    return _seeded(NoLoCo, locals(), "pairing_seed")


@register("scheme", "gossip")
def gossip(
    sync_every: int = 1,
    topology: Topology | None = None,
    schedule: GossipSchedule | None = None,
    gossip_steps: int = 1,
    overlap: bool = False,
    wire_dtype: WireDtype = "fp32",
    options: SyncOptions | None = None,
) -> OuterScheme:
    """Decentralised SGD (Lian et al. 2017): weights are mixed with those of neighbours in a graph. A receive buffer
    and no state.

    Differences from the paper: it mixes after the step and waits for it; the paper's mixing beside the gradient
    is ``overlap``. Pairs drawn at random by default, in place of a ring; any optimizer inside; a message that
    is lost leaves its weight to its receiver.

    Args: those of :class:`~commkit.outer.GossipSGD`.
    """
    return OuterScheme(GossipSGD, locals()).checked()


@register("scheme", "single_merge")
def single_merge(
    p_gossip: float = 0.2,
    windows: Sequence[tuple[int, int, Mode]] = (),
    sync_every: int = 1,
    topology: Topology | None = None,
    schedule_seed: int = 0,
    wire_dtype: WireDtype = "fp32",
    options: SyncOptions | None = None,
) -> OuterScheme:
    """Sparse gossip and one merge of all replicas at the end ("A single global merging suffices", 2025): two ranks
    that a round brings together really meet with a probability of ``p_gossip``. No state.

    Differences from the paper: none in the schedule: pairs meet with probability ``p_gossip`` and one mean of
    all ends the run. Batch-norm statistics are averaged with the weights, not measured anew;
    ``recompute_batch_norm`` does that.

    Args: those of :class:`~commkit.outer.GossipSGD`; ``p_gossip``, ``windows`` and ``schedule_seed`` are its
        :class:`~commkit.outer.GossipSchedule`'s. With a fixed budget communicate late; with none before the merge the
        merged model is useless. ``probe_merge`` says on the way what it would be.
    """
    if options is not None and not options.final_sync:
        raise ValueError(
            "options.final_sync=False leaves out the merge that single_merge is about; leave it true, or use gossip"
        )
    knobs = {
        "sync_every": sync_every,
        "topology": topology,
        "schedule": GossipSchedule(p_gossip, windows, schedule_seed),
        "wire_dtype": wire_dtype,
        "options": options,
    }
    return OuterScheme(GossipSGD, knobs).checked()


@register("scheme", "dfedsam_mgs")
def dfedsam_mgs(
    sync_every: int = 16,
    rho: float = 0.05,
    gossip_steps: int = 4,
    topology: Topology | None = None,
    schedule: GossipSchedule | None = None,
    wire_dtype: WireDtype = "fp32",
    options: SyncOptions | None = None,
) -> OuterScheme:
    """DFedSAM-MGS (Shi et al. 2023): sharpness-aware local steps, then several gossip steps in a row, for ranks with
    data of their own on sparse graphs. Its optimizer's step takes a closure. No state.

    Differences from the paper: rounds are counted in steps, not in epochs; any optimizer follows the
    sharpness-aware gradient; the exponential graph by default.

    Args: those of :class:`~commkit.outer.DFedSAM`.
    """
    return OuterScheme(DFedSAM, locals()).checked()


@register("scheme", "dadao")
def dadao() -> NoReturn:
    """DADAO (Nabli and Oyallon 2023): a solver for smooth, strongly convex problems, in Python alone
    (``commkit.outer.Dadao``); it does not train networks.

    Differences from the paper: none in the recursion. Ranks are simulated in one process, and the constants L
    and mu are arguments.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "'dadao' solves smooth, strongly convex problems of which it must know both constants, so it trains no "
        "network; call commkit.outer.Dadao(gradients, start, smoothness, convexity, rates), or use a2cid2, its "
        "form for networks"
    )


@register("scheme", "push_sum")
def push_sum(
    sync_every: int = 1,
    topology: Topology | None = None,
    schedule: GossipSchedule | None = None,
    gossip_steps: int = 1,
    wire_dtype: WireDtype = "fp32",
    options: SyncOptions | None = None,
) -> OuterScheme:
    """Stochastic gradient push (Assran et al. 2019): gossip over one-way links, unbiased by a mass that travels
    along. 4 bytes per parameter and one number.

    Differences from the paper: exchanges are awaited: there is no overlap. Any optimizer inside; a rank whose
    mass falls below 1/1000 starts again from its peers' weights.

    Args: those of :class:`~commkit.outer.PushSum`.
    """
    return OuterScheme(PushSum, locals()).checked()


@register("scheme", "a2cid2")
def a2cid2(
    sync_every: int = 1,
    topology: Topology | None = None,
    pairing_seed: int = 0,
    wire_dtype: WireDtype = "fp32",
    options: SyncOptions | None = None,
) -> OuterScheme:
    """A2CiD2 (Nabli, Belilovsky and Oyallon 2023): averages of pairs, with a second copy of the weights that
    carries momentum. 4 bytes per parameter.

    Differences from the paper: meetings take place in rounds after every ``sync_every`` steps, in place of a
    thread of their own at random times; both sides mix up to that moment first, which keeps the sum of both
    copies.

    Args: those of :class:`~commkit.outer.A2CiD2`; ``pairing_seed`` is its ``seed``.
    """
    return _seeded(A2CiD2, locals(), "pairing_seed")


@register("scheme", "monna")
def monna(
    num_faulty: int,
    momentum: float = 0.99,
    sync_every: int = 1,
    wire_dtype: WireDtype = "fp32",
    options: SyncOptions | None = None,
) -> OuterScheme:
    """MoNNA (Farhadkhani et al. 2023): every rank averages the weights nearest to its own, so that a few ranks may
    send anything. 4 bytes per parameter.

    Differences from the paper: of the vectors that arrived f are left out, so dead ranks do not use up that
    allowance. There is no exchange of momenta for data that differ much, and no merge at the end.

    Args: those of :class:`~commkit.outer.MoNNA`.
    """
    return OuterScheme(MoNNA, locals()).checked()


@register("scheme", "async_local_sgd")
def async_local_sgd(
    sync_every: int = 100,
    rule: PushRule | None = None,
    servers: Sequence[int] = (0,),
    dynamic: bool = True,
    min_steps: int = 5,
    speed_ema: float = 0.5,
    num_shards: int | None = None,
    grace_s: float = 0.5,
    lease_factor: float = 3.0,
    min_lease_s: float = 60.0,
    timeout_s: float = 1800.0,
    compressor: Compressor | None = None,
    policy: Policy | None = None,
    inner_state: Literal["keep", "reset"] = "keep",
    average_buffers: bool = True,
    on_worker_error: Literal["raise", "continue"] = "raise",
) -> AsyncScheme:
    """Asynchronous local SGD with delayed Nesterov momentum (Liu et al. 2024): one rank or several serve, the others
    train, and nobody waits for the slowest. 12 bytes per parameter on the servers, 4 on a worker.

    Differences from the paper: the inner optimizer's state stays on its worker from task to task by default;
    several ranks may share the server's work; leases end tasks of workers that are lost.

    Args: those of :class:`~commkit.outer.AsyncOptions`; ``rule`` is a block such as ``{name: delayed_nesterov,
        momentum: 0.6}``, or ``stale_nesterov``, ``delayed_sgd``, ``fedbuff``.
    """
    knobs = {key: value for key, value in locals().items() if key not in ("rule", "policy")}
    knobs["servers"] = tuple(servers)
    if policy is not None:
        knobs["policy"] = policy
    return AsyncScheme(AsyncOptions(**knobs), DelayedNesterov() if rule is None else rule)


@register("scheme", "qsdp")
def qsdp(
    weight_bits: Literal[2, 4, 8, 16, 32] = 8,
    gradient_bits: Literal[2, 4, 8, 16, 32] = 8,
    bucket_size: int = 1024,
    levels: Literal["uniform", "learned"] = "uniform",
    feedback: Literal["none", "error_feedback"] = "none",
    start_step: int = 0,
    min_numel: int = 1024,
    min_ndim: int = 2,
    exclude: Sequence[str] = (),
) -> ShardedScheme:
    """QSDP (Markov et al. 2023): FSDP whose gathered weights and scattered gradients are quantised. For models under
    ``fully_shard``. No state; 1.008 bytes per element each way at 8 bits, where FSDP sends 4 or 2.

    Differences from the paper: learned levels are fitted to each message, in place of a few times in a run, and
    travel with it. Error feedback for gradients is an addition.

    Args:
        weight_bits: of the gathered weights, on a lattice that is shifted at random after every optimizer step; the
            optimizer's own shards stay as they are. 16 is bfloat16; 32 leaves the gather to FSDP. Below 8 wants a
            trial.
        gradient_bits: of the scattered gradients, rounded at random so that their mean is right. 4 is noisy with few
            ranks.
        bucket_size: elements per range of either, a multiple of 4.
        levels: "learned" puts the levels of codes of 2 and 4 bits where the values are, see
            :class:`~commkit.compressors.LearnedLevels`.
        feedback: "error_feedback" keeps what the gradients' codes leave unsent and rounds to the nearest: less noise at
            4 bits, for a residual as large as the whole model on every rank, 4 bytes per element.
        start_step: steps in full precision before.
        min_numel: smaller parameters go in full precision, each as a whole.
        min_ndim: so do those of fewer dimensions: norms and biases at 2.
        exclude: and those whose name matches one of these shell patterns.
    """
    rounding: Literal["nearest", "stochastic"] = "nearest" if feedback != "none" else "stochastic"
    return ShardedScheme(
        weights=_ranged(weight_bits, bucket_size, "shift", levels),
        gradients=_ranged(gradient_bits, bucket_size, rounding, levels),
        feedback=feedback,
        policy=Policy(start_step, min_numel, min_ndim, exclude),
    )


@register("scheme", "zeropp")
def zeropp(
    weight_bits: Literal[4, 8, 16, 32] = 8,
    gradient_bits: Literal[4, 8, 16, 32] = 4,
    weight_block: int = 256,
    gradient_block: int = 256,
    local_size: int | None = None,
    nodes: Nodes | None = None,
    start_step: int = 0,
    min_numel: int = 1024,
    min_ndim: int = 2,
    exclude: Sequence[str] = (),
) -> ShardedScheme:
    """ZeRO++ (Wang et al. 2023): block-quantised gathers, and gradients that are averaged inside each node before they
    cross to others. For models under ``fully_shard`` over several nodes. No state.

    Its third part, a second copy of the weights inside each node for backward, is FSDP's own: give ``fully_shard``
    ``reshard_after_forward`` as the number of ranks per node.

    Differences from the paper: gradients are rounded at random, weights to the nearest, both in blocks of 256.
    The second copy of the weights is FSDP's.

    Args:
        weight_bits: of the gathered weights, nearest rounding. 16 is bfloat16; 32 leaves the gather to FSDP.
        gradient_bits: of the gradients in both hops, rounded at random. 32 leaves the scatter to FSDP.
        weight_block: elements per scale of the weights.
        gradient_block: elements per scale of the gradients.
        local_size: ranks per node; None: the environment's LOCAL_WORLD_SIZE, which launchers set.
        nodes: the ranks of each node instead.
        start_step: steps in full precision before.
        min_numel: smaller parameters go in full precision, each as a whole.
        min_ndim: so do those of fewer dimensions: norms and biases at 2.
        exclude: and those whose name matches one of these shell patterns.
    """
    gradients = _blocked(gradient_bits, gradient_block, "stochastic")
    return ShardedScheme(
        weights=_blocked(weight_bits, weight_block, "nearest"),
        gradients=gradients,
        between=gradients,
        policy=Policy(start_step, min_numel, min_ndim, exclude),
        local_size=local_size,
        nodes=nodes,
    )


@register("scheme", "hsdp")
def hsdp(scheme: Scheme, inside: Scheme | ShardedScheme | None = None) -> ShardedScheme:
    """Sharded inside each node, any scheme between the replicas of a mesh: ``{name: hsdp, scheme: {name: powersgd}}``.
    ``fully_shard`` gets the shard axis alone, :func:`commkit.attach` the whole mesh. Residuals are of shards: their memory is
    divided by the number of shard ranks.

    The scheme sees a parameter's shard as the tensor that it compresses: one scale, or one low-rank matrix, for each.

    Differences from the paper: no paper describes it.

    Args:
        scheme: for the replicate axis: a name, a block or a Reducer.
        inside: for the shard axis, "qsdp" or "zeropp" or a block of theirs; None leaves it to FSDP.

    Raises:
        TypeError: ``scheme`` reduces no gradients, or ``inside`` is not for sharded models.
    """
    made = ShardedScheme()
    if inside is not None:
        told = inside if isinstance(inside, ShardedScheme) else make_scheme(inside)  # type: ignore[arg-type]
        if not isinstance(told, ShardedScheme) or told.reducer is not None:
            raise TypeError(
                f"inside={inside!r} must be qsdp or zeropp; leave it out for FSDP's own"
            )
        made = told
    return dataclasses.replace(made, reducer=make_reducer(scheme))


@register("scheme", "three_level")
def three_level(
    tiers: Sequence[str] = ("local", "node"),
    gradient_bits: Literal[4, 8, 16, 32] = 4,
    weight_bits: Literal[4, 8, 16, 32] = 8,
    block_size: int = 256,
    min_numel: int = 1024,
    min_ndim: int = 2,
    exclude: Sequence[str] = (),
) -> PartitionScheme:
    """Three-level partitioning (Xu et al. 2025): weights are cut over the fastest links, gradients and the optimizer's
    state ever finer over the slower ones, so that each is sent most where sending is cheap. An optimizer around yours: see
    :class:`~commkit.sharded.PartitionedOptimizer`.

    Differences from the paper: the tiers are the axes of any mesh, where the paper has the pairs, nodes and
    whole of one machine; gradients are coded on every tier, weights on the slowest alone. There is no second
    copy of the weights for backward.

    Args:
        tiers: axes of the mesh, fastest first, without the one that ``fully_shard`` was given. ``["replicate"]`` is
            ZeRO-1 over the replicas of a sharded model.
        gradient_bits: of gradients on every tier, rounded at random; 16 is bfloat16, 32 full precision.
        weight_bits: of updated weights on the last tier, the slowest; the others carry full precision.
        block_size: elements per scale of either.
        min_numel: smaller parameters go in full precision, each as a whole.
        min_ndim: so do those of fewer dimensions: norms and biases at 2.
        exclude: and those whose name matches one of these shell patterns.
    """
    gradients = _blocked(gradient_bits, block_size, "stochastic")
    weights = _blocked(weight_bits, block_size, "nearest")
    return PartitionScheme(
        tiers=tuple(tiers),
        gradients={} if gradients is None else dict.fromkeys(tiers, gradients),
        weights={} if weights is None else {tiers[-1]: weights},
        policy=Policy(0, min_numel, min_ndim, exclude),
    )


@register("scheme", "backup")
def backup(
    num_backups: int = 1,
    k: int | None = None,
    min_share: float = 0.0,
    transport: TransportName = "torch",
    options: CoordinationOptions | None = None,
) -> StragglerScheme:
    """Backup workers (Chen et al. 2016): a step takes the first k gradients and drops the others. 4 bytes
    per parameter, and 4 with ``options.compressor``, where what was dropped is kept.

    Differences from the paper: shares of the batch go round, so that a slow worker's data is not left out; with
    ``options.compressor`` and error feedback a gradient that came too late stays in its worker's residual.

    Args: those of :class:`~commkit.straggler.Backup`; ``transport`` and ``options`` as for
        :class:`~commkit.straggler.StragglerScheme`.
    """
    return StragglerScheme(Backup(num_backups, k, min_share), _or(options), transport)


@register("scheme", "dbw")
def dbw(
    gain: Literal["smoothness", "noise_scale"] = "smoothness",
    window: int = 5,
    loss_tolerance: float = 0.01,
    max_change: int = 2,
    transport: TransportName = "torch",
    options: CoordinationOptions | None = None,
) -> StragglerScheme:
    """Dynamic backup workers (Xu, Neglia and Sebastianelli 2020): backup workers whose k is chosen anew in every
    step, by the expected progress per second. 4 bytes per parameter.

    Differences from the paper: until its windows are full it awaits half of the workers, not all; k changes by
    at most ``max_change`` and rises while the loss does; ``gain: noise_scale`` is an addition, for optimizers
    with momentum.

    Args: those of :class:`~commkit.straggler.DBW`; ``gain`` has to suit the optimizer. Others as for ``backup``.
    """
    method = DynamicBackup(gain, window, loss_tolerance, max_change)
    return StragglerScheme(method, _or(options), transport)


@register("scheme", "gradient_coding")
def gradient_coding(
    num_stragglers: int = 1,
    code: CodeFamily | None = None,
    mu: float = 0.0,
    transport: TransportName = "torch",
    options: CoordinationOptions | None = None,
) -> StragglerScheme:
    """Gradient coding (Tandon et al. 2017): every worker computes s + 1 shares, so that the exact gradient comes
    without any s of the workers. 4 bytes per parameter.

    Differences from the paper: codes of repetition where they fit, else a deterministic cyclic code; the
    paper's random one only where neither exists, the best of 200. Rounds close when the gradient can be decoded
    (``mu``).

    Args: those of :class:`~commkit.straggler.Coding`. Others as for ``backup``.
    """
    method = Coding(num_stragglers, AutoFamily() if code is None else code, mu)
    return StragglerScheme(method, _or(options), transport)


@register("scheme", "sr_sgc")
def sr_sgc(
    burst: int = 1,
    rounds: int = 2,
    stragglers: int = 1,
    code: CodeFamily | None = None,
    mu: float = 1.0,
    braking: float | None = None,
    transport: TransportName = "torch",
    options: CoordinationOptions | None = None,
) -> StragglerScheme:
    """Sequential gradient coding with selective repetition (Krishnan et al. 2023): the exact gradient, some rounds
    later, for less redundancy. 4 bytes per parameter and job under way.

    Differences from the paper: the code as for ``gradient_coding``; ``braking`` and one model on late gradients
    are additions to the paper's several models.

    Args: those of :class:`~commkit.straggler.SelectiveRepetition`; ``braking`` is the rho of adaptive braking (Venigalla
        et al. 2020), for one model that takes late gradients. Others as for ``backup``.
    """
    method = SelectiveRepetition(burst, rounds, stragglers, code or AutoFamily(), mu)
    return StragglerScheme(method, _or(options), transport, braking)


@register("scheme", "m_sgc")
def m_sgc(
    burst: int = 1,
    rounds: int = 2,
    stragglers: int = 1,
    code: CodeFamily | None = None,
    mu: float = 1.0,
    braking: float | None = None,
    transport: TransportName = "torch",
    options: CoordinationOptions | None = None,
) -> StragglerScheme:
    """Multiplexed sequential gradient coding (Krishnan et al. 2023): the exact gradient, some rounds later, with little
    redundancy: lost work is mostly tried again. 4 bytes per parameter and job under way.

    Differences from the paper: those of ``sr_sgc``. A group's coded part counts as soon as it can be decoded,
    which codes of repetition allow with fewer workers than the paper counts.

    Args: those of :class:`~commkit.straggler.Multiplexed`. Others as for ``sr_sgc``.
    """
    method = Multiplexed(burst, rounds, stragglers, code or AutoFamily(), mu)
    return StragglerScheme(method, _or(options), transport, braking)


def _or(options: CoordinationOptions | None) -> CoordinationOptions:
    return CoordinationOptions() if options is None else options


def _seeded(method: type[OuterSync], knobs: dict[str, Any], name: str) -> OuterScheme:
    """``seed`` of a scheme's block is that of its reducer; the method's own has another name there."""
    return OuterScheme(method, {"seed": knobs.pop(name), **knobs}).checked()


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


def _ranged(
    bits: int,
    bucket_size: int,
    rounding: Literal["shift", "stochastic", "nearest"],
    levels: Literal["uniform", "learned"],
) -> Compressor | None:
    if bits in (16, 32):
        return Cast("bf16") if bits == 16 else None
    if levels == "learned" and bits < 8:
        # A lattice of uneven steps cannot be shifted as one: what stays unbiased is stochastic rounding.
        uneven: Literal["stochastic", "nearest"] = (
            "nearest" if rounding == "nearest" else "stochastic"
        )
        return LearnedLevels(bits, bucket_size, uneven)  # type: ignore[arg-type]
    return MinMax(bits, bucket_size, rounding)  # type: ignore[arg-type]


def _blocked(
    bits: int, block_size: int, rounding: Literal["nearest", "stochastic"]
) -> Compressor | None:
    if bits in (16, 32):
        return Cast("bf16") if bits == 16 else None
    return BlockQuantize(bits, block_size, rounding)  # type: ignore[arg-type]


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
        TypeError: parts that cannot go together, knobs beside a Reducer, or a scheme that is an optimizer
            or trains with local updates.
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
    if isinstance(made, OuterScheme):
        name = made.method.__name__
        raise TypeError(
            f"scheme {_block(scheme)['name']!r} trains with local updates, it reduces no gradients: "
            f"with commkit.outer.{name}(model, optimizer): ..., around a plain module"
        )
    if isinstance(made, AsyncScheme):
        raise TypeError(
            f"scheme {_block(scheme)['name']!r} has servers and workers, it reduces no gradients: see "
            "commkit.outer.AsyncServer and AsyncWorker, or train with launch/train.py"
        )
    if isinstance(made, PartitionScheme):
        raise TypeError(
            f"scheme {_block(scheme)['name']!r} is an optimizer around yours: optimizer = commkit.schemes.make_scheme(...)("
            "model.named_parameters(), torch.optim.AdamW, mesh, lr=...); commkit.attach(model, optimizer)"
        )
    if isinstance(made, ShardedScheme):
        raise TypeError(
            f"scheme {_block(scheme)['name']!r} is for sharded models: call torch.distributed.fsdp.fully_shard on the "
            "model, then commkit.attach(model, scheme, optimizer)"
        )
    if isinstance(made, StragglerScheme):
        raise TypeError(
            f"scheme {_block(scheme)['name']!r} has a coordinator, it reduces no gradients among equals: "
            "made = commkit.schemes.make_scheme(...); made.coordinate(...) on one rank, made.work(...) on the others, "
            "or train with launch/train.py"
        )
    return made


def make_scheme(
    scheme: str | Path | Mapping[str, Any], knobs: Mapping[str, Any] | None = None
) -> (
    Reducer
    | OptimizerScheme
    | OuterScheme
    | AsyncScheme
    | StragglerScheme
    | ShardedScheme
    | PartitionScheme
):
    """As :func:`make_reducer`, also for schemes that come without what they need:

    - optimizers, without parameters: ``make_scheme("onebit_adam")(model.parameters(), lr=1e-3)``;
    - those that train with local updates, without a model: ``make_scheme("diloco")(model, optimizer)``;
    - the one that cuts an optimizer's state, without it:
      ``make_scheme("three_level")(model.named_parameters(), torch.optim.AdamW, mesh, lr=1e-3)``;
    - those for sharded models, without one: ``attach(model, make_scheme("qsdp"), optimizer)``;
    - the asynchronous one, a role for each rank: ``make_scheme("async_local_sgd").worker(model, optimizer)``;
    - those with a coordinator: ``make_scheme("dbw").coordinate([model], [optimizer], batch=64)`` on one rank,
      ``.work(model, batch=64)`` on the others.

    Raises:
        ConfigError: unknown scheme or field, wrong type or value.
        TypeError: parts that cannot go together.
    """
    block = _block(scheme) | dict(knobs or {})
    seed = block.pop("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"scheme.seed={seed!r} must be an integer")
    made = build("scheme", block, "scheme")
    if isinstance(made, ShardedScheme) and made.reducer is not None:
        made.reducer.seed = seed
    if isinstance(
        made, OptimizerScheme | OuterScheme | StragglerScheme | ShardedScheme | PartitionScheme
    ):
        return dataclasses.replace(made, seed=seed)
    if isinstance(made, AsyncScheme):
        return dataclasses.replace(made, options=dataclasses.replace(made.options, seed=seed))
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
