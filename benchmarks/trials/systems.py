"""The systems of the convergence table. A scheme that this version does not have is reported as such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trials.tasks import TASKS, Inner

Recipe = Mapping[str, Any]
RANKS = (2, 4)


@dataclass(frozen=True)
class System:
    """One row.

    Args:
        name: of the row.
        scheme: the recipe's ``scheme`` block.
        inner: the optimizer, and so the dense row that it is compared with: one, or one for each task.
        overrides: of the recipe, by task; mappings are merged, so ``{"scheme": {"rank": 8}}`` changes one knob.
        lr: by task, if it cannot be that of dense training.
        sweep: by task, the learning rates that ``--tune`` tries if not those of dense training.
        outer_sweep: fields of the scheme that ``--tune`` tries, if it trains with local updates.
        ranks: with how many it is worth a row.
        tasks: on which.
        note: what a reader should know.
    """

    name: str
    scheme: Recipe
    inner: Inner | Mapping[str, Inner]
    overrides: Mapping[str, Recipe] = field(default_factory=dict)
    lr: Mapping[str, float] = field(default_factory=dict)
    sweep: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    outer_sweep: tuple[Recipe, ...] = ()
    ranks: tuple[int, ...] = RANKS
    tasks: tuple[str, ...] = ("gpt", "digits")
    note: str = ""

    def inner_of(self, task: str) -> Inner:
        return self.inner if isinstance(self.inner, str) else self.inner[task]


DENSE = "dense-"  # and the inner optimizer: the rows that others are compared with
# What most people train such a task with.
USUAL: Mapping[str, Inner] = {"gpt": "adamw", "digits": "sgd"}
# In steps of lr per parameter, as of AdamW, because the update is a vector of signs.
_SIGN_LR = {"gpt": 1e-3, "digits": 4e-3}
_SIGN_SWEEP = {task: (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3) for task in ("gpt", "digits")}


def clips(**knobs: Any) -> dict[str, Recipe]:
    """On the GPT, whose training clips: the scheme does it by ``knobs``, before anything is saved up for later, and
    nothing that has arrived is cut."""
    return {"gpt": {"scheme": knobs, "optim": {"grad_clip": 0.0}}}


def both(**sections: Any) -> dict[str, Recipe]:
    """The same overrides for both tasks."""
    return {"gpt": sections, "digits": sections}


_CLIPS_FIRST = clips(max_grad_norm=1.0)
_DGC_CLIPS = clips(clip_norm=1.0)
# Nothing that these send has a norm to clip.
_NO_CLIPPING = {"gpt": {"optim": {"grad_clip": 0.0}}}


SYSTEMS: tuple[System, ...] = (
    System(f"{DENSE}adamw", {"name": "ddp"}, "adamw"),
    System(f"{DENSE}sgd", {"name": "ddp"}, "sgd"),
    System("fp16", {"name": "fp16"}, USUAL),
    System("bf16", {"name": "bf16"}, USUAL),
    System("int8", {"name": "int8"}, USUAL),
    System("dynamic8", {"name": "dynamic8"}, USUAL),
    System("natural", {"name": "natural"}, USUAL),
    System("int4", {"name": "int4"}, USUAL),
    System("qsgd", {"name": "qsgd"}, USUAL, note="4 bits"),
    System("terngrad", {"name": "terngrad"}, "sgd"),
    System(
        "sign",
        {"name": "sign"},
        "sgd",
        overrides=_CLIPS_FIRST,
        note="EF-signSGD; on the GPT neither clipping nor 0.25 to 4 times the lr mends it",
    ),
    System(
        "signsgd_vote",
        {"name": "signsgd_vote", "momentum": 0.9},
        "sgd",
        overrides=both(optim={"momentum": 0.0, "weight_decay": 0.0, "grad_clip": 0.0}),
        lr=_SIGN_LR,
        sweep=_SIGN_SWEEP,
        note="own lr; momentum before the vote, none in SGD",
    ),
    System(
        "topk",
        {"name": "topk", "density": 0.01},
        "sgd",
        overrides=_CLIPS_FIRST,
        note="neither momentum correction nor a warm-up: dgc_99 is this density with both",
    ),
    System(
        "randomk",
        {"name": "randomk", "density": 0.1},
        "sgd",
        overrides=_CLIPS_FIRST,
        note="on the GPT neither clipping nor 0.25 to 4 times the lr mends it",
    ),
    System(
        "ef21",
        {"name": "ef21", "density": 0.1, "momentum": 0.1},
        "sgd",
        overrides={
            "gpt": {
                "scheme": {"max_grad_norm": 1.0},
                "optim": {"momentum": 0.0, "grad_clip": 0.0},
            },
            "digits": {"optim": {"momentum": 0.0}},
        },
        lr={task: 10 * TASKS[task].lr["sgd"] for task in ("gpt", "digits")},
        sweep={
            task: tuple(10 * lr for lr in TASKS[task].sweep["sgd"]) for task in ("gpt", "digits")
        },
        note="momentum as a mean inside the scheme, none in SGD, so 10 times the lr is the same step; no dense warm-up",
    ),
    System(
        "econtrol",
        {"name": "econtrol", "density": 0.1},
        "sgd",
        overrides=_CLIPS_FIRST,
        note="made for ranks with data of their own (heterogeneous.py); here they draw from one text, and it has no "
        "momentum correction",
    ),
    System(
        "dgc",
        {"name": "dgc", "density": 0.001, "warmup_steps": 100},
        "sgd",
        overrides=_DGC_CLIPS,
        note="99.9 % sparse after 100 steps of warm-up: an element then waits for longer than the run lasts",
    ),
    System(
        "dgc_99",
        {"name": "dgc", "density": 0.01, "warmup_steps": 60},
        "sgd",
        overrides=_DGC_CLIPS,
        note="99 % sparse after 60 steps of warm-up, for a run as short as this",
    ),
    System(
        "powersgd",
        {"name": "powersgd", "rank": 4},
        "sgd",
        overrides=clips(max_grad_norm=1.0, start_step=30),
        note="with SGD, as in the paper; on the GPT dense while the learning rate warms up",
    ),
    System(
        "powersgd_adamw",
        {"name": "powersgd", "rank": 4},
        "adamw",
        overrides=clips(max_grad_norm=1.0, start_step=60),
        tasks=("gpt",),
        note="dense while the learning rate warms up; matrices of 64 rows in rank 4",
    ),
    System(
        "hierarchical",
        {"name": "hierarchical", "scheme": {"name": "powersgd", "rank": 4}, "local_size": 2},
        USUAL,
        overrides={
            "gpt": {
                "scheme": {"scheme": {"max_grad_norm": 1.0, "start_step": 60}},
                "optim": {"grad_clip": 0.0},
            }
        },
        ranks=(4,),
        note="nodes of 2 ranks, PowerSGD r4 between them; bytes of both levels; on the GPT with AdamW, as powersgd_adamw",
    ),
    System(
        "onebit_adam",
        {"name": "onebit_adam", "freeze_step": 60},
        "adamw",
        overrides=_CLIPS_FIRST,
        note="dense Adam for 60 steps; at half the lr it equals dense training on a tuning seed of the GPT",
    ),
    System(
        "zero_one_adam",
        {
            "name": "zero_one_adam",
            "var_freeze_step": 60,
            "local_step_scaler": 60,
            "local_step_clipper": 8,
        },
        "adamw",
        overrides=_NO_CLIPPING,
        note="signs from the first step, when the variance is not settled; 60 to 300 steps with up to 8 local ones, where "
        "the paper has thousands",
    ),
    System(
        "onebit_lamb",
        {"name": "onebit_lamb", "freeze_step": 60},
        "adamw",
        overrides=_CLIPS_FIRST,
        lr={"gpt": 3.2e-2, "digits": 1.6e-2},
        sweep={task: (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2) for task in ("gpt", "digits")},
        note="own lr; LAMB, so dense AdamW is another algorithm; dense for 60 steps",
    ),
    System(
        "demo",
        {"name": "demo"},
        "adamw",
        overrides=_NO_CLIPPING,
        lr={"gpt": 4e-3, "digits": 4e-3},
        sweep=_SIGN_SWEEP,
        note="own lr; 2 or 4 ranks send 32 of 4096 coefficients each, where the paper's 64 cover half of them",
    ),
    System(
        "demo_512",
        {"name": "demo", "top_k": 512},
        "adamw",
        overrides=_NO_CLIPPING,
        lr={"gpt": 4e-3},
        sweep=_SIGN_SWEEP,
        ranks=(2,),
        tasks=("gpt",),
        note="own lr; as much of a tile from 2 ranks as from 32 with the default",
    ),
)
