"""Thousands of workers on a virtual clock, over the cost model.

Where a collective joins all, a round is one vector operation over the workers. Where pairs meet, it is one over the
pairs. Only asynchronous workers, which queue for a server, are processes of SimPy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cluster import Cluster
from .collectives import Hops, hops
from .pace import Pace
from .predict import Prediction, Round, Workload, predict
from .rounds import round_of
from .scenario import MethodPart, Scenario
from .traffic import law_of
from .workers import Array, Workers

SERVED = "async_local_sgd"
_FREE = Pace(0.0, 0.0)


class SimulationError(ValueError):
    """A method that cannot be simulated, or a package that is missing; the message says what to do."""


@dataclass(frozen=True)
class Outcome:
    """One method.

    Args:
        scheme, sync_every: which, and steps per round.
        seconds: that all rounds took, on the clock of the slowest worker.
        step_s: of it, per step.
        sync_s: mean time that a worker is held up by a round's synchronisation, waiting for the slowest included.
        idle_share: of the workers' time in which nothing useful is computed: they wait, restart, or do again what a
            failure undid.
        bytes_per_step: that a worker sends.
        peak_bytes_per_s: see :class:`~commkit.cost.predict.Prediction`.
    """

    scheme: str
    sync_every: int
    seconds: float
    step_s: float
    sync_s: float
    idle_share: float
    bytes_per_step: float
    peak_bytes_per_s: float

    @property
    def goodput(self) -> float:
        """Share of the workers' time that is useful computing."""
        return 1 - self.idle_share


def simulate(scenario: Scenario, pace: Callable[[str], Pace] = lambda name: _FREE) -> list[Outcome]:
    """All methods of a scenario, on the same draws.

    Args:
        scenario: checked.
        pace: of a scheme's arithmetic; by default none is counted.

    Raises:
        SimulationError: a scheme of another kind, or SimPy is missing where it is needed.
    """
    return [_one(scenario, method, pace(method.scheme)) for method in scenario.methods]


def _one(scenario: Scenario, method: MethodPart, pace: Pace) -> Outcome:
    work = Workload(
        scenario.shapes,
        scenario.compute.seconds,
        bytes_per_parameter=scenario.bytes_per_parameter,
    )
    cluster = scenario.cluster
    if method.scheme == SERVED:
        return _served(scenario, method, cluster)
    try:
        law = law_of(method.scheme)
    except ValueError as error:
        raise SimulationError(f"methods: {error}") from error
    plan = None
    if law.per_round:
        plan = round_of(method.scheme, method.sync_every)
        if plan is None:
            raise SimulationError(
                f"methods: {method.scheme!r} has no rounds of sync_every={method.sync_every} steps; give another number"
            )
    elif method.sync_every not in (None, 1):
        raise SimulationError(
            f"methods: {method.scheme!r} sends in every step, so sync_every={method.sync_every} must be left out"
        )
    found = predict(law, pace, work, cluster, plan)
    sent = law.sent(work.shapes, cluster.world_size)
    costs = [(one.count, hops(one.op, one.scope, one.payload, cluster)) for one in sent]
    if plan is not None and {one.op for one in sent} == {"exchange"}:
        return _pairs(scenario, found, plan, costs)
    return _together(scenario, found, plan, costs)


def _together(
    scenario: Scenario,
    found: Prediction,
    plan: Round | None,
    costs: list[tuple[float, Hops]],
) -> Outcome:
    """Everybody waits for everybody."""
    num, rounds = scenario.cluster.world_size, scenario.rounds
    workers = Workers(scenario, num)
    steps = found.sync_every
    computing = workers.rounds(rounds, steps)
    extra = np.zeros(rounds)
    for count, h in costs:
        messages = count * h.messages
        extra += workers.slowest_messages(rounds, messages, h.link.latency_s)
        extra -= messages * h.link.latency_s
    exposed = found.exposed_s if plan is None else found.sync_s
    transfers = np.maximum(exposed + extra, 0.0)
    # Parts whose outcome is awaited at once are one; others begin evenly spread over the round.
    late = plan is not None and any(delay for _, delay in plan.parts)
    parts = plan.parts if plan is not None and late else [(1.0, 0)]
    clock = np.zeros(num)
    wire_free = waited = 0.0
    for r in range(rounds):
        for share, delay in parts:
            clock = clock + computing[r] / len(parts)
            wire_free = max(float(clock.max()), wire_free) + share * float(transfers[r])
            blocked = np.maximum(wire_free - clock - delay * computing[r] / steps, 0.0)
            clock = clock + blocked
            waited += float(blocked.mean())
    seconds = float(clock.max())
    lost = _restarts(scenario, num, seconds, seconds / rounds)
    return _outcome(found, scenario, computing, seconds + lost, waited / rounds)


