"""The compiled libraries, and what binding an operator to a function of theirs takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cuda_library, library
from .backends import Backend, Cpu, Cuda
from .noise import noise_keys

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}
"""Name of an operator and the dispatch key -> its kernel."""

_LARGE = 2 << 20  # bytes of a huge page
_backends: dict[str, Backend] = {}  # by the type of device
_problems = {"cpu": "not loaded", "cuda": "not loaded"}


def find() -> tuple[str, ...]:
    """Load the libraries; the types of device, "cpu" and "cuda", that there is one for."""
    cpu, _problems["cpu"] = library.load()
    cuda, _problems["cuda"] = cuda_library.load()
    if cpu is not None:
        _backends["cpu"] = Cpu(cpu)
    if cuda is not None:
        _backends["cuda"] = Cuda(cuda)
    return tuple(_backends)


def problem(device_type: str) -> str:
    """Why there is no library for this type of device; "" if there is. On a GPU, of each that it does not
    run on as well."""
    cuda = _backends.get("cuda")
    if device_type != "cuda" or not isinstance(cuda, Cuda):
        return _problems[device_type]
    reasons = {index: cuda.problem(index) for index in range(torch.cuda.device_count())}
    return "; ".join(f"cuda:{index}: {reason}" for index, reason in reasons.items() if reason)


def level() -> str:
    """The instruction set in use."""
    name: bytes = _backends["cpu"].library.ck_level()
    return name.decode()


def use_level(name: str) -> None:
    """Force an instruction set, one of ``library.LEVELS``; "" is the best. For tests.

    Raises:
        ValueError: this processor lacks it.
        RuntimeError: there is no library.
    """
    if "cpu" not in _backends:
        raise RuntimeError(f"no compiled kernels: {_problems['cpu']}")
    library.select_level(_backends["cpu"].library, name)


def kernel(*dispatch_keys: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function serves the operator of its name: "CPU" if nothing else is said, "CUDA" too where
    both libraries have it with the same arguments."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in dispatch_keys or ("CPU",):
            KERNELS[function.__name__, key] = function
        return function

    return keep


def call(name: str, *arguments: Any) -> Any:
    """A function of the CPU's library; of a tensor it gets the address, and a list of tensors as an array."""
    return getattr(_backends["cpu"].library, name)(*(_as_c(x) for x in arguments))


def run(name: str, first: Tensor, *arguments: Any) -> Any:
    """:func:`call` of a function of the library for the first tensor's device, whose last argument is the
    number of threads, which is torch's, or the stream, which is the current one."""
    device = first.device
    return _backends[device.type].run(name, device, *(_as_c(x) for x in (first, *arguments)))


def _as_c(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.data_ptr()
    if isinstance(x, list):
        return (ctypes.c_void_p * len(x))(*(t.data_ptr() for t in x))
    return x


def cuda_function(name: str, device: torch.device) -> Any:
    """A function of the CUDA library that launches nothing."""
    return getattr(_backends[device.type].library, name)


def workspace(device: torch.device, function: str, *sizes: int) -> Tensor:
    """Memory for what is between two launches, of the size that a function of the CUDA library says."""
    return empty((cuda_function(function, device)(*sizes),), torch.uint8, device)


def scalar(x: Tensor) -> Any:
    """An argument of one float32, as the library for its device takes it."""
    return _backends[x.device.type].scalar(x)


def is_scalar(x: Tensor, device: torch.device) -> bool:
    """Whether ``x`` is one float32, on this device."""
    return x.device == device and x.dtype == torch.float32 and x.numel() == 1


def max_rows(device: torch.device) -> int:
    """How many rows one call can add up."""
    return _backends[device.type].max_rows


def usable(device: torch.device) -> bool:
    """Whether compiled kernels run on this device."""
    return device.type in _backends and _backends[device.type].usable(device)


def keys(seed: int) -> Any:
    """Of the noise."""
    return (ctypes.c_uint32 * 2)(*(key & 0xFFFFFFFF for key in noise_keys(seed)))


def flat(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether ``x`` is 1-D, contiguous, of one of the dtypes (float32, bfloat16, float16 if none is given),
    and where compiled kernels run."""
    known = x.dtype in (dtypes or DTYPES)
    return known and x.dim() == 1 and x.is_contiguous() and usable(x.device)


def all_flat(xs: Sequence[Tensor], device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether each of ``xs`` is flat, on this device; sooner than one by one."""
    known = dtypes or DTYPES
    return usable(device) and all(
        x.dtype in known and x.dim() == 1 and x.is_contiguous() and x.device == device for x in xs
    )


def fits(x: Tensor, numel: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``x`` is flat, of so many elements, and on this device."""
    return x.device == device and x.numel() == numel and flat(x, dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, on huge pages where the system has some. The C library returns large blocks to the
    system and gets them back page by page, at several times the cost of what is then written to them."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and x.nbytes >= _LARGE and isinstance(_backends.get("cpu"), Cpu):
        call("ck_prefer_huge_pages", x, x.nbytes)
    return x
