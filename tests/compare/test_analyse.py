import json

import pytest

from launch.compare.analyse import Spread, compare
from launch.compare.figures import read_figures
from launch.interface import HEADER_BYTES
from tests.compare.runs import failed, finished, trial


def rows_of(outcomes):
    return {row.name: row for row in compare(outcomes)}


def test_ratio_of_a_run_to_itself_is_one(tmp_path):
    outcomes = [finished(tmp_path, "ddp", seed=s, step_seconds=0.1 + s) for s in range(3)]
    row = rows_of(outcomes)["ddp"]
    assert row.to_ddp == Spread(1.0, 1.0, 1.0, 3)
    assert row.to_noop is None


def test_ratios_are_taken_inside_a_block(tmp_path):
    """The machine is twice as slow in the second block, of which a ratio must know nothing."""
    outcomes = []
    for round, slow in enumerate((1.0, 2.0)):
        for name, seconds in (("ddp", 0.4), ("sign", 0.1), ("noop", 0.05)):
            outcomes.append(finished(tmp_path, name, round=round, step_seconds=slow * seconds))
    sign = rows_of(outcomes)["sign"]
    assert (sign.to_ddp.low, sign.to_ddp.high) == pytest.approx((0.25, 0.25))
    assert sign.to_noop.median == pytest.approx(2.0)
    assert sign.middle("step_seconds") == pytest.approx(0.15)


def test_medians_and_spread_are_over_the_runs(tmp_path):
    times = (0.3, 0.1, 0.8)
    outcomes = [finished(tmp_path, "x", seed=s, step_seconds=t) for s, t in enumerate(times)]
    assert rows_of(outcomes)["x"].values["step_seconds"] == Spread(0.3, 0.1, 0.8, 3)


def test_split_adds_up_and_compression_is_reductions_without_collectives(tmp_path):
    figures = read_figures(finished(tmp_path, "x", step_seconds=1.0).trial.directory)
    assert figures.compute_seconds + figures.exposed_comm_seconds == pytest.approx(1.0)
    assert figures.compression_seconds == pytest.approx(0.3)


def test_first_steps_are_not_in_the_median(tmp_path):
    outcome = finished(tmp_path, "x", steps=5, step_seconds=1.0)
    path = outcome.trial.directory / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step_seconds": 1.0', '"step_seconds": 9.0', 1))
    assert read_figures(outcome.trial.directory).step_seconds == 1.0


def test_what_sends_in_rounds_is_compared_by_means(tmp_path):
    """No median step would show what every fourth one costs."""
    bound = finished(tmp_path, "noop", step_seconds=1.0, wire_bytes=0, steps=8)
    rounds = finished(tmp_path, "rounds", step_seconds=1.0, wire_bytes=0, steps=8)
    path = rounds.trial.directory / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records[3::4]:
        record |= {"step_seconds": 5.0, "wire_bytes": 100}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    row = rows_of([bound, rounds])["rounds"]
    steady = [record["step_seconds"] for record in records[1:]]
    assert row.middle("step_seconds") == pytest.approx(sum(steady) / len(steady))
    assert row.to_noop.median == pytest.approx(sum(steady) / len(steady))


def test_a_failing_run_is_reported_and_the_others_count(tmp_path):
    outcomes = [
        finished(tmp_path, "ddp"),
        failed(tmp_path, "bad", "ValueError: no"),
        failed(tmp_path, "bad", "ValueError: no", seed=1),
        finished(tmp_path, "some", step_seconds=0.2),
        failed(tmp_path, "some", "hung", seed=1),
    ]
    rows = rows_of(outcomes)
    assert (rows["bad"].finished, len(rows["bad"].runs)) == (0, 2)
    assert rows["bad"].errors == ["ValueError: no"]
    assert rows["bad"].to_ddp is None
    assert rows["bad"].curve == ()
    assert (rows["some"].finished, rows["some"].errors) == (1, ["hung"])
    assert rows["some"].to_ddp.median == pytest.approx(2.0)


def test_a_run_without_its_ddp_has_no_ratio(tmp_path):
    outcomes = [failed(tmp_path, "ddp", "x"), finished(tmp_path, "sign")]
    assert rows_of(outcomes)["sign"].to_ddp is None


def test_interfaces_are_reconciled_with_and_without_headers(tmp_path):
    sent = 1000 + 3 * HEADER_BYTES
    outcome = finished(tmp_path, "x", wire_bytes=1000, tx=(sent, sent), packets=3)
    figures = read_figures(outcome.trial.directory)
    assert figures.interface_ratio == pytest.approx(sent / 1000)
    assert figures.payload_ratio == pytest.approx(1.0)
    assert figures.tx_bytes == sent


def test_buffers_that_ddp_sends_are_expected(tmp_path):
    outcome = finished(tmp_path, "x", tx=(1500 + 66, 1000 + 66), buffer_bytes=500)
    assert read_figures(outcome.trial.directory).payload_ratio == pytest.approx(1.0)


def test_what_cannot_be_reconciled_is_not(tmp_path):
    uncounted = finished(tmp_path, "torch:ddp", wire_bytes=None, tx=(1000, 1000))
    nothing = finished(tmp_path, "noop", wire_bytes=0, tx=(10, 10))
    loopback = finished(tmp_path, "x")
    for outcome in (uncounted, nothing, loopback):
        assert read_figures(outcome.trial.directory).payload_ratio is None
    several = finished(tmp_path, "y", tx=(1000, 1000))
    assert read_figures(several.trial.directory, ranks_per_node=2).payload_ratio is None
    assert read_figures(uncounted.trial.directory).tx_bytes == 1000
    assert read_figures(uncounted.trial.directory).compression_seconds is None


def test_curve_has_bytes_and_training_time(tmp_path):
    outcome = finished(tmp_path, "x", step_seconds=0.5, wire_bytes=100, tx=(120, 140))
    points = read_figures(outcome.trial.directory).curve
    assert [(p.step, p.seconds, p.wire_bytes, p.tx_bytes) for p in points] == [
        (5, 2.5, 500, 650.0),
        (10, 5.0, 1000, 1300.0),
    ]


def test_rows_begin_with_ddp_and_end_with_the_bound(tmp_path):
    outcomes = [finished(tmp_path, name) for name in ("noop", "b", "ddp", "a")]
    assert [row.name for row in compare(outcomes)] == ["ddp", "b", "a", "noop"]


def test_unfinished_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"run: .*x-0-0.* did not finish"):
        read_figures(trial(tmp_path, "x").directory)
