"""DeepSpeed with commkit: ``commkit.deepspeed.initialize`` in the place of ``deepspeed.initialize``.

    engine, optimizer, loader, scheduler = commkit.deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config="ds_config.json"
    )

where ``ds_config.json`` has a block such as ``"commkit": {"scheme": {"name": "powersgd", "rank": 4}}``, or an optimizer
that DeepSpeed once had, such as OneBitAdam. The loop stays as it is; ``engine.commkit.last_step`` says what a step
cost.
"""

from __future__ import annotations

from .adapters.deepspeed.attach import Attached, attach
from .adapters.deepspeed.handle import EngineHandle
from .adapters.deepspeed.initialize import initialize
from .adapters.deepspeed.library import DeepSpeedVersionError

__all__ = ["Attached", "DeepSpeedVersionError", "EngineHandle", "attach", "initialize"]
