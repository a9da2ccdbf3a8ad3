"""The benchmarks run. What they measure is for ``make bench``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARED = {"cells.py", "harness.py", "model.py", "report.py", "run_all.py"}


def test_many_buckets_runs_and_writes_its_result(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "many_buckets.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr

    result = json.loads(file.read_text())
    assert all(target["reached"] for target in result["targets"])
    assert {"date", "torch", "machine", "load_average"} <= set(result["environment"])
    assert "| reached |" in done.stdout


@pytest.mark.parametrize(
    "program", sorted(p.name for p in BENCHMARKS.glob("*.py") if p.name not in SHARED)
)
def test_every_program_is_in_the_readme(program: str) -> None:
    assert f"`{program}`" in (BENCHMARKS / "README.md").read_text()


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda p: p.name)
def test_kept_results_say_when_and_where_and_are_not_quick_runs(file: Path) -> None:
    result = json.loads(file.read_text())
    assert {"date", "torch", "commkit", "machine"} <= set(result["environment"])
    assert result["settings"]["quick"] is False
