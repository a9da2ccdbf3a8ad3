"""State of a scheme when the set of ranks changes while it is at work."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..checkpoint import merge
from ..reducer import Reducer
from ..types import RANK, SHARD, WHOLE, Comm, StateDict, parameter_of


def dealt_again(reducer: Reducer, parameters: Mapping[str, nn.Parameter], comm: Comm) -> None:
    """Deal what ranks keep as servers of a share to the ranks of ``comm``. What a lost rank kept counts as zero;
    residuals of ranks stay with them. Collective."""
    state = reducer.state_dict()
    of_ranks = comm.all_gather_object({k: v for k, v in state.items() if f"/{SHARD}/" in k})
    if not any(of_ranks):
        return
    kept = {k: v for k, v in state.items() if f"/{SHARD}/" not in k and f"/{WHOLE}/" not in k}
    for key, x in merge(of_ranks).items():
        whole = x.new_zeros(parameters[parameter_of(key)].numel())
        whole[: x.numel()] = x
        kept[key] = whole
    reducer.load_state_dict(kept)


def for_everybody(state: StateDict) -> StateDict:
    """The part of a reducer's state that is not a single rank's."""
    return {
        k: v for k, v in state.items() if not k.startswith(f"{RANK}/") and f"/{SHARD}/" not in k
    }
