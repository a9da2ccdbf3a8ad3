"""Run every recipe of ``configs/`` in turn, in one process: ``every_recipe.py OUT ARGUMENT...``."""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from commkit.config import load_yaml
from commkit.outer import AsyncScheme
from commkit.schemes import make_scheme
from commkit.straggler import StragglerScheme
from launch.train import main


def has_roles(block: dict[str, Any]) -> bool:
    """Whether ranks differ in what they do."""
    return isinstance(make_scheme(block), AsyncScheme | StragglerScheme)


configs = Path(__file__).resolve().parents[2] / "configs"
alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
for config in sorted(configs.glob("*.yaml")):
    if alone and has_roles(load_yaml(config)["scheme"]):
        continue  # a server needs somebody who trains
    # A run of a few steps is over before any warm-up; one rank alone can stand no faulty one.
    changes = {"warmup_steps": 0, "num_faulty": 0, "switch_step": 0}
    fields = [f for f in changes if f in load_yaml(config)["scheme"]]
    short = [word for f in fields for word in ("--set", f"scheme.{f}={changes[f]}")]
    main(["--config", str(config), "--out", f"{sys.argv[1]}/{config.stem}", *short, *sys.argv[2:]])
