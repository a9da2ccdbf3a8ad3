"""``engine.save_checkpoint`` and ``load_checkpoint`` with what the scheme keeps, next to DeepSpeed's own files.

``DIR/TAG/commkit`` is a checkpoint of :mod:`commkit.checkpoint`: residuals of all ranks, plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import checkpoint
from ...checkpoint import CheckpointError, SchemeState
from ...comm import DistComm
from ...types import Stateful
from .library import require_method
from .settings import Block

_SAVE = ("save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters")
_LOAD = (
    "load_dir",
    "tag",
    "load_module_strict",
    "load_optimizer_states",
    "load_lr_scheduler_states",
    "load_module_only",
    "custom_load_fn",
)


@dataclass(frozen=True)
class Kept:
    """What goes with DeepSpeed's checkpoint, as :func:`commkit.checkpoint.save` wants it.

    Args:
        reducer: residuals.
        comm: the ranks that save together.
        replicated: what is equal on all ranks.
        per_rank: what is not.
        after_load: called when all of it is loaded.
    """

    reducer: SchemeState
    comm: DistComm
    replicated: Mapping[str, Stateful] = field(default_factory=dict)
    per_rank: Mapping[str, Stateful] = field(default_factory=dict)
    after_load: Callable[[], None] = lambda: None

    def save(self, directory: Path) -> None:
        checkpoint.save(directory, **self._parts())

    def load(self, directory: Path, block: Block) -> None:
        checkpoint.load(directory, **self._parts(), on_resize=block.on_world_size_change)
        self.after_load()

    def _parts(self) -> dict[str, Any]:
        return {
            "replicated": self.replicated,
            "per_rank": self.per_rank,
            "reducer": self.reducer,
            "comm": self.comm,
        }


def check_saving(engine: Any) -> None:
    """
    Raises:
        DeepSpeedVersionError: the two methods are not what they were.
    """
    require_method(engine, "save_checkpoint", _SAVE)
    require_method(engine, "load_checkpoint", _LOAD)


def keep_with_checkpoints(engine: Any, kept: Kept, block: Block) -> list[Callable[[], None]]:
    """Save and load ``kept`` with the engine from now on. Returns what undoes it."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        # First, so that "latest" never names a checkpoint that is not whole.
        kept.save(_directory(engine, save_dir, tag))
        return save(save_dir, tag, *args, **kwargs)

    def load_checkpoint(load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if tag is None:
            latest = Path(load_dir) / "latest"
            tag = latest.read_text().strip() if latest.is_file() else None
        path, client_state = load(load_dir, tag, *args, **kwargs)
        options = dict(zip(_LOAD[2:], args, strict=False)) | kwargs
        wanted = options.get("load_optimizer_states", True)
        if path is not None and wanted and not options.get("load_module_only", False):
            _load(kept, _directory(engine, load_dir, str(tag)), block)
        return path, client_state

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
    return [lambda: delattr(engine, "save_checkpoint"), lambda: delattr(engine, "load_checkpoint")]


def _load(kept: Kept, directory: Path, block: Block) -> None:
    if (directory / ".metadata").is_file():
        kept.load(directory, block)
    elif block.missing_state == "error":
        raise CheckpointError(
            f"no state of commkit's scheme at {str(directory)!r}: the checkpoint was saved without commkit, or is not "
            'complete; to start with empty residuals say "missing_state": "fresh" in the block "commkit"'
        )


def _directory(engine: Any, directory: Any, tag: str) -> Path:
    """One for each pipeline stage."""
    name = f"commkit_stage{engine.stage_id:02d}" if engine.pipeline_parallelism else "commkit"
    return Path(directory) / tag / name
