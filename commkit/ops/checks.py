"""What an operator must be given, whichever kernel serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_sign_rows(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    check_floats("out", out)
    _check_rows("bits", bits, -(-out.numel() // 8), torch.uint8, out.device)
    _check("scales", scales, len(bits), out.dtype, out.device)


def check_compensation(
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    sent: Tensor | None,
    name: str = "gradient",
) -> None:
    """Residuals, of which ``sent`` was taken, and gradients, which have that name, with memory of their own."""
    if len(residuals) != len(gradients):
        raise ValueError(f"residuals has {len(residuals)} tensors for {len(gradients)} {name}s")
    for i, (residual, gradient) in enumerate(zip(residuals, gradients, strict=True)):
        place = f"[{i}]" if len(residuals) > 1 else ""
        n = gradient.numel()
        check_floats(name + place, gradient)
        _check("residual" + place, residual, n, _work_dtype(gradient.dtype), gradient.device)
        _check_apart("residual" + place, residual, {name + place: gradient})
    if sent is not None and residuals:
        _check("sent", sent, len(residuals), torch.float32, residuals[0].device)


def check_sums(sums: Sequence[Tensor], addends: Mapping[str, Sequence[Tensor]]) -> None:
    """Sums are written while their addends, by name and checked already, are read."""
    for name, each in addends.items():
        if len(sums) != len(each):
            raise ValueError(f"sums has {len(sums)} tensors for {len(each)} {name}")
        for i, (total, x) in enumerate(zip(sums, each, strict=True)):
            _check(f"sums[{i}]", total, x.numel(), _work_dtype(x.dtype), x.device)
            _check_apart(f"sums[{i}]", total, {f"{name}[{i}]": x})


def check_sign_output(bits: Tensor, scales: Tensor, name: str, xs: Sequence[Tensor]) -> None:
    """Room for the signs and the scales of ``xs``."""
    device = bits.device
    for i, x in enumerate(xs):
        check_floats(f"{name}[{i}]", x)
        if x.device != device:
            raise ValueError(f"{name}[{i}] is on {x.device} and must be on {device}, as bits is")
    _check("bits", bits, _sign_bytes(xs), torch.uint8, bits.device)
    _check("scales", scales, len(xs), torch.float32, bits.device)


def check_foreach_sign_rows(
    name: str, outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor
) -> None:
    device, dtype = scales.device, outs[0].dtype if outs else None
    for i, out in enumerate(outs):
        check_floats(f"{name}[{i}]", out)
        if out.dtype != dtype or out.device != device:
            raise ValueError(
                f"{name}[{i}] is of {out.dtype} on {out.device} and must be of {dtype} on {device}, as "
                f"{name}[0] and scales are"
            )
    _check_rows("bits", bits, _sign_bytes(outs), torch.uint8, scales.device)
    if scales.dtype != torch.float32:
        raise TypeError(f"scales is of {scales.dtype} and must be of {torch.float32}")
    if scales.shape != (len(bits), len(outs)):
        raise ValueError(
            f"scales has shape {tuple(scales.shape)} and must have {(len(bits), len(outs))}"
        )


def _check_apart(name: str, written: Tensor, read: Mapping[str, Tensor | None]) -> None:
    for other, x in read.items():
        if x is not None and written.numel() and written.data_ptr() == x.data_ptr():
            raise ValueError(f"{name} is the memory of {other}, and must have its own")


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sign_bytes(xs: Sequence[Tensor]) -> int:
    return sum((x.numel() + 7) // 8 for x in xs)


def check_block_rows(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    """``codes`` of so many bits per element, and scales per block."""
    check_floats("out", out)
    if bits not in (2, 4, 8):
        raise ValueError(f"bits={bits} must be 2, 4 or 8")
    check_block_size(block_size)
    if not 1 <= divisor < 2**24:  # beyond, float32 does not have every whole number
        raise ValueError(f"divisor={divisor} must be at least 1 and below 2^24")
    n = out.numel()
    _check_rows("codes", codes, -(-n * bits // 8), torch.uint8, out.device)
    _check_rows("scales", scales, -(-n // block_size), torch.float32, out.device)
    if len(codes) != len(scales):
        raise ValueError(f"scales has {len(scales)} tensors for {len(codes)} of codes")


def check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")


def check_floats(name: str, x: Tensor, dim: int = 1) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} is of {x.dtype} and must be of a floating dtype")
    if x.dim() != dim:
        remedy = f"; pass {name}.view(-1)" if dim == 1 else ""
        raise ValueError(f"{name} has shape {tuple(x.shape)} and must be {dim}-D{remedy}")


def check_alike(first: str, like: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """``others`` are of the work dtype, size and device of ``like``."""
    check_floats(first, like)
    dtype = _work_dtype(like.dtype)
    for name, x in others.items():
        if x is not None:
            _check(name, x, like.numel(), dtype, like.device)


def check_correction(
    u: Tensor, v: Tensor, g: Tensor, velocity: Tensor | None, unsent: Tensor | None
) -> None:
    """u and v are written while the others are read."""
    given = {"u": u, "v": v, "velocity": velocity, "unsent": unsent}
    check_alike("g", g, given)
    read = {"g": g, "velocity": velocity, "unsent": unsent}
    for name, x in (("u", u), ("v", v)):
        _check_apart(name, x, read if name == "v" else {"v": v, **read})


def check_tiles(
    out: Tensor,
    places: Sequence[Tensor],
    values: Sequence[Tensor],
    tall: Tensor,
    wide: Tensor,
    columns: int,
) -> None:
    check_floats("out", out)
    for name, basis in (("tall", tall), ("wide", wide)):
        if basis.dim() != 2 or basis.shape[0] != basis.shape[1]:
            raise ValueError(f"{name} has shape {tuple(basis.shape)} and must be square")
        if basis.dtype != out.dtype:
            raise TypeError(f"{name} is of {basis.dtype} and must be of {out.dtype}")
    size = tall.shape[0] * wide.shape[0]
    if columns < 1 or size == 0 or out.numel() % (size * columns):
        raise ValueError(f"columns={columns} of {size} elements do not divide {out.numel()}")
    if not places or len(places) != len(values):
        raise ValueError(f"places has {len(places)} tensors and values {len(values)}")
    for name, rows, dtype in (("places", places, torch.int16), ("values", values, out.dtype)):
        for i, row in enumerate(rows):
            if row.dtype != dtype:
                raise TypeError(f"{name}[{i}] is of {row.dtype} and must be of {dtype}")
            if row.shape != (out.numel() // size, places[0].shape[-1]):
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(row.shape)} and must have one row per tile"
                )


def check_k(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"k={k} must be from 0 to the {n} elements of a row")


def _check_rows(
    name: str, rows: Sequence[Tensor], numel: int, dtype: torch.dtype, device: torch.device
) -> None:
    if not rows:
        raise ValueError(f"{name} is empty and must have at least one tensor")
    for place, row in enumerate(rows):
        _check(f"{name}[{place}]", row, numel, dtype, device)


def _check(name: str, x: Tensor, numel: int, dtype: torch.dtype, device: torch.device) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} is of {x.dtype} and must be of {dtype}")
    if x.dim() != 1 or x.numel() != numel:
        raise ValueError(f"{name} has shape {tuple(x.shape)} and must have ({numel},)")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and must be on {device}")
