"""commkit for Hugging Face Accelerate.

kwargs = SchemeKwargs(scheme={"name": "powersgd", "rank": 4})
accelerator = Accelerator(kwargs_handlers=[kwargs])
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
handle = kwargs.attach(accelerator, model, optimizer)
"""

from .adapters.frameworks.versions import ACCELERATE

ACCELERATE.module()

from .adapters.accelerate import SchemeKwargs  # noqa: E402

__all__ = ["SchemeKwargs"]
