"""The systems for sharded models, in the convergence table's own terms: 4 ranks that hold one model together."""

from __future__ import annotations

from typing import Any

from trials.systems import DENSE, USUAL, System


def _row(row: str, note: str = "", /, **scheme: Any) -> System:
    # Of a model this small most would pass as too small to compress.
    knobs = {"min_numel": 256} if scheme["name"] != "hsdp" else {}
    return System(row, {**scheme, **knobs}, USUAL, ranks=(4,), note=note)


SHARDED_SYSTEMS: tuple[System, ...] = (
    # FSDP itself, bit for bit, with its bytes counted; gloo's scatter moves twice its ideal.
    System(
        f"{DENSE}adamw",
        {"name": "qsdp", "weight_bits": 32, "gradient_bits": 32},
        "adamw",
        ranks=(4,),
        tasks=("gpt",),
        note="FSDP",
    ),
    System(
        f"{DENSE}sgd",
        {"name": "qsdp", "weight_bits": 32, "gradient_bits": 32},
        "sgd",
        ranks=(4,),
        tasks=("digits",),
        note="FSDP",
    ),
    _row("qsdp_w8g8", name="qsdp"),
    _row("qsdp_w8g4", "", name="qsdp", gradient_bits=4),
    _row("qsdp_w8g4_learned", "learned levels", name="qsdp", gradient_bits=4, levels="learned"),
    _row(
        "qsdp_w8g4_feedback",
        "error feedback of whole gradients",
        name="qsdp",
        gradient_bits=4,
        feedback="error_feedback",
    ),
    _row("qsdp_w4g8", "", name="qsdp", weight_bits=4),
    _row("zeropp", "nodes of 2 ranks; 8 bits and 4", name="zeropp", local_size=2),
)
