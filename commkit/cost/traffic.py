"""What a scheme sends for a model of any size on any number of ranks: learnt from the scheme itself.

The production code runs on a few small models over a :class:`~commkit.sim.mirror.MirrorComm`, and what it sends
there is fitted by a law that is linear in the model's shapes and in 1/W. Nothing is written down about a scheme;
one whose traffic follows no such law is refused.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..optim import OptimizerScheme
from ..outer import OuterScheme
from ..reducer import Reducer
from ..schemes import make_scheme
from ..sim.mirror import Call, MirrorComm, Op, gradients_like
from .run import MEASURED_WITH, Ran, run_rounds, run_steps
from .shapes import Shapes, shapes_of

Sides: TypeAlias = tuple[tuple[int, int], ...]
# Of the matrices of each sample; each has a vector of as many elements as rows, few enough that schemes send it densely.
_SIDES: tuple[Sides, ...] = (
    ((256, 512),) * 4,
    ((256, 512),) * 8,
    ((512, 512),) * 4,
    ((128, 1024),) * 4,
    ((512, 512), (256, 512)) * 2,
    ((320, 768),) * 6,
)
_NODES = (2, 4)
_LONGEST = 24  # steps of a round that is run; its traffic does not depend on them
_TOLERANCE, _SLACK = 0.03, 256.0  # of the fit: a share, and bytes of padding


class NoLawError(ValueError):
    """A scheme's traffic cannot be predicted for other models than those it was tried on."""


@dataclass(frozen=True)
class Sent:
    """One kind of collective in a step or round.

    Args:
        op, scope: as in :class:`~commkit.sim.mirror.Call`.
        payload: bytes that a rank hands over, all together.
        count: how many.
    """

    op: Op
    scope: str
    payload: float
    count: float


@dataclass(frozen=True)
class Law:
    """Of one scheme.

    Args:
        name, knobs: the scheme.
        per_round: a round of local updates, not a step.
        whole_step: nothing of it can start before backward has ended.
        evaluations: of each batch; more than 1 where the optimizer's step evaluates it again.
    """

    name: str
    knobs: Mapping[str, Any]
    per_round: bool
    whole_step: bool
    evaluations: float
    _payload: Mapping[tuple[Op, str], npt.NDArray[np.float64]] = field(repr=False)
    _count: Mapping[tuple[Op, str], npt.NDArray[np.float64]] = field(repr=False)
    _state: npt.NDArray[np.float64] = field(repr=False)

    def sent(self, shapes: Shapes, world_size: int) -> list[Sent]:
        """In a step or round."""
        row, counted = _row(shapes, world_size), _count_row(shapes)
        found = [
            Sent(
                op,
                scope,
                max(float(row @ law), 0.0),
                max(float(counted @ self._count[op, scope]), 1.0),
            )
            for (op, scope), law in self._payload.items()
        ]
        return [one for one in found if one.payload > 0.5]

    def state_bytes(self, shapes: Shapes, world_size: int) -> float:
        """That a rank keeps between steps."""
        return max(float(_row(shapes, world_size) @ self._state), 0.0)


