"""The convergence table: real trials end to end, resumed, one of them failing; and its arithmetic."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
BENCHMARKS = HERE.parents[1] / "benchmarks"


@pytest.fixture
def trials_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_trials_run_are_resumed_and_may_fail(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "tiny_table.py"), str(tmp_path / "work")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr

    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ran"] == [["dense-sgd", "broken", "missing"], ["fp16"], []]
    dense, broken, missing, fp16 = told["rows"]
    assert float(dense["loss"]) > 0
    assert broken["verdict"] == "failed"
    assert "density=2.0 must be in (0, 1]" in broken["note"]
    assert missing["verdict"] == "not available"
    assert fp16["x fewer"] == fp16["x fewer late"] == "2"
    assert fp16["verdict"] in ("within 1 %", "misses")
    assert fp16["note"] == "half the bytes; 1 of 3 seeds"
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert left == {"digits"}


@pytest.mark.usefixtures("trials_package")
@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ((1.9, 2.0, 2.1), "within spread"),
        ((1.0, 1.0, 1.0), "within spread"),  # better
        ((1.99, 2.11, 2.2), "within spread"),
        ((2.05, 2.15, 2.25), "misses"),
        ((1.9, None, 2.1), "misses: diverged"),
    ],
)
def test_verdict(losses: tuple[float | None, ...], verdict: str) -> None:
    from trials.table import judge

    dense = _done((1.9, 2.0, 2.1))
    assert judge(_done(losses), dense)["verdict"] == verdict


@pytest.mark.usefixtures("trials_package")
def test_verdict_where_dense_runs_agree() -> None:
    from trials.table import judge

    dense = _done((2.0, 2.001, 2.002))
    line = judge(_done((2.01, 2.011, 2.012)), dense)
    assert line == {"worse by": "+0.50 %", "spreads": "+10.0", "verdict": "within 1 %"}


@pytest.mark.usefixtures("trials_package")
def test_every_recipe_is_one_that_launch_takes() -> None:
    from trials.execute import missing_scheme
    from trials.local import LOCAL_SYSTEMS
    from trials.plan import table_trials
    from trials.systems import SYSTEMS

    from commkit.config import validate
    from commkit.schemes import make_scheme
    from launch.settings import TrainSettings

    trials = [*table_trials(SYSTEMS, ()), *table_trials(LOCAL_SYSTEMS, ())]
    assert len({trial.name for trial in trials}) == len(trials)
    for trial in trials:
        settings = validate(TrainSettings, trial.recipe(), trial.name)
        assert settings.batch.per_rank * trial.ranks == trial.size.batch
        if missing_scheme(settings.scheme) is None:
            make_scheme(settings.scheme)


@pytest.mark.usefixtures("trials_package")
def test_only_chooses_and_refuses_what_fits_nothing() -> None:
    from trials.plan import table_trials
    from trials.systems import SYSTEMS

    names = [trial.name for trial in table_trials(SYSTEMS, ["gpt/powersgd/2", "*/fp16/4/1"])]
    powersgd = {f"gpt/powersgd/2/{seed}" for seed in range(3)}
    assert len(names) == 5
    assert set(names) == powersgd | {"gpt/fp16/4/1", "digits/fp16/4/1"}
    with pytest.raises(ValueError, match="fits no trial"):
        table_trials(SYSTEMS, ["gpt/powersdg"])


@pytest.mark.usefixtures("trials_package")
def test_tuning_takes_the_best_mean_of_the_seeds() -> None:
    from trials.plan import SEEDS, TUNING_SEEDS
    from trials.tuning import rows

    assert not set(TUNING_SEEDS) & set(range(SEEDS))
    tried = {0.1: (2.0, 2.1), 0.2: (1.9, 2.5), 0.4: (1.0, None)}  # the last diverged with one seed
    table = rows([d for lr, losses in tried.items() for d in _done(losses, lr)])
    assert [line["best"] for line in table] == ["yes", "", ""]
    assert [line["validation loss"] for line in table] == [2.05, 2.2, "diverged"]
    assert table[1]["of each seed"] == "1.9000 2.5000"


def _done(losses: tuple[float | None, ...], lr: float | None = None) -> list[Any]:
    from trials.plan import Trial
    from trials.systems import System
    from trials.table import Done

    system = System("x", {"name": "ddp"}, "adamw")
    return [
        Done(Trial("gpt", system, 2, seed, lr), {"status": "finished", "val_loss": loss})
        for seed, loss in enumerate(losses)
    ]
