"""The whole program, as users start it, on models of a few milliseconds a step."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.netlab import probe

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model.layers": "1",
    "model.heads": "2",
    "model.width": "32",
    "model.context": "16",
    "batch.per_rank": "2",
    "eval.batches": "2",
    "eval.batch_size": "2",
}


@pytest.fixture
def start(tmp_path):
    """Starts the program; what is still running at the end of the test is ended."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox, {i * i}\n" for i in range(500)))
    started = []

    def start(*words, **settings):
        changes = {"data.path": str(text), **TINY, **settings}
        command = [sys.executable, str(ROOT / "launch" / "compare" / "__main__.py"), *words]
        command += [word for item in changes.items() for word in ("--set", "=".join(item))]
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # the lab cleans up
            process.wait(timeout=30)
        process.stdout.close()


def compared(out):
    data = json.loads((out / "compare.json").read_text())
    return data, {row["name"]: row for row in data["configurations"]}


@pytest.mark.timeout(280)
def test_loopback_with_a_configuration_that_fails(start, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("scheme: {name: powersgd, rank: 0}")
    out = tmp_path / "out"
    options = ("--nodes", "2", "--link", "none", "--steps", "6", "--seeds", "1")
    process = start(str(broken), *options, "--out", str(out))
    output, _ = process.communicate(timeout=270)
    assert process.returncode == 1, output
    data, rows = compared(out)
    assert list(rows) == ["ddp", "broken", "noop"]
    assert data["setting"]["interrupted"] is False
    assert rows["broken"]["finished"] == 0
    assert rows["broken"]["errors"][0].startswith("error on rank 0: scheme: rank=0 must be >= 1")
    assert rows["ddp"]["step_to_ddp"]["median"] == 1.0
    assert rows["noop"]["step_to_ddp"]["count"] == 1
    assert [point["step"] for point in rows["noop"]["curve"]] == [1, 2, 3, 4, 5, 6]
    assert rows["noop"]["figures"]["wire_bytes"]["median"] == 0
    assert rows["ddp"]["runs"][0]["link_bytes"] == []
    text = (out / "compare.md").read_text()
    assert "No link was emulated" in text
    assert "`broken`: 1 of 1 runs: error on rank 0" in text
    assert text.splitlines()[4] in output  # the table is printed
    assert (out / "runs" / "broken-seed0-round0" / "logs" / "node0.log").is_file()
    assert not list(out.glob("runs/*/checkpoints"))


@pytest.mark.timeout(280)
@pytest.mark.skipif(probe().privilege != "full" or probe().problem is not None, reason="no labs")
def test_interrupted_in_the_lab(start, tmp_path):
    """The bytes of what finished reconcile, the report is partial, and nothing is left behind."""
    out = tmp_path / "out"
    options = ("--nodes", "2", "--link", "200mbit", "--steps", "30", "--seeds", "1")
    process = start(*options, "--out", str(out), **{"model.width": "128"})
    second = out / "runs" / "noop-seed0-round0" / "logs" / "node1.log"
    deadline = time.monotonic() + 200
    while not second.is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    name = "compare-" + "".join(chr(ord("a") + int(digit)) for digit in str(process.pid))
    assert name in subprocess.check_output(["ip", "netns", "list"], text=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert name not in subprocess.check_output(["ip", "netns", "list"], text=True)
    assert not processes_of(out)
    data, rows = compared(out)
    assert data["setting"]["interrupted"] is True
    assert "**Interrupted**" in (out / "compare.md").read_text()
    assert rows["noop"]["errors"] == ["interrupted"]
    assert rows["ddp"]["finished"] == 1
    assert rows["ddp"]["bytes_reconcile"] is True
    (run,) = rows["ddp"]["runs"]
    assert 1.0 < run["figures"]["interface_ratio"] < 1.10
    assert len(run["link_bytes"]) == 2


def processes_of(out):
    """Ids of processes that were started to write into ``out``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing.yaml", "--out", "OUT"), "config: 'nothing.yaml' does not exist"),
        (("--out", "OUT", "--steps", "0"), "--steps: got 0, but at least 1 is needed"),
        (("--out", "OUT", "--link", "100mb"), "100mb"),
        (("--out", "OUT", "--baselines", "torch:x"), "unknown baseline 'torch:x'"),
        (("--out", "OUT", "--set", "model.wdith=1"), "model.wdith: unknown field"),
        (("--out", "HERE"), "holds an earlier comparison"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, words, message):
    from launch.compare.__main__ import main

    (tmp_path / "runs").mkdir()
    places = {"OUT": str(tmp_path / "out"), "HERE": str(tmp_path)}
    assert main([places.get(word, word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
