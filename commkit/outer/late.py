"""The shape of methods that are one round late: a round's outcome is used at the end of the next one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..reducer import Reducer
from ..runtime.alarm import RankFailure
from .anchors import OuterOptimizer
from .base import OuterSync
from .joining import Ranks
from .options import SyncOptions
from .transfer import Transfer
from .units import Unit


class LateSync(OuterSync):
    """At the end of round t: wait for round t-1's transfer, take and launch round t's snapshot, then apply
    the outcome of t-1. A transfer has a whole round to hide in; the staleness is exactly 1.

    Every round starts from the same anchors on all ranks. At the end of the first nothing has arrived, so
    replicas return to where they started and their progress counts one round later; the same holds for the
    first round after an abort. A clean end of the ``with`` block drains what is in flight; the round that
    is open is closed first if the options say so, else its local progress is kept on top.

    An outcome that was in flight when a round was aborted is lost on all ranks (one round of progress):
    replicas have long gone on from the anchors it was measured from. The open round stays, as
    ``options.on_abort`` says. State in a checkpoint: an outcome in flight is waited for and stored.

    Batch-norm statistics come back a round late too, as do the weights that they belong to.

    Args:
        model: as for :class:`OuterSync`.
        optimizer: as for :class:`OuterSync`.
        sync_every: inner steps per round: at least the transfer's time over the step's, so that round ends
            never wait (:func:`~commkit.outer.stability.smallest_sync_every`); more only adds staleness.
        delayed: False uses each outcome at once, as synchronous methods do. To see what the delay costs.
        reducer: as for :class:`OuterSync`.
        outer_optimizer: as for :class:`OuterSync`.
        options: as for :class:`OuterSync`; ``inner_state="average"`` is refused.
        process_group: as for :class:`OuterSync`.
        master_weights: as for :class:`OuterSync`.

    Raises:
        ValueError: ``sync_every`` below 1, or ``inner_state="average"`` together with the delay.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int,
        delayed: bool = True,
        reducer: Reducer | None = None,
        outer_optimizer: OuterOptimizer | None = None,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        if delayed and options is not None and options.inner_state == "average":
            raise ValueError(
                f"inner_state='average' would give {type(self).__name__}, which is one round late, moments that "
                "are a round old; use inner_state='keep' or 'reset'"
            )
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            reducer=reducer,
            outer_optimizer=outer_optimizer,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.delayed = delayed

    def settings(self) -> dict[str, object]:
        return {"delayed": self.delayed}

    def delay(self, unit: Unit) -> int:
        return self.sync_every if self.delayed else 0

    def synchronise(self) -> None:
        for unit in self.due():
            self.end_round(unit)

    def end_round(self, unit: Unit) -> None:
        """Send what this round brought, and start the next one from the anchors that the last one's outcome
        leads to.

        Raises:
            RoundAborted: the transfer that was waited for failed, here or on another rank.
        """
        self.at_unit = unit.index
        self.arrive()
        self.prepare_sync(unit)
        self.newcomer, self.at_unit = False, None
        sent = self._in_flight[-1]
        if not self.delayed:
            self.arrive()
        if len(self._in_flight) > 1 or not self.delayed:
            self.perform_sync()
        else:
            self.roll_back(unit)
        self.was_reset = not sent.finite
        super()._renew_inner_state(sent)

    def make_round(self, unit: Unit, late: bool = False) -> None:
        self.end_round(unit)

    def arrive(self) -> None:
        """Wait for the oldest outcome in flight. If ranks were lost meanwhile, those that are left send the same again."""
        while self.with_survivors(self._sent_again):
            pass

    def _sent_again(self) -> bool:
        """Whether what is in flight had to be sent again; if not, it has arrived, or is behind what has."""
        if self._in_flight:
            self._wait(self._in_flight[0])
        if self.members is not None:
            self.members.catch_up()
        waiting = [transfer for transfer in self._in_flight if transfer.waits]
        for transfer in waiting:
            self._submit(transfer)
        return bool(waiting)

    def _taken(self, unit: Unit) -> Transfer:
        transfer = super()._taken(unit)
        if self.members is not None:  # weights start anew from the anchors, so it is nowhere else
            transfer.keep()
        return transfer

    def _abort(self, failure: RankFailure) -> None:
        again = [] if self.members is None else list(self._in_flight)
        for transfer in again:
            transfer.restore()
        try:
            super()._abort(failure)
        finally:
            self._in_flight.extend(again)

    def _renew_inner_state(self, transfer: Transfer) -> None:
        """Done at the end of the round in which the snapshot was taken: a replica that was not finite then
        must not train the next round on poisoned moments."""

    @torch.no_grad()
    def finish(self) -> None:
        for unit in self.units:
            if self.options.final_sync and self.is_open(unit):
                self.end_round(unit)
        while self._in_flight:
            self.arrive()
            unit = self._in_flight[0].unit
            if not self.is_open(unit):
                self.perform_sync()
                continue
            progress = {name: self.anchors.difference(name) for name in unit.parameters}
            self.perform_sync()
            for name, difference in progress.items():
                self.replica.write(
                    name, self.anchors.values[name].to(difference.device) - difference
                )