def _restarts(scenario: Scenario, num: int, seconds: float, round_s: float) -> float:
    """What failures cost a method that goes on only when all do."""
    if scenario.failures is None:
        return 0.0
    fault = scenario.failures
    state = np.random.RandomState((scenario.seed + 2) % 2**32)
    number = state.poisson(seconds * num / fault.mean_seconds)
    undone = state.uniform(0, fault.checkpoint_every * round_s, size=number).sum()
    return float(undone + number * fault.restart_seconds)


def _pairs(
    scenario: Scenario, found: Prediction, plan: Round, costs: list[tuple[float, Hops]]
) -> Outcome:
    """Random pairs wait for each other alone; one whose partner is down goes on by itself."""
    num, rounds = scenario.cluster.world_size, scenario.rounds
    workers = Workers(scenario, num)
    computing = workers.rounds(rounds, found.sync_every)
    state = np.random.RandomState((scenario.seed + 3) % 2**32)
    latency = sum(count * h.messages for count, h in costs)
    median = costs[0][1].link.latency_s
    fixed = found.sync_s - latency * median
    noise = workers.message(rounds, num // 2, median) * latency
    delay_s = plan.parts[0][1] * scenario.compute.seconds
    clock = np.zeros(num)
    waited = np.zeros(rounds)
    fault = scenario.failures
    for r in range(rounds):
        clock = clock + computing[r]
        down = np.zeros(num, dtype=np.bool_)
        if fault is not None:
            down = state.uniform(size=num) < 1 - np.exp(-computing[r] / fault.mean_seconds)
            clock = clock + down * fault.restart_seconds
        before = clock.copy()
        order = state.permutation(num)[: num - num % 2].reshape(-1, 2)
        met = ~(down[order[:, 0]] | down[order[:, 1]])
        done = clock[order].max(axis=1) + fixed + noise[r]
        for side in (0, 1):
            mine = order[met, side]
            clock[mine] = np.maximum(done[met], clock[mine] + delay_s) - delay_s
        waited[r] = float((clock - before).mean())
    return _outcome(found, scenario, computing, float(clock.max()), float(waited.mean()))


def _outcome(
    found: Prediction, scenario: Scenario, computing: Array, seconds: float, sync_s: float
) -> Outcome:
    busy = float(computing.sum()) / (seconds * computing.shape[1])
    return Outcome(
        found.scheme,
        found.sync_every,
        seconds,
        seconds / (scenario.rounds * found.sync_every),
        sync_s,
        1 - busy,
        found.wire_bytes,
        found.peak_bytes_per_s,
    )


def _served(scenario: Scenario, method: MethodPart, cluster: Cluster) -> Outcome:
    """Workers fetch weights from one server and push what they made of them, whenever they are done."""
    simpy = _simpy()
    num, steps = cluster.world_size, method.sync_every or 50
    workers = Workers(scenario, num)
    computing = workers.rounds(scenario.rounds, steps)
    size = 4.0 * scenario.shapes.numel
    link = cluster.link
    environment = simpy.Environment()
    inbound, outbound = simpy.Resource(environment), simpy.Resource(environment)
    waits: list[float] = []

    def transfer(port: Any) -> Generator[Any, Any, None]:
        with port.request() as turn:
            yield turn
            yield environment.timeout(size / link.bytes_per_second)
        yield environment.timeout(link.latency_s)

    def worker(index: int) -> Generator[Any, Any, None]:
        for r in range(scenario.rounds):
            yield environment.timeout(computing[r, index])
            before = environment.now
            yield from transfer(inbound)
            yield from transfer(outbound)
            waits.append(environment.now - before)

    for index in range(num):
        environment.process(worker(index))
    environment.run()
    seconds = float(environment.now)
    busy = float(computing.sum()) / (seconds * num)
    return Outcome(
        method.scheme,
        steps,
        seconds,
        seconds / (scenario.rounds * steps),
        float(np.mean(waits)),
        1 - busy,
        size / steps,
        2 * num * size / (steps * scenario.compute.seconds),
    )


def _simpy() -> Any:
    try:
        return importlib.import_module("simpy")
    except ModuleNotFoundError as error:
        raise SimulationError(
            f"methods: {SERVED!r} is simulated with simpy, which is not installed; pip install 'commkit[simulate]'"
        ) from error