@lru_cache(maxsize=256)
def law_of(name: str, ranks_per_node: int = 1, inner: str = "", settings: str = "{}") -> Law:
    """The law of a registered scheme.

    Args:
        name: the scheme.
        ranks_per_node: matters to "hierarchical" alone.
        inner: there, the scheme between nodes.
        settings: of the scheme, as JSON.

    Raises:
        NoLawError: it is not one for steps or rounds of equal ranks, or follows no law.
    """
    knobs = {**MEASURED_WITH.get(inner or name, {}), **json.loads(settings)}
    fragments = knobs.get("fragments")
    if isinstance(fragments, int):  # of which a round has a multiple of steps
        knobs.setdefault("sync_every", fragments * max(1, _LONGEST // fragments))
    if inner:
        knobs = {"scheme": {"name": inner, **knobs}, "local_size": ranks_per_node}
    made = make_scheme(name, knobs)
    if isinstance(made, OuterScheme):
        knobs = {**_short(made, knobs), **knobs}
        made = make_scheme(name, knobs)
        assert isinstance(made, OuterScheme)
        run = _rounds
    elif isinstance(made, Reducer | OptimizerScheme):
        run = _steps
    else:
        raise NoLawError(
            f"scheme {name!r} has a coordinator, servers or shards; predictions are for schemes of equal ranks"
        )
    per_node = ranks_per_node if inner else 1
    ran: dict[tuple[Sides, int], Ran] = {
        (sides, nodes * per_node): run(name, knobs, sides, nodes * per_node)
        for sides in _SIDES
        for nodes in _NODES
    }
    return _fit(name, knobs, isinstance(made, OuterScheme), _whole_step(made), ran)


def _short(made: OuterScheme, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds that take no time to run."""
    every = made(*_model(_SIDES[0], knobs)).sync_every
    return {"sync_every": _LONGEST} if every > _LONGEST else {}


def _whole_step(made: Reducer | OptimizerScheme | OuterScheme) -> bool:
    if isinstance(made, OuterScheme):
        return False
    if isinstance(made, OptimizerScheme):
        made = made([nn.Parameter(torch.zeros(2, 2))], lr=1e-3).reducer
    return made.whole_step


def _steps(name: str, knobs: Mapping[str, Any], sides: Sides, world: int) -> Ran:
    made = make_scheme(name, knobs)
    assert isinstance(made, Reducer | OptimizerScheme)
    shapes = {f"{i}.weight": torch.Size(side) for i, side in enumerate(sides)}
    shapes |= {f"{i}.bias": torch.Size(side[:1]) for i, side in enumerate(sides)}
    return run_steps(made, gradients_like(shapes, seed=0), MirrorComm(world))


def _rounds(name: str, knobs: Mapping[str, Any], sides: Sides, world: int) -> Ran:
    made = make_scheme(name, knobs)
    assert isinstance(made, OuterScheme)
    return run_rounds(made, _model(sides, knobs)[0], MirrorComm(world))


def _model(sides: Sides, knobs: Mapping[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """With as many layers as there are to be fragments; those beyond ``sides`` hold next to nothing."""
    layers = [nn.Linear(columns, rows) for rows, columns in sides]
    fragments = knobs.get("fragments")
    if isinstance(fragments, int):
        layers += [nn.Linear(1, 1, bias=False) for _ in range(fragments - len(sides))]
    model = nn.Sequential(*layers)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def _shapes(sides: Sides) -> Shapes:
    return shapes_of([*sides, *(side[:1] for side in sides)])


def _row(shapes: Shapes, world_size: int) -> npt.NDArray[np.float64]:
    features = np.array(shapes.features, dtype=np.float64)
    return np.concatenate([features, features / world_size])


def _count_row(shapes: Shapes) -> npt.NDArray[np.float64]:
    return np.array([shapes.matrices, 1.0])


def _fit(
    name: str,
    knobs: Mapping[str, Any],
    per_round: bool,
    whole_step: bool,
    ran: Mapping[tuple[Sides, int], Ran],
) -> Law:
    sums = {key: _sums(one.calls) for key, one in ran.items()}
    kinds = list(dict.fromkeys(kind for one in sums.values() for kind in one))
    rows = np.stack([_row(_shapes(sides), world) for sides, world in ran])
    counts = np.stack([_count_row(_shapes(sides)) for sides, _ in ran])
    solve = partial(_solve, name)
    return Law(
        name,
        knobs,
        per_round,
        whole_step,
        max(one.evaluations for one in ran.values()),
        {k: solve(rows, [one[k][0] for one in sums.values()]) for k in kinds},
        {k: _solve(name, counts, [one[k][1] for one in sums.values()], slack=1.0) for k in kinds},
        solve(rows, [one.state_bytes for one in ran.values()]),
    )


def _sums(calls: Sequence[Call]) -> dict[tuple[Op, str], tuple[float, float]]:
    found: dict[tuple[Op, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for call in calls:
        payload, count = found[call.op, call.scope]
        found[call.op, call.scope] = (payload + call.payload, count + 1)
    return found


def _solve(
    name: str, rows: npt.NDArray[np.float64], values: Sequence[float], slack: float = _SLACK
) -> npt.NDArray[np.float64]:
    scale = np.abs(rows).max(axis=0)
    wanted = np.array(values, dtype=np.float64)
    law: npt.NDArray[np.float64] = np.linalg.lstsq(rows / scale, wanted, rcond=1e-9)[0] / scale
    off = np.abs(rows @ law - wanted)
    if (off > _TOLERANCE * np.abs(wanted) + slack).any():
        worst = int(np.argmax(off))
        raise NoLawError(
            f"scheme {name!r} sends {wanted[worst]:.0f} bytes where a law linear in the model's shapes gives "
            f"{(rows @ law)[worst]:.0f}; its traffic depends on more than the model and the ranks"
        )
    return law
