"""commkit for the Hugging Face Trainer.

trainer = Trainer(model=model, args=args, train_dataset=data, scheme={"name": "powersgd", "rank": 4})
trainer.train()
"""

from .adapters.frameworks.versions import ACCELERATE, TRANSFORMERS

TRANSFORMERS.module()
ACCELERATE.module()

import transformers  # noqa: E402

from .adapters.huggingface import SchemeTrainerMixin  # noqa: E402


class Trainer(SchemeTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with ``scheme=``; see :class:`SchemeTrainerMixin`."""


__all__ = ["SchemeTrainerMixin", "Trainer"]
