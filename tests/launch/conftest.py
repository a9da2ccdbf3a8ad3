"""Runs ``launch/train.py`` as users do: in its own processes, under torchrun if there are two."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `launch` is not installed
# A model that takes milliseconds a step, on a text of a few kilobytes.
TINY = {
    "model.layers": "1",
    "model.heads": "2",
    "model.width": "32",
    "model.context": "16",
    "batch.per_rank": "2",
    "eval.batches": "2",
    "eval.batch_size": "3",
    "schedule.warmup": "3",
    "schedule.length": "20",
}


def as_launched(rank: int, world_size: int, port: int) -> None:
    """Give this process the environment of a rank under a launcher, whose store is at ``port``."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )


class Launcher:
    """Starts training programs and makes sure that none outlives the test."""

    def __init__(self, text: Path) -> None:
        self.text = text
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self, recipe: str, out: Path, *options: str, ranks: int = 2, **overrides: str
    ) -> "subprocess.Popen[str]":
        """Start training; ``overrides`` are settings with ``__`` for a dot."""
        words = [str(ROOT / "launch" / "train.py"), "--config", f"configs/{recipe}.yaml"]
        words += ["--out", str(out), *self.settings(**overrides), *options]
        return self.spawn(words, ranks)

    def settings(self, **overrides: str) -> list[str]:
        """The words that make a run tiny, and ``overrides``."""
        changes = {"data.path": str(self.text), **TINY}
        changes |= {name.replace("__", "."): value for name, value in overrides.items()}
        return [word for item in changes.items() for word in ("--set", "=".join(item))]

    def spawn(self, words: list[str], ranks: int) -> "subprocess.Popen[str]":
        """Start a Python program, under torchrun if it has several ranks."""
        shell = ["bash", str(ROOT / "launch" / "torchrun.sh")] if ranks > 1 else [sys.executable]
        process = subprocess.Popen(
            [*shell, *words],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHON": sys.executable,
                "NPROC": str(ranks),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def finish(self, process: "subprocess.Popen[str]", timeout_s: float = 90) -> str:
        """Wait for the end and return all output."""
        output, _ = process.communicate(timeout=timeout_s)
        return output

    def run(self, *arguments: str | Path, ranks: int = 2, **overrides: str) -> str:
        """Train to the end, which must be a good one; return the output."""
        recipe, out, *options = arguments
        process = self.start(str(recipe), Path(out), *map(str, options), ranks=ranks, **overrides)
        output = self.finish(process)
        assert process.returncode == 0, output
        return output

    @staticmethod
    def family(process: "subprocess.Popen[str]") -> list[int]:
        """Ids of the process and of all that descend from it, as far as they still live."""
        parents = processes()
        members = [process.pid] if process.pid in parents else []
        for member in members:  # grows while we go through it
            members += [pid for pid, parent in parents.items() if parent == member]
        return members

    @staticmethod
    def alive(pids: list[int]) -> list[int]:
        return [pid for pid in pids if pid in processes()]

    @staticmethod
    def kill(pids: list[int]) -> None:
        """SIGKILL, which nothing can prepare for."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @staticmethod
    def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s"
            time.sleep(0.02)

    def close(self) -> None:
        for process in self._started:
            self.kill(self.family(process))
            process.wait(timeout=10)
            if process.stdout:
                process.stdout.close()


def processes() -> dict[int, int]:
    """The parent of every living process; one that only waits to be reaped is not living."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may end while we look
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    return parents


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 20 kB in which the next byte can be learnt."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox, {i * i}\n" for i in range(500)))
    return path


@pytest.fixture(scope="module")
def launcher(text: Path) -> Iterator[Launcher]:
    launcher = Launcher(text)
    yield launcher
    launcher.close()
