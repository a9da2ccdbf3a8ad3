"""The cost model: equal to the library's own counts and to the committed measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commkit import cli
from commkit.comm import all_reduce_wire_bytes
from commkit.config import ConfigError, validate
from commkit.cost import pace
from commkit.cost.cluster import Cluster, Link
from commkit.cost.collectives import hops
from commkit.cost.pace import Pace
from commkit.cost.predict import Workload, bucket_shares, predict, smallest_sync_every
from commkit.cost.rounds import round_of
from commkit.cost.run import MEASURED_WITH, run_steps
from commkit.cost.scenario import Scenario, load_scenario
from commkit.cost.shapes import shapes_of, transformer
from commkit.cost.simulate import Stage, simulate
from commkit.cost.traffic import NoLawError, law_of
from commkit.cost.units import parse_bandwidth, parse_bytes, parse_count, parse_seconds
from commkit.schemes import make_scheme
from commkit.sim import run_threads
from commkit.sim.mirror import MirrorComm, gradients_like
from launch import gpt
from launch.settings import ModelSettings

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "benchmarks" / "results" / "lab"
FREE = Pace(0.0, 0.0)
GBIT = Link.of_rate(1e9, 3e-4)


def of_nodes(nodes, link=GBIT, ranks_per_node=1):
    return Cluster(nodes, ranks_per_node, link, Link(2e9, 1e-4))


def lab_shapes():
    model = gpt.build(ModelSettings(layers=4, heads=8, width=512), 0)
    return shapes_of(tuple(p.shape) for p in model.parameters())


def measured(file, name):
    found = json.loads((LAB / f"{file}.json").read_text())
    return next(c["figures"] for c in found["configurations"] if c["name"] == name)


@pytest.mark.parametrize("name", ["ddp", "fp16", "int8", "powersgd", "sign", "topk", "dgc"])
def test_predicted_bytes_are_those_that_the_lab_counted(name):
    """On a model 20 times as large as any that the law was learnt on."""
    found = predict(law_of(name), FREE, Workload(lab_shapes(), 1.0), of_nodes(2))
    counted = measured("grid_2_nodes_1gbit", name)["wire_bytes"]["median"]
    assert found.wire_bytes == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("file", "nodes", "rate"),
    [
        ("ddp_4_nodes_50mbit", 4, 5e7),
        ("ddp_4_nodes_200mbit", 4, 2e8),
        ("grid_2_nodes_200mbit", 2, 2e8),
        ("grid_2_nodes_50mbit", 2, 5e7),
        ("powersgd_2_nodes_50mbit", 2, 5e7),
    ],
)
def test_predicted_step_times_are_those_of_the_lab(file, nodes, rate):
    """Where the link decides; what it takes to compute is the lab's step without communication."""
    work = Workload(lab_shapes(), measured(file, "noop")["step_seconds"]["median"])
    found = predict(law_of("ddp"), FREE, work, of_nodes(nodes, Link.of_rate(rate, 3e-4)))
    assert 0.85 <= found.step_s / measured(file, "ddp")["step_seconds"]["median"] <= 1.15


def test_a_law_gives_what_the_scheme_sends_on_other_ranks_and_shapes():
    sides = [torch.Size((384, 640)), torch.Size((256, 1024)), torch.Size((300,))]
    shapes = {str(i): side for i, side in enumerate(sides)}
    for name in ("int8", "powersgd", "sign"):

        def rank(comm, name=name):
            return run_steps(make_scheme(name), gradients_like(shapes, comm.rank), comm)

        # Ranks serve parts of unequal size: the law is of their mean.
        counted = [ran.payload_bytes for ran in run_threads(rank, 8)]
        sent = law_of(name).sent(shapes_of(sides), 8)
        assert sum(one.payload for one in sent) == pytest.approx(sum(counted) / 8, rel=0.02)


@pytest.mark.parametrize("name", ["sign", "topk", "powersgd", "onebit_adam", "dgc", "demo"])
def test_a_later_step_is_like_the_second(name):
    """Times are taken of one, and bytes of the other."""
    gradients = gradients_like({"a": torch.Size((64, 96)), "b": torch.Size((70, 50))}, seed=0)
    second, later = (
        run_steps(make_scheme(name, MEASURED_WITH.get(name, {})), gradients, MirrorComm(2), steps)
        for steps in (2, 6)
    )
    assert later.payload_bytes == second.payload_bytes
    assert later.rounds == second.rounds
    assert later.state_bytes == second.state_bytes


