import json
import re

import pytest

from launch.compare.analyse import compare
from launch.compare.report import Setting, markdown, table, write
from tests.compare.runs import failed, finished

SETTING = Setting("2 nodes, links of 100mbit", "100mbit", 2, 1, 10, 1, 1, ("model.width=32",))


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_all_files_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    outcomes = [finished(tmp_path, "ddp", tx=(1066, 1066)), failed(tmp_path, "bad", "boom: x")]
    text = write(compare(outcomes), SETTING, tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "compare.json",
        "compare.md",
        "loss.png",
        "time.png",
    }
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "compare.md").read_text().startswith(text)
    assert str(tmp_path) not in (out / "compare.json").read_text()
    data = json.loads((out / "compare.json").read_text())
    ddp, bad = data["configurations"]
    assert ddp["step_to_ddp"] == {"median": 1.0, "low": 1.0, "high": 1.0, "count": 1}
    assert ddp["bytes_reconcile"] is True
    assert (bad["finished"], bad["errors"]) == (0, ["boom: x"])
    assert bad["runs"][0]["status"] == "failed"
    assert data["setting"]["overrides"] == ["model.width=32"]
    assert {"torch", "python", "cores"} <= set(data["machine"])


def test_table_has_ratios_and_dashes_for_the_unknown(tmp_path):
    outcomes = [
        finished(tmp_path, "ddp", step_seconds=0.4),
        finished(tmp_path, "torch:fp16", step_seconds=0.1, wire_bytes=None),
        failed(tmp_path, "bad", "boom"),
    ]
    found = cells(table(compare(outcomes)))
    assert found["torch:fp16"]["step / ddp"] == "0.250"
    assert found["torch:fp16"]["wire [MB/step]"] == "-"
    assert found["ddp"]["step [ms]"] == "400.0"
    assert found["bad"]["runs"] == "0/1"
    assert found["bad"]["step / ddp"] == "-"
    assert "accuracy" not in found["ddp"]  # nobody has one


def test_failures_are_told_with_their_reason(tmp_path):
    outcomes = [finished(tmp_path, "ddp"), failed(tmp_path, "bad", "IndexError: boom")]
    text = markdown(compare(outcomes), SETTING)
    assert "## Did not finish\n\n- `bad`: 1 of 1 runs: IndexError: boom" in text


@pytest.mark.parametrize(
    ("sent", "message"),
    [(1066, r"Bytes reconcile: .* within 5% of wire_bytes"), (1200, r"more than 5%.*`ddp` 1\.134")],
)
def test_reconciliation_is_told(tmp_path, sent, message):
    rows = compare([finished(tmp_path, "ddp", tx=(sent, sent))])
    assert re.search(message, markdown(rows, SETTING))


def test_loopback_and_interruption_are_told(tmp_path):
    rows = compare([finished(tmp_path, "ddp")])
    setting = Setting("2 nodes on loopback", "none", 2, 1, 10, 1, 1, (), interrupted=True)
    text = markdown(rows, setting)
    assert "No link was emulated" in text
    assert "**Interrupted**" in text


def test_nothing_finished_is_still_a_report(tmp_path):
    text = write(compare([failed(tmp_path, "ddp", "boom")]), SETTING, tmp_path / "out")
    assert "boom" in text
    assert not (tmp_path / "out" / "loss.png").exists()
