"""Finding and loading the compiled CUDA kernels: as ``library``, for the other shared object."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from .library import Signatures, chosen_mode, open_library

INTERFACE = 5  # of csrc/cuda/kernels.h
PATH = Path(__file__).with_name("_kernels_cuda.so")

_POINTER = c_void_p
_STREAM = c_void_p
_INPUT = (c_void_p, c_int, c_int64)  # address, dtype, number of elements (of rows)
_PLAIN: Signatures = {
    "ck_cuda_interface": ([], c_int),
    "ck_cuda_max_rows": ([], c_int),
    "ck_cuda_error": ([c_int], c_char_p),
    "ck_cuda_probe": ([], c_int),
    "ck_cuda_encode_signs_workspace": ([c_int64], c_int64),
    "ck_cuda_select_workspace": ([c_int64], c_int64),
    "ck_cuda_ranked_magnitude_workspace": ([], c_int64),
}
_KERNELS: dict[str, list[type]] = {  # and a stream at the end; they return an error code
    "encode_signs": [*_INPUT, _POINTER, _POINTER, _POINTER],
    "encode_signs_compensated": [*_INPUT, _POINTER, _POINTER, c_float, *[_POINTER] * 4],
    "reencode_signs": [_POINTER, c_int64, _POINTER, _POINTER, c_int, *[_POINTER] * 5],
    "sum_signs": [_POINTER, c_int64, _POINTER, _POINTER, c_int, c_int],
    "quantize_blocks": [*_INPUT, c_int, c_int64, _POINTER, _POINTER, _POINTER],
    "sum_blocks": [
        *(_POINTER, c_int64, _POINTER, _POINTER, c_int),
        *(c_int, c_int64, c_int, c_int),
    ],
    "uniform_noise": [_POINTER, c_int64, _POINTER],
    "ternarize": [*_INPUT, _POINTER, _POINTER, _POINTER],
    "pack_ternary": [_POINTER, c_int64, _POINTER],
    "pack_nibbles": [_POINTER, c_int64, _POINTER],
    "select_at_least": [*_INPUT, _POINTER, _POINTER],
    "correct_and_select": [
        *(*_INPUT, _POINTER, _POINTER, c_float, c_int),
        *(_POINTER, _POINTER, _POINTER, _POINTER),
    ],
    "take": [_POINTER, c_int64, _POINTER],
    "ranked_magnitude": [*_INPUT, c_int64, c_int64, c_int64, _POINTER, _POINTER],
    "largest_of_rows": [*_INPUT, c_int64, c_int64, _POINTER],
    "scatter_accumulate": [_POINTER, c_int64, _POINTER, c_int, _POINTER, c_int64],
    "correct_momentum": [*_INPUT, _POINTER, _POINTER, c_float, c_int, _POINTER, _POINTER],
    "frozen_adam": [*[_POINTER] * 4, c_float, c_float, c_int64],
}


def signatures() -> Signatures:
    """Of every function of the library."""
    kernels: Signatures = {
        f"ck_cuda_{name}": ([*arguments, _STREAM], c_int) for name, arguments in _KERNELS.items()
    }
    return {**_PLAIN, **kernels}


UNPROVEN = "they have yet to run on a GPU; COMMKIT_CUDA=auto uses them"


def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not. Nothing is asked of the GPU yet, so that a process may still fork.

    ``COMMKIT_CUDA``: 0 uses the reference kernels, 1 refuses to do without the compiled ones, auto takes what
    is there. Not set, it is 0: the kernels have yet to run on a GPU.

    Raises:
        ValueError: the variable has another value.
        RuntimeError: COMMKIT_CUDA=1 and there is no usable library, or no GPU.
    """
    mode = chosen_mode("COMMKIT_CUDA")
    if mode == "0":
        return None, "COMMKIT_CUDA=0"
    library, problem = _find()
    if library is None and mode == "1":
        raise RuntimeError(
            f"COMMKIT_CUDA=1 but {problem}; this needs a GPU, a torch for CUDA, and commkit installed with nvcc "
            "at hand"
        )
    if library is not None and "COMMKIT_CUDA" not in os.environ:
        return None, UNPROVEN
    return library, problem


def _find() -> tuple[ctypes.CDLL | None, str]:
    if torch.version.cuda is None:
        return None, "this torch is not for CUDA"
    if torch.cuda.device_count() == 0:
        return None, "torch sees no GPU"
    return open_library(PATH, "ck_cuda_interface", INTERFACE, signatures())