def test_a_scheme_with_a_coordinator_has_no_law():
    with pytest.raises(NoLawError, match="equal ranks"):
        law_of("dbw")


def test_collectives_take_the_bytes_that_are_counted():
    for ranks in (2, 4, 7):
        found = hops("all_reduce", "", 7_000_000, of_nodes(ranks))
        assert found.wire_bytes == pytest.approx(all_reduce_wire_bytes(7_000_000, ranks), abs=1)
        assert found.link_bytes == found.wire_bytes
    assert hops("all_reduce", "", 1000, of_nodes(1)).seconds == 0


def test_a_ring_crosses_a_node_once_however_many_ranks_it_has():
    one, four = of_nodes(8), of_nodes(2, ranks_per_node=4)
    assert (
        hops("all_reduce", "", 1e6, one).link_bytes == hops("all_reduce", "", 1e6, four).link_bytes
    )
    # Pairs share the link: four ranks send, four in seven of the others are elsewhere.
    assert hops("exchange", "", 1e6, four).link_bytes == pytest.approx(4e6 * 4 / 7)


def test_buckets_hold_everything():
    for size in (1000.0, 2e6, 3e8):
        assert sum(bucket_shares(size)) == pytest.approx(1)


def test_units_hide_what_a_single_bucket_cannot():
    """A model that fits a bucket of DDP comes in parts where it is sharded."""
    work, cluster = Workload(shapes_of([(512, 512)] * 8), 0.5), of_nodes(4, Link(1e8, 0.0))
    one, four = (
        predict(law_of("ddp"), FREE, replace(work, units=units), cluster) for units in (1, 4)
    )
    assert one.exposed_s == pytest.approx(one.sync_s)  # all comes when backward ends
    assert four.exposed_s == pytest.approx(four.sync_s / 4)
    assert four.link_bytes == one.link_bytes


def test_nothing_is_exposed_on_an_endless_link_and_all_of_it_on_a_slow_one():
    work = Workload(lab_shapes(), 1.0)
    fast = predict(law_of("ddp"), FREE, work, of_nodes(4, Link(1e15, 0.0)))
    slow = predict(law_of("ddp"), FREE, work, of_nodes(4, Link(1e5, 0.0)))
    assert fast.step_s == pytest.approx(1.0, rel=1e-3)
    assert slow.exposed_s == pytest.approx(slow.sync_s, rel=0.01)
    assert slow.low_s < slow.step_s < slow.high_s


def test_factors_are_of_their_collective_alone():
    slow = replace(of_nodes(4), factors={"all_reduce": (3.0, 2.0)})
    plain, found = (hops("all_reduce", "", 1e6, cluster) for cluster in (of_nodes(4), slow))
    assert found.messages == 3 * plain.messages
    assert found.link_bytes == 2 * plain.link_bytes
    assert found.wire_bytes == plain.wire_bytes  # what is counted stays
    assert hops("all_gather", "", 1e6, slow) == hops("all_gather", "", 1e6, of_nodes(4))


def test_sending_takes_the_processor_where_none_is_spare():
    work, endless = Workload(lab_shapes(), 1.0), of_nodes(4, Link(1e15, 0.0))
    busy = replace(endless, send_cpu_s_per_byte=1e-9)
    found = predict(law_of("ddp"), FREE, work, busy)
    assert found.step_s == pytest.approx(1.0 + 1e-9 * found.wire_bytes, rel=1e-3)


