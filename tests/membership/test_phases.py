"""A worker dies inside a step's exchange, before any of its collectives; for the others the step never began."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import commkit
from commkit import Elastic
from commkit.comm import DistComm
from commkit.membership import Place

from .crew import Crew
from .training import QUICK, die, digest, loss_of, make_model

_AT = 3  # the step in which it dies
SCHEMES: dict[str, dict[str, Any]] = {
    "powersgd": {"name": "powersgd", "rank": 2, "min_compression_rate": 0.0},
    "topk": {"name": "topk", "density": 0.1, "min_numel": 0},
    "sign": {"name": "sign", "min_numel": 0},
    "econtrol": {"name": "econtrol", "density": 0.1, "min_numel": 0},
}
_COLLECTIVES = ("all_reduce", "all_gather", "all_to_all")


def _die_before(number: int) -> None:
    """The process ends before its next collective but ``number``."""
    left = [number]

    def mortal(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                die()
            left[0] -= 1
            return method(*args, **kwargs)

        return call

    for name in _COLLECTIVES:
        setattr(DistComm, name, mortal(getattr(DistComm, name)))


def exchange(place: Place, tell: Callable[[Any], None], scheme: Any, before: int) -> dict[str, Any]:
    model = make_model()
    attempts: list[dict[str, torch.Tensor]] = []
    with Elastic(QUICK, place) as members:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        handle = commkit.attach(model, scheme, optimizer, members=members)
        for step in members.steps(6, model=model, optimizer=optimizer):
            with step:
                optimizer.zero_grad()
                if step.number == _AT:
                    # Of servers' shares another rank has the lost one's, so only what is this rank's own is the same.
                    own = handle.state_dict().items()
                    kept = {
                        k: x.clone() for k, x in own if "/shard/" not in k and "/whole/" not in k
                    }
                    attempts.append(
                        kept | {f"model/{k}": x.clone() for k, x in model.state_dict().items()}
                    )
                    if place.rank == 1:
                        _die_before(before)
                loss_of(model, step.number, place.rank).backward()
                optimizer.step()
        last = handle.last_step.num_contributors
    same = all(
        attempts[0].keys() == other.keys()
        and all(torch.equal(attempts[0][k], other[k]) for k in other)
        for other in attempts[1:]
    )
    return {"digest": digest(model), "attempts": len(attempts), "same": same, "last": last}


@pytest.mark.parametrize(
    ("scheme", "before"),
    [
        ("powersgd", 0),
        ("powersgd", 1),  # between P and Q
        ("powersgd", 2),  # all have the outcome, and do not know that all have
        ("topk", 0),
        ("sign", 1),  # between the scatter and the gather
        ("econtrol", 0),
    ],
)
def test_residuals_are_those_before_the_step(scheme: str, before: int) -> None:
    with Crew(exchange, 3, SCHEMES[scheme], before) as crew:
        first, last = crew.finish(0, 2)
    assert first["digest"] == last["digest"]
    assert first["same"]
    assert last["same"]
    assert first["attempts"] == last["attempts"]
    assert first["last"] == 2
    if before == 0:
        assert first["attempts"] == 2
