"""Messages between ranks that share no collective: who answers, who is lost, and a mean among those left."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..aggregators.health import are_finite
from ..comm import CollectiveError
from ..types import Comm

_log = logging.getLogger(__name__)

_SLOTS = 64
# Above all tags of rounds; torch's tags have 31 bits.
_FIRST_MERGE_TAG = 2**30


def tag_of(round_number: int, slot: int = 0) -> int:
    """A message's tag: two ranks that are in different rounds, or at different points of one, never take each
    other's messages."""
    return (round_number * _SLOTS + slot) % _FIRST_MERGE_TAG


class Peers:
    """The other ranks of ``comm``, some of which may stop to answer.

    A lost peer stays lost: what is addressed to it is not sent, and nothing is expected from it.

    Args:
        comm: used by :meth:`Comm.exchange` alone.
        complete: an exchange in which a peer is lost fails, as all who are left make it anew.

    Attributes:
        lost: ranks whose process has ended.
        suspects: how many messages with an inf or NaN each rank has sent.
        missed: messages that did not arrive or were not finite.
    """

    def __init__(self, comm: Comm, complete: bool = False) -> None:
        self.comm = comm
        self._complete = complete
        self.lost: set[int] = set()
        self.suspects: Counter[int] = Counter()
        self.missed = 0
        self._merges = 0

    @property
    def rank(self) -> int:
        return self.comm.rank

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int
    ) -> dict[int, Tensor]:
        """One exchange with those who are left; what arrived, in rank order. Empty tensors are not sent.

        Raises:
            CollectiveError: a peer was lost in it, and exchanges have to be complete.
        """
        self.missed += len(self.lost & set(receives))
        lost = self.comm.exchange(self._with(sends), self._with(receives), tag)
        if lost and self._complete:
            raise CollectiveError(f"ranks {sorted(lost)} were lost in an exchange with them")
        for peer in sorted(lost):
            _log.warning("rank %d: rank %d is lost; its share goes to myself", self.rank, peer)
        self.missed += len(lost & set(receives))
        self.lost |= lost
        return {peer: receives[peer] for peer in sorted(receives) if peer not in self.lost}

    def swap(
        self,
        message: Tensor,
        to: Collection[int],
        sources: Collection[int],
        tag: int,
        like: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Send one message to all of ``to`` and receive one of its size (or like ``like``) from all of ``sources``."""
        like = message if like is None else like
        return self.exchange(
            dict.fromkeys(to, message), {peer: torch.empty_like(like) for peer in sources}, tag
        )

    def finite(self, arrived: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Those of ``arrived`` without inf and NaN; who sent another is a suspect."""
        kept = {}
        for peer, x in arrived.items():
            if are_finite([x]):
                kept[peer] = x
            else:
                self.suspect(peer)
        return kept

    def suspect(self, peer: int) -> None:
        """``peer`` sent what cannot be used."""
        self.suspects[peer] += 1
        self.missed += 1
        _log.warning("rank %d: rank %d sent inf or NaN, which is ignored", self.rank, peer)

    def gather(self, x: Tensor) -> dict[int, Tensor]:
        """Everybody's ``x``, of equal shape, this rank's too, by rank; all ranks that are left call it. For small
        tensors: each is sent W - 1 times."""
        others = [peer for peer in range(self.comm.world_size) if peer != self.rank]
        arrived = self.swap(x, others, others, self._tag())
        return dict(sorted({**arrived, self.rank: x}.items()))

    def mean(self, x: Tensor, include: bool = True) -> Tensor:
        """The mean of flat ``x`` over all ranks that are left, the same bits on each. All of them call it, as often.

        Each owns a part, adds it up in rank order, and sends the outcome round: 2 (W-1)/W of ``x`` per rank
        as in an all-reduce, but between pairs, so that a dead rank breaks nothing. A rank that dies on the way
        makes the others start over without it.

        Args:
            x: (n,), the same n everywhere.
            include: False contributes nothing, as of a rank whose ``x`` is not finite.

        Raises:
            FloatingPointError: nobody contributes.
        """
        while True:
            members, contributors = self._roll_call(include, x.device)
            if not contributors:
                raise FloatingPointError(
                    "no rank that is left has finite weights, so there is no mean; lower the learning rate, or "
                    "resume from a checkpoint"
                )
            out = self._attempt(x, members, contributors)
            flag = torch.tensor([out is not None], dtype=torch.uint8, device=x.device)
            told = self.gather(flag)
            if out is not None and set(told) == set(members) and all(map(bool, told.values())):
                return out

    def _attempt(
        self, x: Tensor, members: Sequence[int], contributors: Collection[int]
    ) -> Tensor | None:
        """The mean; None if somebody was lost on the way."""
        parts = dict(zip(members, x.tensor_split(len(members)), strict=True))
        others = [peer for peer in members if peer != self.rank]
        own = parts[self.rank]
        into = {peer: torch.empty_like(own) for peer in contributors if peer != self.rank}
        sends = {p: parts[p].contiguous() for p in others} if self.rank in contributors else {}
        shares = self.exchange(sends, into, self._tag())
        complete = len(shares) == len(into)
        if self.rank in contributors:
            shares[self.rank] = own
        total = torch.zeros_like(own)
        for rank in sorted(shares):
            total += shares[rank] / len(contributors)
        into = {peer: torch.empty_like(parts[peer]) for peer in others}
        arrived = self.exchange(dict.fromkeys(others, total), into, self._tag())
        if not complete or len(arrived) < len(others):
            return None
        return torch.cat([{**arrived, self.rank: total}[rank] for rank in members])

    def _roll_call(self, include: bool, device: torch.device) -> tuple[list[int], list[int]]:
        """Who is left, and who of them contributes. Twice round, so that what one has seen all know."""
        told = torch.zeros(self.comm.world_size + 1, dtype=torch.uint8, device=device)
        contributors = []
        for _ in range(2):
            told[sorted(self.lost)] = 1
            told[-1] = include
            heard = self.gather(told.clone())
            for report in heard.values():
                self.lost.update(torch.nonzero(report[:-1]).flatten().tolist())
            contributors = [
                rank for rank, report in heard.items() if report[-1] and rank not in self.lost
            ]
        members = [rank for rank in range(self.comm.world_size) if rank not in self.lost]
        return members, contributors

    def _tag(self) -> int:
        self._merges += 1
        return _FIRST_MERGE_TAG + self._merges % _FIRST_MERGE_TAG

    def _with(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {p: x for p, x in tensors.items() if p not in self.lost and x.numel()}
