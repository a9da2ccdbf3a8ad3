"""Thousands of workers on a virtual clock, over the cost model.

Where a collective joins all, a round is one vector operation over the workers. Where pairs meet, it is one over the
pairs. Only asynchronous workers, which queue for a server, are processes of SimPy.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .cluster import Cluster
from .collectives import Hops, hops
from .coordinated import SCHEMES as COORDINATED
from .coordinated import method_of, play, star_of, vectors_of
from .pace import Pace
from .predict import ELEMENT, Prediction, Round, Workload, predict
from .rounds import round_of
from .scenario import MethodPart, Scenario
from .sharded import is_sharded, predict_sharded
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
        scheme, sync_every: what the scenario calls it, and steps per round.
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


@dataclass(frozen=True)
class Stage:
    """What a scenario is played on.

    Args:
        work: of a rank; its time is that of a middling one.
        cluster: of all ranks.
    """

    work: Workload
    cluster: Cluster


def simulate(
    scenario: Scenario,
    pace: Callable[[str], Pace] = lambda name: _FREE,
    stage: Stage | None = None,
) -> list[Outcome]:
    """All methods of a scenario, on the same draws.

    Args:
        scenario: checked.
        pace: of a scheme's arithmetic; by default none is counted.
        stage: in place of the scenario's own model, times and cluster.

    Raises:
        SimulationError: a scheme of another kind, or SimPy is missing where it is needed.
    """
    stage = stage or Stage(scenario.work, scenario.cluster)
    return [_one(scenario, stage, method, pace(method.scheme)) for method in scenario.methods]


def _one(scenario: Scenario, stage: Stage, method: MethodPart, pace: Pace) -> Outcome:
    work, cluster = stage.work, stage.cluster
    if method.scheme in COORDINATED:
        return _coordinated(scenario, stage, method)
    sharded = is_sharded(method.scheme)
    if method.settings and (sharded or method.scheme == SERVED):
        raise SimulationError(
            f"methods: {method.scheme!r} is simulated with its defaults; leave settings out"
        )
    if method.scheme == SERVED:
        return _served(scenario, stage, method)
    if sharded:
        _require_no_rounds(method)
        found = predict_sharded(method.scheme, pace, work, cluster)
        return _together(scenario, stage, replace(found, scheme=method.label), None, [])
    told = json.dumps(method.settings, sort_keys=True)
    try:
        law = law_of(method.scheme, settings=told)
    except ValueError as error:
        raise SimulationError(f"methods: {error}") from error
    plan = None
    if law.per_round:
        plan = round_of(method.scheme, method.sync_every, told)
        if plan is None:
            raise SimulationError(
                f"methods: {method.scheme!r} has no rounds of sync_every={method.sync_every} steps; give another number"
            )
    else:
        _require_no_rounds(method)
    found = replace(predict(law, pace, work, cluster, plan), scheme=method.label)
    sent = law.sent(work.shapes, cluster.world_size)
    costs = [(one.count, hops(one.op, one.scope, one.payload, cluster)) for one in sent]
    if plan is not None and {one.op for one in sent} == {"exchange"}:
        return _pairs(scenario, stage, found, plan, costs)
    return _together(scenario, stage, found, plan, costs)


def _require_no_rounds(method: MethodPart) -> None:
    if method.sync_every not in (None, 1):
        raise SimulationError(
            f"methods: {method.scheme!r} sends in every step, so sync_every={method.sync_every} must be left out"
        )


def _together(
    scenario: Scenario,
    stage: Stage,
    found: Prediction,
    plan: Round | None,
    costs: list[tuple[float, Hops]],
) -> Outcome:
    """Everybody waits for everybody."""
    num, rounds = stage.cluster.world_size, scenario.rounds
    workers = Workers(scenario, num, stage.work.compute_s)
    steps = found.sync_every
    computing = workers.rounds(rounds, steps)
    extra = np.zeros(rounds)
    for count, h in costs:
        messages = count * h.messages
        extra += workers.slowest_messages(rounds, messages, h.link.latency_s)
        extra -= messages * h.link.latency_s
    own_s = 0.0 if plan is None else _own_s(found, plan, stage.cluster)
    exposed = found.exposed_s if plan is None else _away_s(found, stage.cluster)
    transfers = np.maximum(exposed + extra, 0.0)
    # Parts whose outcome is awaited at once are one; others begin evenly spread over the round.
    late = plan is not None and any(delay for _, delay in plan.parts)
    parts = plan.parts if plan is not None and late else [(1.0, 0)]
    clock = np.zeros(num)
    wire_free = waited = 0.0
    for r in range(rounds):
        for share, delay in parts:
            clock = clock + (computing[r] + own_s) / len(parts)
            wire_free = max(float(clock.max()), wire_free) + share * float(transfers[r])
            blocked = np.maximum(wire_free - clock - delay * computing[r] / steps, 0.0)
            clock = clock + blocked
            waited += float(blocked.mean())
    seconds = float(clock.max())
    lost = _restarts(scenario, num, seconds, seconds / rounds)
    return _outcome(found, scenario, computing, seconds + lost, waited / rounds)


def _own_s(found: Prediction, plan: Round, cluster: Cluster) -> float:
    """Of a round, that takes the processors on which the model is computed."""
    own = found.again_s * found.sync_every
    if not cluster.compresses_beside:
        own += found.compression_s
    if all(delay == 0 for _, delay in plan.parts):  # nobody computes while messages are sent
        return own
    return own + cluster.send_cpu_s_per_byte * found.wire_bytes * found.sync_every


def _away_s(found: Prediction, cluster: Cluster) -> float:
    """Of a round, that goes on without them."""
    return found.sync_s if cluster.compresses_beside else found.sync_s - found.compression_s


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
    scenario: Scenario,
    stage: Stage,
    found: Prediction,
    plan: Round,
    costs: list[tuple[float, Hops]],
) -> Outcome:
    """Random pairs wait for each other alone; one whose partner is down goes on by itself."""
    num, rounds = stage.cluster.world_size, scenario.rounds
    workers = Workers(scenario, num, stage.work.compute_s)
    computing = workers.rounds(rounds, found.sync_every)
    state = np.random.RandomState((scenario.seed + 3) % 2**32)
    latency = sum(count * h.messages for count, h in costs)
    median = costs[0][1].link.latency_s
    own_s = _own_s(found, plan, stage.cluster)
    fixed = _away_s(found, stage.cluster) - latency * median
    noise = workers.message(rounds, num // 2, median) * latency
    delay_s = plan.parts[0][1] * stage.work.compute_s
    clock = np.zeros(num)
    waited = np.zeros(rounds)
    fault = scenario.failures
    for r in range(rounds):
        clock = clock + computing[r] + own_s
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


def _coordinated(scenario: Scenario, stage: Stage, method: MethodPart) -> Outcome:
    """One rank coordinates the rounds, and those that are late or down in one are in the next again. All transfers pass
    its link, at once."""
    _require_no_rounds(method)
    num, numel = stage.cluster.world_size, stage.work.shapes.numel
    workers = Workers(scenario, num - 1, stage.work.compute_s)
    times = workers.rounds(scenario.rounds, 1)
    if scenario.failures is not None:
        state = np.random.RandomState((scenario.seed + 4) % 2**32)
        down = state.uniform(size=times.shape) < 1 - np.exp(-times / scenario.failures.mean_seconds)
        times = times + down * scenario.failures.restart_seconds
    try:
        found = method_of(method.scheme, num - 1, method.settings)
    except ValueError as error:
        raise SimulationError(f"methods: {error}") from error
    star = star_of(numel, vectors_of(found), stage.cluster)
    played = play(found, times, scenario.rounds, star)
    # Down and up, each as slow as its slowest message.
    late = workers.slowest_messages(len(played.seconds), 2, stage.cluster.link.latency_s)
    late_s = float(late.mean()) - 2 * stage.cluster.link.latency_s
    seconds = float(played.seconds.sum()) + late_s * len(played.seconds)
    step_s = seconds / played.jobs
    useful = float(times.mean()) * played.used / num
    return Outcome(
        method.label,
        1,
        seconds,
        step_s,
        step_s - useful,
        1 - useful / step_s,
        ELEMENT * float(numel) * played.vectors,
        star.link_bytes / stage.work.compute_s,
    )


def _served(scenario: Scenario, stage: Stage, method: MethodPart) -> Outcome:
    """Workers fetch weights from one server and push what they made of them, whenever they are done."""
    simpy = _simpy()
    num, steps = stage.cluster.world_size, method.sync_every or 50
    workers = Workers(scenario, num, stage.work.compute_s)
    computing = workers.rounds(scenario.rounds, steps)
    size, link = ELEMENT * float(stage.work.shapes.numel), stage.cluster.link
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
        method.label,
        steps,
        seconds,
        seconds / (scenario.rounds * steps),
        float(np.mean(waits)),
        1 - busy,
        size / steps,
        2 * num * size / (steps * stage.work.compute_s),
    )


def _simpy() -> Any:
    try:
        return importlib.import_module("simpy")
    except ModuleNotFoundError as error:
        raise SimulationError(
            f"methods: {SERVED!r} is simulated with simpy, which is not installed; pip install 'commkit[simulate]'"
        ) from error
