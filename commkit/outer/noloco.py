"""NoLoCo: DiLoCo's outer step over a few random replicas at a time, and nothing that waits for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..aggregators.health import health
from ..aggregators.message import Layout
from ..metrics import profiler_range
from ..registry import spec
from ..runtime.alarm import Alarm, NoAlarm
from ..types import Comm, Compressor, TensorCtx
from .decentralised import NOBODY, Decentralised
from .flat import WireDtype, flat, for_wire, parts
from .joining import Ranks
from .options import SyncOptions
from .pairing import partners_of, random_groups, round_robin
from .peers import tag_of
from .stability import check_gamma
from .transfer import Transfer
from .units import Unit

_ANCHOR, _WEIGHTS, _ACK = range(3)


class NoLoCo(Decentralised):
    """NoLoCo (Kolehmainen et al. 2025): every ``sync_every`` inner steps each replica meets ``group_size - 1``
    others, drawn anew each round, and steps on its own anchor phi::

        m <- alpha m - beta mean(phi_j - w_j) - gamma (phi - mean(phi_j))
        phi <- phi + m;  w <- phi

    with means over its group: heavy-ball momentum and a pull towards the group. (The paper says Nesterov;
    its code does this.) Over all replicas the pull cancels, so their mean follows DiLoCo with heavy-ball momentum.

    With ``beta == gamma`` and no compressor only ``w_j`` is sent, P elements per round and peer. Otherwise
    ``phi_j`` is sent too, as early as the first inner step of the round, since who will meet is known then:
    2P elements, half of them hidden.

    Both sides of an exchange take *differences of what was sent*: ``mean(x_j)`` is computed as
    ``x_i + mean(x'_j - x'_i)`` with x' as decoded, of the own message too. So what a code loses only keeps
    replicas a little apart; the mean over replicas loses nothing, and no error feedback is needed.

    A lost or non-finite partner makes for a step on one's own. An odd replica steps alone in its round.

    State: 8 bytes per parameter (anchor and momentum; in host memory with ``options.offload``), and during
    a round 4 per peer, or 8 if anchors are sent.

    Args:
        model: as for :class:`~commkit.outer.OuterSync`.
        optimizer: the inner one; the paper uses Adam, 6e-4 at 100M parameters to 1.2e-4 at 7B.
        sync_every: H; 50 in the paper. A pair exchange costs the same however many replicas there are, so
            H can be half of what all-reduce needs.
        alpha: outer momentum, in [0, 1). 0.5; DiLoCo's 0.9 leaves no useful gamma.
        beta: weight of the pseudo-gradients, DiLoCo's outer learning rate; 0.7.
        gamma: weight of the pull towards the group; None is ``beta``. With alpha = 0.5, noise leaves replicas
            closest near 0.7 to 1.
        group_size: 2. Larger groups agree faster, at ``group_size - 1`` times the bytes.
        pairing: "random" groups; or "round_robin", in which everybody meets everybody once in W - 1 rounds.
        compressor: of pseudo-gradients; fixed payload sizes. The anchors still travel in ``wire_dtype``, early:
            fewer bytes on the critical path, more in total than with none.
        wire_dtype: as for :class:`Decentralised`.
        strict: partners confirm what they have received before they use it, one byte more, so that either all
            of a group use it or none, and the mean over replicas is kept. Without it a partner that dies in the
            middle may be used by one and not by another: harmless for stability.
        seed: of the pairings and of compressors' randomness; equal on all ranks.
        options: as for :class:`~commkit.outer.OuterSync`. Gradients of ``warmup_steps`` are averaged by collectives.
        process_group: as for :class:`~commkit.outer.OuterSync`.
        master_weights: as for :class:`~commkit.outer.OuterSync`.

    Raises:
        ValueError: a value out of range; ``gamma`` outside the bound within which replicas stay together, which
            is named; "round_robin" with groups of another size than 2.
        TypeError: a compressor whose payload sizes depend on the data.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 50,
        alpha: float = 0.5,
        beta: float = 0.7,
        gamma: float | None = None,
        group_size: int = 2,
        pairing: Literal["random", "round_robin"] = "random",
        compressor: Compressor | None = None,
        wire_dtype: WireDtype = "fp32",
        strict: bool = False,
        seed: int = 0,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        gamma = beta if gamma is None else gamma
        if beta <= 0:
            raise ValueError(f"beta={beta} must be > 0; use 0.7")
        if group_size < 2:
            raise ValueError(f"group_size={group_size} must be >= 2; use 2 for pairs")
        check_gamma(gamma, alpha, group_size)
        if pairing not in ("random", "round_robin"):
            raise ValueError(f"pairing={pairing!r} must be 'random' or 'round_robin'")
        if pairing == "round_robin" and group_size != 2:
            raise ValueError(
                f"pairing='round_robin' makes pairs, not groups of {group_size}; use group_size=2, or 'random'"
            )
        if compressor is not None and not compressor.fixed_size:
            raise TypeError(
                f"a message between two needs a size that both know, but {type(compressor).__name__} has "
                "fixed_size=False; use a compressor whose payload_bytes depends on the shape alone"
            )
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            wire_dtype=wire_dtype,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.group_size, self.pairing = group_size, pairing
        self.compressor, self.strict, self.seed = compressor, strict, seed
        self.sends_anchors = beta != gamma or compressor is not None
        self._momentum: dict[str, Tensor] = {}
        self._announced: int | None = None
        self._heard: dict[int, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "alpha": self.alpha,
            "beta": self.beta,
            "gamma": self.gamma,
            "group_size": self.group_size,
            "pairing": self.pairing,
            "compressor": spec(self.compressor),
            "strict": self.strict,
            "seed": self.seed,
        }

    def partners(self, rank: int, round_number: int) -> list[int]:
        """The ranks that ``rank`` meets in a round; none if it steps alone. Symmetric, and equal wherever
        computed."""
        n, place = len(self.ranks), self.ranks.index(rank)
        if self.pairing == "round_robin":
            met = [round_robin(n, round_number)[place]]
        elif self.group_size == 2:
            met = [partners_of(random_groups(n, 2, self.seed, round_number), n)[place]]
        else:
            groups = random_groups(n, self.group_size, self.seed, round_number)
            met = next(group for group in groups if place in group)
        return sorted(self.ranks[i] for i in met if i != place)

    # A round.

    def synchronise(self) -> None:
        if self.sends_anchors:
            self._announce_anchors()
        super().synchronise()

    def prepare_sync(self, unit: Unit | None = None) -> None:
        if self.sends_anchors:  # they are already, unless the round is made anew
            self._announce_anchors()
        super().prepare_sync(unit)

    def _announce_anchors(self) -> None:
        """Begin to exchange anchors with whom this round will end; once per round."""
        if self._announced == self.round:
            return
        number = self._announced = self.round
        anchors = for_wire(flat(self.anchors.values).to(self.replica.device), self.wire_dtype)

        def job() -> None:
            met = self.partners(self.peers.rank, number)
            arrived = self.peers.swap(anchors, met, met, tag_of(number, _ANCHOR))
            self._heard = self.peers.finite(arrived) | {self.peers.rank: anchors}

        self.in_background(job, [anchors])

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        """Turn the pseudo-gradients of ``transfer`` into what is added to ``alpha m``."""
        met = self.partners(self.peers.rank, transfer.number)
        if self.sends_anchors:
            push = self._push_of_both(transfer, met)
        else:
            push = self._push_of_weights(transfer, met)
        if push is None:
            transfer.roster = NOBODY
            return
        transfer.values = parts(push, transfer.values)

    def _push_of_weights(self, transfer: Transfer, met: list[int]) -> Tensor | None:
        """``gamma (mean w_j - phi)``; None if nobody's is finite."""
        like = transfer.values
        weights = for_wire(flat(self.live_values(transfer.unit)), self.wire_dtype)
        arrived = self.peers.swap(weights, met, met, tag_of(transfer.number, _WEIGHTS))
        arrived = self._confirmed(self.peers.finite(arrived), met, transfer)
        self.report(transfer, len(arrived) + transfer.finite)
        if not transfer.finite:
            anchors = flat({name: self.anchors.values[name] for name in like})
            return self._mean_of(arrived, anchors, self.gamma)
        away = flat(like).neg_()
        return away.add_(_pull(arrived, weights, away)).mul_(self.gamma)

    def _push_of_both(self, transfer: Transfer, met: list[int]) -> Tensor | None:
        """``-beta mean(phi_j - w_j) - gamma (phi - mean phi_j)``; None if no pseudo-gradient is finite."""
        own, number, rank = flat(transfer.values), transfer.number, self.peers.rank
        # Anchors of this round were announced before its first inner step ended.
        anchors = self._heard
        if self.compressor is None:
            message = for_wire(own, self.wire_dtype)
            arrived = self.peers.swap(message, met, met, tag_of(number, _WEIGHTS))
            mine, theirs = message, self.peers.finite(arrived)
        else:
            mine, theirs = self._compressed(transfer, met, self.compressor)
        theirs = {peer: x for peer, x in theirs.items() if peer in anchors}
        theirs = self._confirmed(theirs, met, transfer)
        self.report(transfer, len(theirs) + transfer.finite)
        pull = _pull({peer: anchors[peer] for peer in theirs}, anchors[rank], own)
        if not transfer.finite:
            if not theirs:
                return None
            mean = torch.stack([x.to(own.dtype) for x in theirs.values()]).mean(0)
            return pull.mul_(self.gamma).sub_(mean, alpha=self.beta)
        own.add_(_pull(theirs, mine, own))
        return pull.mul_(self.gamma).sub_(own, alpha=self.beta)

    def _compressed(
        self, transfer: Transfer, met: list[int], compressor: Compressor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """This rank's pseudo-gradients and those of others that are finite, as decoded."""
        ctxs = [
            TensorCtx(name, x.shape, x.dtype, x.device, transfer.number, self.seed)
            for name, x in transfer.values.items()
        ]
        values = list(transfer.values.values())
        with profiler_range("compress"):
            payloads = compressor.compress_each(values, ctxs, self.peers.rank)
        flag = health([*values, *(x for payload in payloads for x in payload)], values[0].device)
        layout = Layout(payloads)
        message = layout.encode(payloads, flag)
        arrived = self.peers.swap(message, met, met, tag_of(transfer.number, _WEIGHTS))

        def decoded(x: Tensor) -> Tensor:
            got = layout.decode(x)
            with profiler_range("decompress"):
                tensors = [compressor.decompress(p, ctx) for p, ctx in zip(got, ctxs, strict=True)]
            return flat(dict(zip(transfer.values, tensors, strict=True)))

        theirs = {}
        for peer, x in arrived.items():
            if bool(layout.mark(x)):
                self.peers.suspect(peer)
            else:
                theirs[peer] = decoded(x)
        return decoded(message), theirs

    def _confirmed(
        self, theirs: dict[int, Tensor], met: list[int], transfer: Transfer
    ) -> dict[int, Tensor]:
        """``theirs``; in strict mode only if everybody in the group has everything."""
        if not self.strict or not met:
            return theirs
        complete = transfer.finite and len(theirs) == len(met)
        ack = torch.tensor([complete], dtype=torch.uint8, device=self.replica.device)
        told = self.peers.swap(ack, met, met, tag_of(transfer.number, _ACK))
        if complete and len(told) == len(met) and all(map(bool, told.values())):
            return theirs
        return {} if transfer.finite else theirs

    def _mean_of(
        self, theirs: Mapping[int, Tensor], anchors: Tensor, weight: float
    ) -> Tensor | None:
        if not theirs:
            return None
        anchors = anchors.to(self.replica.device)
        mean = torch.stack([x.to(anchors.dtype) for x in theirs.values()]).mean(0)
        return mean.sub_(anchors).mul_(weight)

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        for name, push in mean.items():
            anchor, momentum = self.anchors.values[name], self._momentum[name]
            momentum.mul_(self.alpha).add_(push.to(momentum.device))
            anchor.add_(momentum)
        self.anchors.write_back(unit.parameters)

    # State.

    def _open(self, private: Comm, alarm: Alarm | NoAlarm) -> None:
        if not self._momentum:
            values = self.anchors.values.items()
            self._momentum = {name: torch.zeros_like(x) for name, x in values}
        self._announced = None
        super()._open(private, alarm)

    def own_state(self) -> dict[str, Any]:
        return {"momentum": dict(self._momentum)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        for name, momentum in self._momentum.items():
            momentum.copy_(state["momentum"][name])
        # What was exchanged early is of other anchors.
        self._announced = None


def _pull(theirs: Mapping[int, Tensor], own: Tensor, like: Tensor) -> Tensor:
    """``mean(x_j) - x_i`` over the group with oneself, of messages as sent; (P,) in the dtype of ``like``. Over
    a pair that uses it, the sum is exactly 0."""
    total, own = torch.zeros_like(like), own.to(like.dtype)
    for x in theirs.values():
        total += (x.to(like.dtype) - own) / (len(theirs) + 1)
    return total
