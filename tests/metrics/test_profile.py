"""What torch's profiler shows of a step: every verb, each inside the one that calls it."""

import os
from collections import defaultdict

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

import commkit
from commkit.metrics import profiler_range
from tests.harness import run_ranks

SCHEMES = {
    "ddp": {},
    "bf16": {},
    "int8": {},
    "topk": {},
    "powersgd": {"rank": 1},
    "terngrad": {},
}
# name: all the ranges that must lie around it, somewhere
INSIDE = {
    "aggregate": {"reduce"},
    "compensate": {"reduce"},
    "update_feedback": {"reduce"},
    "compress": {"reduce", "aggregate"},
    "serve": {"reduce", "aggregate"},
    "orthonormalise": {"reduce", "aggregate"},
    "all_gather": {"reduce", "aggregate"},
    "all_to_all": {"reduce", "aggregate"},
    "decompress": {"reduce"},
}
EXPECTED = {
    "ddp": {"all_reduce"},
    "bf16": {"compress", "all_reduce", "decompress"},
    "int8": {"compress", "all_to_all", "serve", "decompress"},
    "topk": {"compensate", "compress", "all_gather", "decompress", "update_feedback"},
    "powersgd": {"compensate", "compress", "orthonormalise", "all_reduce", "decompress"},
    "terngrad": {"compress", "all_reduce", "all_to_all", "serve", "decompress"},
}


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 8))


def recording() -> profile:
    # Reductions run on a thread that was there before.
    every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    return profile(activities=[ProfilerActivity.CPU], experimental_config=every)


def nesting(events: list[FunctionEvent]) -> dict[str, list[set[str]]]:
    """For every range of ours, what other ranges of ours are around each of its occurrences."""
    ours = [e for e in events if e.name.startswith("commkit.")]
    found = defaultdict(list)
    for e in ours:
        around = {
            o.name.removeprefix("commkit.")
            for o in ours
            if o is not e
            and o.thread == e.thread
            and o.time_range.start <= e.time_range.start
            and e.time_range.end <= o.time_range.end
        }
        found[e.name.removeprefix("commkit.")].append(around)
    return dict(found)


def within(events: list[FunctionEvent], name: str) -> list[FunctionEvent]:
    """What happened on any thread while the block ``test.NAME`` ran."""
    (block,) = (e for e in events if e.name == f"test.{name}")
    span = block.time_range
    return [e for e in events if span.start <= e.time_range.start <= span.end]


def profiled(rank: int, world_size: int) -> dict[str, dict[str, list[set[str]]]]:
    """By scheme. One profile of all, because to begin and to end one takes seconds."""
    models = {name: DistributedDataParallel(network()) for name in SCHEMES}
    handles = [commkit.attach(models[name], name, **knobs) for name, knobs in SCHEMES.items()]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with commkit.DiLoCo(model, optimizer, sync_every=1, reducer=commkit.schemes.int8()):
        with recording() as profiler:
            for name in SCHEMES:
                with record_function(f"test.{name}"):
                    models[name](torch.ones(4, 64)).sum().backward()
            model(torch.ones(4, 64)).sum().backward()
            with record_function("test.diloco"):
                optimizer.step()
    for handle in handles:
        handle.close()
    torch.distributed.barrier()
    events = profiler.events()
    return {name: nesting(within(events, name)) for name in (*SCHEMES, "diloco")}


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, list[set[str]]]]:
    return run_ranks(profiled, 2)[0]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_step_shows_what_it_does_and_where(seen, name):
    ranges = seen[name]
    assert EXPECTED[name] | {"reduce"} <= set(ranges)
    for verb, around in INSIDE.items():
        for outer in ranges.get(verb, []):
            assert around <= outer, (verb, outer)
    assert all(outer == set() for outer in ranges["reduce"])


def test_a_round_shows_both_ends_and_the_transfer_between(seen):
    ranges = seen["diloco"]
    assert ranges["prepare_sync"] == [set()]
    assert ranges["perform_sync"] == [set()]
    assert ranges["wait"] == ranges["apply"] == [{"perform_sync"}]
    assert ranges["carry_out"] == [set()]
    assert all("carry_out" in outer for outer in ranges["reduce"] + ranges["all_to_all"])


def test_nothing_is_made_without_a_profiler():
    idle = profiler_range("reduce")
    assert idle is profiler_range("compress")
    assert not isinstance(idle, torch.autograd.profiler.record_function)
    with recording() as profiler:
        with profiler_range("reduce"):
            os.getpid()
    assert [e.name for e in profiler.events() if e.name.startswith("commkit")] == ["commkit.reduce"]
    assert profiler_range("reduce") is idle
