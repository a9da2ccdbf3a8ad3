"""Advice is what the cost model says, and moves one way with the link."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commkit import cli
from commkit.advise import Question, Row, advise, choose
from commkit.config import ConfigError
from commkit.cost.cluster import TCP_GOODPUT
from commkit.cost.predict import Prediction, predict
from commkit.cost.rounds import round_of
from commkit.cost.traffic import law_of
from tests.probe.found import PACES, probe_of

RATES = [10.0**k for k in range(-1, 8)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "probe.json"
    path.write_text(probe_of().model_dump_json())
    return path


def test_predictions_are_those_of_the_cost_model():
    probe = probe_of()
    question = Question(probe)
    for row in advise(question).rows:
        if row.kind in ("sharded", "coordinator"):
            continue  # see tests/cost
        plan = None
        if row.kind == "local updates":
            plan = round_of(row.name, row.prediction.sync_every)
        wanted = predict(
            law_of(row.name), probe.pace(row.name), question.work, question.cluster, plan
        )
        assert row.prediction == wanted


def test_a_faster_link_never_asks_for_more_compression():
    rungs = [advise(Question(probe_of(rate))).choice.rung for rate in RATES]
    assert rungs == sorted(rungs, reverse=True)
    assert rungs[0] != rungs[-1]


def test_with_an_endless_link_there_is_nothing_to_recommend():
    found = advise(Question(probe_of(1e12, latency_s=0.0)))
    assert found.is_none
    assert found.reason.startswith("none: plain DDP")


def test_local_updates_take_the_fewest_steps_that_reach_the_utilisation():
    question = Question(probe_of(10.0), schemes=["diloco"], utilisation=0.8)
    found = advise(question).choice.prediction
    assert found.utilisation >= 0.8
    plan = round_of("diloco", found.sync_every // 2)
    shorter = predict(
        law_of("diloco"), question.probe.pace("diloco"), question.work, question.cluster, plan
    )
    assert shorter.utilisation < 0.8


numbers = st.floats(1e-3, 1e3)
KINDS = ("every step", "optimizer", "local updates")


def row(name, kind, fixed, wire, rate, fits=True):
    step = 1.0 + fixed + wire / rate
    found = Prediction(name, 1, step, 0.9 * step, 1.1 * step, 1.0, step - 1, 0, 0, wire, 0, 0, 0)
    return Row(found, kind, fits, found.utilisation >= 0.9)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), numbers, st.floats(0, 900)), min_size=1, max_size=6),
    st.lists(numbers, min_size=2, max_size=6),
)
def test_the_choice_moves_one_way_once_anything_reaches_the_utilisation(schemes, rates):
    """And it is within the utilisation's reach of the fastest."""

    def rows(rate):
        others = [row(f"s{i}", kind, f, w, rate) for i, (kind, f, w) in enumerate(schemes)]
        return [row("ddp", "plain", 0.0, 1000.0, rate), *others]

    rungs = []
    for rate in sorted(rates):
        found = rows(rate)
        recommended, _ = choose(found, 0.9)
        chosen = next(one for one in found if one.name == recommended[0])
        fastest = min(one.prediction.step_s for one in found)
        assert chosen.prediction.step_s <= 1.12 * fastest
        if any(one.reaches for one in found):
            rungs.append(chosen.rung)
    assert rungs == sorted(rungs, reverse=True)


def test_of_schemes_that_are_as_fast_the_gentlest_is_chosen():
    ddp = row("ddp", "plain", 0.0, 1000.0, 1.0)
    hook = row("topk", "every step", 0.211, 1.0, 1.0)
    optimizer = row("dgc", "optimizer", 0.2, 1.0, 1.0)
    assert choose([optimizer, hook, ddp], 0.9)[0][0] == "topk"
    slower = row("topk", "every step", 0.25, 1.0, 1.0)
    assert choose([optimizer, slower, ddp], 0.9)[0][0] == "dgc"


def test_what_does_not_fit_is_never_recommended():
    small = row("sign", "every step", 0.0, 1.0, 1.0, fits=False)
    large = row("int8", "every step", 0.0, 1.5, 1.0)
    assert choose([small, large], 0.5)[0] == ("int8",)
    with pytest.raises(ConfigError, match="memory: no scheme's state fits"):
        choose([small], 0.5)


