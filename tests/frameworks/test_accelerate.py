"""What Accelerate's own loop adds: accumulation, checkpoints of another number of ranks, and FSDP2."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import commkit
from commkit.checkpoint import CheckpointError, merge
from tests.adapters import problem
from tests.harness import run_ranks

from .launcher import pretend_torchrun
from .setups import SETUPS, Net, adamw, batch

pytest.importorskip("accelerate")
pytestmark = pytest.mark.timeout(180)

Told: TypeAlias = tuple[str, list[Any]]
TOPK = {"name": "topk", "density": 0.1}


def _prepared(scheme: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    from accelerate import Accelerator

    from commkit.accelerate import SchemeKwargs

    kwargs = SchemeKwargs(scheme=scheme, on_resize=options.pop("on_resize", "mean"))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[kwargs], **options)
    net = Net()
    model, optimizer = accelerator.prepare(net, adamw(net.parameters()))
    return accelerator, model, optimizer, kwargs.attach(accelerator, model, optimizer)


def _train(rank: int, steps: int, prepared: tuple[Any, ...]) -> list[int]:
    """How often gradients were reduced, after each micro-batch."""
    accelerator, model, optimizer, handle = prepared
    reduced = []
    for step in range(steps):
        with accelerator.accumulate(model):
            accelerator.backward(model(*batch(step, rank)))
            optimizer.step()
            optimizer.zero_grad()
        reduced.append(handle.reducer.step)
    return reduced


def _saved(rank: int, directory: str) -> tuple[Any, list[int], Any]:
    accumulated = _prepared(TOPK, gradient_accumulation_steps=2)
    steps = _train(rank, 4, accumulated)
    accumulated[0].save_state(f"{directory}/topk")
    state = {key: x.clone() for key, x in accumulated[3].reducer.state_dict().items()}
    local = _prepared(SETUPS["diloco"].scheme or {})
    _train(rank, 5, local)  # inside a round
    local[0].save_state(f"{directory}/diloco")
    method = local[3]
    with torch.no_grad():  # back to what all replicas have in common
        method.restart_from_anchors()
    weights = problem.parameters(local[1])
    return state, steps, weights


def _resized(rank: int, world_size: int, directory: str) -> tuple[Any, Any, str]:
    pretend_torchrun(rank, world_size)
    accelerator, _, _, handle = _prepared(TOPK)
    accelerator.load_state(f"{directory}/topk")
    state = {key: x.clone() for key, x in handle.reducer.state_dict().items()}
    accelerator, model, _, _ = _prepared(SETUPS["diloco"].scheme or {})
    accelerator.load_state(f"{directory}/diloco")
    weights = problem.parameters(model)
    strict = _prepared(TOPK, on_resize="error")
    with pytest.raises(CheckpointError) as refused:
        strict[0].load_state(f"{directory}/topk")
    return state, weights, str(refused.value)


def test_accumulation_and_another_number_of_ranks(told: Told) -> None:
    directory, of_ranks = told
    saved = [of_rank[0] for of_rank in of_ranks]
    for _, steps, _ in saved:
        assert steps == [0, 1, 1, 2]  # reductions so far: one for two micro-batches
    merged = merge([state for state, _, _ in saved])
    for state, weights, refused in run_ranks(_resized, 3, directory, deadline_s=80.0):
        assert state.keys() == merged.keys()
        assert all(torch.equal(state[key], merged[key]) for key in merged)
        assert "saved by 2 ranks and this job has 3" in refused
        assert torch.equal(weights, saved[0][2])  # the last synchronised ones


QSDP = {"name": "qsdp", "min_numel": 100}


def _sharding(scheme: Any) -> tuple[Any, ...]:
    """Prepared by FSDP2. Accelerate shards on GPUs alone; nothing of what it does then needs one."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from commkit.accelerate import SchemeKwargs

    kwargs = SchemeKwargs(scheme=scheme)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[kwargs])
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT"
    )
    net = Net()
    model, optimizer = accelerator.prepare(net, adamw(net.parameters()))
    return accelerator, model, optimizer, kwargs.attach(accelerator, model, optimizer)


def _whole(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.full_tensor().reshape(-1) for p in model.parameters()]).detach()  # type: ignore[attr-defined]


def _sharded(rank: int, directory: str) -> tuple[Any, ...]:
    """Weights after five steps by hand, by Accelerate, and by Accelerate with a checkpoint on the way; bytes of the last
    two; and what was said of schemes that do not fit."""
    net = Net()
    fully_shard(net)
    optimizer: Any = adamw(net.parameters())
    handle: Any = commkit.attach(net, QSDP, optimizer)
    for step in range(5):
        net(*batch(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    ends, sent = [_whole(net)], [handle.last_step.wire_bytes]
    handle.close()
    for resumed in (False, True):
        accelerator, model, optimizer, handle = _sharding(QSDP)
        if resumed:
            accelerator.load_state(directory)
        for step in range(3 if resumed else 0, 5):
            accelerator.backward(model(*batch(step, rank)))
            optimizer.step()
            optimizer.zero_grad()
            if step == 2 and not resumed:
                accelerator.save_state(directory)
        ends.append(_whole(model))
        sent.append(handle.last_step.wire_bytes)
        handle.close()
    refused = {}
    for scheme in ("sign", "diloco"):
        with pytest.raises((TypeError, ValueError)) as error:
            _sharding(scheme)
        refused[scheme] = str(error.value)
    dist.barrier()
    return ends, sent, refused


def _all(rank: int, world_size: int, directory: str) -> tuple[Any, Any]:
    pretend_torchrun(rank, world_size)
    return _saved(rank, directory), _sharded(rank, f"{directory}/sharded")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Where two ranks have saved, and what each of them says."""
    directory = str(tmp_path_factory.mktemp("accelerate"))
    return directory, run_ranks(_all, 2, directory, deadline_s=120.0)


def test_sharded_by_fsdp2(told: Told) -> None:
    for _, (ends, sent, refused) in told[1]:
        assert torch.equal(ends[0], ends[1])
        assert torch.equal(ends[1], ends[2])
        assert len(set(sent)) == 1
        assert sent[0] > 0
        assert "mesh" in refused["sign"]
        assert "local updates" in refused["diloco"]
