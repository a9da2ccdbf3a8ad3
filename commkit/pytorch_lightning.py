"""commkit for Lightning, ``pytorch_lightning``.

trainer = Trainer(strategy="ddp", callbacks=[CommkitCallback("powersgd", rank=4)])
trainer = Trainer(strategy=LocalUpdatesStrategy(), callbacks=[CommkitCallback("diloco", sync_every=100)])
"""

from .adapters.frameworks.versions import PYTORCH_LIGHTNING

PYTORCH_LIGHTNING.module()

from pytorch_lightning import Callback  # noqa: E402
from pytorch_lightning.strategies import DDPStrategy  # noqa: E402

from .adapters.lightning import LocalUpdatesMixin, SchemeCallback, ddp_comm  # noqa: E402


class CommkitCallback(SchemeCallback, Callback):
    __doc__ = SchemeCallback.__doc__
    requirement = PYTORCH_LIGHTNING


class LocalUpdatesStrategy(LocalUpdatesMixin, DDPStrategy):
    __doc__ = LocalUpdatesMixin.__doc__


__all__ = ["CommkitCallback", "LocalUpdatesStrategy", "ddp_comm"]
