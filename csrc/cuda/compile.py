"""Compiles the CUDA kernels into one shared object: ``python csrc/cuda/compile.py FILE.so``.

It needs nvcc, from ``CUDA_HOME`` or else from ``PATH``, and neither a GPU nor torch. ``COMMKIT_CUDA_ARCH`` names
what to compile for: machine code for sm_NN, and PTX, which later GPUs compile for themselves, for compute_NN.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = "sm_80,sm_90,compute_90"
# Without contraction to fused multiply-add, results are the reference's. The run-time library is linked in, and
# hidden from torch's.
COMPILE = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
LINK = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]
LINK += ["-Xcompiler", "-static-libstdc++,-static-libgcc"]


class CudaError(Exception):
    """The kernels cannot be compiled; the message says why."""


def find_nvcc() -> str | None:
    """Its path, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def gencode(architectures: str) -> list[str]:
    """nvcc's options for "sm_NN" and "compute_NN", separated by commas.

    Raises:
        CudaError: one is neither.
    """
    options = []
    for name in architectures.split(","):
        found = re.fullmatch(r"(sm|compute)_(\d+[a-z]?)", name.strip())
        if not found:
            raise CudaError(
                f"COMMKIT_CUDA_ARCH={architectures!r}: {name!r} must be sm_NN or compute_NN, as in "
                f"{ARCHITECTURES!r}"
            )
        options += ["-gencode", f"arch=compute_{found[2]},code={found[0]}"]
    return options


def compile_kernels(target: Path) -> None:
    """All of ``csrc/cuda`` into ``target``, as many files at once as there are processors.

    Raises:
        CudaError: there is no nvcc, or it failed.
    """
    options = gencode(os.environ.get("COMMKIT_CUDA_ARCH") or ARCHITECTURES)
    nvcc = find_nvcc()
    if nvcc is None:
        place = "in CUDA_HOME" if os.environ.get("CUDA_HOME") else "on PATH; set CUDA_HOME"
        raise CudaError(f"there is no nvcc {place}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted(HERE.glob("*.cu"))
        objects = [Path(folder, f"{source.stem}.o") for source in sources]
        commands = [
            [nvcc, *COMPILE, *options, "-c", str(source), "-o", str(path)]
            for source, path in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        target.parent.mkdir(parents=True, exist_ok=True)
        _run([nvcc, *LINK, *options, *map(str, objects), "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CudaError(f"{' '.join(command)}\n{done.stdout}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        compile_kernels(Path(sys.argv[1]))
    except CudaError as error:
        sys.exit(str(error))
