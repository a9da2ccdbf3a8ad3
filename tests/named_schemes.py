"""The registered schemes, told apart by what they build."""

from __future__ import annotations

from commkit.optim import OptimizerScheme
from commkit.registry import names
from commkit.schemes import make_scheme

_built = {name: make_scheme(name) for name in names("scheme") if name != "compose"}
OPTIMIZERS = sorted(n for n, made in _built.items() if isinstance(made, OptimizerScheme))
REDUCERS = sorted(set(_built) - set(OPTIMIZERS))