def test_the_smallest_round_reaches_the_utilisation_and_half_of_it_does_not():
    work, cluster = Workload(transformer(10_000_000), 0.1), of_nodes(4)

    def predicted(every):
        plan = round_of("diloco", every)
        return plan and predict(law_of("diloco"), FREE, work, cluster, plan)

    found = smallest_sync_every(0.9, predicted)
    assert found.utilisation >= 0.9
    assert predicted(found.sync_every // 2).utilisation < 0.9
    with pytest.raises(ValueError, match=r"utilisation=1 must be > 0 and < 1"):
        smallest_sync_every(1, predicted)


def test_batches_that_are_evaluated_twice_take_twice_the_time():
    """Learnt from the optimizer's step, which calls its closure."""
    endless = of_nodes(4, Link(1e15, 0.0))
    for name, times in (("dfedsam_mgs", 2), ("gossip", 1)):
        found = predict(law_of(name), FREE, Workload(lab_shapes(), 0.5), endless, round_of(name, 4))
        assert found.step_s == pytest.approx(times * 0.5, rel=1e-6)
        assert found.utilisation == pytest.approx(1 / times, rel=1e-6)


def test_what_a_round_takes_is_told_from_what_each_of_its_steps_takes(monkeypatch):
    """Of a clock that is exact."""

    def seconds(name, knobs, device, world_size, number):
        return 5.0 + 2.0 * world_size + 0.25 * number

    monkeypatch.setattr(pace, "_round", seconds)
    found = pace.pace_of("gossip", {"wire_dtype": "bf16"})
    numel = pace.MATRICES * pace.SIDE**2
    for number in (1, 16, 24):
        assert found.seconds(numel, 4, number) == pytest.approx(5 + 2 * 4 + 0.25 * number)
    # What grows faster than the ranks is met where it was timed.
    monkeypatch.setattr(pace, "_round", lambda *told: 1.0 * told[3] ** 2)
    steep = pace.pace_of("push_sum", {"wire_dtype": "bf16"})
    assert [steep.seconds(numel, world, 16) for world in (1, 2, 8)] == pytest.approx([0, 4, 64])
    work, cluster = Workload(lab_shapes(), 0.5), of_nodes(4, Link(1e15, 0.0))
    of_every = [
        predict(law_of("gossip"), Pace(1e-9, 0, 2e-9), work, cluster, round_of("gossip", every))
        for every in (1, 8)
    ]
    numel = lab_shapes().numel
    assert [one.compression_s for one in of_every] == pytest.approx([3e-9 * numel, 17e-9 * numel])


def test_transformers_have_the_size_that_was_asked_for():
    for size in (10**6, 7 * 10**9, 107 * 10**9):
        assert transformer(size).numel == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    ("parse", "good", "value", "bad"),
    [
        (parse_bandwidth, "1Gbit/s", 1e9, "1gbps"),
        (parse_count, "7B", 7e9, "7x"),
        (parse_bytes, "80GB", 80e9, "80gib"),
    ],
)
def test_quantities(parse, good, value, bad):
    assert parse(good, "field") == value
    for wrong in (bad, "", "-1", "0" + good[-3:].lstrip("0123456789")):
        with pytest.raises(ValueError, match="field: got"):
            parse(wrong, "field")
    assert parse_seconds("20ms", "delay") == pytest.approx(0.02)


def scenario(**fields):
    base = {
        "nodes": 16,
        "model_size": "10M",
        "compute": {"seconds": 0.5, "jitter": 0.0},
        "methods": [{"scheme": "diloco", "sync_every": 20}],
        "rounds": 10,
    }
    return validate(Scenario, base | fields, "here")


def test_a_simulation_without_chance_is_the_prediction():
    given = scenario(methods=[{"scheme": "ddp"}, {"scheme": "diloco", "sync_every": 20}])
    work = given.work
    for one in simulate(given):
        plan = round_of("diloco", 20) if one.scheme == "diloco" else None
        found = predict(law_of(one.scheme), FREE, work, given.cluster, plan)
        assert one.step_s == pytest.approx(found.step_s, rel=1e-6)
        assert one.idle_share == pytest.approx(1 - found.utilisation, rel=1e-6)


@pytest.mark.parametrize("name", ["int8", "diloco", "co2", "dfedsam_mgs"])
def test_a_simulation_is_the_prediction_on_any_stage(name):
    """Also where arithmetic and sending take the processors on which the model is computed."""
    every = None if name == "int8" else 20
    given = scenario(methods=[{"scheme": name, "sync_every": every}])
    busy = replace(of_nodes(4, Link(2e6, 1e-3)), send_cpu_s_per_byte=1e-8)
    stage, own = Stage(Workload(lab_shapes(), 0.5), busy), Pace(2e-9, 1e-10, 3e-10)
    (one,) = simulate(given, lambda scheme: own, stage)
    plan = None if every is None else round_of(name, every)
    found = predict(law_of(name), own, stage.work, busy, plan)
    assert one.step_s == pytest.approx(found.step_s, rel=1e-6)
    assert one.idle_share == pytest.approx(1 - found.utilisation, rel=1e-6)


