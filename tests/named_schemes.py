"""The registered schemes, told apart by what they build."""

from __future__ import annotations

from commkit.optim import OptimizerScheme
from commkit.outer import AsyncScheme, OuterScheme
from commkit.registry import names
from commkit.schemes import make_scheme
from commkit.sharded import PartitionScheme, ShardedScheme
from commkit.straggler import StragglerScheme

# Cannot be built by name alone, or at all.
NEED_PARTS = ("compose", "dadao", "hierarchical", "hsdp", "monna", "post_local_sgd")
_built = {name: make_scheme(name) for name in names("scheme") if name not in NEED_PARTS}
OPTIMIZERS = sorted(n for n, made in _built.items() if isinstance(made, OptimizerScheme))
OUTER = sorted(n for n, made in _built.items() if isinstance(made, OuterScheme))
ASYNCHRONOUS = sorted(n for n, made in _built.items() if isinstance(made, AsyncScheme))
COORDINATED = sorted(n for n, made in _built.items() if isinstance(made, StragglerScheme))
SHARDED = sorted(
    n for n, made in _built.items() if isinstance(made, ShardedScheme | PartitionScheme)
)
REDUCERS = sorted(set(_built) - {*OPTIMIZERS, *OUTER, *ASYNCHRONOUS, *COORDINATED, *SHARDED})
