"""The concepts every layer shares: what a payload, a compressor, a feedback and an aggregator are.

This module imports nothing of commkit's own. Bodies live in the packages named after the concepts.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Payload: TypeAlias = tuple[Tensor, ...]
"""Everything of one tensor that crosses the wire, and nothing else does."""

Wire: TypeAlias = Literal["summable", "gatherable"]
ReduceOp: TypeAlias = Literal["sum", "max", "min"]
StateDict: TypeAlias = dict[str, Tensor]

RANK, SHARED, SHARD, NODE, WHOLE = "rank", "shared", "shard", "node", "whole"
"""Part of a state key that says how states of several ranks merge when the world size changes: ``rank/NAME``
is averaged; ``shared/NAME`` and ``whole/NAME`` are equal everywhere; ``shard/NAME@START`` is put together
from its owners into ``whole/NAME``, and ``node/NAME``, which one rank of each node has, is averaged over
those into ``whole/NAME``; from there new owners take their share."""


def section(state: Mapping[str, Tensor], name: str) -> StateDict:
    """The entries below ``name/``, without it."""
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def parameter_of(key: str) -> str:
    """The parameter's name at the end of a state key: ``shard/NAME@START``, ``velocity::NAME`` ..."""
    return key.rpartition("/")[2].rpartition("::")[2].partition("@")[0]


class NonFiniteError(ArithmeticError):
    """Some rank held an inf or NaN. Aggregators raise it on every rank of the group together and before
    they change any state; the Reducer answers with a dense all-reduce."""


@dataclass(frozen=True, slots=True)
class TensorCtx:
    """What is known of one tensor in one reduction. Identical on every rank by construction.

    Args:
        key: the parameter's fully qualified name.
        shape: shape of the tensor.
        dtype: its dtype on the user's side (arithmetic is done in :attr:`work_dtype`).
        device: its device.
        step: how many reductions this parameter has behind it.
        seed: base of all shared randomness.
    """

    key: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    step: int
    seed: int

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def work_dtype(self) -> torch.dtype:
        """float32, or float64 for float64 gradients."""
        return torch.promote_types(self.dtype, torch.float32)

    def shared_seed(self, salt: int = 0) -> int:
        """31-bit seed made of (seed, step, key, salt). Without a salt it is equal on every rank."""
        return zlib.crc32(f"{self.seed}/{self.step}/{self.key}/{salt}".encode()) & 0x7FFFFFFF


class Compressor(ABC):
    """A pure map tensor -> payload -> tensor: no state, no communication, a frozen dataclass that is its
    own configuration.

    ``wire`` is "summable" when the element-wise sum of payloads is the payload of the sum (all-reduce can
    carry it), else "gatherable". ``fixed_size`` says that payload sizes depend on the context alone, and
    ``shows_nonfinite`` that an inf or NaN in ``x`` always leaves one in a float of the payload, so that
    nobody has to look for it in ``x``.
    """

    wire: ClassVar[Wire] = "gatherable"
    fixed_size: ClassVar[bool] = True
    shows_nonfinite: ClassVar[bool] = False

    @property
    def allows_error_feedback(self) -> bool:
        """False of codes whose errors are as large as their inputs: residuals would grow without bound."""
        return True

    @abstractmethod
    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        """Encode ``x`` (any float dtype, shape ``ctx.shape``).

        ``salt`` is the only rank-local input: aggregators pass their rank, and only stochastic rounding
        may use it, so that ranks round independently. ``decompress`` never sees it. A non-finite ``x``
        must not raise (its aggregator reports it).
        """

    @abstractmethod
    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        """Decode to a fresh tensor of ``ctx.shape`` and ``ctx.work_dtype``."""

    @abstractmethod
    def payload_bytes(self, ctx: TensorCtx) -> int:
        """Bytes of the payload of one tensor, as declared; a test holds it to the truth."""

    def combine(self, payloads: Sequence[Payload], ctx: TensorCtx) -> Tensor:
        """The mean of what the ranks sent, added up in rank order so that every rank gets the same bits.
        Each share is divided first, as in an all-reduce: the sum may not exist where the mean does."""
        total = self.decompress(payloads[0], ctx).div_(len(payloads))
        for payload in payloads[1:]:
            total.add_(self.decompress(payload, ctx).div_(len(payloads)))
        return total

    def combine_into(self, out: Tensor, payloads: Sequence[Payload], ctx: TensorCtx) -> None:
        """Write :meth:`combine`, bit for bit, to ``out``: ``(ctx.numel,)`` of ``ctx.work_dtype``. Worth
        overriding where that takes no temporaries, as is :meth:`subtract_`."""
        out.copy_(self.combine(payloads, ctx).view(-1))

    def subtract_(self, x: Tensor, payload: Payload, ctx: TensorCtx) -> None:
        """``x -= decompress(payload)`` in place, bit for bit; ``x`` as ``out`` of :meth:`combine_into`."""
        x.sub_(self.decompress(payload, ctx).view(-1))

    def compress_each(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], salt: int = 0
    ) -> list[Payload]:
        """:meth:`compress`, bit for bit, of several. Worth overriding where a call costs more than the work on a
        small tensor, as are the other two on ``each``."""
        return [self.compress(x, ctx, salt) for x, ctx in zip(xs, ctxs, strict=True)]

    def combine_each_into(
        self,
        outs: Sequence[Tensor],
        payloads: Sequence[Sequence[Payload]],
        ctxs: Sequence[TensorCtx],
    ) -> None:
        """:meth:`combine_into`, bit for bit, of several; ``payloads[i]`` are what the ranks sent of the i-th."""
        for out, of_ranks, ctx in zip(outs, payloads, ctxs, strict=True):
            self.combine_into(out, of_ranks, ctx)

    def subtract_each_(
        self, xs: Sequence[Tensor], payloads: Sequence[Payload], ctxs: Sequence[TensorCtx]
    ) -> None:
        """:meth:`subtract_`, bit for bit, of several."""
        for x, payload, ctx in zip(xs, payloads, ctxs, strict=True):
            self.subtract_(x, payload, ctx)

    def places(self, payload: Payload, ctx: TensorCtx) -> Tensor | None:
        """(k,) integers: the flat places where the decoded payload is not zero, if the payload itself says
        so; None if it does not."""
        return None


