"""What is installed, and what every scheme costs: measured, not written down."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn, get_type_hints

import torch
import torch.distributed as dist

from .config import ConfigError
from .cost.run import MEASURED_WITH, STEPS, run_rounds, run_sharded, run_steps
from .ops import OPS, native
from .optim import OptimizerScheme
from .outer import AsyncScheme, OuterScheme
from .reducer import Reducer
from .registry import lookup, names
from .runtime.codec import Codec
from .schemes import make_scheme
from .sharded import PartitionScheme, ShardedScheme
from .sim import ThreadComm, ThreadNetwork, run_threads
from .straggler import Share, StragglerScheme
from .version import __version__

SIDE = 1000  # the tensor that schemes are measured on has SIDE x SIDE elements: a million
_PAPER = re.compile(r"\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)")
_WRAPPERS = {"ddp": "DDP", "fsdp2": "FSDP2", "deepspeed": "DeepSpeed"}
_WORKS_WITH: dict[str, tuple[str, ...]] = {
    "round": ("plain module",),
    "task": ("plain module",),
    "step of FSDP": ("FSDP2",),
    "": ("Python alone",),
}
_REQUIRED = ("torch", "numpy", "pydantic", "PyYAML")
_OPTIONAL = (
    *(
        "torchdata",
        "tqdm",
        "tyro",
        "matplotlib",
        "scikit-learn",
        "mpi4py",
        "deepspeed",
        "lightning",
    ),
    *(
        "accelerate",
        "transformers",
        "torchft",
        "tensorboard",
        "wandb",
        "opentelemetry-sdk",
        "simpy",
    ),
)


@dataclass(frozen=True)
class SchemeCard:
    """One scheme.

    Args:
        name: as in ``scheme: {name: ...}``.
        description: the first sentence of its docstring.
        paper: that the docstring cites; empty if none.
        wrappers: what it can be attached to.
        every: what payload_bytes and wire_bytes are sent in, "step", "round", "task" of a worker and its server, or
            "step of FSDP", which gathers weights (twice, but for three_level) and scatters gradients; empty if nothing is sent.
        payload_bytes: per step or round and million float32 parameters, mean of two ranks; None if the
            scheme cannot be built without knobs.
        wire_bytes: sent for that.
        state_bytes: per parameter, between steps, mean of two ranks.
        rounds: collectives of a rank in that step or round; None where it sends messages to one other.
    """

    name: str
    description: str
    paper: str
    wrappers: tuple[str, ...]
    every: str
    payload_bytes: int | None
    wire_bytes: int | None
    state_bytes: float | None
    rounds: int | None


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
        "kernels": kernels("cpu"),
        **({"CUDA kernels": kernels("cuda")} if torch.cuda.device_count() else {}),
    }


def kernels(device_type: str) -> dict[str, str]:
    """Which kernel serves each operator on "cpu" or "cuda": the pure-torch reference or a compiled one."""
    compiled = native.served(device_type)
    return {
        name: "compiled" if name in compiled else "pure-torch reference" for name in sorted(OPS)
    }


def _card(name: str) -> SchemeCard:
    text = " ".join((inspect.getdoc(lookup("scheme", name)) or "").split("\n\n")[0].split())
    paper = _PAPER.search(text)
    sentence, _, _ = _PAPER.sub("", text).partition(". ")
    cost = _measure(name)
    return SchemeCard(
        name=name,
        description=re.sub(r"\s+([,.:;])", r"\1", sentence).strip().rstrip(":."),
        paper=paper[1] if paper else "",
        wrappers=_WORKS_WITH[cost.every] if cost.every in _WORKS_WITH else wrappers(),
        every=cost.every,
        payload_bytes=cost.payload_bytes,
        wire_bytes=cost.wire_bytes,
        state_bytes=cost.state_bytes,
        rounds=cost.rounds,
    )


@dataclass(frozen=True)
class _Cost:
    """As in :class:`SchemeCard`; None without usable defaults."""

    every: str = "step"
    payload_bytes: int | None = None
    wire_bytes: int | None = None
    state_bytes: float | None = None
    rounds: int | None = None


def _measure(name: str) -> _Cost:
    returns = get_type_hints(lookup("scheme", name))["return"]
    if returns is NoReturn:
        return _Cost("")  # a name that says where else to look
    try:
        made = make_scheme(name, MEASURED_WITH.get(name))
    except ConfigError:  # a scheme that has to be told its parts
        return _Cost("step of FSDP" if returns is ShardedScheme else "step")
    if isinstance(made, AsyncScheme):
        return _measure_task(made)
    if isinstance(made, StragglerScheme):
        return _measure_workers(made)
    if isinstance(made, ShardedScheme | PartitionScheme):
        gathers = 2 if isinstance(made, ShardedScheme) else 1
        if isinstance(made, PartitionScheme):  # between its slowest two ranks
            axis = made.tiers[-1]
            made = ShardedScheme(made.weights.get(axis), made.gradients.get(axis))
        payload, wire, rounds = run_threads(partial(_measure_sharded, made, gathers), world_size=2)[
            0
        ]
        return _Cost("step of FSDP", payload, wire, 0.0, rounds)
    measure = _measure_method if isinstance(made, OuterScheme) else _measure_rank
    # Servers hold shards of unequal size: take the mean.
    told = run_threads(partial(measure, name), world_size=2)
    payload, wire, state, rounds = (sum(column) / len(told) for column in zip(*told, strict=True))
    every = "round" if isinstance(made, OuterScheme) else "step"
    return _Cost(every, round(payload), round(wire), state, round(rounds))


def _measure_task(scheme: AsyncScheme) -> _Cost:
    """Of one server and one worker: the worker's push, and the weights that come back."""
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn(SIDE, SIDE, generator=generator)}
    codec, rule = (
        Codec(scheme.options.compressor, scheme.options.policy, scheme.options.seed, weights),
        copy.deepcopy(scheme.rule),
    )
    feedback = codec.feedback(None)
    rule.bind(weights, num_workers=1)
    for task in range(STEPS):
        delta = {"weight": torch.randn(SIDE, SIDE, generator=generator)}
        push = codec.encode(delta, list(weights), task, 1, feedback)
        feedback.commit(True)
        rule.push(codec.decode(push, list(weights), task))
    on_server = [x for what in ("weights", *rule.kept) for x in getattr(rule, what).values()]
    residuals = [x for x in feedback.state_dict().values() if x.ndim]
    on_worker = [*weights.values(), *residuals]  # where the task started from
    sent = round((_size(push) + _size(rule.weights.values())) / 2)
    return _Cost("task", sent, sent, _size([*on_server, *on_worker]) / 2 / SIDE**2)


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _measure_method(name: str, comm: ThreadComm) -> tuple[int, int, float, int]:
    """Of a method with local updates: what a round of the whole model sends."""
    side = SIDE // 2  # a million parameters in layers, which some methods cut the model into
    model = torch.nn.Sequential(*(torch.nn.Linear(side, side, bias=False) for _ in range(4)))
    made = make_scheme(name, MEASURED_WITH.get(name))
    assert isinstance(made, OuterScheme)
    ran = run_rounds(made, model, comm)
    return ran.payload_bytes, ran.wire_bytes, ran.state_bytes / SIDE**2, ran.rounds


