import json
import math
import re
import struct
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commkit.metrics import (
    JsonLinesSink,
    OpenTelemetrySink,
    TensorBoardSink,
    WandbSink,
    finite,
)

RECORDS = [
    {
        "step": step,
        "loss": 1.0 / step,
        "step_seconds": 0.5 * step,
        "wire_bytes": 100 * step,
        "rounds": 2,
        "residual_norm": None,
        "nonfinite": step == 2,
    }
    for step in (1, 2, 3)
]


def write_all(sink):
    for record in RECORDS:
        sink.write(record)
    sink.close()


def test_json_lines_give_the_records_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_all(JsonLinesSink(path))
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS


def test_json_lines_are_json_whatever_the_loss(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path)
    sink.write({"step": 1, "loss": math.nan, "norm": -math.inf, "lr": 0.5})
    sink.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "norm": None,
        "lr": 0.5,
    }


def test_finite_leaves_all_else_alone():
    assert finite({"a": 1, "b": "x", "c": None, "d": 2.5, "e": True}) == {
        "a": 1,
        "b": "x",
        "c": None,
        "d": 2.5,
        "e": True,
    }


def test_tensorboard_has_every_number_at_its_step(tmp_path):
    write_all(TensorBoardSink(tmp_path))
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    names = {"loss", "step_seconds", "wire_bytes", "rounds", "nonfinite"}
    assert set(board.Tags()["scalars"]) == names
    for name in names:
        told = [(event.step, event.value) for event in board.Scalars(name)]
        assert told == [(r["step"], pytest.approx(float(r[name]))) for r in RECORDS]


def stored(path):
    """The messages of W&B's file of an offline run: a header of 7 bytes, then LevelDB's log format."""
    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # filling up to the next block
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def history(directory, starts):
    """The rows that were logged in ``starts`` starts of a run, in their order. W&B's own process writes them, and may
    not be done when the run is."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 20
    while True:
        records = [
            wandb_internal_pb2.Record.FromString(message)
            for path in sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
            for message in stored(path)
        ]
        ended = sum(record.WhichOneof("record_type") == "exit" for record in records)
        if ended == starts:
            break
        assert time.monotonic() < deadline, f"{ended} of {starts} ended"
        time.sleep(0.05)
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_wandb_logs_every_number_and_goes_on_after_a_resumption(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    write_all(WandbSink(tmp_path, {"lr": 0.1}, project="tests", mode="offline"))
    first = (tmp_path / "wandb" / "run-id.txt").read_text()
    rows = history(tmp_path, starts=1)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, record in zip(rows, RECORDS, strict=True):
        told = {name: row[name] for name in record if name != "residual_norm"}
        assert told == {n: record[n] for n in told}
        assert "residual_norm" not in row
    again = WandbSink(tmp_path, project="tests", mode="offline")
    again.write({"step": 2, "loss": 9.0})  # a resumed run goes back to its checkpoint
    again.close()
    assert (tmp_path / "wandb" / "run-id.txt").read_text() == first
    assert {"step": 2, "loss": 9.0}.items() <= history(tmp_path, starts=2)[-1].items()


def points(reader):
    """Data points by instrument: (unit, [point, ...])."""
    data = reader.get_metrics_data()
    return {
        metric.name: (metric.unit, metric.data.data_points)
        for of_resource in data.resource_metrics
        for scope in of_resource.scope_metrics
        for metric in scope.metrics
    }


def test_opentelemetry_adds_up_bytes_and_keeps_the_distribution_of_seconds():
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    write_all(OpenTelemetrySink(provider, {"commkit.scheme": "powersgd"}))
    told = points(reader)
    assert set(told) == {
        f"commkit.{n}"
        for n in ("steps", "loss", "step_seconds", "wire_bytes", "rounds", "nonfinite")
    }
    unit, (point,) = told["commkit.wire_bytes"]
    assert (unit, point.value) == ("By", 600)
    assert dict(point.attributes) == {"commkit.scheme": "powersgd"}
    assert told["commkit.steps"][1][0].value == 3
    assert told["commkit.nonfinite"][1][0].value == 1
    assert told["commkit.rounds"][1][0].value == 6
    assert told["commkit.loss"][1][0].value == pytest.approx(1 / 3)  # the last
    unit, (seconds,) = told["commkit.step_seconds"]
    assert (unit, seconds.count, seconds.sum) == ("s", 3, 3.0)
    assert (seconds.min, seconds.max) == (0.5, 1.5)
    provider.shutdown()


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("torch.utils.tensorboard", TensorBoardSink, "tensorboard"),
        ("wandb", WandbSink, "wandb"),
        ("opentelemetry.sdk", lambda path: OpenTelemetrySink(), "opentelemetry"),
    ],
)
def test_a_missing_package_is_an_error_that_says_what_to_install(
    tmp_path, monkeypatch, module, make, extra
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"commkit[{extra}]")):
        make(tmp_path)