@runtime_checkable
class CorrectsMomentum(Protocol):
    """A compressor with a fused path for momentum correction, which gives the bits of the parts one by one."""

    def corrects(self, ctx: TensorCtx) -> bool:
        """Whether it has one for this tensor."""

    def correct_and_compress(
        self,
        g: Tensor,
        before: tuple[Tensor | None, Tensor | None],
        after: tuple[Tensor, Tensor],
        momentum: float,
        nesterov: bool,
        masking: bool,
        ctx: TensorCtx,
    ) -> Payload:
        """The payload of ``after[1]`` as momentum correction makes it of ``g``. Velocity and unsent are read
        from ``before`` and written to ``after``, less what is sent, contiguous and in the work dtype."""


@runtime_checkable
class Feedback(Protocol):
    """The only home of residuals. ``update`` and ``deliver`` stage; ``commit`` makes the step's changes
    real, or drops all of them, so that a skipped step leaves no trace."""

    @property
    def needs_contraction(self) -> bool:
        """Whether errors are carried on, so that a code must lose less than it is given."""

    @property
    def changes_mean(self) -> bool:
        """Whether :meth:`deliver` does anything at all."""

    def holds(self, key: str) -> bool:
        """Whether anything of ``key`` is kept."""

    def compensate(self, x: Tensor, key: str) -> Tensor:
        """``x`` plus what was left unsent. The result is the feedback's to reuse in ``update``."""

    def update(self, compensated: Tensor, sent: Tensor, key: str) -> None:
        """Stage what is left unsent now."""

    def deliver(self, mean: Tensor, key: str) -> Tensor:
        """What the optimizer gets when ``mean`` is what arrived: the mean itself, unless differences to
        an estimate were sent. It may be the feedback's own memory, to be written over after the next step."""

    def release(self, x: Tensor, key: str) -> Tensor:
        """``x`` and all that it left unsent, for a tensor that goes densely from now on; stages that
        nothing is kept of it."""

    def commit(self, ok: bool) -> None: ...

    def norm(self) -> float:
        """2-norm of everything left unsent on this rank."""

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Aggregated:
    """Outcome for one tensor, in the context's work dtype.

    Args:
        mean: the agreed mean; the same bits on every rank of the group. Already divided.
        sent: what this rank really contributed, after loss; zeros if it was dropped; the very input if
            nothing was lost.
        num_contributors: how many ranks are in ``mean``.

    Functions in place of tensors are called each time somebody asks and nothing is kept, so that one
    tensor at a time is in memory.
    """

    __slots__ = ("_mean", "_sent", "num_contributors")

    def __init__(
        self,
        mean: Tensor | Callable[[], Tensor],
        sent: Tensor | Callable[[], Tensor],
        num_contributors: int,
    ) -> None:
        self._mean = mean
        self._sent = sent
        self.num_contributors = num_contributors

    @property
    def mean(self) -> Tensor:
        return self._mean if isinstance(self._mean, Tensor) else self._mean()

    @property
    def sent(self) -> Tensor:
        return self._sent if isinstance(self._sent, Tensor) else self._sent()

    def mean_into(self, out: Tensor) -> None:
        """Write ``mean`` to ``out``, of its shape and of any dtype."""
        out.copy_(self.mean)

    def sent_places(self) -> Tensor | None:
        """(k,) integers: the flat places where what was sent is not zero. None: it is not sparse, or not
        known without forming it."""
        return None

    def take_sent_from(self, compensated: Tensor) -> bool:
        """The fused path of plain error feedback: subtract ``sent`` from ``compensated`` in place, if that
        can be done without forming it. False: it cannot, and nothing was done."""
        return False


