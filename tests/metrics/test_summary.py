import math

import pytest
import torch

import commkit
from commkit.metrics import JsonLinesSink, Recorder, StepStats, summary
from launch.rundir import read_records
from tests.harness import run_ranks

RECORDS = [
    {
        "step_seconds": seconds,
        "exposed_comm_seconds": seconds / 4,
        "dense_bytes": 4000,
        "payload_bytes": 500,
        "wire_bytes": 1000,
        "nonfinite": seconds > 2,
    }
    for seconds in (1.0, 3.0, 2.0, 2.0)
]


def test_a_summary_adds_up_what_the_records_say():
    told = summary(RECORDS)
    assert told.steps == 4
    assert told.median_step_seconds == 2.0
    assert told.median_exposed_comm_seconds == 0.5
    assert told.exposed_share == 0.25
    assert (told.dense_bytes, told.payload_bytes, told.wire_bytes) == (16000, 2000, 4000)
    assert told.compression_ratio == 4.0
    assert told.nonfinite_steps == 1


def test_its_text_has_every_figure():
    text = str(summary(RECORDS))
    for words in ("4", "2 s", "25.0% of the time", "16 kB", "2 kB", "4 kB (dense / 4)"):
        assert words in text
    assert len(text.splitlines()) == 7
    assert "not measured" not in text


@pytest.mark.parametrize("key", list(RECORDS[0]))
def test_what_one_record_lacks_is_not_made_up(key):
    told = summary([*RECORDS, {**RECORDS[0], key: None}])
    nothing = {name for name, value in vars(told).items() if value is None}
    assert (
        nothing
        == {
            "step_seconds": {"median_step_seconds", "exposed_share"},
            "exposed_comm_seconds": {"median_exposed_comm_seconds", "exposed_share"},
            "dense_bytes": {"dense_bytes", "compression_ratio"},
            "payload_bytes": {"payload_bytes"},
            "wire_bytes": {"wire_bytes", "compression_ratio"},
            "nonfinite": {"nonfinite_steps"},
        }[key]
    )
    assert "not measured" in str(told)


def test_no_steps_are_no_division_by_zero():
    told = summary([])
    assert (told.steps, told.exposed_share, told.compression_ratio) == (0, None, None)
    assert str(told).splitlines()[0].split() == ["steps", "0"]


def recorded(rank, world_size, directory):
    """Training by an ordinary loop: what the handle said at each step, and the summary."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = commkit.attach(model, "int8", optimizer)
    sinks = [JsonLinesSink(directory / "metrics.jsonl")] if rank == 0 else []
    said = []
    with Recorder(handle, sinks, step=10) as recorder:
        for step in range(4):
            value = math.inf if step == 2 and rank == 1 else 1.0
            loss = model(torch.full((2, 64), value)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:  # the weights are not finite any more
                with torch.no_grad():
                    for p in model.parameters():
                        p.fill_(0.1)
            recorder.record(loss=loss.item())
            said.append(handle.last_step)
    handle.close()
    torch.distributed.barrier()
    return said, recorder.summary()


def test_a_recorder_writes_what_the_handle_says_and_sums_it_up(tmp_path):
    said, told = run_ranks(recorded, 2, tmp_path)[0]
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [11, 12, 13, 14]
    for record, stats in zip(records, said, strict=True):
        assert isinstance(stats, StepStats)
        assert record["wire_bytes"] == stats.wire_bytes > 0
        assert record["dense_bytes"] == 4 * (64 * 64 + 64)
        assert record["step_seconds"] >= record["exposed_comm_seconds"] > 0
        assert "loss" in record
    assert told.nonfinite_steps == 1
    assert [record["nonfinite"] for record in records] == [False, False, True, False]
    assert told.wire_bytes == sum(stats.wire_bytes for stats in said)
    assert 0 < told.exposed_share <= 1
