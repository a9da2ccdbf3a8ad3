"""What a probe finds is what is there."""

import itertools
import json

import pytest
import torch
from torch import nn

from commkit.config import ConfigError
from commkit.probe import Extent, ProbeError, Subject, fingerprint, load_probe, measure
from commkit.probe.links import meetings
from commkit.probe.report import Probe
from commkit.probe.sweep import sweep
from commkit.sim.mirror import MirrorComm
from tests.harness import run_ranks
from tests.netlab.conftest import lab_name, make_lab, needs_namespaces  # noqa: F401
from tests.probe.found import probe_of

CPU = torch.device("cpu")
SCHEMES = ("ddp", "sign")


def tiny():
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))


def probed(rank, world_size):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(8, 64)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    subject = Subject(model, lambda wrapped: wrapped(x).square().mean() / 2, step, micro_batches=2)
    extent = Extent(message_s=1e-3, repeats=2, steps=3, schemes=SCHEMES)
    return measure(subject, extent, ranks_per_node=1).model_dump_json()


@pytest.fixture(scope="module")
def of_two_ranks():
    return [Probe.model_validate_json(text) for text in run_ranks(probed, 2)]


def test_ranks_agree_and_what_is_written_is_read_again(of_two_ranks, tmp_path):
    first, second = of_two_ranks
    assert first == second
    file = tmp_path / "probe.json"
    file.write_text(first.model_dump_json())
    assert load_probe(file) == first


def test_it_knows_the_model_and_the_ranks(of_two_ranks):
    probe = of_two_ranks[0]
    assert probe.model.shapes.numel == sum(p.numel() for p in tiny().parameters())
    probe.require_model(tiny())
    probe.require_ranks(2)
    other = nn.Linear(64, 256)
    with pytest.raises(ProbeError, match=r"of a model of 33,088 parameters .* this one has 16,640"):
        probe.require_model(other)
    with pytest.raises(ProbeError, match="it is of 2 ranks, this run has 3"):
        probe.require_ranks(3)


def test_parts_of_a_step_are_no_more_than_the_step(of_two_ranks):
    c = of_two_ranks[0].compute
    assert 0 < c.head_room_s <= c.backward_s < c.step_s
    assert c.forward_s + c.optimizer_s < c.step_s


def test_every_collective_and_scheme_is_there(of_two_ranks):
    probe = of_two_ranks[0]
    assert len({one.op for one in probe.collectives}) == 5
    assert all(0 < one.bytes_per_second for one in probe.collectives)
    assert [one.scheme for one in probe.compression] == list(SCHEMES)
    assert probe.pace("sign").seconds(10**6, 2) > probe.pace("ddp").seconds(10**6, 2)
    with pytest.raises(ProbeError, match="--schemes topk"):
        probe.pace("topk")
    assert [(p.first, p.second, p.inside_node) for p in probe.pairs] == [(0, 1, False)]
    assert probe.cluster.ranks_per_machine == 2  # nodes on one machine


@pytest.mark.parametrize("burst", [0, 20_000])
def test_a_sweep_finds_alpha_and_beta_also_behind_a_burst(burst):
    def message(size):
        return 3e-4 + max(0, size - burst) / 6e6

    found = sweep(message, MirrorComm(1), CPU, target_s=0.1, repeats=3)
    assert found.latency_s == pytest.approx(3e-4, rel=0.05)
    assert found.bytes_per_second == pytest.approx(6e6, rel=1e-6)
    assert found.spread == pytest.approx(0)


def test_messages_that_are_late_now_and_then_do_not_count():
    calls = itertools.count()

    def message(size):
        return 3e-4 + size / 6e6 + (0.02 if next(calls) % 3 == 0 else 0.0)

    found = sweep(message, MirrorComm(1), CPU, target_s=0.1, repeats=3)
    assert found.latency_s == pytest.approx(3e-4, rel=0.05)
    assert found.bytes_per_second == pytest.approx(6e6, rel=1e-6)
    assert found.spread > 0.01


@pytest.mark.parametrize("nodes", [1, 2, 3, 6])
def test_every_two_nodes_meet_once_and_nobody_twice_at_a_time(nodes):
    rounds = meetings([rank // 2 for rank in range(2 * nodes)])
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    met = [(a // 2, b // 2) for pairs in rounds for a, b in pairs]
    assert sorted(met) == sorted(
        [(n, n) for n in range(nodes)] + [(a, b) for b in range(nodes) for a in range(b)]
    )


def test_fingerprints_tell_names_and_shapes_apart():
    a, b = nn.Linear(3, 5), nn.Linear(5, 3)
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a) == fingerprint(nn.Linear(3, 5))
    frozen = nn.Linear(3, 5)
    frozen.bias.requires_grad_(False)
    assert fingerprint(frozen) != fingerprint(a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("compute"), r"compute is missing.*probe again"),
        (lambda d: d["link"].pop("latency_s"), r"link\.latency_s is missing"),
        (lambda d: d.update(version=7), "version=7 must be 1"),
        (lambda d: d.update(nodes=3), "nodes: unknown field"),
        (lambda d: d["compute"].update(step_s=0), r"compute\.step_s=0"),
    ],
)
def test_files_that_are_no_probe_are_refused(change, message, tmp_path):
    data = json.loads(probe_of().model_dump_json())
    change(data)
    file = tmp_path / "probe.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ProbeError, match=message):
        load_probe(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_probe(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps=0 must be >= 1"),
        ({"message_s": 0.0}, "message_s=0.0 must be > 0"),
        ({"schemes": ("powersgdd",)}, "unknown scheme 'powersgdd'"),
    ],
)
def test_impossible_extents_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Extent(**fields)


@pytest.mark.timeout(200)
def test_in_the_lab_bandwidths_are_the_set_rates(make_lab, launcher_words, tmp_path):  # noqa: F811
    out = tmp_path / "probe.json"
    with make_lab(3, ["200mbit", "200mbit", "50mbit"]) as lab:
        results = lab.torchrun("-m", launcher_words(out), deadline_s=150)
        assert [result.returncode for result in results] == [0, 0, 0], results
    probe = load_probe(out)
    assert (probe.cluster.nodes, probe.cluster.ranks_per_node) == (3, 1)
    assert probe.local is None
    found = {(p.first, p.second): p.bytes_per_second * 8e-6 for p in probe.pairs}
    assert found == pytest.approx({(0, 1): 200, (0, 2): 50, (1, 2): 50}, rel=0.1)
    assert probe.link.bytes_per_second * 8e-6 == min(found.values())  # the slowest


@pytest.fixture
def launcher_words(tmp_path):
    """Arguments of a probe of a model that takes milliseconds a step, on a text of a few kilobytes."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 2000)
    tiny = ["data.path=" + str(text), "model.layers=1", "model.width=32", "model.heads=2"]
    words = [word for one in tiny for word in ("--set", one)]
    return lambda out: [
        "commkit.cli",
        "probe",
        "--out",
        str(out),
        "--quick",
        "--schemes",
        "ddp",
        *words,
    ]
