"""``DistComm``: the only place of the library that calls torch.distributed's collectives.

Each call counts the bytes that it sends and the time that it takes.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import connections
from .connections import ConnectionsCut
from .metrics import profiler_range
from .patience import patiently
from .types import ByteCounter, ReduceOp

_SWAP_TAG = 1 << 20  # of no exchange
_LARGE = 1 << 16  # bytes; less goes into the connection's buffer at once
_SMALL = 1 << 18  # bytes; with less, an all-reduce takes the time of its messages one after another
_PEER = {dist.isend: "group_dst", dist.irecv: "group_src"}
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_COMBINE: dict[ReduceOp, Callable[..., Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}

# torch 2.13 renamed these and warns about the old names; 2.11 knows only those.
_all_gather_single = cast(
    Callable[..., Any],
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor,
)
_reduce_scatter_single = cast(
    Callable[..., Any],
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor,
)


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def all_reduce_wire_bytes(size: int, world_size: int) -> int:
    """Bytes a rank sends in a ring all-reduce of ``size`` bytes: 2 (W-1)/W size."""
    return 2 * (world_size - 1) * size // world_size


P = ParamSpec("P")
R = TypeVar("R")


class CollectiveError(RuntimeError):
    """A collective failed: a peer is lost, or too late. The group is of no use any more."""


def _collective(method: Callable[P, R]) -> Callable[P, R]:
    """``method`` with torch's plain RuntimeError as a :class:`CollectiveError`, and given up when it waits in vain."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return patiently(lambda: method(*args, **kwargs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error

    return call


