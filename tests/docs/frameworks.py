"""What the frameworks' pages take for granted, on ranks such as their launchers start."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from .everyday import WIDTH, Net, everyday

NAMES = ("accelerate", "deepspeed", "lightning", "torchft", "transformers")
RANKS = 2
_kept: list[Any] = []  # what has to live as long as the process


def prepare(rank: int, world_size: int) -> None:
    """This process as a launcher would have started it."""
    from tests.deepspeed import world
    from tests.frameworks.launcher import pretend_torchrun

    pretend_torchrun(rank, world_size)
    world.prepare(rank, world_size)
    world.allow_fp16()
    os.environ["WANDB_MODE"] = "disabled"


def accelerate() -> dict[str, Callable[[], Any]]:
    from accelerate import Accelerator

    from commkit.accelerate import SchemeKwargs

    return everyday() | {
        "Accelerator": lambda: partial(Accelerator, cpu=True),
        "SchemeKwargs": lambda: SchemeKwargs,
    }


def lightning() -> dict[str, Callable[[], Any]]:
    import lightning as L

    from commkit.lightning import CommkitCallback

    class Learner(L.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = partial(
        L.Trainer,
        accelerator="cpu",
        devices=RANKS,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return everyday() | {
        "L": lambda: SimpleNamespace(Trainer=trainer, LightningModule=Learner),
        "Trainer": lambda: trainer,
        "CommkitCallback": lambda: CommkitCallback,
        "module": Learner,
        "loader": lambda: DataLoader(torch.ones(8, WIDTH), batch_size=2),  # type: ignore[arg-type]
    }


def huggingface() -> dict[str, Callable[[], Any]]:
    from transformers import Seq2SeqTrainingArguments

    class Model(Net):
        def forward(self, x: Tensor) -> Any:
            return {"loss": super().forward(x)}

    arguments = partial(
        Seq2SeqTrainingArguments,
        "out-of-args",
        max_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return everyday() | {
        "model": Model,
        "args": arguments,
        "data": lambda: [{"x": torch.ones(WIDTH)} for _ in range(64)],
    }


def deepspeed() -> dict[str, Callable[[], Any]]:
    import commkit.deepspeed

    batches = [torch.ones(2, WIDTH) for _ in range(2)]
    return everyday() | {
        "commkit": lambda: commkit,
        "args": lambda: SimpleNamespace(deepspeed_config="ds_config.json"),
        "batches": lambda: batches,
        "batch": lambda: batches[0],
    }


def a_deepspeed_engine() -> dict[str, Callable[[], Any]]:
    from tests.deepspeed import world

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    engine = world.engine_of(net, world.config(commkit={"scheme": "sign"}), optimizer)
    return everyday() | {"engine": lambda: engine}


def torchft() -> dict[str, Callable[[], Any]]:
    """Both ranks are replicas of one process each."""
    from torchft.coordination import LighthouseServer

    lighthouse = None
    if dist.get_rank() == 0:
        lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=RANKS)
    told = [None if lighthouse is None else lighthouse.address().rpartition(":")[2]]
    dist.broadcast_object_list(told, src=0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _kept.extend((lighthouse, store))
    net = Net()
    here = {
        "rank": 0,
        "world_size": 1,
        "store_addr": "127.0.0.1",
        "store_port": store.port,
        "lighthouse_addr": f"http://127.0.0.1:{told[0]}",
        "replica_id": f"replica_{dist.get_rank()}",
        "hostname": "127.0.0.1",
    }
    return everyday() | {
        "here": lambda: here,
        "model": lambda: net,
        "optimizer": lambda: torch.optim.SGD(net.parameters(), lr=0.01),
        "state_dict": lambda: net.state_dict,
        "load_state_dict": lambda: net.load_state_dict,
        "batches": lambda: repeat(torch.ones(2, WIDTH)),
    }


def train_by(ds_config: dict[str, Any]) -> None:
    """One step by such a config, or by what it shows of one, which must have sent something."""
    import commkit.deepspeed

    net = Net()
    engine, *_ = commkit.deepspeed.initialize(
        model=net,
        model_parameters=net.parameters(),
        config={"train_micro_batch_size_per_gpu": 2, **ds_config},
    )
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.ones(2, WIDTH, dtype=dtype)))
    engine.step()
    assert engine.commkit.last_step.wire_bytes > 0
    engine.commkit.close()


GIVEN = {
    "accelerate": accelerate,
    "lightning": lightning,
    "huggingface": huggingface,
    "deepspeed": deepspeed,
    "a deepspeed engine": a_deepspeed_engine,
    "torchft": torchft,
}
