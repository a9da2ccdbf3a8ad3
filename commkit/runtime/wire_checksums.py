"""Payloads with a checksum, so that what is damaged on its way is found and not trained on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..comm import CollectiveError
from ..types import ByteCounter, Comm, ReduceOp

_SUM_BYTES = 8


class WireDamage(CollectiveError):
    """A payload is not what its sender sent."""


class CheckedComm:
    """Collectives whose every payload carries its CRC-32, which finds any flipped bit; all ranks raise then, and name
    the sender. For looking for bad memory, cables and network cards: an all-reduce becomes an all-to-all, a sum and an
    all-gather, as what the backend adds up on the way has no checksum, and each collective is followed by a small one. TCP
    has 16 bits of its own.

    Args:
        comm: what it travels by.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._parts: dict[Comm, CheckedComm] = {}

    @property
    def rank(self) -> int:
        return self._comm.rank

    @property
    def world_size(self) -> int:
        return self._comm.world_size

    @property
    def bytes(self) -> ByteCounter:
        return self._comm.bytes

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        if self.world_size == 1:
            return x
        flat = x.view(-1)
        sizes = [part.numel() for part in flat.tensor_split(self.world_size)]
        own = sizes[self.rank]
        parts = self.all_to_all(flat, sizes, [own] * self.world_size)
        total = parts[0].clone()
        for part in parts[1:]:  # in the order of ranks
            if op == "sum":
                total += part
            else:
                total = torch.maximum(total, part) if op == "max" else torch.minimum(total, part)
        padded = total.new_zeros(sizes[0])  # the largest
        padded[:own] = total
        rows = self.all_gather(padded)
        flat.copy_(torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)]))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        rows = self._comm.all_gather(_sealed(x))
        return torch.stack(self._opened("all_gather", rows.unbind(), x))

    def all_to_all(
        self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> list[Tensor]:
        sealed = [_sealed(part) for part in x.split_with_sizes(list(send_sizes))]
        expected = [size * x.element_size() + _SUM_BYTES for size in recv_sizes]
        parts = self._comm.all_to_all(torch.cat(sealed), [s.numel() for s in sealed], expected)
        return self._opened("all_to_all", parts, x)

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        message = self._comm.broadcast(_sealed(x), src)
        (found,) = self._opened("broadcast", [message], x, first=src)
        return x.copy_(found.view(x.shape))

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int = 0
    ) -> set[int]:
        """No collective, so this rank alone raises."""
        messages = {
            peer: torch.empty(
                x.numel() * x.element_size() + _SUM_BYTES, dtype=torch.uint8, device=x.device
            )
            for peer, x in receives.items()
        }
        lost = self._comm.exchange({p: _sealed(x) for p, x in sends.items()}, messages, tag)
        for peer in receives.keys() - lost:
            if not _is_whole(messages[peer]):
                raise _damage(self.rank, "exchange", peer)
            receives[peer].view(-1).copy_(_content(messages[peer], receives[peer]))
        return lost

    def all_gather_object(self, obj: Any) -> list[Any]:
        return self._comm.all_gather_object(obj)

    def barrier(self) -> None:
        self._comm.barrier()

    def split(self, groups: Sequence[Sequence[int]], label: str) -> Comm:
        part = self._comm.split(groups, label)
        return self._parts.setdefault(part, CheckedComm(part))

    def _opened(
        self, op: str, messages: Sequence[Tensor], like: Tensor, first: int = 0
    ) -> list[Tensor]:
        """What is in ``messages``, which are from rank ``first`` on. Collective.

        Raises:
            WireDamage: on every rank, if one of them got something else than was sent.
        """
        damaged = (first + at for at, each in enumerate(messages) if not _is_whole(each))
        own = torch.tensor([next(damaged, -1)], device=like.device)
        for rank, sender in enumerate(self._comm.all_gather(own).flatten().tolist()):
            if sender >= 0:
                raise _damage(rank, op, sender)
        return [_content(each, like) for each in messages]


def _sealed(x: Tensor) -> Tensor:
    """The bytes of ``x``, and their checksum."""
    data = x.detach().contiguous().view(-1).view(torch.uint8)
    return torch.cat([data, _sum_of(data).view(torch.uint8)])


def _is_whole(message: Tensor) -> bool:
    data, told = message[:-_SUM_BYTES], message[-_SUM_BYTES:]
    return torch.equal(_sum_of(data).view(torch.uint8), told)


def _content(message: Tensor, like: Tensor) -> Tensor:
    return message[:-_SUM_BYTES].clone().view(like.dtype)  # aligned, as a part need not be


def _sum_of(data: Tensor) -> Tensor:
    return torch.tensor([zlib.crc32(data.cpu().numpy().tobytes())], device=data.device)


def _damage(receiver: int, op: str, sender: int) -> WireDamage:
    return WireDamage(
        f"rank {receiver} received other {op} bytes from rank {sender} than it sent, by their CRC-32: "
        "look for bad memory, cables or network cards between the two, and go on from a checkpoint"
    )
