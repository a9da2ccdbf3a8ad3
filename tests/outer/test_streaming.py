"""Laws of Streaming DiLoCo."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import threading
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import commkit
from commkit.aggregators import TwoShot
from commkit.compressors import E3M0
from commkit.feedback import ErrorFeedback
from commkit.outer import OuterSync, RoundAborted
from commkit.outer.diloco import DiLoCo
from commkit.outer.mixing import mixing_bound, mixing_radius
from commkit.outer.options import SyncOptions
from commkit.outer.streaming import StreamingDiLoCo
from commkit.policy import Policy
from commkit.reducer import Reducer
from tests.harness import ThreadComm, run_ranks, run_threads
from tests.outer.problem import Net, assert_same, inner_step, train, weights

NO_FINAL = SyncOptions(final_sync=False)
Streaming = functools.partial(StreamingDiLoCo, sync_every=6, fragments=3)


class Tower(nn.Module):
    """Equal layers, so that fragments are equal."""

    def __init__(self, layers: int = 4, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def tower_step(model: nn.Module, inner: torch.optim.Optimizer, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    width = model.layers[0].in_features
    inner.zero_grad()
    model(torch.randn(4, width, generator=generator)).square().mean().backward()
    inner.step()


def e3m0(rounding: Any) -> Reducer:
    """The paper's 4-bit floats; nearest rounding with error feedback at both stages."""
    if rounding == "stochastic":
        return Reducer(TwoShot(E3M0(rounding=rounding)), policy=Policy(min_numel=0))
    shots = TwoShot(E3M0(rounding=rounding), server_feedback=ErrorFeedback())
    return Reducer(shots, ErrorFeedback(), Policy(min_numel=0))


REDUCERS: dict[str, Any] = {
    "none": lambda: None,
    "e3m0": lambda: e3m0("nearest"),
    "e3m0_stochastic": lambda: e3m0("stochastic"),
    "powersgd": lambda: commkit.schemes.powersgd(rank=1),
    "topk": lambda: commkit.schemes.topk(density=0.2, min_numel=0),
}


def anchors_of(outer: OuterSync) -> dict[str, torch.Tensor]:
    return {n: v.detach().clone() for n, v in outer.anchors.values.items()}


class Recording(StreamingDiLoCo):
    """Notes at which step what starts and what is applied."""

    def __init__(self, *args: Any, **knobs: Any) -> None:
        super().__init__(*args, **knobs)
        self.starts: list[tuple[int, int]] = []
        self.applied: list[tuple[int, int]] = []

    def prepare_sync(self, unit: Any = None) -> None:
        super().prepare_sync(unit)
        self.starts.append((self.step, unit.index))

    def apply(self, unit: Any, mean: Any) -> None:
        super().apply(unit, mean)
        self.applied.append((self.step, unit.index))


def _one_fragment_is_diloco(comm: Any, rank: int) -> None:
    group = comm if isinstance(comm, ThreadComm) else None
    results = []
    for method in (
        functools.partial(DiLoCo, sync_every=3),
        functools.partial(StreamingDiLoCo, sync_every=3, fragments=1, overlap=0, mixing=0.0),
    ):
        model = Net(rank)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        with method(model, inner, process_group=group) as outer:
            for step in range(10):
                inner_step(model, inner, rank, step)
            momenta = [s["momentum_buffer"] for s in outer.anchors.optimizer.state.values()]
        named = {str(i): m for i, m in enumerate(momenta)}
        results.append(weights(model) | anchors_of(outer) | dict(model.named_buffers()) | named)
    assert_same(*results)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_fragment_without_overlap_and_mixing_is_diloco(world_size: int) -> None:
    run_threads(lambda comm: _one_fragment_is_diloco(comm, comm.rank), world_size)


def _processes_one_fragment(rank: int, world_size: int) -> None:
    _one_fragment_is_diloco(None, rank)


def test_one_fragment_is_diloco_between_processes() -> None:
    run_ranks(_processes_one_fragment, 2)


