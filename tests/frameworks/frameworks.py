"""The same training through each framework: one function each.

To add a framework: write its function, which trains as ``run`` says and saves and resumes by the framework's own
checkpoint, and enter it in ``FRAMEWORKS``, with the schemes that it cannot serve in ``NOT_SERVED``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import commkit

from .setups import ROWS, SAVE_AT, STEPS, Net, Outcome, Run, Sent, Setup, batch


def plain(setup: Setup, run: Run) -> Outcome:
    """An ordinary loop with ``commkit.attach``: what the others are compared with."""
    net, sent = Net(), Sent()
    model: torch.nn.Module = net if setup.local else DistributedDataParallel(net)
    optimizer = setup.optimizer(net.parameters())
    handle: Any = (
        commkit.attach(model, optimizer)
        if setup.scheme is None
        else commkit.attach(model, setup.scheme, optimizer)
    )
    weights: dict[str, Any] = {"model": net, "optimizer": optimizer}
    contents: dict[str, Any] = {"reducer": handle.reducer, "comm": handle.comm}
    contents["replicated"] = {"method": handle} if setup.local else weights
    contents["per_rank"] = weights | {"replica": handle.replica_state} if setup.local else {}
    directory = Path(run.directory, "state")
    if run.resumed:
        commkit.checkpoint.load(directory, **contents)
    for step in run.steps:
        loss = model(*batch(step, run.rank))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sent.see(handle.last_step)
        if step + 1 == SAVE_AT:
            commkit.checkpoint.save(directory, **contents)
    handle.close()
    return net.outcome(sent.most)


def accelerate(setup: Setup, run: Run) -> Outcome:
    from accelerate import Accelerator

    from commkit.accelerate import SchemeKwargs

    kwargs = SchemeKwargs(scheme=setup.scheme)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[kwargs])
    net, sent = Net(), Sent()
    model, optimizer = accelerator.prepare(net, setup.optimizer(net.parameters()))
    handle = kwargs.attach(accelerator, model, optimizer)
    directory = str(Path(run.directory, "state"))
    if run.resumed:
        accelerator.load_state(directory)
    for step in run.steps:
        loss = model(*batch(step, run.rank))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        sent.see(handle.last_step)
        if step + 1 == SAVE_AT:
            accelerator.save_state(directory)
    handle.close()
    return net.outcome(sent.most)


def lightning(setup: Setup, run: Run) -> Outcome:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from commkit.lightning import CommkitCallback, LocalUpdatesStrategy

    sent = Sent()

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.losses = (net := Net()).body, net.losses

        def training_step(self, number: torch.Tensor, index: int) -> torch.Tensor:
            return Net.forward(self, *batch(self.global_step, run.rank))  # type: ignore[arg-type]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return setup.optimizer(self.parameters())

        def on_train_batch_end(self, *args: Any) -> None:
            sent.see(callback.handle.last_step)  # type: ignore[union-attr]

    callback = CommkitCallback(setup.scheme)
    saving = ModelCheckpoint(
        run.directory, "{step}", every_n_train_steps=SAVE_AT, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=run.world_size,
        strategy=LocalUpdatesStrategy() if setup.local else "ddp",
        max_steps=STEPS,
        callbacks=[callback] if run.resumed else [callback, saving],
        logger=False,
        enable_checkpointing=not run.resumed,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Module()
    numbers = torch.utils.data.DataLoader(list(range(STEPS)), batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module,
            numbers,
            ckpt_path=f"{run.directory}/step={SAVE_AT}.ckpt" if run.resumed else None,
        )
    return Net.outcome(module, sent.most)  # type: ignore[arg-type]


def huggingface(setup: Setup, run: Run) -> Outcome:
    from torch.utils.data import SequentialSampler
    from transformers import TrainingArguments

    from commkit.huggingface import Trainer

    class Ordered(Trainer):
        def _get_train_sampler(self, *args: Any) -> SequentialSampler:  # type: ignore[type-arg]
            return SequentialSampler(self.train_dataset)

    class Model(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return {"loss": super().forward(x, y)}

    # Accelerate gives rank r every W-th batch from r on.
    batches = [batch(step, rank) for step in range(STEPS) for rank in range(run.world_size)]
    rows = [{"x": x[i], "y": y[i]} for x, y in batches for i in range(ROWS)]
    arguments = TrainingArguments(
        run.directory,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        save_steps=SAVE_AT,
        save_only_model=False,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    net = Model()
    trainer = Ordered(
        model=net,
        args=arguments,
        train_dataset=rows,
        scheme=setup.scheme,
        optimizers=(setup.optimizer(net.parameters()), None),
    )
    trainer.train(
        resume_from_checkpoint=f"{run.directory}/checkpoint-{SAVE_AT}" if run.resumed else None
    )
    sent = [int(each.get("commkit/wire_bytes", 0)) for each in trainer.state.log_history]
    return net.outcome(max(sent))


def deepspeed(setup: Setup, run: Run) -> Outcome:
    """Stage 0, where all schemes of the table are served; tests/deepspeed has the other stages."""
    from tests.deepspeed import world

    world.prepare(run.rank, run.world_size)
    net, sent = Net(), Sent()
    block = {} if setup.scheme is None else {"commkit": {"scheme": setup.scheme}}
    engine = world.engine_of(net, world.config(**block), setup.optimizer(net.parameters()))
    if run.resumed:
        engine.load_checkpoint(run.directory)
    for step in run.steps:
        engine.backward(engine(*batch(step, run.rank)))
        engine.step()
        sent.see(engine.commkit.last_step)
        if step + 1 == SAVE_AT:
            engine.save_checkpoint(run.directory)
    engine.commkit.close()
    return net.outcome(sent.most)


FRAMEWORKS: dict[str, Callable[[Setup, Run], Outcome]] = {
    "plain": plain,
    "deepspeed": deepspeed,
    "accelerate": accelerate,
    "lightning": lightning,
    "huggingface": huggingface,
}
NOT_SERVED: dict[tuple[str, str], str] = {}
"""(framework, scheme) -> why."""
