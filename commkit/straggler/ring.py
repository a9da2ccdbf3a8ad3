"""The weights that workers compute with, for every job under way: the same bits on coordinators and workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..feedback import NoFeedback
from ..runtime.codec import Codec
from ..types import StateDict

_UNSENT = (
    NoFeedback()
)  # what a code leaves unsent is the difference to the coordinator's own weights


class Ring:
    """T + 1 sets of weights: job j is computed with set ``j mod (T+1)``.

    With ``chained`` all sets are of one model, each made of the one before it by what was sent; without, each is
    of a model of its own.

    What is compressed is the difference between the coordinator's weights and those that workers have. So what a
    code leaves unsent is sent later (server-side error feedback), and nothing drifts.

    Args:
        codec: of the weights.
        delay: T.
        chained: one model.
        weights: of each model, by name, to start from; copied. On a worker all names, on a coordinator
            those of its part.
    """

    def __init__(
        self, codec: Codec, delay: int, chained: bool, weights: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.codec, self.chained = codec, chained
        self.size = delay + 1
        self.sets: list[dict[str, Tensor]] = [
            {n: x.detach().to("cpu", copy=True) for n, x in weights[0 if chained else s].items()}
            for s in range(self.size)
        ]

    def of_job(self, job: int) -> dict[str, Tensor]:
        """The weights that ``job`` is computed with, as long as it is under way."""
        return self.sets[job % self.size]

    def encode(self, job: int, weights: Mapping[str, Tensor], number: int) -> list[Tensor]:
        """What takes workers from what they have to ``weights``, for ``job``, which begins.

        Args:
            weights: the coordinator's, of the job's model.
            number: of the round, from which shared randomness comes.
        """
        have = self.sets[(job - self.chained) % self.size]
        outgoing = {}
        for name, x in weights.items():
            x = x.detach().to("cpu")
            if self.codec.compresses(name, number):
                dtype = torch.promote_types(x.dtype, torch.float32)
                x = x.to(dtype) - have[name].to(dtype)
            outgoing[name] = x
        return self.codec.encode(outgoing, list(weights), number, 0, _UNSENT)

    @torch.no_grad()
    def begin(
        self, job: int, changes: Sequence[Tensor] | None, names: Sequence[str], number: int
    ) -> None:
        """``job`` begins: its set is made of what was sent for ``names``. None: nothing has changed."""
        have, new = self.sets[(job - self.chained) % self.size], self.of_job(job)
        decoded = {} if changes is None else self.codec.decode(changes, names, number)
        for name in names:
            if name not in decoded:
                if new is not have:
                    new[name].copy_(have[name])
            elif self.codec.compresses(name, number):
                torch.add(have[name], decoded[name].to(have[name].dtype), out=new[name])
            else:
                new[name].copy_(decoded[name])

    def whole(self) -> list[Tensor]:
        """Everything, in full."""
        return [x for weights in self.sets for x in weights.values()]

    def load_whole(self, tensors: Iterable[Tensor], names: Sequence[str]) -> None:
        """Take over what :meth:`whole` gave, of a coordinator that has ``names``."""
        incoming = iter(tensors)
        for weights in self.sets:
            for name in names:
                weights[name].copy_(next(incoming))

    def reset(self, weights: Sequence[Mapping[str, Tensor]]) -> None:
        """Every set becomes its model's newest weights."""
        for place, mine in enumerate(self.sets):
            for name, x in mine.items():
                x.copy_(weights[0 if self.chained else place][name])

    def state_dict(self) -> StateDict:
        return {f"{s}/{name}": x for s, mine in enumerate(self.sets) for name, x in mine.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for s, mine in enumerate(self.sets):
            for name, x in mine.items():
                x.copy_(state[f"{s}/{name}"])