def _measure_workers(made: StragglerScheme) -> _Cost:
    """Of a scheme with a coordinator: the most that one of two workers sends it in a round, and what they keep."""
    network = ThreadNetwork(2 + len(made.options.coordinators))
    batch = made.method.build(2).num_units

    def rank(comm: ThreadComm) -> tuple[int, int, int]:
        model = torch.nn.Linear(SIDE, SIDE, bias=False)
        mine = network.at(comm.rank)
        if comm.rank in made.options.coordinators:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            with made.coordinate([model], [optimizer], batch=batch, network=mine) as coordinator:
                coordinator.run(jobs=6)
            return 0, 0, 0
        before: dict[int, tuple[int, int]] = {}  # rounds

        def loss(share: Share) -> torch.Tensor:
            sent = worker.sent
            before.setdefault(worker.round, (sent.payload_bytes, sent.wire_bytes))
            rows = torch.Generator().manual_seed(share.seed)
            out: torch.Tensor = model(torch.randn(1, SIDE, generator=rows)).square().mean()
            return out

        with made.work(model, batch=batch, network=mine) as worker:
            worker.run(loss)
            state = sum(x.numel() * x.element_size() for x in worker.kept_tensors())
        at = list(before.values())
        payload, wire = max(((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(at)), default=(0, 0))
        return payload, wire, state

    payload, wire, state = max(run_threads(rank, network.world_size))
    return _Cost("round", payload, wire, state / SIDE**2)


def _measure_sharded(made: ShardedScheme, gathers: int, comm: ThreadComm) -> tuple[int, int, int]:
    """Of one parameter: its weights gathered, for forward and for backward or once, its gradient scattered."""
    made = dataclasses.replace(made, local_size=None if made.between is None else 1)
    ran = run_sharded(made, SIDE, gathers, comm)
    return ran.payload_bytes, ran.wire_bytes, ran.rounds


def _measure_rank(name: str, comm: ThreadComm) -> tuple[int, int, float, int]:
    made = make_scheme(name, MEASURED_WITH.get(name))
    assert isinstance(made, Reducer | OptimizerScheme)
    generator = torch.Generator().manual_seed(comm.rank)
    ran = run_steps(made, {"weight": torch.randn(SIDE, SIDE, generator=generator)}, comm)
    return ran.payload_bytes, ran.wire_bytes, ran.state_bytes / SIDE**2, ran.rounds


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
