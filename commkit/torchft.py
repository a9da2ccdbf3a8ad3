"""commkit for torchft: compressed gradients among the replicas of a ``torchft.Manager``.

group = torchft.ProcessGroupGloo()
manager = torchft.Manager(pg=group, use_async_quorum=False, ...)
optimizer = commkit.torchft.attach(manager, group, model, "powersgd", optimizer, rank=4)
"""

from .adapters.frameworks.versions import TORCHFT

TORCHFT.module()

from .adapters.torchft import ManagedOptimizer, attach  # noqa: E402

__all__ = ["ManagedOptimizer", "attach"]
