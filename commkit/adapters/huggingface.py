"""Hugging Face Trainer: a mixin that puts a scheme under ``trainer.train()``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from ..optim import OptimizerScheme
from ..outer import AdLoCo, DFedSAM, OuterScheme, OuterSync
from ..schemes import Scheme
from .accelerate import SchemeKwargs
from .frameworks import Attachment, Totals
from .frameworks.connect import made_of
from .frameworks.versions import TRANSFORMERS

# They set the micro-batches of a step, or need a closure: the Trainer does neither.
_OWN_LOOP = (AdLoCo, DFedSAM)


class SchemeTrainerMixin:
    """Goes before a Trainer class: ``class MyTrainer(SchemeTrainerMixin, Seq2SeqTrainer): ...``.

    ``Trainer(model=..., args=..., scheme={"name": "powersgd", "rank": 4})`` then trains with the scheme:

    - gradients are reduced by it, or an optimizer that communicates (``scheme="onebit_adam"``) is built with the learning
      rate, betas, epsilon and weight decay of the arguments, or replicas train alone and meet (``scheme="diloco"``);
    - checkpoints of the Trainer hold its state, every rank's, in ``checkpoint-N/commkit``, and
      ``train(resume_from_checkpoint=...)`` restores it, at the same number of ranks bit for bit;
    - logs hold the keys of :class:`~commkit.adapters.frameworks.record.Totals`.

    Args:
        scheme: as for :func:`commkit.attach`; None if the optimizer that is given is one of ``commkit.optim``.
        scheme_timeout_s: seconds after which a stuck reduction raises on all ranks.
        scheme_on_resize: what a checkpoint of another number of ranks does to residuals: "mean" or "error".

    Attributes:
        scheme_handle: the attachment, while training; None before.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
        RuntimeError: a version of transformers outside the range; later, from ``train()``, a single process.
        TypeError: a scheme that needs a loop of its own, or an optimizer besides a scheme that is one.
    """

    def __init__(
        self,
        *args: Any,
        scheme: Scheme | OuterScheme | None = None,
        scheme_timeout_s: float = 1800.0,
        scheme_on_resize: str = "mean",
        **kwargs: Any,
    ) -> None:
        TRANSFORMERS.check()
        made = made_of(scheme)
        if isinstance(made, OuterScheme) and issubclass(made.method, _OWN_LOOP):
            raise TypeError(
                f"{made.method.__name__} decides what happens inside a step, which the Trainer does itself; use "
                "commkit.attach in a loop of your own, or another scheme"
            )
        super().__init__(*args, **kwargs)
        self._scheme_fields = {
            # An optimizer that communicates is its own scheme.
            "scheme": None if isinstance(made, OptimizerScheme) else scheme,
            "timeout_s": scheme_timeout_s,
            "on_resize": scheme_on_resize,
        }
        if isinstance(made, OptimizerScheme):
            self._build_optimizer_by(made)
        self._kwargs: SchemeKwargs | None = None
        self._totals = Totals()
        self.add_callback(_Steps(self))  # type: ignore[attr-defined]

    @property
    def scheme_handle(self) -> Attachment | None:
        return None if self._kwargs is None else self._kwargs.handle

    def _build_optimizer_by(self, made: OptimizerScheme) -> None:
        trainer: Any = self
        if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
            raise TypeError(
                f"the scheme is the optimizer {made.optimizer.__name__}, and another one was given; leave scheme out and "
                f"give commkit.optim.{made.optimizer.__name__} as optimizers=(optimizer, None), or leave that out"
            )
        args = trainer.args
        offered = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        taken = inspect.signature(made.optimizer).parameters

        class Built(made.optimizer):  # type: ignore[name-defined,misc]
            """The Trainer asks for a class, and the scheme's fields belong to what it builds."""

            def __new__(cls, params: Any, **settings: Any) -> Any:
                return made(params, **settings)

        settings = {k: v for k, v in offered.items() if k in taken and k not in made.knobs}
        trainer.optimizer_cls_and_kwargs = (Built, settings)

    def _wrap_model(
        self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """Called right before Accelerate wraps the model, by the handler that it has then."""
        wrapped = super()._wrap_model(model, training, *args, **kwargs)  # type: ignore[misc]
        if training and not isinstance(wrapped, DistributedDataParallel):
            accelerator = self.accelerator  # type: ignore[attr-defined]
            self._kwargs = SchemeKwargs.like(accelerator.ddp_handler, **self._scheme_fields)
            accelerator.ddp_handler = self._kwargs
        return wrapped

    def _connect(self) -> None:
        trainer: Any = self
        assert self._kwargs is not None
        self._kwargs.connect(trainer.model_wrapped, trainer.optimizer, trainer.accelerator.scaler)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        assert self._kwargs is not None
        self._kwargs.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._connect()
            assert self._kwargs is not None
            self._kwargs.load(Path(checkpoint))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._totals.record())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class _Steps(TrainerCallback):
    """Begins and ends what the mixin does, and counts."""

    def __init__(self, trainer: SchemeTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._connect()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        handle = self._trainer.scheme_handle
        assert handle is not None
        self._trainer._totals.add(handle)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs_of_ddp, handle = self._trainer._kwargs, self._trainer.scheme_handle
        if isinstance(handle, OuterSync) and kwargs_of_ddp is not None:
            handle.close()
            kwargs_of_ddp.handle = None  # the next train() goes on with the same DDP
