"""Finding the compiled kernels: COMMKIT_NATIVE, COMMKIT_CPU, and a library that is missing or broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commkit.ops import library

from .native_levels import needs_native

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMKIT_NATIVE", raising=False)
    monkeypatch.delenv("COMMKIT_CPU", raising=False)


def test_zero_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMKIT_NATIVE", "0")
    assert library.load() == (None, "COMMKIT_NATIVE=0")


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMKIT_NATIVE", "yes")
    with pytest.raises(ValueError, match="COMMKIT_NATIVE='yes'"):
        library.load()


@pytest.mark.parametrize("broken", [False, True])
def test_without_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bool) -> None:
    path = tmp_path / "_kernels.so"
    if broken:
        path.write_text("not a library")
    monkeypatch.setattr(library, "PATH", path)
    found, why = library.load()
    assert found is None
    assert ("cannot be loaded" if broken else "was not built") in why
    monkeypatch.setenv("COMMKIT_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"COMMKIT_NATIVE=1 but _kernels\.so"):
        library.load()


@needs_native
def test_a_library_of_another_interface_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "INTERFACE", library.INTERFACE + 1)
    found, why = library.load()
    assert found is None
    assert "another version" in why


@needs_native
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"COMMKIT_CPU": "baseline"}, "loaded baseline"),
        ({"COMMKIT_CPU": "sse9"}, "COMMKIT_CPU='sse9'"),
        ({"COMMKIT_NATIVE": "0"}, "none: COMMKIT_NATIVE=0 torch's"),
    ],
)
def test_a_new_process_obeys_the_variables(variables: dict[str, str], said: str) -> None:
    code = "from commkit.ops import native; print(*native.status().values())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
    )
    assert said in done.stdout + done.stderr
