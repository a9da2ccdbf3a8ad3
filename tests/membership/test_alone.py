"""One worker that hosts its own store: what the loop asks of its user."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commkit
from commkit import Elastic, ElasticOptions
from commkit.membership import Place


@pytest.fixture
def members() -> Iterator[Elastic]:
    place = Place(0, 1, "127.0.0.1", 0, hosts=True, job="alone")
    with Elastic(ElasticOptions(heartbeat_s=0.1, limit_s=2.0), place) as elastic:
        yield elastic
    assert not dist.is_initialized()


def _model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _run(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    for _ in range(times):
        optimizer.step()


def test_steps_are_given_once_each(members: Elastic) -> None:
    model, optimizer = _model()
    handle = commkit.attach(model, "topk", optimizer, members=members)
    numbers = []
    for step in members.steps(5, first=2, model=model, optimizer=optimizer):
        with step:
            _run(model, optimizer)
            numbers.append(step.number)
    assert numbers == [2, 3, 4]
    assert (members.rank, members.world_size, members.epoch) == (0, 1, 1)
    assert handle.reducer.step == 3
    handle.close()


def test_two_steps_in_a_block_are_refused(members: Elastic) -> None:
    model, optimizer = _model()
    commkit.attach(model, "topk", optimizer, members=members)
    steps = members.steps(2, model=model, optimizer=optimizer)
    with pytest.raises(RuntimeError, match="a second optimizer step in one block"), next(steps):
        _run(model, optimizer, times=2)


def test_a_step_without_its_block_is_refused(members: Elastic) -> None:
    model, optimizer = _model()
    commkit.attach(model, "topk", optimizer, members=members)
    steps = members.steps(2, model=model, optimizer=optimizer)
    next(steps)
    with pytest.raises(RuntimeError, match="step 0 was not run in its block"):
        next(steps)


def test_what_cannot_follow_is_refused(members: Elastic) -> None:
    model, optimizer = _model()
    with pytest.raises(
        TypeError, match="DistributedDataParallel cannot follow members that change"
    ):
        commkit.attach(DistributedDataParallel(model), "topk", members=members)
    scheme = {"name": "hierarchical", "scheme": "topk", "local_size": 1}
    with pytest.raises(TypeError, match="use the scheme without hierarchical"):
        commkit.attach(model, scheme, optimizer, members=members)
    next(members.steps(1))
    with pytest.raises(RuntimeError, match=r"attach before members\.steps"):
        commkit.attach(model, "topk", optimizer, members=members)


def test_a_group_that_is_there_already_is_refused(members: Elastic) -> None:
    with pytest.raises(RuntimeError, match="leave init_process_group out"):
        Elastic().start()
