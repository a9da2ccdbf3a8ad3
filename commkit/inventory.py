"""What is installed, and what every scheme costs: measured, not written down."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import platform
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .config import ConfigError
from .ops import OPS, native
from .optim import OptimizerScheme
from .reducer import Reducer
from .registry import lookup, names
from .schemes import make_scheme
from .sim import ThreadComm, run_threads
from .types import SHARED
from .version import __version__

SIDE = 1000  # the tensor that schemes are measured on has SIDE x SIDE elements: a million
_STEPS = 2  # the second finds all state in place
# Settings under which the second step is one of the compressed stage.
_MEASURED_WITH = {
    "onebit_adam": {"freeze_step": 1},
    "onebit_lamb": {"freeze_step": 1},
    "zero_one_adam": {"var_freeze_step": 1},
}
_PAPER = re.compile(r"\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)")
_WRAPPERS = {"ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2", "deepspeed": "DeepSpeed"}
_REQUIRED = ("torch", "numpy", "pydantic", "PyYAML")
_OPTIONAL = ("torchdata", "tqdm", "tyro", "matplotlib", "scikit-learn", "mpi4py", "deepspeed")


@dataclass(frozen=True)
class SchemeCard:
    """One scheme.

    Args:
        name: as in ``scheme: {name: ...}``.
        description: the first sentence of its docstring.
        paper: that the docstring cites; empty if none.
        wrappers: what it can be attached to.
        payload_bytes: per step and million float32 parameters, mean of two ranks; None if the
            scheme cannot be built without knobs.
        wire_bytes: sent for that.
        state_bytes: per parameter, between steps, mean of two ranks.
    """

    name: str
    description: str
    paper: str
    wrappers: tuple[str, ...]
    payload_bytes: int | None
    wire_bytes: int | None
    state_bytes: float | None


def scheme_cards() -> list[SchemeCard]:
    """Every registered scheme, measured with default knobs by two threads."""
    return [_card(name) for name in names("scheme")]


def wrappers() -> tuple[str, ...]:
    """What this version has adapters for."""
    package = __package__ or "commkit"
    found = (
        label
        for module, label in _WRAPPERS.items()
        if importlib.util.find_spec(f"{package}.adapters.{module}") is not None
    )
    return tuple(found)


def installation() -> dict[str, Any]:
    """Versions, devices, backends and kernels, as plain data."""
    return {
        "versions": {
            "commkit": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in (*_REQUIRED, *_OPTIONAL)},
        },
        "devices": {"cpu_threads": torch.get_num_threads(), "gpus": torch.cuda.device_count()},
        "backends": _backends(),
        "compiled kernels": native.status(),
        "kernels": kernels(),
    }


def kernels() -> dict[str, str]:
    """Which kernel serves each operator on the CPU: the pure-torch reference or a compiled one."""
    compiled = native.served()
    return {
        name: "compiled" if name in compiled else "pure-torch reference" for name in sorted(OPS)
    }


def _card(name: str) -> SchemeCard:
    text = " ".join((inspect.getdoc(lookup("scheme", name)) or "").split("\n\n")[0].split())
    paper = _PAPER.search(text)
    sentence, _, _ = _PAPER.sub("", text).partition(". ")
    payload, wire, state = _measure(name)
    return SchemeCard(
        name=name,
        description=re.sub(r"\s+([,.:;])", r"\1", sentence).strip().rstrip(":."),
        paper=paper[1] if paper else "",
        wrappers=wrappers(),
        payload_bytes=payload,
        wire_bytes=wire,
        state_bytes=state,
    )


def _measure(name: str) -> tuple[int, int, float] | tuple[None, None, None]:
    """``(payload bytes, wire bytes, state bytes per parameter)``; None without usable defaults."""
    try:
        make_scheme(name)
    except ConfigError:
        return None, None, None  # a scheme that has to be told its parts
    told = run_threads(
        partial(_measure_rank, name), world_size=2
    )  # servers hold shards of unequal size: take the mean
    payload, wire, state = (sum(column) / len(told) for column in zip(*told, strict=True))
    return round(payload), round(wire), state


def _measure_rank(name: str, comm: ThreadComm) -> tuple[int, int, float]:
    weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE))
    made = make_scheme(name, _MEASURED_WITH.get(name))
    optimizer = made([weight], lr=1e-3) if isinstance(made, OptimizerScheme) else None
    reducer = optimizer.reducer if optimizer is not None else made
    assert isinstance(reducer, Reducer)
    if optimizer is not None:
        optimizer.bind({"weight": weight}, comm)
        optimizer.set_up()
    generator = torch.Generator().manual_seed(comm.rank)
    for _ in range(_STEPS):
        before = (comm.bytes.payload_bytes, comm.bytes.wire_bytes)
        gradient = torch.randn(SIDE, SIDE, generator=generator)
        weight.grad = reducer.reduce({"weight": gradient}, comm)["weight"]
        reducer.end_step()
        if optimizer is not None:
            optimizer.step()
    state = sum(
        x.numel() * x.element_size()
        for key, x in reducer.state_dict().items()
        if not key.startswith(f"{SHARED}/")
    )
    if optimizer is not None:
        tensors = (x for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor))
        state += sum(x.numel() * x.element_size() for x in tensors if x.ndim)
    payload, wire = comm.bytes.payload_bytes, comm.bytes.wire_bytes
    return payload - before[0], wire - before[1], state / SIDE**2


def _backends() -> dict[str, bool]:
    if not dist.is_available():
        return {}
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
