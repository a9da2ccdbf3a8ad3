import json

import pytest

from commkit.metrics import finite
from launch.report import plot, read_run, table
from launch.rundir import (
    METRIC_KEYS,
    RunDirectory,
    aggregate,
    read_records,
    write_atomically,
)


def record(step, **values):
    return {**dict.fromkeys(METRIC_KEYS, 0), "step": step, "loss": 1.0 / step, **values}


def write_records(path, records, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def finished_run(directory, **summary):
    directory.mkdir()
    run = RunDirectory(directory)
    write_records(run.metrics, [record(s, wire_bytes=s * 1000) for s in (1, 2, 3)])
    run.write_summary({"val_loss": 2.5, **summary})
    return directory


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    write_records(tmp_path / "metrics", [record(1), record(2)], tail='{"step": 3, "lo')
    assert [r["step"] for r in read_records(tmp_path / "metrics")] == [1, 2]


def test_no_file_is_no_records(tmp_path):
    assert read_records(tmp_path / "metrics") == []


def test_resuming_keeps_exactly_the_records_up_to_the_checkpoint(tmp_path):
    run = RunDirectory(tmp_path)
    records = [record(step, loss=0.1 + 1 / 3**step) for step in range(1, 9)]
    write_records(run.metrics, records, tail='{"step"')
    write_records(run.validation, [{"step": s, "val_loss": 1.5} for s in (3, 6)])
    run.prepare({"seed": 0}, step=5)
    assert read_records(run.metrics) == records[:5]
    assert read_records(run.validation) == [{"step": 3, "val_loss": 1.5}]
    run.prepare({"seed": 0}, step=0)
    assert run.metrics.read_text() == ""


def test_a_reader_never_sees_half_a_file(tmp_path):
    write_atomically(tmp_path / "file", "old")
    with (tmp_path / "file").open() as reader:
        write_atomically(tmp_path / "file", "new")
        assert reader.read() == "old"
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_summary_adds_up_the_records():
    records = [
        record(s, loss=float(s), wire_bytes=10, payload_bytes=5, dense_bytes=100, step_seconds=s)
        for s in range(1, 16)
    ]
    summary = aggregate(records)
    assert summary["train_loss"] == sum(range(6, 16)) / 10
    assert summary["total_wire_bytes"] == 150
    assert summary["total_payload_bytes"] == 75
    assert summary["total_dense_bytes"] == 1500
    assert summary["median_step_seconds"] == 8


def test_summary_of_nothing_has_no_figures():
    assert aggregate([])["train_loss"] is None
    assert aggregate([])["median_step_seconds"] is None
    assert aggregate([])["total_wire_bytes"] == 0


def test_nan_and_inf_become_null():
    values = finite({"loss": float("nan"), "residual_norm": float("inf"), "lr": 0.5})
    assert values == {"loss": None, "residual_norm": None, "lr": 0.5}
    assert aggregate([record(1, loss=None)])["train_loss"] is None


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (5, 10, 100, 95):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoints / "step_000101.partial").mkdir()  # its run was killed
    run.prune_checkpoints()
    assert sorted(run.checkpoints.iterdir()) == [run.checkpoint(95), run.checkpoint(100)]


def test_checkpoints_are_not_overwritten(tmp_path):
    run = RunDirectory(tmp_path)
    run.refuse_to_overwrite()
    (run.checkpoints / "step_000005.partial").mkdir(parents=True)
    run.refuse_to_overwrite()
    run.checkpoint(5).mkdir()
    with pytest.raises(ValueError, match=r"--out: .* holds checkpoints .* --resume"):
        run.refuse_to_overwrite()


def test_two_runs_cannot_write_into_one_directory(tmp_path):
    first = RunDirectory(tmp_path)
    first.lock()
    with pytest.raises(ValueError, match=r"--out: .* is being written by another run"):
        RunDirectory(tmp_path).lock(patience_s=0.2)


def test_table_compares_with_the_first_run(tmp_path):
    plain, small = (read_run(finished_run(tmp_path / name)) for name in ("plain", "small"))
    small.summary["total_wire_bytes"] //= 4
    plain.summary["median_step_seconds"] = 0.2
    small.summary["median_step_seconds"] = 0.1
    header, rule, first, second = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table([plain, small]).splitlines()
    )
    assert len(header) == len(rule) == len(first) == len(second)
    row = dict(zip(header, second, strict=True))
    assert row["run"] == "small"
    assert row["bytes / plain"] == "0.250"
    assert row["step time / plain"] == "0.500"
    assert row["step time [ms]"] == "100.0"
    assert dict(zip(header, first, strict=True))["bytes / plain"] == "1.000"


def test_table_of_runs_without_figures_shows_dashes(tmp_path):
    run = read_run(finished_run(tmp_path / "run", val_loss=None))
    run.summary.update(train_loss=None, median_step_seconds=None, total_wire_bytes=0)
    assert "-" in table([run]).splitlines()[2].split()


def test_bytes_that_nobody_counted_are_dashes(tmp_path):
    """Torch's own hooks count none."""
    pytest.importorskip("matplotlib")
    run = read_run(finished_run(tmp_path / "run"))
    run.summary["total_wire_bytes"] = None
    for line in run.records:
        line["wire_bytes"] = None
    counted = read_run(finished_run(tmp_path / "counted"))
    header, _, _, cells = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table([counted, run]).splitlines()
    )
    row = dict(zip(header, cells, strict=True))
    for column in ("MB on the wire per step", "MB on the wire in all", "bytes / counted"):
        assert row[column] == "-"
    plot([counted, run], tmp_path / "loss.png")


def test_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plot([read_run(finished_run(tmp_path / "run"))], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"run: .* has no summary\.json.*--resume"):
        read_run(tmp_path)
