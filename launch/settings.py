"""What a run can be told. Every default is here, so that a recipe in ``configs/`` is a few lines.

Unknown fields and wrong types are errors: nothing is converted or ignored silently.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16"]


class Section(BaseModel):
    """Base of every section: strict types, no unknown field, immutable once checked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSettings(Section):
    """Shape of the GPT; see :mod:`launch.gpt`."""

    layers: PositiveInt = 4
    heads: PositiveInt = 4
    width: PositiveInt = 160  # features per position; must be a multiple of heads
    context: PositiveInt = 128  # bytes the model sees at once
    dropout: Fraction = 0.0

    @model_validator(mode="after")
    def heads_divide_width(self) -> "ModelSettings":
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, got width={self.width} and "
                f"heads={self.heads}; choose for example width={self.heads * 32}"
            )
        return self


class DigitsSettings(Section):
    """The network of ``task: digits``; see :mod:`launch.digits`."""

    width: PositiveInt = 32  # filters of the first convolution; the next have 2 and 4 times these


class DataSettings(Section):
    """Text to learn from; see :mod:`launch.data`."""

    path: str | None = None  # a file or a directory; none is Python's own standard library
    max_megabytes: PositiveFloat = 8.0  # a directory is read up to this much (10^6 bytes)


class OptimSettings(Section):
    """The optimizer. ``betas`` belong to AdamW, ``momentum`` to SGD."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 2e-3  # peak learning rate
    weight_decay: NonNegativeFloat = 0.1  # on matrices only, never on norms
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    momentum: Fraction = 0.9
    grad_clip: NonNegativeFloat = 1.0  # largest norm of the averaged gradient; 0 turns it off


class ScheduleSettings(Section):
    """Learning rate against step; see :mod:`launch.schedule`. Knows nothing of ``steps``."""

    warmup: NonNegativeInt = 30  # steps of linear warm-up
    length: PositiveInt = 300  # step at which the cosine has come down to min_lr
    min_lr: NonNegativeFloat = 2e-4  # kept from `length` on

    @model_validator(mode="after")
    def warmup_ends_before_length(self) -> "ScheduleSettings":
        if self.warmup >= self.length:
            raise ValueError(
                f"warmup must be shorter than length, got warmup={self.warmup} and "
                f"length={self.length}; lower schedule.warmup or raise schedule.length"
            )
        return self


class BatchSettings(Section):
    """Sequences in one optimizer step: ``per_rank * accumulate * world_size``."""

    per_rank: PositiveInt = 8  # sequences in one forward and backward
    accumulate: PositiveInt = 1  # backward passes before the gradients are sent


class CheckpointSettings(Section):
    every: NonNegativeInt = 25  # steps; 0 saves at the end only
    asynchronous: bool = False  # training goes on while one is written, at a copy of the state
    # At --resume with another number of ranks: all start from the mean residual, or refuse.
    on_world_size_change: Literal["mean", "error"] = "mean"


class EvalSettings(Section):
    """Validation on ``batches * batch_size`` fixed windows, the same for any world size."""

    every: NonNegativeInt = 0  # steps; 0 evaluates at the end only
    batches: PositiveInt = 16
    batch_size: PositiveInt = 16


class DebugSettings(Section):
    """What to check while training; see :class:`commkit.Debug`."""

    check_replicas_every: NonNegativeInt = 0  # steps; 0 is never
    wire_checksums: bool = False


class ElasticSettings(Section):
    """Workers that may be lost and joined by others, under ``python -m launch.members``; the fields of
    :class:`commkit.ElasticOptions` that runs differ in."""

    min_workers: PositiveInt = 1  # with fewer, the run saves and stops
    heartbeat_s: PositiveFloat = 0.5
    limit_s: PositiveFloat = 5.0  # without a sign of life, after which a worker is left out
    start_s: PositiveFloat = 300.0  # how long to wait for all at the start
    grace_s: NonNegativeFloat = 0.0  # how long too few wait for others
    step_limit_s: PositiveFloat | None = None


class DDPSettings(Section):
    """Handed to ``DistributedDataParallel`` as they are."""

    bucket_cap_mb: PositiveFloat = 25.0
    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = False


class FSDPSettings(Section):
    """How schemes for sharded models shard; see :mod:`launch.sharding`."""

    # Ranks that hold one replica; 0: those of a node if the scheme reduces between replicas, else all.
    shards: NonNegativeInt = 0
    # As for ``fully_shard``. A number of ranks keeps weights sharded among so many until backward has used them.
    reshard_after_forward: bool | PositiveInt = True


# Defaults that ``task: digits`` has of its own; fields given in a recipe go before them.
DIGITS_DEFAULTS: dict[str, dict[str, Any]] = {
    "optim": {"name": "sgd", "lr": 0.05, "weight_decay": 5e-4, "momentum": 0.9, "grad_clip": 0.0},
    "schedule": {"warmup": 10, "length": 300, "min_lr": 5e-4},
    "batch": {"per_rank": 32},
}


class TrainSettings(Section):
    """A whole run: one YAML file of ``configs/`` over these defaults."""

    task: Literal["gpt", "digits"] = "gpt"  # what is learnt: text, or handwritten digits
    seed: NonNegativeInt = 0
    steps: PositiveInt = 300  # when to stop; does not change the schedule
    max_seconds: PositiveFloat | None = None  # of training, after which a run stops before `steps`
    model: ModelSettings = ModelSettings()  # of gpt
    digits: DigitsSettings = DigitsSettings()
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    schedule: Annotated[ScheduleSettings, Field(validate_default=True)] = ScheduleSettings()
    batch: BatchSettings = BatchSettings()
    device: Device = "auto"  # cuda if there is a GPU for every rank of the machine, else cpu
    precision: Precision = "fp32"  # bf16 is autocast; weights stay float32
    checkpoint: CheckpointSettings = CheckpointSettings()
    eval: EvalSettings = EvalSettings()
    debug: DebugSettings = DebugSettings()
    elastic: ElasticSettings | None = None  # see :mod:`launch.elastic`
    ddp: DDPSettings = DDPSettings()
    fsdp: FSDPSettings = FSDPSettings()
    # Sinks of records besides metrics.jsonl; see :mod:`launch.sinks`.
    tensorboard: bool = False
    wandb: bool = False  # WANDB_PROJECT, WANDB_MODE ... say the rest
    opentelemetry: bool = False  # OTEL_EXPORTER_OTLP_ENDPOINT ... say the rest
    scheme: dict[str, Any]  # {name: ..., knobs}, handed to commkit.attach; or "torch:..."

    @model_validator(mode="before")
    @classmethod
    def task_brings_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("task") != "digits":
            return data
        merged = dict(data)
        for section, defaults in DIGITS_DEFAULTS.items():
            given = data.get(section, {})
            merged[section] = {**defaults, **given} if isinstance(given, dict) else given
        return merged

    @field_validator("scheme")
    @classmethod
    def scheme_has_a_name(cls, scheme: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(scheme.get("name"), str):
            raise ValueError(
                "scheme must be a mapping with a name, such as {name: powersgd, rank: 4}; "
                "`commkit schemes` lists the names"
            )
        return scheme

    @model_validator(mode="after")
    def density_warmup_ends(self) -> "TrainSettings":
        warmup, end = _density_warmup(self.scheme), max(self.steps, self.schedule.length)
        if warmup >= end:
            raise ValueError(
                f"scheme.warmup_steps must be shorter than the run, got {warmup} with steps={self.steps} "
                f"and schedule.length={self.schedule.length}, so that the wanted density is never "
                "reached; lower scheme.warmup_steps"
            )
        return self

    @field_validator("schedule")
    @classmethod
    def schedule_comes_down(
        cls, schedule: ScheduleSettings, info: ValidationInfo
    ) -> ScheduleSettings:
        optim = info.data.get("optim")  # missing if it is itself wrong
        if optim is not None and schedule.min_lr > optim.lr:
            raise ValueError(
                f"min_lr must not exceed optim.lr, got {schedule.min_lr} and {optim.lr}; "
                "lower schedule.min_lr"
            )
        return schedule


def _density_warmup(block: Any) -> int:
    """The longest ``warmup_steps`` of a scheme and of the parts it is composed of. That of ``options`` is another:
    it ends where local updates begin."""
    if not isinstance(block, dict):
        return 0
    own = block.get("warmup_steps", 0)
    parts = [value for key, value in block.items() if key != "options"]
    return max(own if isinstance(own, int) else 0, *map(_density_warmup, [None, *parts]))


# What may differ between a run and its resumption without making it another run.
RESUMABLE_CHANGES = frozenset(
    {
        "steps",
        "max_seconds",
        "batch",
        "checkpoint",
        "debug",
        "eval",
        "ddp",
        "elastic",
        "fsdp",
        "device",
        "tensorboard",
        "wandb",
        "opentelemetry",
    }
)