class DistComm:
    """Collectives over one torch.distributed process group, counted.

    With one rank in the group nothing is sent and nothing counted as sent.

    Args:
        group: the process group. It must not be used by another thread at the same time: c10d matches
            collectives by the order in which they are issued.
        timeout_s: of the groups that :meth:`split` makes; None is the backend's default.
        back: another gloo group of the same ranks, for what goes from a rank to one before it; see :func:`private_comm`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout_s: float | None = None,
        back: dist.ProcessGroup | None = None,
    ) -> None:
        self.group = group
        self._back = group if back is None else back
        self._timeout_s = timeout_s
        self._rank = group.rank()
        self._world_size = group.size()
        self._bytes = ByteCounter()
        self._label = ""
        self._parts: dict[tuple[str, tuple[int, ...]], DistComm] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def bytes(self) -> ByteCounter:
        return self._bytes

    @_collective
    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        if self._world_size > 1:
            wire = all_reduce_wire_bytes(nbytes(x), self._world_size)
            with self._counted("all_reduce", nbytes(x), wire):
                if nbytes(x) < _SMALL and x.is_contiguous() and self._both_ways(x):
                    self._all_reduce_directly(x.view(-1), op)
                else:
                    dist.all_reduce(x, op=_OPS[op], group=self.group)
        return x

    def _all_reduce_directly(self, x: Tensor, op: ReduceOp) -> None:
        """Each rank combines its share of all, in the order of ranks, and sends it to all: the bytes of a ring, whose
        2 (W-1) messages one after another are two at once here. Two ranks send all they have, once."""
        rank, world_size = self._rank, self._world_size
        shares = [x] * world_size if world_size == 2 else list(x.tensor_split(world_size))
        own = shares[rank]
        rows = list(own.new_empty(world_size - 1, own.numel()))
        rows.insert(rank, own)
        self._swap(shares, rows)
        for row in rows[1:]:
            _COMBINE[op](rows[0], row, out=rows[0])
        if rank > 0:
            own.copy_(rows[0])
        if world_size > 2:
            self._swap([own] * world_size, shares)

    @_collective
    def all_gather(self, x: Tensor) -> Tensor:
        if self._world_size == 1:
            return x.unsqueeze(0)
        out = x.new_empty(self._world_size * x.numel())
        rows = out.view(self._world_size, -1)
        with self._counted("all_gather", nbytes(x), (self._world_size - 1) * nbytes(x)):
            # In a ring of more, nobody sends to whom it receives from; and it crosses a node's link once.
            if self._world_size == 2 and nbytes(x) >= _LARGE and self._both_ways(x):
                self._swap([x, x], list(rows))
            else:
                _all_gather_single(out, x, group=self.group)
        return rows

    @_collective
    def all_gather_into(self, out: Tensor, x: Tensor, async_op: bool = False) -> dist.Work | None:
        """As FSDP gathers: ``x``, (n,), of all ranks into ``out``, (world_size n,). The handle if ``async_op``."""
        with self._counted("all_gather", nbytes(x), (self._world_size - 1) * nbytes(x)):
            work: dist.Work | None = _all_gather_single(out, x, group=self.group, async_op=async_op)
        return work

    @_collective
    def reduce_scatter_into(
        self, out: Tensor, x: Tensor, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """As FSDP scatters: the reduction ``op`` of torch's of all ranks' ``x``, (world_size n,), into ``out``, (n,). The
        handle if ``async_op``. gloo moves what an all-reduce does, and that is counted."""
        wire = (self._world_size - 1) * nbytes(out)
        if dist.get_backend(self.group) == "gloo":
            wire = all_reduce_wire_bytes(nbytes(x), self._world_size)
        with self._counted("reduce_scatter", nbytes(x), wire):
            work: dist.Work | None = _reduce_scatter_single(
                out, x, op=op, group=self.group, async_op=async_op
            )
        return work

    def joined(self, group: dist.ProcessGroup, label: str) -> DistComm:
        """A comm over another group that this rank is in, whose bytes are counted here too, under ``label``."""
        return self._share_counter(DistComm(group, self._timeout_s), label)

    def _share_counter(self, other: DistComm, label: str) -> DistComm:
        other._bytes, other._label = self._bytes, f"{self._label}{label}/"
        return other

    @_collective
    def all_to_all(
        self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> list[Tensor]:
        if self._world_size == 1:
            return [x]
        out = x.new_empty(sum(recv_sizes))
        wire = (x.numel() - send_sizes[self._rank]) * x.element_size()
        received = list(out.split_with_sizes(list(recv_sizes)))
        with self._counted("all_to_all", nbytes(x), wire):
            if self._both_ways(x):
                self._swap(x.split_with_sizes(list(send_sizes)), received)
            else:
                dist.all_to_all_single(out, x, list(recv_sizes), list(send_sizes), group=self.group)
        return received

    def _both_ways(self, x: Tensor) -> bool:
        """Whether :meth:`_swap` moves it sooner than a collective."""
        return x.device.type == "cpu" and dist.get_backend(self.group) == "gloo"

    def _swap(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        """``sends[i]`` goes to rank i, and what rank i sends here into ``receives[i]``; all contiguous.

        Both ways at once. gloo's own collectives send before they tell what they are ready to receive, and where a peer
        came first, these words wait behind all that is sent: its data come after ours, in twice the time.
        """
        rank = self._rank
        if receives[rank] is not sends[rank]:
            receives[rank].copy_(sends[rank])
        peers = [(rank + i) % self._world_size for i in range(1, self._world_size)]
        pending = [
            dist.irecv(receives[peer], group=self._way(peer, rank), group_src=peer, tag=_SWAP_TAG)
            for peer in reversed(peers)
            if receives[peer].numel()
        ]
        pending += [
            dist.isend(sends[peer], group=self._way(rank, peer), group_dst=peer, tag=_SWAP_TAG)
            for peer in peers
            if sends[peer].numel()
        ]
        for work in pending:
            assert work is not None
            work.wait()

    def _way(self, source: int, target: int) -> dist.ProcessGroup:
        return self.group if source < target else self._back

    @_collective
    def broadcast(self, x: Tensor, src: int) -> Tensor:
        if self._world_size > 1:
            wire = (self._world_size - 1) * nbytes(x) // self._world_size
            with self._counted("broadcast", nbytes(x), wire):
                dist.broadcast(x, group_src=src, group=self.group)
        return x

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int = 0
    ) -> set[int]:
        size = sum(map(nbytes, sends.values()))
        with self._counted("exchange", size, size):
            if dist.get_backend(self.group) == "nccl":
                return self._exchange_both_ways(sends, receives)
            try:
                return patiently(lambda: self._exchange_each(sends, receives, tag))
            except ConnectionsCut:
                return {*sends, *receives}

    def _exchange_both_ways(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]
    ) -> set[int]:
        """For NCCL, which knows no tags and has to see both ways at once."""
        ops = [self._op(dist.isend, x, peer) for peer, x in sends.items()]
        ops += [self._op(dist.irecv, x, peer) for peer, x in receives.items()]
        for done in dist.batch_isend_irecv(ops) if ops else []:
            done.wait()
        return set()

    def _exchange_each(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int
    ) -> set[int]:
        lost: set[int] = set()
        pending: list[tuple[int, Any]] = []
        for begin, tensors in ((dist.irecv, receives), (dist.isend, sends)):
            for peer, x in tensors.items():
                try:
                    work = begin(x, group=self.group, tag=tag, **{_PEER[begin]: peer})
                except RuntimeError:  # its process has ended
                    lost.add(peer)
                else:
                    pending.append((peer, work))
        for peer, work in pending:
            try:
                work.wait()
            except RuntimeError:
                lost.add(peer)
        return lost

    def _op(self, op: Callable[..., Any], x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(op, x, group=self.group, group_peer=peer)

    @_collective
    def all_gather_object(self, obj: Any) -> list[Any]:
        # Not torch's collective of this name, which unpickles whatever comes: a peer could have it run anything.
        device = self._device_of_objects()
        own = _packed(obj).to(device)
        sizes = own.new_empty(self._world_size, dtype=torch.int64)
        _all_gather_single(sizes, torch.tensor([own.numel()], device=device), group=self.group)
        row = own.new_zeros(int(sizes.max()))
        row[: own.numel()] = own
        rows = row.new_empty(self._world_size * row.numel())
        _all_gather_single(rows, row, group=self.group)
        parts = rows.cpu().view(self._world_size, -1)
        return [_unpacked(part[:size]) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def _device_of_objects(self) -> torch.device:
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @_collective
    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def split(self, groups: Sequence[Sequence[int]], label: str) -> DistComm:
        own = part_of(groups, self._rank, self._world_size)
        if (label, own) not in self._parts:
            # Groups live until destroy_process_group(), and each is made once: torch gives a new group over
            # the ranks of a destroyed one its name, and with it the stale addresses in the store.
            everybody = own == tuple(range(self._world_size))
            part = (
                DistComm(self.group, self._timeout_s, self._back)
                if everybody
                else private_comm(self.group, self._timeout_s, own)
            )
            self._parts[label, own] = self._share_counter(part, label)
        return self._parts[label, own]

    def apart(self, label: str, backend: str | None = None) -> DistComm:
        """A comm over a group of the same ranks for another thread, made once per ``label`` and counted apart. Collective
        the first time; ``backend``: None is this group's."""
        key = f"apart/{label}", tuple(range(self._world_size))
        if key not in self._parts:
            self._parts[key] = private_comm(self.group, self._timeout_s, backend=backend)
        return self._parts[key]

    @contextmanager
    def _counted(self, op: str, payload_bytes: int, wire_bytes: int) -> Iterator[None]:
        """Around a collective: its bytes, its time, and its range in a profile. One that fails is not counted."""
        start = time.perf_counter()
        with profiler_range(op):
            yield
        seconds = time.perf_counter() - start
        self._bytes.add(self._label + op, payload_bytes, wire_bytes, seconds)