def test_settings_are_the_schemes_and_a_name_tells_methods_apart():
    methods = [
        {"scheme": "diloco", "sync_every": 20},
        {"scheme": "diloco", "sync_every": 20, "name": "eight", "settings": {"reducer": "int8"}},
    ]
    dense, eight = simulate(scenario(methods=methods))
    assert (dense.scheme, eight.scheme) == ("diloco", "eight")
    assert eight.bytes_per_step == pytest.approx(dense.bytes_per_step / 4, rel=0.05)


def test_fragments_are_the_parts_of_a_round():
    four, eight = (round_of("streaming_diloco", 16, f'{{"fragments": {n}}}') for n in (4, 8))
    assert (len(four.parts), len(eight.parts)) == (4, 8)
    assert sum(share for share, _ in eight.parts) == pytest.approx(1)
    law, shapes = law_of("streaming_diloco", settings='{"fragments": 8}'), lab_shapes()
    sent = sum(one.payload for one in law.sent(shapes, 4))
    assert sent == pytest.approx(4 * shapes.numel, rel=0.01)


def test_pairs_do_not_wait_for_the_slowest_of_all():
    slow = {
        "seconds": 0.5,
        "jitter": 0.1,
        "stragglers": {"enter": 0.05, "leave": 0.7, "slowdown": 5},
    }
    methods = [{"scheme": "noloco", "sync_every": 20}, {"scheme": "diloco", "sync_every": 20}]
    pairs, everybody = simulate(scenario(nodes=256, compute=slow, methods=methods))
    assert pairs.idle_share < everybody.idle_share
    again = simulate(scenario(nodes=256, compute=slow, methods=methods))
    assert again == [pairs, everybody]  # equal seeds


def test_failures_cost_time():
    fault = {"mean_seconds": 500, "restart_seconds": 30}
    whole, broken = simulate(scenario())[0], simulate(scenario(failures=fault))[0]
    assert broken.seconds > whole.seconds
    assert broken.goodput < whole.goodput


def test_asynchronous_workers_queue_for_their_server():
    pytest.importorskip("simpy")
    methods = [{"scheme": "async_local_sgd", "sync_every": 20}]
    few, many = (simulate(scenario(nodes=n, methods=methods))[0] for n in (2, 64))
    assert few.idle_share < many.idle_share
    # The server's port carries every push: that bounds the time.
    port = 4.0 * scenario().work.shapes.numel / scenario().cluster.link.bytes_per_second
    assert many.seconds >= 64 * 10 * port


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": 0}, "nodes"),
        ({"link": {"rate": "1gbps"}}, "not a number and one of the units"),
        ({"model_size": "10"}, "model_size=10 must be >= 100000"),
        ({"workers": 3}, "workers"),
    ],
)
def test_impossible_scenarios_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        scenario(**fields)


def test_a_model_that_does_not_fit_is_refused(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    file.write_text(
        "{nodes: 2, model_size: 7B, memory_gb: 80, compute: {seconds: 1}, methods: [{scheme: ddp}]}"
    )
    assert cli.main(["simulate", str(file)]) == 2
    assert "more than memory_gb=80" in capsys.readouterr().err


def test_committed_scenarios_are_valid():
    files = sorted((ROOT / "configs" / "scenarios").glob("*.yaml"))
    assert files
    for file in files:
        load_scenario(file)


def test_simulate_prints_a_table(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    file.write_text(
        "{nodes: 1024, model_size: 10M, rounds: 1000, compute: {seconds: 1}, methods: [{scheme: ddp}]}"
    )
    assert cli.main(["simulate", str(file)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "scheme"
    assert row.split()[0] == "ddp"


def test_simulate_draws_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "s.yaml"
    file.write_text(
        "{nodes: 4, model_size: 10M, rounds: 5, compute: {seconds: 1}, methods: [{scheme: ddp}]}"
    )
    picture = tmp_path / "s.png"
    assert cli.main(["simulate", str(file), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["simulate", str(file), "--plot", str(tmp_path / "s.nothing")]) == 2
    assert "give a file such as out.png" in capsys.readouterr().err
