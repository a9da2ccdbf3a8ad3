"""Schemes for sharded models and those with a coordinator: their own bytes, their own rounds, and the laws of any prediction."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commkit.config import validate
from commkit.cost.cluster import Cluster, Link
from commkit.cost.coordinated import (
    CoordinationError,
    method_of,
    play,
    predict_coordinated,
    star_of,
)
from commkit.cost.pace import Pace, pace_of
from commkit.cost.predict import Workload
from commkit.cost.run import GATHERS, run_sharded
from commkit.cost.scenario import Scenario
from commkit.cost.shapes import Shapes, transformer
from commkit.cost.sharded import FSDP, predict_sharded
from commkit.cost.simulate import SimulationError, simulate
from commkit.cost.transfers import queued, shared_link, transferred
from commkit.inventory import _measure
from commkit.schemes import make_scheme
from commkit.sim import run_threads

FREE = Pace(0.0, 0.0)
WORK = Workload(transformer(10_000_000), 1.0)
ENDLESS = Link(1e18, 0.0)
RATES = [10.0**k for k in range(4, 11)]


def cluster(rate=1e8, gpu=True, nodes=4, per_node=2, latency=1e-4):
    link = Link(rate, latency)
    return Cluster(
        nodes, per_node, link, link, backend="nccl" if gpu else "gloo", compresses_beside=gpu
    )


def sharded(name, where):
    return predict_sharded(name, FREE, WORK, where)


@pytest.mark.parametrize("name", ["qsdp", "zeropp"])
def test_predicted_bytes_of_sharded_models_are_those_that_the_scheme_sends(name):
    side, world = 1024, 4
    made = make_scheme(name)
    if made.between is not None:
        made = dataclasses.replace(made, local_size=2)
    counted = run_threads(lambda comm: run_sharded(made, side, GATHERS, comm).wire_bytes, world)
    work = Workload(Shapes(side**2, 2 * side, 1, 0), 1.0)
    found = predict_sharded(name, FREE, work, cluster(nodes=2, per_node=2))
    assert found.wire_bytes == pytest.approx(sum(counted) / world, rel=0.01)


def test_fsdp_sends_its_weights_twice_and_its_gradients_once():
    size = 4 * WORK.shapes.numel * 7 / 8
    assert sharded(FSDP, cluster()).wire_bytes == pytest.approx(3 * size, rel=1e-3)
    # gloo scatters with an all-reduce's traffic
    assert sharded(FSDP, cluster(gpu=False)).wire_bytes == pytest.approx(4 * size, rel=1e-3)


@pytest.mark.parametrize("name", [FSDP, "qsdp", "zeropp"])
def test_laws_of_sharded_models(name):
    for gpu in (True, False):
        endless = dataclasses.replace(cluster(gpu=gpu), link=ENDLESS, local=ENDLESS)
        assert sharded(name, endless).step_s == pytest.approx(1.0, rel=1e-6)
        steps = [sharded(name, cluster(rate, gpu)).step_s for rate in RATES]
        assert steps == sorted(steps, reverse=True)
    hidden, awaited = (sharded(name, cluster(1e8, gpu)) for gpu in (True, False))
    assert hidden.step_s <= awaited.step_s
    assert hidden.low_s < hidden.step_s < hidden.high_s
    assert hidden.memory_bytes < WORK.shapes.numel * 16 / 2
    slow = sharded(name, cluster(1e4))
    assert slow.exposed_s == pytest.approx(slow.sync_s, rel=0.01)


def test_arithmetic_of_sharded_models_takes_time():
    pace = pace_of("qsdp")
    assert pace.alone + 2 * pace.each > 0
    slow = predict_sharded("qsdp", Pace(1e-7, 0.0), WORK, cluster(gpu=False))
    assert slow.compression_s == pytest.approx(1e-7 * WORK.shapes.numel)
    assert slow.step_s > sharded("qsdp", cluster(gpu=False)).step_s + 0.9 * slow.compression_s


def test_a_simulation_of_sharded_models_is_the_prediction():
    given = scenario(
        {"scheme": "fsdp"},
        {"scheme": "qsdp"},
        nodes=2,
        ranks_per_node=2,
        backend="nccl",
        compute={"seconds": 0.5, "jitter": 0.0},
        link={"rate": "1gbit"},
    )
    for one in simulate(given):
        found = predict_sharded(one.scheme, FREE, given.work, given.cluster)
        assert one.step_s == pytest.approx(found.step_s)
        assert one.bytes_per_step == found.wire_bytes
    assert given.cluster.compresses_beside


def coordinated(name, where, jitter=0.0):
    return predict_coordinated(name, WORK, where, jitter)


@pytest.mark.parametrize(("name", "load"), [("backup", 1), ("gradient_coding", 2)])
def test_laws_of_coordinators(name, load):
    """On an endless link a step takes as long as the share of the batch that a worker computes."""
    endless = dataclasses.replace(cluster(), link=ENDLESS, local=ENDLESS)
    assert coordinated(name, endless).step_s == pytest.approx(load)
    found = [coordinated(name, cluster(rate)) for rate in RATES]
    steps = [one.step_s for one in found]
    assert steps == sorted(steps, reverse=True)
    assert all(one.low_s < one.step_s < one.high_s for one in found)
    assert all(one.utilisation < 1 / load for one in found)
    size = _measure(name).wire_bytes / 1e6  # of a worker, for each parameter
    assert found[0].wire_bytes == pytest.approx(size * WORK.shapes.numel, rel=0.01)


def test_everything_passes_the_coordinators_link():
    star = star_of(1_000_000, 1.0, cluster(1e6, nodes=8, per_node=1, latency=0.0))
    assert star.down_s == star.up_s == pytest.approx(7 * 4.0)
    assert star.in_turn_s == pytest.approx(7 * 4.0 + 2 * 4.0)
    assert star.in_turn_s < star.at_once_s


@given(starts=st.lists(st.floats(0, 20), min_size=1, max_size=9), each=st.floats(0.01, 5))
def test_a_shared_link_carries_everything_and_is_never_idle(starts, each):
    begun = np.array(starts)
    ends = shared_link(begun, each)
    assert (ends >= begun + each - 1e-9).all()
    assert (ends <= begun + len(starts) * each + 1e-9).all()
    order = np.argsort(begun, kind="stable")
    assert (np.diff(ends[order]) >= -1e-9).all()
    end = 0.0
    for start in begun[order]:  # one after another takes as long in all
        end = max(end, start) + each
    assert ends.max() == pytest.approx(end)


@given(starts=st.lists(st.floats(0, 20), min_size=1, max_size=9), each=st.floats(0.01, 5))
def test_nothing_ends_sooner_than_one_after_another(starts, each):
    begun = np.array(starts)
    first, equal = queued(begun, each), shared_link(begun, each)
    between = transferred(begun, each)
    assert (first <= equal + 1e-9).all()
    assert (first - 1e-9 <= between).all()
    assert (between <= equal + 1e-9).all()
    assert between.max() == pytest.approx(first.max())


def test_equal_parts_of_a_link():
    assert shared_link(np.array([0.0, 0.0, 9.0]), 1.0).tolist() == [2.0, 2.0, 10.0]
    # Alone for 0.5 s, then half of it each.
    assert shared_link(np.array([0.5, 0.0]), 1.0).tolist() == [2.0, 1.5]


@pytest.mark.parametrize("name", ["backup", "gradient_coding", "sr_sgc", "m_sgc"])
def test_a_step_of_a_coordinator_is_between_one_after_another_and_all_at_once(name):
    where = cluster(1e7, nodes=4, per_node=1, latency=0.0)
    for slowness in ([1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [1.0, 1.0, 2.0]):
        found = predict_coordinated(name, WORK, where, 0.0, slowness)
        computing = _rounds(name, slowness)
        assert computing < found.step_s <= 1.01 * (computing + found.sync_s)
    alike, faster = (
        predict_coordinated(name, WORK, where, 0.0, slowness)
        for slowness in ([1.0, 1.0, 1.0], [0.5, 0.5, 0.5])
    )
    assert faster.step_s < alike.step_s


def _rounds(name, seconds):
    """Seconds of a step where nothing has to be sent."""
    return play(method_of(name, 3), np.array([seconds]), 200).step_s


def test_the_first_two_of_three_are_awaited_and_the_third_comes_late():
    played = play(method_of("backup", 3), np.array([[1.0, 2.0, 9.0]]), jobs=2)
    assert played.seconds.tolist() == [2.0, 2.0]
    assert played.used == 2


def test_a_code_does_without_its_straggler_and_computes_twice():
    played = play(method_of("gradient_coding", 4), np.array([[1.0, 1.0, 1.0, 9.0]]), jobs=3)
    assert played.seconds.tolist() == [2.0] * 3
    assert (played.jobs, played.vectors) == (3, 1)


@pytest.mark.parametrize("name", ["sr_sgc", "m_sgc"])
def test_sequential_codes_finish_their_jobs_later(name):
    played = play(method_of(name, 8), np.ones((5, 8)), jobs=10)
    assert len(played.seconds) > played.jobs == 10
    assert played.vectors == {"sr_sgc": 1, "m_sgc": 2}[name]
    assert played.step_s > 1


def scenario(*methods, **changes):
    slow = {"seconds": 1.0, "jitter": 0.05}
    slow["stragglers"] = {"enter": 0.05, "leave": 0.9, "slowdown": 8}
    base = {"nodes": 33, "model_size": "1M", "link": {"rate": "100gbit", "latency": "1us"}}
    base |= {"compute": slow, "rounds": 40, "methods": list(methods)}
    return validate(Scenario, base | changes, "here")


def test_backup_workers_and_codes_do_not_wait_for_stragglers():
    everybody, backup, coded = simulate(
        scenario(
            {"scheme": "ddp"},
            {"scheme": "backup", "settings": {"num_backups": 6}},
            {"scheme": "gradient_coding", "settings": {"num_stragglers": 3}},
        )
    )
    assert backup.step_s < 0.5 * everybody.step_s
    assert backup.idle_share < everybody.idle_share
    assert 3.8 < coded.step_s < everybody.step_s


def test_a_worker_that_restarts_is_a_straggler():
    fault = {"mean_seconds": 300, "restart_seconds": 1000}
    method = {"scheme": "backup", "settings": {"num_backups": 8}}
    (steady,), (broken,) = (simulate(scenario(method, **f)) for f in ({}, {"failures": fault}))
    assert broken.seconds < steady.seconds + 100


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"scheme": "dbw"}, "equal ranks"),
        ({"scheme": "int8", "settings": {"bitz": 3}}, "bitz: unknown field"),
        ({"scheme": "qsdp", "settings": {"weight_bits": 4}}, "simulated with its defaults"),
        ({"scheme": "backup", "sync_every": 4}, "sends in every step"),
        ({"scheme": "backup", "settings": {"num_backups": 99}}, "num_backups=99"),
        ({"scheme": "backup", "settings": {"backups": 1}}, "backups: unknown field"),
    ],
)
def test_what_cannot_be_simulated_is_refused(method, message):
    with pytest.raises(SimulationError, match=message):
        simulate(scenario(method))


def test_coordinators_that_cannot_be_predicted_are_refused():
    with pytest.raises(CoordinationError, match="wants 3 ranks"):
        coordinated("backup", cluster(nodes=2, per_node=1))
    with pytest.raises(CoordinationError, match="by the gradients"):
        method_of("dbw", 8)
    with pytest.raises(CoordinationError, match="has no coordinator"):
        method_of("int8", 8)
    with pytest.raises(ValueError, match="is not for sharded models"):
        sharded("int8", cluster())
