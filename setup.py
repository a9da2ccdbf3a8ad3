"""Builds commkit and its compiled kernels. Everything declarative is in pyproject.toml.

``COMMKIT_NATIVE``: auto (the default) compiles the kernels of csrc/ if it can and else says that it did not,
1 fails where it cannot, 0 does not try. ``COMMKIT_CUDA`` says the same of csrc/cuda and nvcc, and
``COMMKIT_CUDA_ARCH`` what to compile for: see csrc/cuda/compile.py. torch is not needed to build, and the result
fits any Python and torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODES = ("auto", "0", "1")


def chosen(variable: str) -> str:
    mode = os.environ.get(variable, "auto")
    if mode not in MODES:
        sys.exit(f"{variable}={mode!r} must be one of {', '.join(MODES)}")
    return mode


NATIVE, CUDA = chosen("COMMKIT_NATIVE"), chosen("COMMKIT_CUDA")

# Contraction would make results depend on whether the processor has fused multiply-add.
COMPILE = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
COMPILE += ["-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
LINK = ["-pthread", "-ldl"]
if sys.platform.startswith("linux"):
    LINK += ["-static-libstdc++", "-static-libgcc"]


def kernels() -> Extension:
    folder = Path(__file__).parent / "csrc"
    sources, headers = (
        sorted(f"csrc/{path.name}" for pattern in patterns for path in folder.glob(pattern))
        for patterns in (["*.cpp"], ["*.h", "*.inc"])
    )
    return Extension(
        "commkit.ops._kernels",
        sources,
        depends=headers,  # an sdist carries them for that
        language="c++",
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
    )


class CudaExtension(Extension):
    """Compiled by csrc/cuda/compile.py."""


def cuda_kernels() -> CudaExtension:
    folder = Path(__file__).parent / "csrc/cuda"
    others = sorted(
        f"csrc/cuda/{path.name}" for path in [*folder.glob("*.h"), *folder.glob("*.py")]
    )
    sources = sorted(f"csrc/cuda/{path.name}" for path in folder.glob("*.cu"))
    return CudaExtension("commkit.ops._kernels_cuda", sources, depends=others)


def compile_cuda(target: Path) -> None:
    path = Path(__file__).parent / "csrc/cuda/compile.py"
    spec = importlib.util.spec_from_file_location("commkit_compile_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.compile_kernels(target)


class BuildKernels(build_ext):
    """Shared objects that are no Python modules, and may be missing."""

    def get_ext_filename(self, ext_name: str) -> str:
        return str(Path(*ext_name.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        cuda = isinstance(ext, CudaExtension)
        # What fails must not leave an older build in place.
        self._built(ext).unlink(missing_ok=True)
        try:
            if cuda:
                compile_cuda(self._built(ext))
            else:
                super().build_extension(ext)
        except Exception as error:  # of one class or another, from version to version
            if (CUDA if cuda else NATIVE) == "1":
                raise
            kind = "CUDA" if cuda else "compiled"
            print(f"commkit: no {kind} kernels, pure torch instead: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        every = self.extensions
        for ext in every:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        self.extensions = [ext for ext in every if self._built(ext).exists()]
        super().copy_extensions_to_source()
        self.extensions = every

    def _built(self, ext: Extension) -> Path:
        return Path(self.build_lib, self.get_ext_filename(ext.name))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {k: v for k, v in super().get_output_mapping().items() if Path(k).exists()}


class Wheel(bdist_wheel):
    """Tied to the platform but to no version of Python; to neither if nothing is compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        platform: str = super().get_tag()[2]
        return "py3", "none", platform


extensions = [kernels()] if NATIVE != "0" else []
if CUDA != "0":
    extensions.append(cuda_kernels())
setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
