"""What Lightning has that the other frameworks have not: the pair, two packages, accumulation, sharded models."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.adapters import problem
from tests.harness import run_ranks

from .launcher import pretend_torchrun
from .setups import STEPS, Net, adamw, batch

pytest.importorskip("lightning")
pytestmark = pytest.mark.timeout(240)

SIGN = {"name": "sign"}


def _module(package: str, sharded_by: Callable[[Any], DeviceMesh] | None = None) -> Any:
    pl = importlib.import_module(package)

    class Module(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.losses = problem.model(), []

        def configure_model(self) -> None:
            if sharded_by is not None:
                fully_shard(self.body, mesh=sharded_by(self))

        def training_step(self, number: torch.Tensor, index: int) -> torch.Tensor:
            at = self.trainer.fit_loop.total_batch_idx
            return Net.forward(self, *batch(at, self.global_rank))  # type: ignore[arg-type]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.parameters())

    return Module()


def _trainer(package: str, callbacks: list[Any], strategy: Any = "ddp", **options: Any) -> Any:
    pl = importlib.import_module(package)
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **({"logger": False, "max_steps": STEPS, "enable_checkpointing": False} | options),
    )


def _fit(trainer: Any, module: Any, **options: Any) -> torch.Tensor:
    numbers = torch.utils.data.DataLoader(list(range(STEPS)), batch_size=None)
    trainer.fit(module, numbers, **options)
    return problem.parameters(module)


def _callback(package: str = "lightning.pytorch") -> torch.Tensor:
    ours = importlib.import_module(f"commkit.{package.partition('.')[0]}")
    return _fit(_trainer(package, [ours.CommkitCallback(SIGN)]), _module(package))


def _pair(registers: bool, with_callback: bool) -> torch.Tensor:
    """``registers``: as Lightning does on GPUs."""
    from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook as register
    from lightning.pytorch.strategies import DDPStrategy

    from commkit.lightning import CommkitCallback, ddp_comm

    class OnGPU(DDPStrategy):
        def _register_ddp_hooks(self) -> None:
            register(self.model, self._ddp_comm_state, self._ddp_comm_hook)

    state, hook = ddp_comm(SIGN)
    strategy = (OnGPU if registers else DDPStrategy)(ddp_comm_state=state, ddp_comm_hook=hook)
    callbacks = [CommkitCallback(state)] if with_callback else []
    return _fit(_trainer("lightning.pytorch", callbacks, strategy), _module("lightning.pytorch"))


def _accumulated() -> tuple[list[float], list[float]]:
    """(bytes in the log after each step, their total)."""
    from lightning.pytorch.loggers.logger import DummyLogger

    from commkit.lightning import CommkitCallback

    class Kept(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.records: list[dict[str, float]] = []

        def log_metrics(self, metrics: Any, step: int | None = None, **_: Any) -> None:
            self.records.append(dict(metrics))

    logger = Kept()
    options = {"accumulate_grad_batches": 2, "max_steps": 4, "log_every_n_steps": 1}
    trainer = _trainer("lightning.pytorch", [CommkitCallback(SIGN)], logger=logger, **options)
    _fit(trainer, _module("lightning.pytorch"))
    records = [r for r in logger.records if "commkit/wire_bytes" in r]
    return (
        [r["commkit/wire_bytes"] for r in records],
        [r["commkit/total_wire_bytes"] for r in records],
    )


def _sharded(
    directory: str, sharded_by: Callable[[Any], DeviceMesh], **scheme: Any
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Weights after all steps, the same after a checkpoint on the way, and bytes."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy

    from commkit.lightning import CommkitCallback

    ends, sent = [], 0
    for resumed in (False, True):
        callback = CommkitCallback(**scheme)
        saving = ModelCheckpoint(directory, "{step}", every_n_train_steps=5)
        trainer = _trainer(
            "lightning.pytorch",
            [callback] if resumed else [callback, saving],
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            enable_checkpointing=not resumed,
        )
        module = _module("lightning.pytorch", sharded_by)
        _fit(trainer, module, ckpt_path=f"{directory}/step=5.ckpt" if resumed else None)
        weights = [p.full_tensor().reshape(-1) for p in module.parameters()]
        ends.append(torch.cat(weights).detach())
        sent = callback.handle.last_step.wire_bytes  # type: ignore[union-attr]
    return ends[0], ends[1], sent


def _sharded_over_all(directory: str) -> Any:
    over_all = lambda module: module.device_mesh["data_parallel"]
    return _sharded(directory, over_all, scheme="qsdp", min_numel=100)


def _replicas_of_one_shard(directory: str) -> Any:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return _sharded(directory, lambda module: mesh["shard"], scheme="sign", mesh=lambda: mesh)


def _all(rank: int, world_size: int) -> dict[str, Any]:
    pretend_torchrun(rank, world_size)
    warnings.simplefilter("ignore")
    told: dict[str, Any] = {}
    directory = [tempfile.mkdtemp()]
    dist.broadcast_object_list(directory, src=0)
    cases: dict[str, Callable[[], Any]] = {
        "lightning": _callback,
        "pytorch_lightning": lambda: _callback("pytorch_lightning"),
        "pair on a GPU": lambda: _pair(registers=True, with_callback=False),
        "pair on a GPU, with callback": lambda: _pair(registers=True, with_callback=True),
        "pair on a CPU, with callback": lambda: _pair(registers=False, with_callback=True),
        "accumulated": _accumulated,
        "sharded": lambda: _sharded_over_all(f"{directory[0]}/sharded"),
        "replicas": lambda: _replicas_of_one_shard(f"{directory[0]}/replicas"),
    }
    for name, case in cases.items():
        told[name] = case()
        dist.barrier()
    return told


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """By rank; run once, whether it fails or not."""
    return run_ranks(_all, 2, deadline_s=200.0)


@pytest.mark.parametrize(
    "way",
    [
        "pytorch_lightning",
        "pair on a GPU",
        "pair on a GPU, with callback",
        "pair on a CPU, with callback",
    ],
)
def test_all_ways_to_give_a_scheme_give_the_same_bits(told: list[dict[str, Any]], way: str) -> None:
    for of_rank in told:
        assert torch.equal(of_rank["lightning"], of_rank[way])


def test_micro_batches_are_sent_once_and_counted_once(told: list[dict[str, Any]]) -> None:
    for of_rank in told:
        sent, total = of_rank["accumulated"]
        assert len(sent) == 4
        assert len(set(sent)) == 1
        assert total == [sum(sent[: n + 1]) for n in range(4)]


@pytest.mark.parametrize("layout", ["sharded", "replicas"])
def test_a_sharded_model_resumes_bit_for_bit(told: list[dict[str, Any]], layout: str) -> None:
    for of_rank in told:
        whole, resumed, sent = of_rank[layout]
        assert torch.equal(whole, resumed)
        assert sent > 0
