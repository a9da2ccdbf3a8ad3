"""Compiling and finding the CUDA kernels without a GPU: COMMKIT_CUDA, COMMKIT_CUDA_ARCH, CUDA_HOME."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from commkit.ops import cuda_library
from commkit.ops.backends import Cuda

PROGRAM = Path(__file__).parents[2] / "csrc/cuda/compile.py"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMMKIT_CUDA", "COMMKIT_CUDA_ARCH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())


def compiler() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_cuda", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_zero_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMKIT_CUDA", "0")
    assert cuda_library.load() == (None, "COMMKIT_CUDA=0")


def test_nobody_uses_them_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (object(), "")
    monkeypatch.setattr(cuda_library, "_find", lambda: found)
    monkeypatch.delenv("COMMKIT_CUDA", raising=False)
    assert cuda_library.load() == (None, cuda_library.UNPROVEN)
    monkeypatch.setenv("COMMKIT_CUDA", "auto")
    assert cuda_library.load() == found


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMKIT_CUDA", "yes")
    with pytest.raises(ValueError, match="COMMKIT_CUDA='yes'"):
        cuda_library.load()


@pytest.mark.parametrize(
    ("version", "gpus", "why"),
    [(None, 0, "not for CUDA"), ("13.0", 0, "no GPU"), ("13.0", 1, "was not built")],
)
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str | None, gpus: int, why: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(cuda_library, "PATH", tmp_path / "_kernels_cuda.so")
    found, problem = cuda_library.load()
    assert found is None
    assert why in problem
    monkeypatch.setenv("COMMKIT_CUDA", "1")
    with pytest.raises(RuntimeError, match=f"COMMKIT_CUDA=1 but .*{why}"):
        cuda_library.load()


class OldDriver:
    """A library that the driver cannot run."""

    probes = 0

    def ck_cuda_max_rows(self) -> int:
        return 128

    def ck_cuda_probe(self) -> int:
        self.probes += 1
        return 35

    def ck_cuda_error(self, code: int) -> bytes:
        return b"CUDA driver version is insufficient"


@pytest.mark.usefixtures("_gpu")
def test_a_gpu_that_cannot_run_them_is_left_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = OldDriver()
    backend = Cuda(library)
    for _ in range(2):
        assert not backend.usable(torch.device("cuda:0"))
    assert library.probes == 1
    assert backend.problem(0) == "CUDA driver version is insufficient (CUDA error 35)"
    monkeypatch.setenv("COMMKIT_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"COMMKIT_CUDA=1 but on cuda:0: CUDA driver"):
        backend.usable(torch.device("cuda:0"))


@pytest.mark.usefixtures("_gpu")
def test_an_error_of_a_launch_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    library = OldDriver()
    library.ck_cuda_take = lambda *arguments: 0 if arguments == (1, 2, 77) else 35  # type: ignore[attr-defined]
    backend = Cuda(library)
    backend.run("ck_take", torch.device("cuda:0"), 1, 2)
    with pytest.raises(RuntimeError, match=r"ck_take failed on the GPU: .* \(CUDA error 35\)"):
        backend.run("ck_take", torch.device("cuda:0"), 1, 3)


def test_architectures_are_nvccs_options() -> None:
    assert compiler().gencode("sm_90, compute_90") == [
        *("-gencode", "arch=compute_90,code=sm_90"),
        *("-gencode", "arch=compute_90,code=compute_90"),
    ]


@pytest.mark.parametrize("bad", ["90", "sm_90;sm_80", "hopper", "", "sm_90,"])
def test_what_is_no_architecture_is_refused(bad: str) -> None:
    program = compiler()
    with pytest.raises(program.CudaError, match="COMMKIT_CUDA_ARCH="):
        program.gencode(bad)


def test_cuda_home_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = compiler()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert program.find_nvcc() == str(nvcc)
    with pytest.raises(program.CudaError, match="broken"):
        program.compile_kernels(tmp_path / "x.so")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    with pytest.raises(program.CudaError, match="no nvcc in CUDA_HOME"):
        program.compile_kernels(tmp_path / "x.so")
