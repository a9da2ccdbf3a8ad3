"""Records as a run of Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from .sink import missing, numbers


class WandbSink:
    """Logs every number of a record, with ``step`` as the horizontal axis.

    What the arguments leave open is W&B's own to decide: ``wandb login`` or ``WANDB_API_KEY``, ``WANDB_PROJECT``,
    ``WANDB_ENTITY``, ``WANDB_NAME``, ``WANDB_RUN_GROUP``, ``WANDB_MODE``.

    Args:
        directory: where W&B keeps its files, in a folder ``wandb``. A sink opened there again continues the run.
        config: the run's settings.
        project: None: ``WANDB_PROJECT``, else W&B's default.
        mode: None: ``WANDB_MODE``, else online. "offline" writes to ``directory`` for ``wandb sync``.

    Raises:
        ModuleNotFoundError: the ``wandb`` package is missing.
        wandb.errors.Error: the run cannot start, such as without a login.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any] | None = None,
        project: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise missing("wandb", "wandb", "WandbSink") from error
        directory.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=project,
            dir=str(directory),
            config=None if config is None else dict(config),
            mode=mode,
            resume="allow",
            id=_run_id(directory),
            reinit="create_new",
        )
        # W&B's own step only goes up; a resumed run goes back to its checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log({"step": record["step"], **dict(numbers(record))})

    def close(self) -> None:
        self._run.finish()


def _run_id(directory: Path) -> str:
    """The id of the run that ``directory`` holds, made up the first time."""
    kept = directory / "wandb" / "run-id.txt"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(uuid4().hex[:8] + "\n", encoding="utf-8")
    return kept.read_text(encoding="utf-8").strip()