@pytest.mark.parametrize("overlap", [0, 1])
def test_each_fragment_once_per_period_at_the_same_steps_everywhere(overlap: int) -> None:
    def run(comm: ThreadComm) -> tuple[list[Any], list[Any]]:
        method = functools.partial(
            Recording, sync_every=6, fragments=3, overlap=overlap, options=NO_FINAL
        )
        outer = train(comm, method, 19)[1]
        return outer.starts, outer.applied

    (starts, applied), *others = run_threads(run, 3)
    for other in others:
        assert other == (starts, applied)
    # (1.7): 0-based fragment p at t = (p+1) H/F + k H
    assert starts == [(t, (t // 2 - 1) % 3) for t in range(2, 19, 2)]
    assert applied == [(min(t + overlap, 19), p) for t, p in starts]
    for begin in range(1, 19 - 6 + 1):
        window = [p for t, p in starts if begin <= t < begin + 6]
        assert Counter(window) == Counter(range(3))


@pytest.mark.parametrize("scheme", REDUCERS)
@pytest.mark.parametrize(("overlap", "mixing"), [(0, 0.0), (1, 0.5)])
def test_anchors_are_bit_equal_always(scheme: str, overlap: int, mixing: float) -> None:
    def run(comm: ThreadComm) -> list[dict[str, torch.Tensor]]:
        reducer = REDUCERS[scheme]()
        model, seen = Net(comm.rank), []
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        knobs = {"overlap": overlap, "mixing": mixing, "reducer": reducer}
        with Streaming(model, inner, process_group=comm, **knobs) as outer:
            for step in range(15):
                inner_step(model, inner, comm.rank, step)
                seen.append(anchors_of(outer))
                if mixing == 0.0 and overlap == 0 and (step + 1) % 2 == 0:
                    fragment = outer.units[((step + 1) // 2 - 1) % 3]
                    assert_same(
                        {n: weights(model)[n] for n in fragment.parameters},
                        {n: seen[-1][n] for n in fragment.parameters},
                    )
        return [*seen, anchors_of(outer), weights(model)]

    first, *others = run_threads(run, 3)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert_same(mine, theirs)
    assert any(not torch.equal(first[0][n], first[-2][n]) for n in first[0])


def test_mixing_is_equation_1_10() -> None:
    """Between start and use a constant gradient moves the weight; then half of each."""

    def run(comm: ThreadComm) -> list[float]:
        model = nn.Linear(1, 1, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        seen = []
        outer = StreamingDiLoCo(
            model,
            inner,
            sync_every=3,
            fragments=1,
            overlap=2,
            mixing=0.25,
            outer_lr=0.5,
            outer_momentum=0.0,
            process_group=comm,
            options=NO_FINAL,
        )
        with outer:
            start = model.weight.item()
            for _ in range(5):
                model.weight.grad = torch.full_like(model.weight, [1.0, 3.0][comm.rank])
                inner.step()
                seen.append(model.weight.item() - start)
            anchor = outer.anchors.values["weight"].item() - start
        return [*seen, anchor]

    # Differences at t=3: 3 and 9, mean 6; anchor -3. At t=5 weights are at -5 and -15.
    for seen, speed in zip(run_threads(run, 2), (1.0, 3.0), strict=True):
        moved = [-speed * t for t in (1, 2, 3, 4)]
        expected = [*moved, 0.25 * -5 * speed + 0.75 * -3, -3.0]
        assert seen == pytest.approx(expected, abs=1e-5)


def test_full_mixing_does_not_synchronise_weights() -> None:
    def run(comm: ThreadComm, alone: bool) -> dict[str, torch.Tensor]:
        model = Net(0)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        options = SyncOptions(final_sync=False, average_buffers=False)
        knobs = {"overlap": 1, "mixing": 1.0, "process_group": comm, "options": options}
        outer = Streaming(model, inner, **knobs)
        if not alone:
            outer.start()
        for step in range(14):
            inner_step(model, inner, comm.rank, step)
        if not alone:
            assert outer.round == 7
            outer.close()
        return weights(model)

    together = run_threads(functools.partial(run, alone=False), 2)
    apart = run_threads(functools.partial(run, alone=True), 2)
    for a, b in zip(together, apart, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(("overlap", "mixing"), [(1, 0.5), (0, 0.5), (1, 1.0)])
@pytest.mark.parametrize("steps", [12, 13, 14])
def test_the_end_synchronises_whole_in_spite_of_mixing(
    overlap: int, mixing: float, steps: int
) -> None:
    """Even if the last fragment has just begun, or has just been mixed."""

    def run(comm: ThreadComm) -> dict[str, torch.Tensor]:
        method = functools.partial(Streaming, overlap=overlap, mixing=mixing)
        model, outer = train(comm, method, steps)
        assert_same({n: weights(model)[n] for n in anchors_of(outer)}, anchors_of(outer))
        return weights(model)

    assert_same(*run_threads(run, 2))


def test_the_period_begins_after_the_warm_up() -> None:
    def run(comm: ThreadComm) -> list[tuple[int, int]]:
        method = functools.partial(
            Recording,
            sync_every=6,
            fragments=3,
            overlap=1,
            options=SyncOptions(warmup_steps=3, final_sync=False),
        )
        outer = train(comm, method, 11)[1]
        # The last was in flight at the end.
        assert outer.applied == [(min(t + 1, 11), p) for t, p in outer.starts]
        return outer.starts

    assert run_threads(run, 2) == [[(5, 0), (7, 1), (9, 2), (11, 0)]] * 2


def test_resetting_inner_state_touches_the_fragment_alone() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        options = SyncOptions(inner_state="reset", final_sync=False)
        with Streaming(model, inner, process_group=comm, options=options) as outer:
            for step in range(2):
                inner_step(model, inner, comm.rank, step)
            names = {id(p): n for n, p in model.named_parameters()}
            kept = {names[id(p)] for p in inner.state}
            assert kept == set(outer.replica.parameters) - set(outer.units[0].parameters)

    run_threads(run, 1)


def test_bytes_of_4_bit_floats_are_as_computed() -> None:
    """Per fragment start 2 (W-1)/W (P/F) (1/2 + 4/256), each shard rounded up to whole blocks."""

    def run(comm: ThreadComm) -> None:
        model = Tower(width=63)  # 4032 elements per layer
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        knobs = {"sync_every": 4, "fragments": 4, "options": NO_FINAL}
        method = StreamingDiLoCo(
            model, inner, process_group=comm, reducer=e3m0("stochastic"), **knobs
        )
        with method as outer:
            for step in range(4):
                tower_step(model, inner, comm.rank, step)
                expected = 4032 * (0.5 + 4 / 256)
                assert expected <= outer.last_step.wire_bytes <= expected + 2 * 132 + _CONTROL

    run_threads(run, 2)


def _bytes_by_step(method: Any, comm: Any, rank: int, steps: int) -> list[int]:
    model = Tower(width=64)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    sent = []
    with method(model, inner, process_group=comm, options=NO_FINAL) as outer:
        for step in range(steps):
            tower_step(model, inner, rank, step)
            sent.append(outer.last_step.wire_bytes)
    return sent


METHODS_OF_BYTES = (
    functools.partial(DiLoCo, sync_every=40),
    functools.partial(StreamingDiLoCo, sync_every=40, fragments=4),
)
# What a round sends to agree who contributes and that all went well: rows of 16 bytes, and 4.
_CONTROL = 200


def _check_peaks(diloco: list[int], streaming: list[int]) -> None:
    peaks = [
        max(sum(sent[i : i + 10]) for i in range(len(sent) - 9)) for sent in (diloco, streaming)
    ]
    elements = sum(p.numel() for p in Tower(width=64).parameters())
    assert peaks[0] >= 4 * elements
    assert peaks[1] <= peaks[0] / 4 + _CONTROL
    # The same in total: nothing is left out, nothing sent twice.
    assert abs(sum(streaming) - sum(diloco)) <= 2 * 4 * _CONTROL


def test_peak_bytes_fall_by_the_number_of_fragments() -> None:
    def run(comm: ThreadComm) -> None:
        _check_peaks(*(_bytes_by_step(m, comm, comm.rank, 80) for m in METHODS_OF_BYTES))

    run_threads(run, 2)


def _processes_peak(rank: int, world_size: int) -> None:
    _check_peaks(*(_bytes_by_step(m, None, rank, 80) for m in METHODS_OF_BYTES))


def test_peak_bytes_between_processes() -> None:
    run_ranks(_processes_peak, 2)


@pytest.mark.parametrize(
    ("scheme", "inner_state"), [*((scheme, "keep") for scheme in REDUCERS), ("none", "average")]
)
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_run_is_bit_equal_with_a_fragment_in_flight(
    scheme: str, stop: int, inner_state: Any
) -> None:
    """Two stops are between the start of a fragment and its use."""
    keep_open = SyncOptions(final_sync=False, inner_state=inner_state)
    kinds = {"sync_every": 9, "fragments": 3, "overlap": 2, "mixing": 0.5}

    def run(comm: ThreadComm, broken: bool) -> tuple[Any, ...]:
        model = Net(0)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        options = keep_open if broken else dataclasses.replace(keep_open, final_sync=True)
        knobs = {**kinds, "process_group": comm, "reducer": REDUCERS[scheme]()}
        outer = Recording(model, inner, options=options, **knobs)
        before: list[Any] = []
        if broken:
            outer.start()
            for step in range(stop):
                inner_step(model, inner, comm.rank, step)
            parts = (outer, outer.reducer, model, inner)
            states = [copy.deepcopy(part.state_dict()) for part in parts]
            in_flight = len(states[0]["in_flight"])
            assert in_flight == (stop % 3 != 2 and stop > 2)
            before = outer.applied.copy()
            outer.close(finish=False)
            model = Net(1)
            inner = torch.optim.AdamW(model.parameters(), lr=0.02)
            options = dataclasses.replace(keep_open, final_sync=True)
            knobs["reducer"] = REDUCERS[scheme]()
            outer = Recording(model, inner, options=options, **knobs)
        with outer:
            if broken:
                for part, state in zip((outer, outer.reducer, model, inner), states, strict=True):
                    part.load_state_dict(state)
            for step in range(stop if broken else 0, 16):
                inner_step(model, inner, comm.rank, step)
        state = weights(model) | dict(model.named_buffers())
        return state, anchors_of(outer), [*before, *outer.applied]

    whole = run_threads(functools.partial(run, broken=False), 2)
    halves = run_threads(functools.partial(run, broken=True), 2)
    for one, other in zip(whole, halves, strict=True):
        assert_same(one[0], other[0])
        assert_same(one[1], other[1])
        assert one[2] == other[2]  # none twice, none lost


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_every_element_is_reduced_exactly_once(seed: int, scheme: str) -> None:
    """Random shapes, 0 and 1 element among them; after one period each element moved by its own mean."""
    numbers = random.Random(seed)
    shapes = [(), (0,), (1,), (1, 1)]
    shapes += [tuple(numbers.randint(1, 9) for _ in range(numbers.randint(1, 3))) for _ in range(9)]
    numbers.shuffle(shapes)

    def run(comm: ThreadComm) -> None:
        layers = [nn.ParameterList([torch.zeros(s) for s in shapes[i::4]]) for i in range(4)]
        model = nn.ModuleList([nn.ModuleList(layers)])
        reducer = commkit.schemes.int8(min_numel=0) if scheme == "int8" else None
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        outer = Recording(
            model,
            inner,
            sync_every=4,
            fragments=4,
            pattern="strided" if seed % 2 else "sequential",
            outer_lr=1.0,
            outer_momentum=0.0,
            reducer=reducer,
            process_group=comm,
            options=NO_FINAL,
        )
        targets, number = {}, 0
        for name, p in model.named_parameters():
            targets[name] = 1.0 + torch.arange(number, number + p.numel()).view(p.shape) / 64
            number += p.numel()
        with outer:
            for _ in range(4):
                for name, p in model.named_parameters():
                    # Everything is taken in the first step; what is synchronised then stays there.
                    left = (comm.rank + 0.5) * targets[name] if outer.step == 0 else 0.0
                    p.grad = torch.zeros_like(p) + left
                inner.step()
        for name, p in model.named_parameters():
            wanted = -targets[name] * sum(r + 0.5 for r in range(comm.world_size)) / comm.world_size
            if scheme == "none":
                torch.testing.assert_close(p.detach(), wanted)
            elif p.numel():  # two roundings, each to 127 steps of the largest that is rounded
                largest = (comm.world_size - 0.5) * targets[name].max()
                assert (p.detach() - wanted).abs().max() <= 2 * largest / 127

    run_threads(run, 3)


class Gated(Reducer):
    """Does not answer before ``gate`` opens."""

    def __init__(self, aggregator: Any, gate: threading.Event) -> None:
        super().__init__(aggregator)
        self.gate = gate
        self.waited: list[bool] = []

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        self.waited.append(self.gate.wait(20.0))
        return super().reduce(*args, **kwargs)


def test_training_goes_on_while_a_fragment_travels() -> None:
    """The reduction ends only after two more inner steps: if those waited for it, the gate would time out."""

    def run(comm: ThreadComm) -> None:
        gate = threading.Event()
        reducer = Gated(commkit.schemes.ddp().aggregator, gate)
        model = Net(comm.rank)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = Recording(
            model,
            inner,
            sync_every=4,
            fragments=1,
            overlap=3,
            reducer=reducer,
            process_group=comm,
            options=NO_FINAL,
        )
        with outer:
            for step in range(6):
                inner_step(model, inner, comm.rank, step)
            assert outer.starts == [(4, 0)]
            assert outer.applied == []
            gate.set()
            inner_step(model, inner, comm.rank, 6)
            assert outer.applied == [(7, 0)]
        assert reducer.waited == [True]

    run_threads(run, 2)


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_poisoned_replica_is_left_out_and_recovers_whole(overlap: int) -> None:
    """It is healed by the first fragment that it meets, although that is a part of the model only."""

    def run(comm: ThreadComm, poisoned: int | None) -> dict[str, torch.Tensor]:
        model = Tower()
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        knobs = {"sync_every": 4, "fragments": 2, "overlap": overlap, "options": NO_FINAL}
        with StreamingDiLoCo(model, inner, process_group=comm, **knobs) as outer:
            for step in range(12):
                if step == 1 and comm.rank == poisoned:
                    with torch.no_grad():
                        model.layers[3].weight[0, 0] = float("nan")
                tower_step(model, inner, comm.rank, step)
                if step == 1 + overlap:
                    assert outer.was_reset == (comm.rank == poisoned)
                    assert len(inner.state) == (0 if comm.rank == poisoned else 8)
                    anchors = anchors_of(outer)
                    if comm.rank == poisoned:
                        assert_same(weights(model), anchors)
                if step > 1 + overlap:
                    assert outer.was_reset == (comm.rank == poisoned and step < 3 + overlap)
                    assert all(torch.isfinite(p).all() for p in model.parameters())
        return anchors

    with_poison = run_threads(functools.partial(run, poisoned=2), 3)
    without = run_threads(functools.partial(run, poisoned=None), 2)
    for anchors in with_poison:
        for name, expected in without[0].items():
            torch.testing.assert_close(anchors[name], expected, rtol=1e-5, atol=1e-6)


def test_when_nobody_is_finite_all_return_to_the_anchors() -> None:
    def run(comm: ThreadComm) -> None:
        model = Tower()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        knobs = {"sync_every": 4, "fragments": 2, "options": NO_FINAL}
        with StreamingDiLoCo(model, inner, process_group=comm, **knobs) as outer:
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(float("inf"))
            for step in range(2):
                tower_step(model, inner, comm.rank, step)
            assert outer.skipped_rounds == 1
            assert_same(weights(model), anchors_of(outer))

    run_threads(run, 2)


@pytest.mark.parametrize("overlap", [0, 1])
def test_offload_changes_nothing_and_holds_one_fragment(overlap: int) -> None:
    def run(comm: ThreadComm, offload: bool) -> tuple[dict[str, torch.Tensor], list[set[str]]]:
        options = SyncOptions(offload=offload)
        model = Net(comm.rank)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        held = []
        with Streaming(model, inner, process_group=comm, overlap=overlap, options=options) as outer:
            for step in range(14):
                inner_step(model, inner, comm.rank, step)
                held.append(set(outer.anchors.fetched))
            momenta = [s["momentum_buffer"] for s in outer.anchors.optimizer.state.values()]
            named = {f"momentum {i}": x.clone() for i, x in enumerate(momenta)}
        return weights(model) | anchors_of(outer) | named, held

    (plain, _), (offloaded, held) = (
        run_threads(functools.partial(run, offload=o), 2)[0] for o in (False, True)
    )
    assert_same(plain, offloaded)
    units = [set(u.parameters) for u in Streaming(*_net()).units]
    for step, names in enumerate(held, start=1):
        travelling = overlap and step % 2 == 0
        assert names == (units[(step // 2 - 1) % 3] if travelling else set())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_anchors_are_on_the_gpu_one_fragment_at_a_time() -> None:
    def run(comm: ThreadComm) -> None:
        model = Tower().cuda()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        options = SyncOptions(offload=True)
        knobs = {"sync_every": 8, "fragments": 4, "overlap": 1, "options": options}
        with StreamingDiLoCo(model, inner, process_group=comm, **knobs) as outer:
            for step in range(20):
                inner.zero_grad()
                model(torch.ones(2, 8, device="cuda")).square().mean().backward()
                inner.step()
                moments = [s["momentum_buffer"] for s in outer.anchors.optimizer.state.values()]
                held = [x for x in (*outer.anchors.values.values(), *moments) if x.is_cuda]
                assert len(held) == (0 if step % 2 == 0 else 2 if step < 8 else 4)
            assert all(x.is_pinned() for x in outer.anchors.values.values())

    run_threads(run, 1)


def _net() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net(0)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_alternating_schemes_take_turns_in_every_fragment() -> None:
    """PowerSGD's power iteration renews one factor per reduction: with an even number of fragments, a count
    of all reductions would always pick the same one."""
    steps: dict[str, list[int]] = {}

    class Counting(Reducer):
        def _ctx(self, key: str, x: torch.Tensor) -> Any:
            steps.setdefault(key, []).append(self.step)
            return super()._ctx(key, x)

    def run(comm: ThreadComm) -> None:
        model = Tower()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        reducer = Counting(commkit.schemes.powersgd(rank=2).aggregator)
        knobs = {"sync_every": 4, "fragments": 2, "options": NO_FINAL, "reducer": reducer}
        with StreamingDiLoCo(model, inner, process_group=comm, **knobs):
            steps.clear()
            for step in range(12):
                tower_step(model, inner, comm.rank, step)

    run_threads(run, 1)
    assert len(steps) == 8
    for seen in steps.values():
        assert sorted(set(seen)) == [0, 1, 2]


def test_a_failed_fragment_leaves_the_anchors_and_is_carried_on() -> None:
    class Broken(Reducer):
        def reduce(self, *args: Any, **kwargs: Any) -> Any:
            if self.step == 1:
                raise OSError("cable")
            return super().reduce(*args, **kwargs)

    def run(comm: ThreadComm) -> None:
        model = Tower()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        reducer = Broken(commkit.schemes.ddp().aggregator)
        knobs = {"sync_every": 2, "fragments": 2, "outer_lr": 1.0, "outer_momentum": 0.0}
        method = StreamingDiLoCo(
            model, inner, process_group=comm, reducer=reducer, options=NO_FINAL, **knobs
        )
        outer = method.start()
        for step in range(2):
            tower_step(model, inner, comm.rank, step)
        anchors = anchors_of(outer)
        with pytest.raises(RoundAborted, match="cable"):
            tower_step(model, inner, comm.rank, 2)
        assert_same(anchors_of(outer), anchors)
        local = weights(model)
        outer.reducer.reduce = functools.partial(Reducer.reduce, outer.reducer)
        outer.rebuild(comm)
        for step in range(3, 5):
            tower_step(model, inner, comm.rank, step)
        moved = anchors_of(outer)
        for name, value in weights(model).items():
            assert not torch.equal(value, local[name])
            if name.startswith(("layers.0", "layers.2")):  # W=1, lr 1: all local work arrived
                assert torch.allclose(moved[name], value, atol=1e-6)
        outer.close()

    run_threads(run, 1)


def _processes_overlap(rank: int, world_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    def loss(model: nn.Module) -> float:
        x = torch.randn(64, 5, generator=torch.Generator().manual_seed(5))
        y = torch.sin(x @ torch.linspace(-1, 1, 30).view(5, 6)) + 0.05
        model.train()
        return float(nn.functional.mse_loss(model(x), y))

    model = Net(rank)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    reducer = e3m0("nearest")
    knobs: dict[str, Any] = {"sync_every": 9, "fragments": 3, "overlap": 2, "reducer": reducer}
    with StreamingDiLoCo(model, inner, **knobs) as outer:
        first = loss(model)
        for step in range(150):
            inner_step(model, inner, rank, step)
            if step % 10 == 0:
                gathered: list[Any] = [None] * world_size
                dist.all_gather_object(gathered, anchors_of(outer))
                assert_same(gathered[0], gathered[rank])
    return loss(model) / first, weights(model)


def test_fragments_overlap_and_4_bits_between_processes_learn() -> None:
    one, other = run_ranks(_processes_overlap, 2)
    assert_same(one[1], other[1])
    assert one[0] < 0.5


# Settings.


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sync_every": 100, "fragments": 3}, "fragments=3 must divide sync_every=100"),
        ({"overlap": 2}, "overlap=2 must be at least 0 and below sync_every/fragments=2"),
        ({"overlap": -1}, "overlap=-1 must be"),
        ({"mixing": 1.5}, r"mixing=1.5 must be in \[0, 1\]"),
        ({"fragments": 9, "sync_every": 9}, "at most the model's number of layers, 3"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Streaming(*_net(), **knobs)


def test_defaults_depend_on_the_overlap() -> None:
    blocking, overlapped = Streaming(*_net()), Streaming(*_net(), overlap=1)
    assert (blocking.mixing, overlapped.mixing) == (0.0, 0.5)
    rates = []
    for outer in (blocking, overlapped):
        assert outer._make_outer is not None
        rates.append(outer._make_outer([torch.zeros(1, requires_grad=True)]).param_groups[0]["lr"])
    assert rates == [0.7, 0.4]


def test_fragment_sizes_count_every_element() -> None:
    outer = Streaming(*_net())
    trained = sum(p.numel() for p in Net(0).parameters() if p.requires_grad)
    assert sum(outer.fragment_sizes) == trained


def test_ranks_must_agree_on_fragments() -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        Streaming(model, inner, process_group=comm, mixing=0.1 * comm.rank).start()

    with pytest.raises(RuntimeError, match="ranks disagree on mixing"):
        run_threads(run, 2)


# The linear analysis.


def simulated(kappa: float, lr: float, m: float, mixing: float, steps: int, tau: int) -> float:
    """How far the anchor is from the optimum after 400 rounds of H = ``steps``, step by step."""
    rate = (1 - kappa) ** (1 / steps)
    anchor = weight = 1.0
    velocity = 0.0
    weight *= rate ** (steps - tau)
    for _ in range(400):
        for _ in range(tau):
            weight *= rate
        snapshot = weight
        pseudo_gradient = anchor - snapshot
        for _ in range(tau):
            weight *= rate
        velocity = m * velocity + pseudo_gradient
        anchor -= lr * (pseudo_gradient + m * velocity)
        weight = mixing * weight + (1 - mixing) * anchor
        for _ in range(steps - 2 * tau):
            weight *= rate
    return abs(anchor) + abs(velocity)


@pytest.mark.parametrize(
    ("lr", "m", "mixing", "tau"), [(1.5, 0.9, 0.5, 2), (2.0, 0.9, 0.25, 2), (2.0, 0.9, 0.0, 1)]
)
def test_the_bound_parts_what_converges_from_what_diverges(
    lr: float, m: float, mixing: float, tau: int
) -> None:
    bound = mixing_bound(lr, m, mixing, tau / 20)
    assert 0.1 < bound < 1
    assert simulated(0.97 * bound, lr, m, mixing, 20, tau) < 1e-2
    assert simulated(min(0.999, 1.03 * bound), lr, m, mixing, 20, tau) > 1e2


def test_without_overlap_it_is_dilocos_bound() -> None:
    """lr 0.7 and momentum 0.9 are stable up to a contraction of 1.93."""
    radius = functools.partial(mixing_radius, lr=0.7, momentum=0.9, mixing=0.0, overlap=0.0)
    assert radius(1.92) < 1 < radius(1.94)
    polynomial = np.array([1.0, -1.9, 0.9]) + 0.7 * 1.5 * np.array([0.0, 1.9, -0.9])
    assert radius(1.5) == pytest.approx(np.abs(np.roots(polynomial)).max(), abs=1e-9)


def test_a_warning_names_the_figure_and_defaults_are_quiet() -> None:
    with pytest.warns(UserWarning, match=r"goes more than 0\.\d\d of the way"):
        Streaming(*_net(), overlap=1, outer_lr=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for overlap in (0, 1):
            Streaming(*_net(), overlap=overlap)
            Streaming(*_net(), overlap=overlap, mixing=1.0)
