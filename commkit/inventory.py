"""What is installed, and what every scheme costs: measured, not written down."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import platform
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .config import ConfigError
from .ops import NAMESPACE, OPS
from .reducer import Reducer
from .registry import lookup, names
from .schemes import make_scheme
from .sim import ThreadComm, run_threads
from .types import SHARED
from .version import __version__

SIDE = 1000  # the tensor that schemes are measured on has SIDE x SIDE elements: a million
_STEPS = 2  # the second finds all state in place
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
        "kernels": kernels(),
    }


def kernels() -> dict[str, str]:
    """Which kernel serves each operator on the CPU: the pure-torch reference or a compiled one."""
    return {
        name: "compiled"
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
        else "pure-torch reference"
        for name in sorted(OPS)
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

    def rank(comm: ThreadComm) -> tuple[int, int, float]:
        reducer = _reducer(name, comm)
        generator = torch.Generator().manual_seed(comm.rank)
        for _ in range(_STEPS):
            before = (comm.bytes.payload_bytes, comm.bytes.wire_bytes)
            gradient = torch.randn(SIDE, SIDE, generator=generator)
            reducer.reduce({"weight": gradient}, comm)
            reducer.end_step()
        state = sum(
            x.numel() * x.element_size()
            for key, x in reducer.state_dict().items()
            if not key.startswith(f"{SHARED}/")
        )
        payload, wire = comm.bytes.payload_bytes, comm.bytes.wire_bytes
        return payload - before[0], wire - before[1], state / SIDE**2

    told = run_threads(rank, world_size=2)  # servers hold shards of unequal size: take the mean
    payload, wire, state = (sum(column) / len(told) for column in zip(*told, strict=True))
    return round(payload), round(wire), state


def _reducer(name: str, comm: ThreadComm) -> Reducer:
    """That of the scheme, which may be an optimizer."""
    made = make_scheme(name)
    if isinstance(made, Reducer):
        return made
    weight = nn.Parameter(torch.zeros(SIDE, SIDE))
    optimizer = made([weight], lr=0.0)
    optimizer.bind({"weight": weight}, comm)
    return optimizer.reducer


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
