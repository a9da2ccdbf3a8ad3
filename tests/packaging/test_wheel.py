"""The sdist and the wheels that are made of it, as somebody gets them who has nothing of this repository.

They are built by the tools that the environment has (no isolation), and installed into empty folders without
dependencies, which come from the environment.
"""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from commkit import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("commkit", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in"),
    *("README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile"),
)
# What an installed commkit is asked to do: an operator that has a compiled kernel and a reference.
PROBE = """
import torch, commkit
from commkit.compressors import BlockQuantize
from commkit.ops import native
from commkit.types import TensorCtx
x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
ctx = TensorCtx("x", x.shape, x.dtype, x.device, 0, 0)
payload = BlockQuantize(8, 256, "nearest").compress(x, ctx)
print(commkit.__file__)
print(commkit.__version__)
print("quantize_blocks" in native.served("cpu"))
print([t.tolist() for t in payload])
"""
pytestmark = pytest.mark.timeout(300)


def run(*command, cwd, **env):
    """What it prints; fails with that if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a clean copy, unpacked: (archive, folder)."""
    clean = tmp_path_factory.mktemp("repository")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, clean / name, ignore=ignored)
        else:
            shutil.copy(source, clean / name)
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--sdist", "--outdir", out, clean, cwd=out)
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return archive, out / archive.name.removesuffix(".tar.gz")


def wheel_of(sdist, tmp_path_factory, **env):
    """Built from a copy of the unpacked sdist: (path, what the build said)."""
    out = tmp_path_factory.mktemp("wheel")
    tree = shutil.copytree(sdist[1], out / "tree")
    told = run(
        *("-m", "build", "--no-isolation", "--wheel", "--outdir", out / "dist", tree),
        cwd=out,
        COMMKIT_CUDA="0",
        **env,
    )
    (wheel,) = (out / "dist").iterdir()
    return wheel, told


@pytest.fixture(scope="module")
def native_wheel(sdist, tmp_path_factory):
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    return wheel_of(sdist, tmp_path_factory, COMMKIT_NATIVE="1")[0]


@pytest.fixture(scope="module")
def pure_wheel(sdist, tmp_path_factory):
    return wheel_of(sdist, tmp_path_factory, COMMKIT_NATIVE="0")[0]


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def probe(wheel, folder, mode):
    """What the installed wheel says to ``PROBE``: (file, version, kernels in use, payload)."""
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder)
    told = run("-c", PROBE, cwd=folder, PYTHONPATH=str(folder), COMMKIT_NATIVE=mode)
    return told.splitlines()[-4:]


def test_the_sdist_holds_all_that_a_build_and_a_reader_need(sdist):
    archive, tree = sdist
    assert archive.name == f"commkit-{__version__}.tar.gz"
    for name in SOURCES:
        assert (tree / name).exists(), name
    ours = [p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    kept = [p for p in ours if "__pycache__" not in p.parts]
    assert kept
    for path in kept:
        assert (tree / path).is_file(), path
    assert not list(tree.rglob("*.so"))


def test_a_wheel_has_its_kernels_and_types_and_fits_any_python(native_wheel):
    assert native_wheel.name.startswith(f"commkit-{__version__}-py3-none-linux_")
    names = names_in(native_wheel)
    assert {"commkit/ops/_kernels.so", "commkit/py.typed", "commkit/schemes.py"} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"commkit", f"commkit-{__version__}.dist-info"}
    every = {p.relative_to(ROOT).as_posix() for p in (ROOT / "commkit").rglob("*.py")}
    assert every <= names


def test_its_metadata_says_who_what_and_under_which_licence(native_wheel):
    told = metadata_of(native_wheel)
    assert told["Version"] == __version__
    assert told["License-Expression"] == "Apache-2.0"
    assert told["License-File"] == "LICENSE"
    assert told["Author"] == "The commkit authors"
    assert "Typing :: Typed" in told.get_all("Classifier")
    needed = [r for r in told.get_all("Requires-Dist") if "extra ==" not in r]
    assert {r.split(">")[0].split("<")[0] for r in needed} == {
        "torch",
        "numpy",
        "pydantic",
        "PyYAML",
    }


def test_every_extra_is_offered_and_the_tests_need_them_all(native_wheel):
    told = metadata_of(native_wheel)
    frameworks = {"deepspeed", "lightning", "accelerate", "transformers", "mpi"}
    sinks = {"tensorboard", "wandb", "opentelemetry"}
    assert frameworks | sinks | {"simulate", "docs", "train"} <= set(told.get_all("Provides-Extra"))
    tested = " ".join(r for r in told.get_all("Requires-Dist") if r.endswith('extra == "test"'))
    for name in frameworks | sinks | {"simulate", "docs", "train"}:
        assert name in tested, name


def test_both_wheels_work_and_say_the_same(native_wheel, pure_wheel, tmp_path):
    folders = tmp_path / "native", tmp_path / "pure"
    for folder in folders:
        folder.mkdir()
    compiled = probe(native_wheel, folders[0], "1")
    reference = probe(pure_wheel, folders[1], "auto")
    for (file, version, _, _), folder in zip((compiled, reference), folders, strict=True):
        assert file == str(folder / "commkit" / "__init__.py")
        assert version == __version__
    assert compiled[2] == "True"
    assert reference[2] == "False"
    assert compiled[3] == reference[3]


def test_a_wheel_without_kernels_is_pure(pure_wheel):
    assert pure_wheel.name == f"commkit-{__version__}-py3-none-any.whl"
    assert not [name for name in names_in(pure_wheel) if name.endswith(".so")]


def test_without_a_compiler_the_build_says_so_and_goes_on(sdist, tmp_path_factory):
    nothing = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    wheel, told = wheel_of(sdist, tmp_path_factory, COMMKIT_NATIVE="auto", **nothing)
    assert "no compiled kernels, pure torch instead" in told
    assert not [name for name in names_in(wheel) if name.endswith(".so")]
    with pytest.raises(AssertionError, match="/nowhere/c"):
        wheel_of(sdist, tmp_path_factory, COMMKIT_NATIVE="1", **nothing)
