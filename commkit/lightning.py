"""commkit for Lightning, ``lightning.pytorch``.

trainer = Trainer(strategy="ddp", callbacks=[CommkitCallback("powersgd", rank=4)])
trainer = Trainer(strategy=LocalUpdatesStrategy(), callbacks=[CommkitCallback("diloco", sync_every=100)])
"""

from .adapters.frameworks.versions import LIGHTNING

LIGHTNING.module()

from lightning.pytorch import Callback  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

from .adapters.lightning import LocalUpdatesMixin, SchemeCallback, ddp_comm  # noqa: E402


class CommkitCallback(SchemeCallback, Callback):
    __doc__ = SchemeCallback.__doc__
    requirement = LIGHTNING


class LocalUpdatesStrategy(LocalUpdatesMixin, DDPStrategy):
    __doc__ = LocalUpdatesMixin.__doc__


__all__ = ["CommkitCallback", "LocalUpdatesStrategy", "ddp_comm"]
