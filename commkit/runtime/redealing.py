"""State of a scheme when the set of ranks changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..reducer import Reducer
from ..types import NODE, RANK, SHARD, WHOLE, Comm, StateDict, parameter_of


def merge(states: list[StateDict]) -> StateDict:
    """One reducer state that any number of ranks can start from, made of the states of all old ranks.

    ``rank/NAME`` is averaged (absent counts as zero), shards are put together into ``whole/NAME``,
    ``node/NAME`` is averaged over the nodes, each of which has it once, into ``whole/NAME``, and everything
    else is equal on all ranks and taken from the first that has it.
    """
    merged: StateDict = {}
    shards: dict[str, dict[int, Tensor]] = {}
    nodes: dict[str, list[Tensor]] = {}
    for state in states:
        for key, value in state.items():
            if key.startswith(f"{RANK}/"):
                share = value / len(states)
                merged[key] = merged[key] + share if key in merged else share
            elif f"/{SHARD}/" in key:
                name, _, start = key.rpartition("@")
                shards.setdefault(name, {})[int(start)] = value
            elif f"/{NODE}/" in key:
                nodes.setdefault(key.replace(f"/{NODE}/", f"/{WHOLE}/", 1), []).append(value)
            else:
                merged.setdefault(key, value)
    for name, of_nodes in nodes.items():
        merged[name] = torch.stack(of_nodes).mean(0)
    for name, pieces in shards.items():
        end = max(at + piece.numel() for at, piece in pieces.items())
        whole = next(iter(pieces.values())).new_zeros(end)
        for at, piece in pieces.items():
            whole[at : at + piece.numel()] = piece
        merged[name.replace(f"/{SHARD}/", f"/{WHOLE}/", 1)] = whole
    return merged


def dealt_again(reducer: Reducer, parameters: Mapping[str, Tensor], comm: Comm) -> None:
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
