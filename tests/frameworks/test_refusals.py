"""What cannot work is refused where it is given, on every rank, with a remedy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import commkit
from commkit.adapters.frameworks import Requirement
from tests.adapters import problem
from tests.harness import run_ranks

from .launcher import pretend_torchrun
from .setups import SETUPS, Net, adamw, batch, onebit_adam

ROOT = Path(__file__).resolve().parents[2]


def _said(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _accelerate() -> dict[str, str]:
    from accelerate import Accelerator
    from accelerate.utils import DDPCommunicationHookType

    from commkit.accelerate import SchemeKwargs

    def prepared(scheme: Any, optimizer: Any = adamw) -> tuple[Any, ...]:
        kwargs = SchemeKwargs(scheme=scheme)
        accelerator = Accelerator(cpu=True, kwargs_handlers=[kwargs])
        net = Net()
        model, optimizer = accelerator.prepare(net, optimizer(net.parameters()))
        return kwargs, accelerator, model, optimizer

    def not_attached() -> None:
        _, accelerator, model, _ = prepared(SETUPS["diloco"].scheme)
        accelerator.backward(model(*batch(0, dist.get_rank())))

    def underneath() -> None:
        _, accelerator, model, optimizer = prepared(None)
        SchemeKwargs(scheme="diloco").attach(accelerator, model, optimizer)

    def both() -> None:
        _, accelerator, model, optimizer = prepared(None, onebit_adam)
        SchemeKwargs(scheme="int8").attach(accelerator, model, optimizer)

    def neither() -> None:
        kwargs, accelerator, model, optimizer = prepared(None)
        kwargs.attach(accelerator, model, optimizer)

    def twice() -> None:
        _, accelerator, _, _ = prepared("int8")
        accelerator.prepare(Net())

    def without_state() -> None:
        kwargs, accelerator, model, optimizer = prepared("int8")
        kwargs.attach(accelerator, model, optimizer)
        directory = [tempfile.mkdtemp()]
        dist.broadcast_object_list(directory, src=0)
        plain = Accelerator(cpu=True)
        other = Net()
        plain.prepare(other, adamw(other.parameters()))
        plain.save_state(directory[0])
        dist.barrier()
        accelerator.load_state(directory[0])

    return {
        "comm_hook": _said(
            lambda: SchemeKwargs(scheme="int8", comm_hook=DDPCommunicationHookType.FP16)
        ),
        "scheme": _said(lambda: SchemeKwargs(scheme={"name": "powersgd", "rnk": 2})),
        "on_resize": _said(lambda: SchemeKwargs(scheme="int8", on_resize="drop")),
        "optimizer scheme": _said(lambda: prepared("onebit_adam")),
        "not attached": _said(not_attached),
        "underneath": _said(underneath),
        "both": _said(both),
        "neither": _said(neither),
        "twice": _said(twice),
        "without state": _said(without_state),
    }


def _lightning() -> dict[str, str]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from commkit.lightning import CommkitCallback, LocalUpdatesStrategy, ddp_comm

    class Module(LightningModule):
        def __init__(self, optimizers: int = 1) -> None:
            super().__init__()
            self.body, self.losses, self.count = problem.model(), [], optimizers
            self.automatic_optimization = optimizers == 1

        def training_step(self, number: torch.Tensor, index: int) -> torch.Tensor:
            return Net.forward(self, *batch(self.global_step, self.global_rank))  # type: ignore[arg-type]

        def configure_optimizers(self) -> Any:
            made = [adamw(self.parameters()) for _ in range(self.count)]
            return made if self.count > 1 else made[0]

    def trainer(callbacks: list[Any], strategy: Any = "ddp", steps: int = 2) -> Any:
        return Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_steps=steps,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )

    numbers = torch.utils.data.DataLoader([0, 1], batch_size=None)

    def fit(callback: Any, strategy: Any = "ddp", module: Any = None) -> str:
        return _said(lambda: trainer([callback], strategy).fit(module or Module(), numbers))

    def without_state() -> None:
        directory = [tempfile.mkdtemp()]
        dist.broadcast_object_list(directory, src=0)
        plain = trainer([], steps=1)
        plain.fit(Module(), numbers)
        plain.save_checkpoint(f"{directory[0]}/plain.ckpt")
        trainer([CommkitCallback("int8")]).fit(
            Module(), numbers, ckpt_path=f"{directory[0]}/plain.ckpt"
        )

    return {
        "hook": fit(CommkitCallback("int8"), DDPStrategy(ddp_comm_hook=fp16_compress_hook)),
        "underneath": fit(CommkitCallback("diloco")),
        "unwrapped": fit(CommkitCallback("int8"), LocalUpdatesStrategy()),
        "optimizers": fit(CommkitCallback("int8"), module=Module(optimizers=2)),
        "neither": fit(CommkitCallback()),
        "adloco": _said(lambda: CommkitCallback("adloco")),
        "knobs of a pair": _said(lambda: CommkitCallback(ddp_comm("powersgd")[0], rank=2)),
        "pair": _said(lambda: ddp_comm("diloco")),
        "options": _said(lambda: LocalUpdatesStrategy(find_unused_parameters=True)),
        "without state": _said(without_state),
    }


def _huggingface() -> dict[str, str]:
    from transformers import TrainingArguments

    from commkit.huggingface import Trainer

    class Model(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return {"loss": super().forward(x, y)}

    def trainer(scheme: Any, optimizer: Any = adamw) -> Any:
        net = Model()
        x, y = batch(0, 0)
        rows = [{"x": x[i], "y": y[i]} for i in range(len(x))]
        arguments = TrainingArguments(
            tempfile.mkdtemp(),
            use_cpu=True,
            max_steps=1,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        return Trainer(
            model=net,
            args=arguments,
            train_dataset=rows,
            scheme=scheme,
            optimizers=(optimizer(net.parameters()), None),
        )

    return {
        "adloco": _said(lambda: trainer("adloco")),
        "two optimizers": _said(lambda: trainer("onebit_adam")),
        "neither": _said(lambda: trainer(None).train()),
        "both": _said(lambda: trainer("int8", onebit_adam).train()),
    }


def _all(rank: int, world_size: int) -> dict[str, str]:
    pretend_torchrun(rank, world_size)
    warnings.simplefilter("ignore")
    said: dict[str, str] = {}
    for name, cases in {
        "accelerate": _accelerate,
        "lightning": _lightning,
        "huggingface": _huggingface,
    }.items():
        said |= {f"{name}: {what}": text for what, text in cases().items()}
        dist.barrier()
    net = DistributedDataParallel(Net())
    net.register_comm_hook(None, fp16_compress_hook)
    said["two hooks"] = _said(lambda: commkit.attach(net, "int8"))
    return said


EXPECTED = {
    "accelerate: comm_hook": "leave comm_hook out",
    "accelerate: scheme": "ConfigError: scheme.rnk: unknown field",
    "accelerate: on_resize": "on_resize='drop' must be",
    "accelerate: optimizer scheme": "is an optimizer; build it and attach that",
    "accelerate: not attached": "attach(accelerator, model, optimizer) after accelerator.prepare",
    "accelerate: underneath": "averages the gradients of replicas that are to train alone; give the scheme to Accelerator",
    "accelerate: both": "would both reduce the gradients",
    "accelerate: neither": "AdamW does not communicate; give a scheme",
    "accelerate: twice": "SchemeKwargs serves one model",
    "accelerate: without state": "Number of custom checkpoints",
    "lightning: hook": "DDPStrategy has ddp_comm_hook=fp16_compress_hook, and DDP takes one hook only",
    "lightning: underneath": "Trainer(strategy=commkit.lightning.LocalUpdatesStrategy())",
    "lightning: unwrapped": "use Trainer(strategy='ddp')",
    "lightning: optimizers": "give exactly one",
    "lightning: neither": "AdamW does not communicate; give a scheme",
    "lightning: adloco": "sets the number of micro-batches",
    "lightning: knobs of a pair": "belong into ddp_comm()",
    "lightning: pair": "it reduces no gradients",
    "lightning: options": "['find_unused_parameters'] have no effect",
    "lightning: without state": "was saved without CommkitCallback",
    "huggingface: adloco": "decides what happens inside a step",
    "huggingface: two optimizers": "give commkit.optim.OneBitAdam as optimizers=(optimizer, None)",
    "huggingface: neither": "AdamW does not communicate; give a scheme",
    "huggingface: both": "would both reduce the gradients",
    "two hooks": "has a communication hook already, fp16_compress_hook; register one only",
}


@pytest.mark.timeout(240)
def test_what_cannot_work_is_refused_with_a_remedy() -> None:
    for said in run_ranks(_all, 2, deadline_s=200.0):
        assert said.keys() == EXPECTED.keys()
        for case, text in EXPECTED.items():
            assert text in said[case], f"{case}: {said[case]}"


def test_a_version_outside_the_range_is_named_with_the_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.0.1")
    with pytest.raises(
        RuntimeError, match=r"lightning 2\.0\.1 is outside .*>=2\.4,<3; pip install"
    ):
        Requirement("lightning", "2.4", "3", "lightning").check()


def test_prereleases_of_a_version_inside_the_range_are_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.10.0.dev1")
    Requirement("lightning", "2.4", "3", "lightning").check()


def test_commkit_needs_no_framework_and_says_which_extra_brings_one() -> None:
    program = """
        import sys
        for name in ("lightning", "pytorch_lightning", "accelerate", "transformers"):
            sys.modules[name] = None
        import commkit
        for name in ("lightning", "pytorch_lightning", "accelerate", "huggingface"):
            try:
                __import__(f"commkit.{name}")
            except ModuleNotFoundError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [
        f"this part of commkit needs {package}; pip install 'commkit[{extra}]'"
        for package, extra in (
            ("lightning", "lightning"),
            ("pytorch-lightning", "lightning"),
            ("accelerate", "accelerate"),
            ("transformers", "transformers"),
        )
    ]


def test_a_single_process_has_nobody_to_reduce_with() -> None:
    from commkit.accelerate import SchemeKwargs

    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="single process; start the script with torchrun"):
        SchemeKwargs(scheme="int8").connect(Net(), None)
