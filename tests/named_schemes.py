"""The registered schemes, told apart by what they build."""

from __future__ import annotations

from commkit.optim import OptimizerScheme
from commkit.registry import names
from commkit.schemes import make_scheme

NEED_PARTS = ("compose", "hierarchical")  # cannot be built by name alone
_built = {name: make_scheme(name) for name in names("scheme") if name not in NEED_PARTS}
OPTIMIZERS = sorted(n for n, made in _built.items() if isinstance(made, OptimizerScheme))
REDUCERS = sorted(set(_built) - set(OPTIMIZERS))