def test_a_larger_model_on_more_nodes(file, capsys):
    words = ["--model-size", "7B", "--nodes", "64", "--link", "1gbit", "--memory", "192GB"]
    words += ["--step-seconds", "4", "--longest", "4096", "--schemes", "ddp,int8,diloco", "--json"]
    assert cli.main(["advise", "--probe", str(file), *words]) == 0
    told = json.loads(capsys.readouterr().out)
    by_name = {one["scheme"]: one for one in told["rows"]}
    # 28 GB, twice over a link of 0.12 GB/s; 126 messages for each 25 MiB; less what backward hides
    wanted = (
        2 * 28e9 * 63 / 64 / (1e9 / 8 * TCP_GOODPUT) + 28e9 / (25 * 2**20) * 126 * 2e-4 - 0.6 * 4
    )
    assert by_name["ddp"]["exposed_s"] == pytest.approx(wanted, rel=0.01)
    assert told["recommended"][0] == "diloco"
    assert by_name["diloco"]["sync_every"] > 100
    assert cli.main(["advise", "--probe", str(file)]) == 0
    assert "Recommended:" in capsys.readouterr().out


def sharded_advice(link_mbit):
    paces = {**PACES, "qsdp": 1e-11, "zeropp": 1e-11}
    probe = probe_of(link_mbit, nodes=16, paces=paces)
    return advise(Question(probe, model_size="7B", memory="40GB", step_seconds=4.0))


def test_a_model_that_no_rank_has_memory_for_is_sharded():
    fast, middling, slow = (sharded_advice(rate) for rate in (1e6, 1e5, 100.0))
    assert fast.recommended == ("fsdp",)
    assert fast.is_none
    assert fast.reason.startswith("none: plain FSDP")
    assert middling.recommended[0] == "qsdp"
    assert slow.choice.kind == "sharded"
    assert "the fastest" in slow.reason
    assert not next(row for row in fast.rows if row.name == "ddp").fits


def test_what_is_not_advised_is_told(file, capsys):
    assert cli.main(["advise", "--probe", str(file)]) == 0
    told = capsys.readouterr().out
    for name in ("hsdp", "three_level", "async_local_sgd", "dbw"):
        assert f"Not advised: {name}: " in told
    rows = advise(Question(probe_of())).rows
    assert {"fsdp", "backup", "gradient_coding"} < {row.name for row in rows}
    two = advise(Question(probe_of(nodes=2)))
    assert "wants 3 ranks" in two.left_out["backup"]


def test_help_says_what_every_option_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["advise", "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in ("--model-size", "Nominal rate of a node", "Steps per round", "with commas"):
        assert text in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "nodes=0 must be >= 1"),
        (["--link", "1gbps"], "link: got '1gbps'"),
        (["--latency", "soon"], "latency: got 'soon'"),
        (
            ["--model-size", "70B"],
            r"fsdp needs least, 2[89]\d\.\d GB per rank .* more than 80.0 GB; raise --shards",
        ),
        (["--schemes", "dbw"], "dbw is not advised: how many it awaits"),
        (["--schemes", "backup", "--nodes", "2"], "wants 3 ranks"),
        (["--model-size", "many"], "model_size: got 'many'"),
        (["--schemes", "topk"], "'topk' was not timed"),
        (["--utilisation", "1"], "utilisation=1 must be > 0 and < 1"),
        (["--shards", "2"], "shards=2 must divide ranks_per_node=1"),
        (["--step-seconds", "0"], "step_seconds=0 must be > 0"),
        (["--ranks-per-node", "0"], "ranks_per_node=0 must be >= 1"),
    ],
)
def test_impossible_questions_are_refused(words, message, file, capsys):
    assert cli.main(["advise", "--probe", str(file), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_probe_of_one_node_needs_a_link_for_more():
    alone = probe_of(nodes=1, link=None, pairs=[])
    with pytest.raises(ConfigError, match="saw no two nodes"):
        Question(alone, nodes=2)
    with pytest.raises(ConfigError, match="latency: the probe saw no two nodes"):
        Question(alone, nodes=2, link="1gbit")
    assert advise(Question(alone, nodes=1)).is_none
