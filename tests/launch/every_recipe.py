"""Run every recipe of ``configs/`` in turn, in one process: ``every_recipe.py OUT ARGUMENT...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.train import main

configs = Path(__file__).resolve().parents[2] / "configs"
for config in sorted(configs.glob("*.yaml")):
    # A run of a few steps is over before any warm-up.
    short = ["--set", "scheme.warmup_steps=0"] if "warmup_steps" in config.read_text() else []
    main(["--config", str(config), "--out", f"{sys.argv[1]}/{config.stem}", *short, *sys.argv[2:]])