def _packed(obj: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


def part_of(groups: Sequence[Sequence[int]], rank: int, world_size: int) -> tuple[int, ...]:
    """The group that holds ``rank``, in ascending order.

    Raises:
        ValueError: the groups do not hold every rank exactly once.
    """
    if sorted(r for group in groups for r in group) != list(range(world_size)):
        raise ValueError(
            f"groups {[list(group) for group in groups]} must hold each of the ranks 0 to "
            f"{world_size - 1} exactly once"
        )
    return next(tuple(sorted(group)) for group in groups if rank in group)


def require_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``, or the default group.

    Raises:
        RuntimeError: there is none.
    """
    group = group if group is not None else dist.group.WORLD
    if group is None:
        raise RuntimeError("torch.distributed is not initialised; call init_process_group() first")
    return group


def private_comm(
    group: dist.ProcessGroup,
    timeout_s: float | None,
    ranks: Sequence[int] | None = None,
    backend: str | None = None,
) -> DistComm:
    """Collectives over a group of their own, as :func:`new_group_like` makes it; over gloo, over two.

    gloo's thread spins while another one sends on the connection that it is to read from. On a core that both share it
    does so until its time is up, some milliseconds, in which nothing is sent. So each way has its own connections.
    """
    made = new_group_like(group, timeout_s, ranks, backend)
    two_ways = dist.get_backend(made) == "gloo" and made.size() > 1
    back = new_group_like(group, timeout_s, ranks, backend) if two_ways else None
    return DistComm(made, timeout_s, back)


def new_group_like(
    group: dist.ProcessGroup,
    timeout_s: float | None,
    ranks: Sequence[int] | None = None,
    backend: str | None = None,
) -> dist.ProcessGroup:
    """A private group, of the same backend unless another is given, over the same ranks, or over those of
    ``group``'s ranks. Collective over its members alone, not over WORLD."""
    members = dist.get_process_group_ranks(group)

    def make() -> dist.ProcessGroup:
        created = dist.new_group(
            ranks=members if ranks is None else [members[rank] for rank in ranks],
            timeout=None if timeout_s is None else timedelta(seconds=timeout_s),
            backend=dist.get_backend(group) if backend is None else backend,
            use_local_synchronization=True,
        )
        assert isinstance(created, torch.distributed.ProcessGroup)
        return created

    return made_in_wiring(make)


def made_in_wiring(make: Callable[[], dist.ProcessGroup], watch: bool = False) -> dist.ProcessGroup:
    """The group that ``make`` makes, its connections known to the wiring that is in use, if any; collective over
    the group then. ``watch``: see :meth:`commkit.connections.Wiring.keep`."""
    wiring = connections.current()
    if wiring is None:
        return make()
    with wiring.opening() as opened:
        group = patiently(make)
    own = [c.local for c in opened]
    wiring.keep(opened, DistComm(group).all_gather_object(own), watch)
    return group
