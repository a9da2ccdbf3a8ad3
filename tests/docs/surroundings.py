"""What the pages take for granted: names that a block uses and does not define, made anew for each block."""

from __future__ import annotations

import ast
import builtins
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import commkit
from commkit import outer, straggler
from commkit.compressors import BlockQuantize

from . import frameworks
from .everyday import WIDTH, Net, everyday


def three_tiers() -> dict[str, Callable[[], Any]]:
    """A model that is sharded over the fastest of three axes."""
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size(), 1, 1), mesh_dim_names=("node", "local", "pair")
    )
    net = Net()
    fully_shard(net, mesh=mesh["pair"])
    return everyday() | {"mesh": lambda: mesh, "model": lambda: net}


def a_handle() -> dict[str, Callable[[], Any]]:
    """Training that is under way."""
    names = everyday()
    ddp_model, optimizer = names["ddp_model"](), names["optimizer"]()
    handle = commkit.attach(ddp_model, "int8")

    def train_step(batch: Tensor) -> float:
        optimizer.zero_grad()
        loss = ddp_model(batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return names | {
        "handle": lambda: handle,
        "train_step": lambda: train_step,
        "directory": lambda: Path(tempfile.mkdtemp()),
    }


def local_training() -> dict[str, Callable[[], Any]]:
    """A worker with data in shards."""
    names = everyday()
    net, optimizer = names["model"](), torch.optim.SGD(names["model"]().parameters(), lr=0.01)

    def train_step(batch: Tensor, step: int) -> None:
        net(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    shards = [torch.ones(2, WIDTH) for _ in range(dist.get_world_size())]
    return names | {
        "optimizer": lambda: optimizer,
        "train_step": lambda: train_step,
        "data": lambda: shards,
        "BlockQuantize": lambda: BlockQuantize,
        **{name: (lambda name=name: getattr(outer, name)) for name in outer.__all__},
    }


def shares() -> dict[str, Callable[[], Any]]:
    """Samples that a coordinator deals out."""
    samples = torch.ones(4096, WIDTH)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch) * len(batch)

    return everyday() | {
        "data": lambda: samples,
        "loss": lambda: loss,
        **{name: (lambda name=name: getattr(straggler, name)) for name in straggler.__all__},
    }


GIVEN = {
    "": everyday,
    "a handle": a_handle,
    "three tiers": three_tiers,
    "local training": local_training,
    "shares": shares,
    **frameworks.GIVEN,
}


def namespace(program: str, given: str) -> dict[str, Any]:
    """Of the surroundings ``given``, what the program uses and does not define.

    Raises:
        NameError: a name that is not there.
    """
    made = GIVEN[given]()
    used = _free(program)
    unknown = used - set(made)
    if unknown:
        raise NameError(f"nothing defines {', '.join(sorted(unknown))}")
    return {name: made[name]() for name in made if name in used} | {"__name__": "block"}


def _free(program: str) -> set[str]:
    """Names that are read, and neither built in nor bound before (or inside) the statement that reads them."""
    known, free = set(dir(builtins)), set()
    for statement in ast.parse(program).body:
        nodes = list(ast.walk(statement))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        inside = defined | {node.arg for node in nodes if isinstance(node, ast.arg)}
        if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign):  # reads, then binds
            comprehensions = [node.target for node in nodes if isinstance(node, ast.comprehension)]
            inside |= {n.id for c in comprehensions for n in ast.walk(c) if isinstance(n, ast.Name)}
        else:
            inside |= stored
        free |= {n.id for n in names if isinstance(n.ctx, ast.Load)} - known - inside
        known |= stored | imported | defined
    return free
