"""Laws of the methods that are one round late."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import commkit
from commkit.aggregators import AllReduce, LowRankQuantized
from commkit.compressors import NoCompression
from commkit.feedback import ErrorFeedback
from commkit.outer import RoundAborted
from commkit.outer.co2 import CO2
from commkit.outer.dilocox import DiLoCoX
from commkit.outer.late import LateSync
from commkit.outer.options import SyncOptions
from commkit.outer.units import Unit
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import Comm
from tests.harness import run_ranks
from tests.outer.problem import Net, assert_same, inner_step, train, weights

H = 2
OPEN = SyncOptions(final_sync=False)


def dense() -> Reducer:
    return Reducer(AllReduce(NoCompression()))


def low_rank() -> Reducer:
    """Of rank 2 on the small matrices of the problem."""
    return Reducer(
        LowRankQuantized(2, min_compression_rate=0.0, granule=8),
        ErrorFeedback(),
        Policy(min_numel=0),
    )


def co2(*args: Any, **kwargs: Any) -> LateSync:
    return CO2(*args, **{"sync_every": H, "outer_momentum": 0.5} | kwargs)


def co2_int8(*args: Any, **kwargs: Any) -> LateSync:
    return co2(*args, reducer=commkit.schemes.int8(min_numel=0), **kwargs)


def co2_slowmo_form(*args: Any, **kwargs: Any) -> LateSync:
    return co2(*args, normalise_lr=True, clip=1.0, clip_unit="absolute", **kwargs)


def dilocox(*args: Any, **kwargs: Any) -> LateSync:
    return DiLoCoX(*args, **{"sync_every": H, "reducer": low_rank()} | kwargs)


def dilocox_dense(*args: Any, **kwargs: Any) -> LateSync:
    return dilocox(*args, reducer=dense(), **kwargs)


def dilocox_eager(*args: Any, **kwargs: Any) -> LateSync:
    return dilocox(*args, reducer=dense(), eager=True, **kwargs)


COMMON_STARTS: list[Callable[..., LateSync]] = [
    co2,
    co2_int8,
    co2_slowmo_form,
    dilocox,
    dilocox_dense,
]
METHODS = [*COMMON_STARTS, dilocox_eager]
EVERY = pytest.mark.parametrize("method", METHODS)


def anchors_of(outer: LateSync) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in outer.anchors.values.items()}


@EVERY
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_anchors_are_bit_equal_and_rounds_start_from_them(
    method: Callable[..., LateSync], world_size: int
) -> None:
    def run(comm: ThreadComm) -> list[dict[str, Tensor]]:
        model, seen = Net(comm.rank), []
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        with method(model, inner, process_group=comm) as outer:
            start = weights(model)
            for step in range(4 * H):
                inner_step(model, inner, comm.rank, step)
                if (step + 1) % H == 0:
                    live = {n: x for n, x in weights(model).items() if n in outer.anchors.values}
                    seen.append(anchors_of(outer))
                    if method is not dilocox_eager:
                        assert_same(live, seen[-1])
                        seen[-1] |= dict(model.named_buffers()) if step > H else {}
                    elif step + 1 == 3 * H and comm.world_size > 1:
                        assert any(not torch.equal(live[n], seen[-1][n]) for n in live)
                if step + 1 == H:
                    assert_same(weights(model), start)  # nothing has arrived yet
            assert any(not torch.equal(seen[-1][n], start[n]) for n in outer.anchors.values)
        return [*seen, weights(model)]

    runs = run_threads(run, world_size)
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other, strict=True):
            assert_same(mine, theirs)


@EVERY
def test_what_is_applied_is_the_mean_of_one_round_before(method: Callable[..., LateSync]) -> None:
    """Exactly one: outcome number t - 1 at the end of round t, and never another."""

    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        sent: list[dict[str, Tensor]] = []
        applied: list[tuple[int, dict[str, Tensor]]] = []
        with method(model, inner, process_group=comm) as outer:
            kind = type(outer)

            class Watched(kind):  # type: ignore[misc,valid-type]
                def snapshot(self, unit: Unit) -> dict[str, Tensor]:
                    values = super().snapshot(unit)
                    sent.append({n: x.clone() for n, x in values.items()})
                    return values

                def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
                    applied.append((len(sent), {n: x.clone() for n, x in mean.items()}))
                    super().apply(unit, mean)

            outer.__class__ = Watched
            for step in range(4 * H):
                inner_step(model, inner, comm.rank, step)
        assert [number for number, _ in applied] == [2, 3, 4, 4]  # the last one is drained
        if method in (co2, co2_slowmo_form, dilocox_dense, dilocox_eager):
            for (_, mean), own in zip(applied, sent, strict=True):
                for name, x in own.items():
                    everybody = comm.all_gather(x.reshape(-1).contiguous())
                    torch.testing.assert_close(mean[name].view(-1), everybody.mean(0))

    run_threads(run, 2)


@EVERY
def test_a_transfer_that_is_done_at_once_changes_nothing(method: Callable[..., LateSync]) -> None:
    def run(comm: ThreadComm, at_once: bool) -> dict[str, Tensor]:
        def build(*args: Any, **kwargs: Any) -> LateSync:
            outer = method(*args, **kwargs)
            if at_once:
                kind = type(outer)

                class AtOnce(kind):  # type: ignore[misc,valid-type]
                    def prepare_sync(self, unit: Unit | None = None) -> None:
                        super().prepare_sync(unit)
                        self._wait(self._in_flight[-1])

                outer.__class__ = AtOnce
            return outer

        return weights(train(comm, build, 5 * H + 1)[0])

    immediate = run_threads(functools.partial(run, at_once=True), 2)
    for one, other in zip(
        run_threads(functools.partial(run, at_once=False), 2), immediate, strict=True
    ):
        assert_same(one, other)


@EVERY
@pytest.mark.parametrize("stop", [2 * H, 2 * H + 1])
def test_a_run_resumed_with_a_transfer_in_flight_is_bit_equal(
    method: Callable[..., LateSync], stop: int
) -> None:
    steps = 5 * H + 1

    def unbroken(comm: ThreadComm) -> dict[str, Tensor]:
        model, _ = train(comm, method, steps, model=Net(0), optimizer=adam)
        return weights(model) | dict(model.named_buffers())

    def broken(comm: ThreadComm) -> dict[str, Tensor]:
        model = Net(0)
        inner = adam(model.parameters())
        with method(model, inner, process_group=comm) as outer:
            for step in range(stop):
                inner_step(model, inner, comm.rank, step)
            saved = [
                copy.deepcopy(part.state_dict()) for part in (outer, outer.reducer, model, inner)
            ]
            own = copy.deepcopy(outer.rank_state_dict()) if isinstance(outer, DiLoCoX) else {}
            assert len(saved[0]["in_flight"]) == 1
        model = Net(0)
        inner = adam(model.parameters())
        with method(model, inner, process_group=comm) as outer:
            for part, state in zip((outer, outer.reducer, model, inner), saved, strict=True):
                part.load_state_dict(state)  # type: ignore[attr-defined]
            if isinstance(outer, DiLoCoX):
                outer.load_rank_state_dict(own)
            for step in range(stop, steps):
                inner_step(model, inner, comm.rank, step)
        return weights(model) | dict(model.named_buffers())

    for a, b in zip(run_threads(unbroken, 2), run_threads(broken, 2), strict=True):
        assert_same(a, b)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


class Gated(Reducer):
    """Does not reduce before it is let."""

    gate: threading.Event

    def reduce(
        self, named: Mapping[str, Tensor], comm: Comm, hold: Collection[str] = ()
    ) -> dict[str, Tensor]:
        if not self.gate.wait(20):
            raise TimeoutError("nobody opened the gate")
        return super().reduce(named, comm, hold)


@pytest.mark.parametrize("kind", [CO2, DiLoCoX])
def test_inner_steps_go_on_while_a_transfer_is_under_way(kind: type[LateSync]) -> None:
    """The gate opens only once the next round's inner steps are done; the round's end waits for it."""

    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        reducer = Gated(AllReduce(NoCompression()))
        reducer.gate = threading.Event()
        with kind(model, inner, sync_every=3, reducer=reducer, process_group=comm) as outer:
            for step in range(5):  # the first round ends after the third
                inner_step(model, inner, comm.rank, step)
            assert outer.round == 1
            ended = threading.Event()
            last = threading.Thread(
                target=lambda: (inner_step(model, inner, comm.rank, 5), ended.set())
            )
            last.start()
            assert not ended.wait(0.3)  # the transfer of the first round is not there
            reducer.gate.set()
            last.join(20)
            assert ended.is_set()
            assert outer.round == 2

    run_threads(run, 1)


@pytest.mark.parametrize("method", [co2, dilocox_dense])
def test_a_replica_that_is_not_finite_is_left_out(method: Callable[..., LateSync]) -> None:
    """It starts the next round from the common weights with a fresh inner optimizer, and the others' outcome,
    one round later, is that of a round without it. (Its weight is 0 in the first one, to compare with.)"""

    def run(comm: ThreadComm, poisoned: int | None) -> dict[str, Tensor]:
        model = Net(7)
        inner = adam(model.parameters())
        with method(model, inner, process_group=comm, options=OPEN) as outer:
            for step in range(3 * H):
                outer.weight = float(comm.rank != poisoned or step >= H)
                if step == 2 * H - 1 and comm.rank == poisoned:
                    with torch.no_grad():
                        model.first.weight[0, 0] = float("nan")
                inner_step(model, inner, comm.rank, step)
                if step == 2 * H - 1:
                    assert outer.was_reset == (comm.rank == poisoned)
                    assert (len(inner.state) == 0) == (comm.rank == poisoned)
                    assert all(bool(x.isfinite().all()) for x in model.state_dict().values())
            assert not outer.was_reset
            return weights(model)

    with_poison = run_threads(functools.partial(run, poisoned=2), 3)
    without = run_threads(functools.partial(run, poisoned=None), 2)
    for state in with_poison:
        for key, value in without[0].items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [co2, dilocox_dense, dilocox_eager])
def test_a_round_without_any_finite_replica_changes_nothing(
    method: Callable[..., LateSync],
) -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(7)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with method(model, inner, process_group=comm, options=OPEN) as outer:
            for step in range(4 * H):
                inner_step(model, inner, comm.rank, step)
                if step == 2 * H:  # in the third round
                    with torch.no_grad():
                        model.second.weight.fill_(float("inf"))
                if step == 3 * H - 1:
                    before = anchors_of(outer)
            assert outer.skipped_rounds == 1
            assert_same(anchors_of(outer), before)
            assert_same({n: x for n, x in weights(model).items() if n in before}, before)

    run_threads(run, 2)


class Failing(Reducer):
    """One of its reductions raises."""

    at = 1
    calls = 0

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise OSError("cable")
        return super().reduce(*args, **kwargs)


@pytest.mark.parametrize("kind", [CO2, DiLoCoX])
@pytest.mark.parametrize("policy", ["keep_local", "rollback"])
def test_an_outcome_in_flight_is_lost_and_the_open_round_is_kept(
    kind: type[LateSync], policy: Any
) -> None:
    """Then it goes on with an empty pipeline, as in round 0."""

    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        options = SyncOptions(on_abort=policy)
        reducer = Failing(AllReduce(NoCompression()))
        with kind(
            model, inner, sync_every=H, reducer=reducer, options=options, process_group=comm
        ) as outer:
            for step in range(3 * H - 1):
                inner_step(model, inner, comm.rank, step)
            anchors = anchors_of(outer)
            with pytest.raises(RoundAborted, match="cable"):
                inner_step(model, inner, comm.rank, 3 * H - 1)
            assert_same(anchors_of(outer), anchors)
            live = {n: x for n, x in weights(model).items() if n in anchors}
            kept = any(not torch.equal(live[n], anchors[n]) for n in live)
            assert kept == (policy == "keep_local")
            outer.rebuild(comm)
            for step in range(3 * H, 5 * H):
                inner_step(model, inner, comm.rank, step)
                if step == 4 * H - 1:  # sent, but nothing had arrived to be applied
                    assert_same(anchors_of(outer), anchors)
            moved = anchors_of(outer)
            assert any(not torch.equal(moved[n], anchors[n]) for n in moved)

    run_threads(run, 1)


@EVERY
def test_without_a_final_round_local_progress_stays_on_top(
    method: Callable[..., LateSync],
) -> None:
    def run(comm: ThreadComm) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with method(model, inner, process_group=comm, options=OPEN) as outer:
            for step in range(2 * H + 1):
                inner_step(model, inner, comm.rank, step)
            before = anchors_of(outer)
            progress = {n: outer.anchors.difference(n) for n in before}
        after = anchors_of(outer)
        assert any(not torch.equal(after[n], before[n]) for n in after)
        for name, expected in progress.items():
            torch.testing.assert_close(outer.anchors.difference(name), expected)

    run_threads(run, 2)


def test_steps_at_the_end_of_a_round_leave_nothing_to_close() -> None:
    def run(comm: ThreadComm) -> tuple[int, int]:
        return tuple(train(comm, co2, steps)[1].round for steps in (3 * H, 3 * H + 1))  # type: ignore[return-value]

    assert run_threads(run, 1) == [(3, 4)]


def test_counters_of_batch_norm_miss_no_batch() -> None:
    def run(comm: ThreadComm) -> int:
        return int(train(comm, co2, 7 * H, model=Net(0))[0].norm.num_batches_tracked)  # type: ignore[union-attr,arg-type]

    assert run_threads(run, 2) == [7 * H] * 2


@pytest.mark.parametrize("kind", [CO2, DiLoCoX])
def test_stale_moments_are_refused(kind: type[LateSync]) -> None:
    model = Net(0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"inner_state='average' would give .* a round old"):
        kind(model, inner, options=SyncOptions(inner_state="average"))
    kind(model, inner, delayed=False, options=SyncOptions(inner_state="average"))


def process(rank: int, world_size: int, name: str, steps: int) -> dict[str, Tensor]:
    model = Net(rank)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with globals()[name](model, inner):
        for step in range(steps):
            inner_step(model, inner, rank, step)
    return weights(model)


@pytest.mark.parametrize("name", ["co2", "dilocox", "dilocox_eager"])
def test_real_processes(name: str) -> None:
    """Bit-equal among themselves, and what threads give (but for codes, where a last bit decides)."""
    steps = 4 * H + 1
    processes = run_ranks(process, 2, name, steps)
    assert_same(*processes)

    def run(comm: ThreadComm) -> dict[str, Tensor]:
        return weights(train(comm, globals()[name], steps)[0])

    if name != "dilocox":
        torch.testing.assert_close(run_threads(run, 2)[0], processes[0], rtol=1e-5, atol=1e-6)


def aborted_process(rank: int, world_size: int) -> str:
    model = Net(rank)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    reducer = Failing(AllReduce(NoCompression()))
    reducer.at = 1 if rank == 1 else -1
    with CO2(model, inner, sync_every=H, reducer=reducer) as outer:
        for step in range(2 * H):
            inner_step(model, inner, rank, step)
        anchors = anchors_of(outer)
        try:
            for step in range(2 * H, 3 * H):
                inner_step(model, inner, rank, step)
        except RoundAborted as error:
            assert_same(anchors_of(outer), anchors)
            return str(error)
    return "not aborted"


def test_all_processes_abort_the_round_that_fails_on_one() -> None:
    for told in run_ranks(aborted_process, 2):
        assert "cable" in told
        assert "rebuild" in told
