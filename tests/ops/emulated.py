"""The CUDA kernels compiled as C++ and run on CPU tensors: see ``cuda_emulation/emulation.h``."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from commkit.ops import binding, cuda_library, native  # noqa: F401  (native fills KERNELS)
from commkit.ops.backends import Cuda
from commkit.ops.library import open_library

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).with_name("cuda_emulation")
# An unaligned vector traps, as it would on a GPU. Contraction is off there too.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-DCOMMKIT_EMULATION", f"-I{HERE}"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
FLAGS += ["-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error"]


class Emulated(Cuda):
    """Kernels of an emulation. ``calls`` has the names of those that ran."""

    def __init__(self, library: Any) -> None:
        super().__init__(library)
        self.calls: list[str] = []

    def usable(self, device: torch.device) -> bool:
        return True

    def run(self, name: str, device: torch.device, *arguments: Any) -> None:
        self.calls.append(name)
        self.launch(name, *arguments, None)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def _compile(folder: Path) -> Path:
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "emulation.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(
            _run, [["-c", s, "-o", o] for s, o in zip(sources, objects, strict=True)]
        ):
            assert done.returncode == 0, done.stdout
    target = folder / "_kernels_emulated.so"
    subprocess.run([_compiler(), "-shared", *objects, "-o", target], check=True)
    return target


def _run(words: list[Any]) -> subprocess.CompletedProcess[str]:
    command = [_compiler(), "-x", "c++", *FLAGS, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled once per process."""
    with tempfile.TemporaryDirectory() as folder:
        found, problem = open_library(
            _compile(Path(folder)),
            "ck_cuda_interface",
            cuda_library.INTERFACE,
            cuda_library.signatures(),
        )
    assert found is not None, problem
    return found


@contextmanager
def emulating() -> Iterator[Emulated]:
    """``KERNELS`` serve CPU tensors by the CUDA kernels."""
    backend = Emulated(library())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(binding._backends, "cpu", backend)
        yield backend


# The functions that are bound to operators on a GPU.
KERNELS = SimpleNamespace(
    **{name: kernel for (name, key), kernel in binding.KERNELS.items() if key != "CPU"}
)


needs_compiler = pytest.mark.skipif(
    _compiler() is None, reason="the emulation needs a C++ compiler"
)
