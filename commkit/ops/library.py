"""Finding and loading the compiled kernels. They are looked for beside this file and nowhere else."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

INTERFACE = 8  # of csrc/kernels.h
PATH = Path(__file__).with_name("_kernels.so")
MODES = ("auto", "0", "1")
LEVELS = ("baseline", "avx2", "avx512")

Signatures = dict[str, tuple[list[type], "type | None"]]
"""Function -> the types of its arguments and of its result."""

_POINTER = c_void_p
_INPUT = (c_void_p, c_int, c_int64)  # address, dtype, number of elements (of rows)
_SIGNATURES: Signatures = {
    "ck_interface": ([], c_int),
    "ck_select_level": ([c_char_p], c_int),
    "ck_level": ([], c_char_p),
    "ck_prefer_huge_pages": ([_POINTER, c_int64], None),
    "ck_encode_signs": ([*_INPUT, _POINTER, POINTER(c_double), c_int], None),
    "ck_sum_signs": ([_POINTER, c_int64, _POINTER, _POINTER, c_int, c_int, c_int], None),
    "ck_foreach_encode_signs": (
        [*[_POINTER] * 5, c_int64, _POINTER, _POINTER, c_float, _POINTER, c_int],
        None,
    ),
    "ck_foreach_reencode_signs": (
        [*[_POINTER] * 4, c_int, *[_POINTER] * 3, c_int64, _POINTER, c_int],
        None,
    ),
    "ck_foreach_sum_signs": (
        [_POINTER, _POINTER, c_int, _POINTER, _POINTER, c_int64, c_int, c_int],
        None,
    ),
    "ck_quantize_blocks": ([*_INPUT, c_int, c_int64, _POINTER, _POINTER, _POINTER, c_int], None),
    "ck_quantize_buckets": (
        [*_INPUT, c_int, c_int64, c_int, _POINTER, _POINTER, _POINTER, c_int],
        None,
    ),
    "ck_sum_blocks": (
        [_POINTER, c_int64, _POINTER, _POINTER, c_int, c_int, c_int64, c_int, c_int, c_int],
        None,
    ),
    "ck_quantize_codebook": (
        [*_INPUT, _POINTER, c_int, c_int64, _POINTER, _POINTER, _POINTER, c_int],
        c_int,
    ),
    "ck_quantize_natural": ([*_INPUT, _POINTER, _POINTER, _POINTER, c_int], c_int),
    "ck_look_up": ([_POINTER, c_int64, *[_POINTER] * 3, c_int64, c_int], None),
    "ck_uniform_noise": ([_POINTER, c_int64, _POINTER, c_int], None),
    "ck_ternarize": ([*_INPUT, c_float, _POINTER, _POINTER, c_int], None),
    "ck_pack_ternary": ([_POINTER, c_int64, _POINTER, c_int], None),
    "ck_pack_nibbles": ([_POINTER, c_int64, _POINTER, c_int], None),
    "ck_select_at_least": ([*_INPUT, c_float, POINTER(c_void_p), c_int], c_int64),
    "ck_take": ([_POINTER, _POINTER], None),
    "ck_ranked_magnitude": ([*_INPUT, c_int64, c_int64, c_int64, _POINTER, c_int], c_int),
    "ck_largest": ([*_INPUT, *[c_int64] * 5, _POINTER, _POINTER, c_int], c_int),
    "ck_largest_of_rows": ([*_INPUT, c_int64, c_int64, _POINTER, c_int], c_int),
    "ck_scatter_accumulate": ([_POINTER, c_int64, _POINTER, c_int, _POINTER, c_int64], c_int),
    "ck_correct_momentum": (
        [*_INPUT, _POINTER, _POINTER, c_float, c_int, _POINTER, _POINTER, c_int],
        None,
    ),
    "ck_dgc_step": (
        [
            *[*_INPUT, _POINTER, _POINTER, c_float, c_int, c_int, c_float],
            *[c_int64] * 6,
            *[*[_POINTER] * 4, c_int],
        ],
        c_int,
    ),
    "ck_combine_tiles": (
        [
            *[_POINTER, c_int64, c_int64, c_int64, c_int64],
            *[_POINTER, _POINTER, c_int, c_int64, _POINTER, _POINTER, c_int, c_int],
        ],
        c_int,
    ),
    "ck_frozen_adam": ([*[_POINTER] * 4, c_float, c_float, c_int64, c_int], None),
}


def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not.

    ``COMMKIT_NATIVE``: 0 uses the reference kernels, 1 refuses to do without the compiled ones, auto (the
    default) takes what is there. ``COMMKIT_CPU`` forces an instruction set.

    Raises:
        ValueError: a variable has another value, or this processor lacks the instruction set.
        RuntimeError: COMMKIT_NATIVE=1 and there is no usable library.
    """
    mode = chosen_mode("COMMKIT_NATIVE")
    if mode == "0":
        return None, "COMMKIT_NATIVE=0"
    library, problem = open_library(PATH, "ck_interface", INTERFACE, _SIGNATURES)
    if library is None:
        if mode == "1":
            raise RuntimeError(
                f"COMMKIT_NATIVE=1 but {problem}; install commkit with a C++ compiler at hand"
            )
        return None, problem
    select_level(library, os.environ.get("COMMKIT_CPU", ""))
    return library, ""


def chosen_mode(variable: str) -> str:
    """The value of an environment variable, one of ``MODES``.

    Raises:
        ValueError: it has another value.
    """
    mode = os.environ.get(variable, "auto")
    if mode not in MODES:
        raise ValueError(f"{variable}={mode!r} must be one of {', '.join(MODES)}")
    return mode


def select_level(library: ctypes.CDLL, level: str) -> None:
    """Use the functions of ``level``; "" is the best that this processor has.

    Raises:
        ValueError: there is no such level, or this processor lacks it.
    """
    if library.ck_select_level(level.encode()):
        raise ValueError(
            f"COMMKIT_CPU={level!r}: no such instruction set on this processor; use one of {', '.join(LEVELS)}"
        )


def open_library(
    path: Path, version: str, interface: int, signatures: Signatures
) -> tuple[ctypes.CDLL | None, str]:
    """The library at ``path``, whose function ``version`` says ``interface``; or None and why not."""
    if not path.exists():
        return None, f"{path.name} was not built"
    try:
        library = ctypes.CDLL(str(path))  # whose calls release the GIL
        if getattr(library, version)() != interface:
            return None, f"{path.name} is of another version; install commkit again"
        for name, (arguments, result) in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    return library, ""
