"""The compiled kernels, for CPUs and GPUs, put in front of the reference.

A kernel serves contiguous 1-D tensors of the dtypes noted at each function, all on one device; it hands
everything else (float64 above all, strided and mismatched arguments, whose errors are torch's) to the
reference. Results do not depend on the device, on the number of threads, which is torch's, nor on the
instruction set.
"""

from __future__ import annotations

from typing import Any

import torch

from . import (  # noqa: F401  (they fill KERNELS)
    binding,
    native_codebooks,
    native_codes,
    native_cuda,
    native_cuda_signs,
    native_selection,
    native_signs,
    native_tiles,
    native_updates,
)
from .binding import empty, use_level
from .definitions import NAMESPACE

__all__ = ["empty", "register", "served", "status", "use_level"]

_registered: list[Any] = []


def register() -> None:
    """Load the libraries and put their kernels in front of the reference; once, at import."""
    found = binding.find()
    if not found:
        return
    untyped: Any = torch.library
    implementations = untyped.Library(NAMESPACE, "IMPL")
    _registered.append(implementations)  # kernels live as long as it does
    for (name, key), kernel in binding.KERNELS.items():
        if key == "BackendSelect" or key.lower() in found:
            implementations.impl(name, kernel, key)


def served(device_type: str = "cpu") -> frozenset[str]:
    """Names of the operators that a compiled kernel serves on this type of device, "cpu" or "cuda"."""
    if binding.problem(device_type):
        return frozenset()
    return frozenset(
        name for name, key in binding.KERNELS if key in (device_type.upper(), "BackendSelect")
    )


def status() -> dict[str, str]:
    """Which libraries are in use and with which instruction set; or why none."""
    cpu, cuda = (
        f"none: {problem}" if (problem := binding.problem(device_type)) else "loaded"
        for device_type in ("cpu", "cuda")
    )
    level = binding.level() if cpu == "loaded" else "torch's"
    return {"library": cpu, "instruction set": level, "CUDA library": cuda}