@runtime_checkable
class Aggregator(Protocol):
    """Owns the rounds of communication of one reduction, as straight-line code. May hold state, staged
    like that of a :class:`Feedback`."""

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        """Combine ``xs`` over ``comm``. It must not modify ``xs``.

        Raises:
            NonFiniteError: on every rank together, if any rank's ``xs`` held inf or NaN.
        """

    def commit(self, ok: bool) -> None: ...

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@runtime_checkable
class Preparable(Protocol):
    """An aggregator with something to set up or check before the first reduction."""

    def prepare(self, ctxs: Sequence[TensorCtx], comm: Comm) -> None:
        """Collective over ``comm``, the one of all later reductions. ``ctxs`` are of all tensors that will
        be compressed. What it finds wrong it raises on every rank together."""


@dataclass(slots=True)
class ByteCounter:
    """What a :class:`Comm` has sent since it was made.

    Args:
        payload_bytes: bytes of the tensors handed to collectives by this rank.
        wire_bytes: bytes this rank sends with the collective's factor, e.g. 2(W-1)/W for an all-reduce.
        rounds: number of collectives.
        seconds: wall time inside them.
        by_op: wire bytes of each kind of collective; those of a comm made by :meth:`Comm.split` under
            ``"LABEL/OP"``.
    """

    payload_bytes: int = 0
    wire_bytes: int = 0
    rounds: int = 0
    seconds: float = 0.0
    by_op: dict[str, int] = field(default_factory=dict)

    def add(self, op: str, payload_bytes: int, wire_bytes: int, seconds: float) -> None:
        self.payload_bytes += payload_bytes
        self.wire_bytes += wire_bytes
        self.rounds += 1
        self.seconds += seconds
        self.by_op[op] = self.by_op.get(op, 0) + wire_bytes

    def copy(self) -> ByteCounter:
        return replace(self, by_op=dict(self.by_op))

    def labelled(self, label: str) -> int:
        """Wire bytes of the comms that were split off under ``label``, e.g. "inter": between nodes."""
        return sum(size for op, size in self.by_op.items() if op.startswith(f"{label}/"))


class Comm(Protocol):
    """Collectives over one group of ranks; the only way of commkit's schemes to other ranks.

    Every method but :meth:`exchange` is a collective: all ranks of the group call it in the same order.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def bytes(self) -> ByteCounter: ...

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Reduce contiguous ``x`` in place and return it."""

    def all_gather(self, x: Tensor) -> Tensor:
        """``x`` of shape (n,), the same n everywhere -> (world_size, n), row i from rank i."""

    def all_to_all(
        self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> list[Tensor]:
        """``x`` is 1-D: consecutive parts of ``send_sizes`` elements for ranks 0, 1, ... -> the parts
        received from ranks 0, 1, ..., of ``recv_sizes`` elements."""

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """Copy rank ``src``'s contiguous ``x`` into everybody's, in place."""

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int = 0
    ) -> set[int]:
        """Point to point, no collective: send contiguous tensors to the ranks in ``sends`` while tensors arrive
        from the ranks in ``receives``, which are overwritten. Each peer must do the counterpart with the same
        ``tag`` and shapes; nobody else is involved.

        Returns:
            The peers that are lost: what was to be received from them is undefined, what was sent may or may
            not have arrived. A peer that is merely slow is waited for.
        """

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Small objects of all ranks, in rank order: nested dicts, lists and tuples of numbers, text and tensors. For set-up,
        not for the hot path."""

    def barrier(self) -> None: ...

    def split(self, groups: Sequence[Sequence[int]], label: str) -> Comm:
        """The part of this comm that holds this rank.

        Every rank calls it with the same ``groups``, before it first uses a part and while nothing else
        runs on this comm; later calls give the same object again.

        Args:
            groups: ranks of this comm, each in exactly one group. In a part they keep their order.
            label: names the parts' bytes in ``bytes.by_op``; they are counted in this comm's ``bytes``.
        """


class Stateful(Protocol):
    """Anything with the two methods of ``torch.distributed.checkpoint``'s protocol of this name."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@runtime_checkable
class Resizable(Protocol):
    """Something that ranks have in common and each continues in its own way: loaded by another number of
    ranks, each has to find a way back from what they have in common."""

    def after_resize(self) -> None: ...
