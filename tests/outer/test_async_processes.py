"""Asynchronous local SGD on real processes: rank 0 (and others) serve, the rest train."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from commkit import RankFailure
from commkit.compressors import BlockQuantize
from commkit.outer import DiLoCo, SyncOptions
from commkit.outer.async_local_sgd import AsyncOptions, AsyncServer, AsyncWorker, PushRecord
from commkit.outer.delayed_nesterov import DelayedNesterov, DelayedSGD, FedBuff
from commkit.policy import Policy
from tests.harness import run_ranks
from tests.outer.problem import Net, assert_same, batch, inner_step, weights

# Everybody who is alive is waited for, so that who pushes how often does not depend on the machine.
TOGETHER = AsyncOptions(sync_every=8, min_steps=2, grace_s=30.0, dynamic=False, timeout_s=30.0)
QUICK = AsyncOptions(sync_every=8, min_steps=2, grace_s=0.0, timeout_s=30.0)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


class Clock:
    """Goes on by what a step is said to take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_for(flag: Path) -> None:
    """Until another process has touched it; the harness ends who waits in vain."""
    while not flag.exists():
        time.sleep(0.005)


def train(
    worker: AsyncWorker, seconds: float = 0.0, before: Callable[[AsyncWorker], None] | None = None
) -> None:
    while worker.training:
        if before is not None:
            before(worker)
        time.sleep(seconds)
        inner_step(worker.model, worker.optimizer, worker.shard, worker.shard_step)


def loss_of(model: nn.Module) -> float:
    """Over data of all shards, with the statistics of the batch."""
    pairs = [batch(shard, 10_000, rows=64) for shard in range(3)]
    return sum(F.mse_loss(model(x), y).item() for x, y in pairs)


# Convergence, speeds, staleness.


STEP_SECONDS = {1: 1 / 64, 2: 1 / 32, 3: 1 / 16}  # by worker; sums are exact


def _unequal(rank: int, world_size: int) -> Any:
    model = Net(rank)
    before = loss_of(model)
    options = dataclasses.replace(QUICK, sync_every=12)
    if rank == 0:
        records: list[PushRecord] = []
        with AsyncServer(model, DelayedNesterov(), options) as server:
            stats = server.serve(pushes=60, on_push=records.append)
        return before, loss_of(model), weights(model), stats, records
    worker = AsyncWorker(model, sgd(model), options)
    clock = worker.clock = Clock()

    def tick(worker: AsyncWorker) -> None:
        clock.now += STEP_SECONDS[rank]

    with worker:
        train(worker, STEP_SECONDS[rank] / 20, tick)
    return before, loss_of(model), weights(model), worker.step, worker.last_step


def test_workers_of_unequal_speed_converge_on_the_same_weights() -> None:
    server, *workers = run_ranks(_unequal, 4)
    before, after, final, stats, records = server
    assert after < 0.5 * before
    for _, _, theirs, _, _ in workers:
        assert_same(final, theirs)
    assert stats.pushes == len(records) == 60
    assert stats.staleness == Counter(record.staleness for record in records)
    assert stats.max_staleness > 0
    assert stats.steps == sum(record.steps for record in records)
    assert stats.late == stats.nonfinite == stats.expired == 0
    assert stats.steps <= sum(steps for _, _, _, steps, _ in workers)
    # Tasks given when all speeds are known follow them.
    first = [next(i for i, r in enumerate(records) if r.worker == w) for w in (1, 2, 3)]
    known = max(r.lease for r in records[: max(first) + 1]) + 3  # as many may be out
    later = {(r.worker, r.steps) for r in records if r.lease > known}
    assert later
    assert later <= {(1, 12), (2, 6), (3, 3)}
    # Each shard's steps are counted without gaps, whoever does them.
    for shard in range(3):
        at = 0
        for record in records:
            if record.shard == shard:
                assert record.first_step == at
                at += record.steps


# Every push in one order, every download of one version.


class Traced(AsyncWorker):
    """Remembers what it downloaded, by version, and what it pushed, by lease."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.downloads: dict[int, dict[str, Tensor]] = {}
        self.deltas: dict[int, dict[str, Tensor]] = {}
        super().__init__(*args, **kwargs)

    def _take(self) -> None:
        super()._take()
        self.downloads[self.version] = weights(self.model)

    def _push(self) -> None:
        assert self._anchors is not None
        self.deltas[self._number] = {
            name: self._anchors.difference(name).clone() for name in self.replica.parameters
        }
        super()._push()


def _rule(name: str) -> Any:
    return {
        "delayed_nesterov": lambda: DelayedNesterov(buffer_size=2, share=0.25),
        "delayed_sgd": lambda: DelayedSGD(buffer_size=3),
        "fedbuff": lambda: FedBuff(buffer_size=2),
    }[name]()


def _traced(rank: int, world_size: int, servers: tuple[int, ...], name: str) -> Any:
    model = Net(rank)
    start = weights(model)
    options = dataclasses.replace(QUICK, servers=servers, num_shards=4)
    if rank in servers:
        records: list[PushRecord] = []
        with AsyncServer(model, _rule(name), options) as server:
            server.serve(pushes=21, on_push=records.append)
        own = {n: x for n, x in weights(model).items() if n in server.names}
        return start, own, records
    with Traced(model, sgd(model), options) as worker:
        train(worker, 0.002 * rank)
    return worker.downloads, worker.deltas, weights(model)


TRACED: list[tuple[tuple[int, ...], str]] = [
    ((0,), "delayed_nesterov"),
    ((0, 1), "delayed_nesterov"),
    ((3, 0, 1), "delayed_nesterov"),
    ((1, 0), "delayed_sgd"),
    ((0, 1), "fedbuff"),
]


def _all_traced(rank: int, world_size: int) -> list[Any]:
    return [_traced(rank, world_size, servers, name) for servers, name in TRACED]


@pytest.fixture(scope="module")
def traced() -> list[list[Any]]:
    return run_ranks(_all_traced, 5)


@pytest.mark.parametrize("case", range(len(TRACED)), ids=lambda i: f"{TRACED[i][1]}-{TRACED[i][0]}")
def test_one_server_fed_in_the_recorded_order_gives_the_same_bits(
    case: int, traced: list[list[Any]]
) -> None:
    """Serialisable, and the division among servers changes nothing."""
    servers, name = TRACED[case]
    results = [of_rank[case] for of_rank in traced]
    start, _, records = results[servers[0]]
    workers = [results[rank] for rank in range(5) if rank not in servers]
    deltas = {lease: delta for _, theirs, _ in workers for lease, delta in theirs.items()}
    rule = _rule(name)
    trained = list(next(iter(deltas.values())))
    rule.bind({n: start[n] for n in trained}, len(workers))
    history = {0: {n: x.clone() for n, x in rule.weights.items()}}
    downloaded = {}
    for record in records:
        before = rule.version
        assert rule.push(deltas[record.lease], record.staleness)
        assert rule.version == record.version
        downloaded[record.lease] = before - record.staleness
        history[rule.version] = {n: x.clone() for n, x in rule.weights.items()}
    rule.flush()
    history[rule.version] = {n: x.clone() for n, x in rule.weights.items()}
    assert all(version in history for version in downloaded.values())
    for downloads, _, final in workers:
        for version, got in downloads.items():
            for n, x in history[version].items():
                assert torch.equal(got[n], x), (version, n)
        for n, x in rule.weights.items():
            assert torch.equal(final[n], x)
    held: dict[str, Tensor] = {}
    for rank in servers:
        _, own, theirs = results[rank]
        assert theirs == records
        assert not set(held) & set(own)
        held |= own
    assert_same(held, {n: rule.weights[n] for n in held})
    assert set(held) == set(rule.weights)


def _together(rank: int, world_size: int) -> Any:
    model = Net(0)
    options = dataclasses.replace(TOGETHER, sync_every=2)
    if rank == 0:
        records: list[PushRecord] = []
        with AsyncServer(model, DelayedNesterov(), options) as server:
            server.serve(pushes=12, on_push=records.append)
        return records
    with AsyncWorker(model, sgd(model), options) as worker:
        train(worker, 0.02 * rank)
    return None


def test_the_grace_period_lets_workers_start_together_and_ends_when_all_are_there() -> None:
    records = run_ranks(_together, 4)[0]  # four whole periods are beyond the deadline of this run
    for group in range(0, 12, 3):
        assert [r.staleness for r in records[group : group + 3]] == [0, 1, 2]
        assert {r.worker for r in records[group : group + 3]} == {1, 2, 3}


# What it is when nothing is asynchronous.


def _alone(rank: int, world_size: int) -> dict[str, Tensor]:
    model = Net(0)
    options = dataclasses.replace(QUICK, sync_every=3, dynamic=False)
    if rank == 0:
        with AsyncServer(model, DelayedNesterov(buffer_size=1), options) as server:
            server.serve(pushes=4)
    else:
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        with AsyncWorker(model, inner, options) as worker:
            train(worker)
        assert worker.step == 12
    return {**weights(model), **{n: b.clone() for n, b in model.named_buffers()}}


def _diloco_alone(rank: int, world_size: int) -> dict[str, Tensor]:
    model = Net(0)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    with DiLoCo(model, inner, sync_every=3, options=SyncOptions(final_sync=False)):
        for step in range(12):
            inner_step(model, inner, 0, step)
    return {**weights(model), **{n: b.clone() for n, b in model.named_buffers()}}


def test_one_worker_is_diloco_bit_for_bit() -> None:
    (reference,) = run_ranks(_diloco_alone, 1)
    for mine in run_ranks(_alone, 2):
        assert_same(mine, reference)


# Workers that die, stop, leave.


def _with_a_death(rank: int, world_size: int, servers: tuple[int, ...]) -> Any:
    model = Net(0)
    options = dataclasses.replace(TOGETHER, sync_every=2, servers=servers)
    if rank in servers:
        records: list[PushRecord] = []
        with AsyncServer(model, DelayedNesterov(), options) as server:
            server.serve(pushes=40, on_push=records.append)
        return records, server.stats, weights(model)

    def die(worker: AsyncWorker) -> None:
        if rank == world_size - 1 and worker.step == 3:  # in its second task
            os.kill(os.getpid(), signal.SIGKILL)

    with AsyncWorker(model, sgd(model), options) as worker:
        train(worker, before=die)
    return weights(model)


@pytest.mark.parametrize("servers", [(0,), (0, 1)])
def test_a_killed_workers_shard_goes_to_the_others(servers: tuple[int, ...]) -> None:
    size = 3 + len(servers)
    results = run_ranks(_with_a_death, size, servers, dying=[size - 1])
    records, stats, _ = results[0]
    assert results[-1] is None
    assert stats.lost_workers == [size - 1]
    assert stats.pushes == 40
    assert_same(results[-2], results[-3])
    lost = [r for r in records if r.worker == size - 1]
    assert len(lost) == 1
    for shard in range(3):  # all shards go on, and none of their steps is left out or done twice
        at = 0
        for record in (r for r in records if r.shard == shard):
            assert record.first_step == at
            at += record.steps
        assert at >= 20


def _with_a_sleeper(rank: int, world_size: int, directory: str) -> Any:
    """Rank 2 stops in its second task until its lease has expired; training ends when it has gone on for long."""
    model = Net(0)
    options = dataclasses.replace(QUICK, min_lease_s=0.1, lease_factor=1.0, dynamic=False)
    asleep, expired, went_on = (Path(directory, name) for name in ("asleep", "expired", "went on"))
    if rank == 0:

        def look(record: PushRecord) -> None:
            if asleep.exists() and not server.dispatcher.of_worker(2):
                expired.touch()
            if went_on.exists():
                server.stats.steps = 10**9  # which is enough

        with AsyncServer(model, DelayedNesterov(), options) as server:
            return server.serve(steps=10**9, on_push=look)

    def doze(worker: AsyncWorker) -> None:
        if rank == 2 and worker.step == 10:
            asleep.touch()
            wait_for(expired)
        if rank == 2 and worker.step == 40:
            went_on.touch()

    with AsyncWorker(model, sgd(model), options) as worker:
        train(worker, 0.002, doze)
    return worker.dropped, worker.step, weights(model)


def test_a_lease_expires_and_what_comes_late_is_dropped(tmp_path: Path) -> None:
    stats, one, sleeper, other = run_ranks(_with_a_sleeper, 4, str(tmp_path))
    assert stats.expired >= 1
    assert stats.late >= 1
    assert sleeper[0] >= 1
    assert sleeper[1] >= 40  # it went on
    assert stats.lost_workers == []
    assert_same(one[2], sleeper[2])
    assert_same(one[2], other[2])


def _leaving(rank: int, world_size: int, last: bool) -> Any:
    model = Net(0)
    if rank == 0:
        with AsyncServer(model, DelayedNesterov(), QUICK) as server:
            if not last:
                return server.serve(pushes=20)
            with pytest.raises(RankFailure, match="no worker is left"):
                server.serve(pushes=20)
            return server.stats
    inner = sgd(model)
    with AsyncWorker(model, inner, QUICK) as worker:
        while worker.training and not ((rank == 2 or last) and worker.step == 5):
            inner_step(model, inner, worker.shard, worker.shard_step)
    return None


def test_workers_may_leave_until_none_is_left() -> None:
    stats = run_ranks(_leaving, 3, False)[0]
    assert stats.pushes == 20
    assert stats.lost_workers in ([2], [])  # the others may be done before
    stats = run_ranks(_leaving, 3, True)[0]
    assert sorted(stats.lost_workers) == [1, 2]


# What is not finite.


def _poisoned(rank: int, world_size: int, servers: tuple[int, ...]) -> Any:
    model = Net(0)
    options = dataclasses.replace(TOGETHER, sync_every=2, servers=servers)
    if rank in servers:
        records: list[PushRecord] = []
        with AsyncServer(model, DelayedNesterov(), options) as server:
            server.serve(pushes=20, on_push=records.append)
        return server.stats, records, weights(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def poison(worker: AsyncWorker) -> None:
        if rank == world_size - 1 and worker.step == 3:
            with torch.no_grad():
                model.second.weight[0, 0] = float("nan")

    with AsyncWorker(model, inner, options) as worker:
        train(worker, before=poison)
    moments = [s["momentum_buffer"] for s in inner.state.values()]
    return worker.dropped, moments, weights(model)


@pytest.mark.parametrize("servers", [(0,), (1, 0)])
def test_a_push_with_nan_leaves_no_trace(servers: tuple[int, ...]) -> None:
    results = run_ranks(_poisoned, 4, servers)
    stats, records, _ = results[servers[0]]
    assert stats.nonfinite == 1
    assert stats.pushes == len(records) == 20
    assert [r.version for r in records] == list(range(1, 21))
    dropped, moments, final = results[3]
    assert dropped >= 1  # a push may be late at the end
    for x in (*moments, *final.values()):
        assert bool(x.isfinite().all())


def _hopeless(rank: int, world_size: int) -> None:
    model = Net(0)
    if rank == 0:
        with AsyncServer(model, DelayedNesterov(), QUICK) as server:
            with pytest.raises(FloatingPointError, match="lower the inner learning rate"):
                server.serve(pushes=5)
        return
    inner = torch.optim.SGD(model.parameters(), lr=float("inf"))
    with AsyncWorker(model, inner, QUICK) as worker:
        with pytest.raises(RankFailure, match="rank 0 failed: FloatingPointError"):
            train(worker)


def test_nothing_but_nan_ends_the_training() -> None:
    run_ranks(_hopeless, 2)


# Compressed.


class Summing(DelayedNesterov):
    """Adds up what was decoded."""

    def apply(self, delta: Mapping[str, Tensor], staleness: int) -> None:
        super().apply(delta, staleness)
        for name, x in delta.items():
            zero = torch.zeros(x.shape, dtype=torch.float64)
            TOTALS[name] = TOTALS.get(name, zero) + x.double()


TOTALS: dict[str, Tensor] = {}


def _compressed(rank: int, world_size: int, servers: tuple[int, ...]) -> Any:
    model = Net(0)
    options = dataclasses.replace(
        QUICK, servers=servers, compressor=BlockQuantize(bits=8), policy=Policy(min_numel=8)
    )
    if rank in servers:
        records: list[PushRecord] = []
        with AsyncServer(model, Summing(), options) as server:
            server.serve(pushes=31, on_push=records.append)
        return TOTALS, {r.lease for r in records}
    with Traced(model, sgd(model), options) as worker:
        train(worker, 0.002)
    return worker.deltas, worker.feedback.state_dict()


@pytest.mark.parametrize("servers", [(0,), (0, 3)])
def test_compressed_pushes_conserve(servers: tuple[int, ...]) -> None:
    """What the server has added up and what the workers still hold is what the workers went."""
    results = run_ranks(_compressed, 5, servers)
    decoded: dict[str, Tensor] = {}
    for rank in servers:
        totals, accepted = results[rank]
        decoded |= totals
    workers = [results[rank] for rank in range(5) if rank not in servers]
    compressed = 0
    for name, total in decoded.items():
        went = torch.zeros_like(total)
        for deltas, residuals in workers:
            went += sum(delta[name].double() for n, delta in deltas.items() if n in accepted)
            if name in residuals:
                total = total + residuals[name].double()
                compressed += float(residuals[name].abs().max()) > 1e-5
        torch.testing.assert_close(total, went, atol=2e-6, rtol=0)
    assert compressed > 0  # something was left unsent at all


# Checkpoints.


def _resumable(rank: int, world_size: int, pushes: int, file: str, save_at: int, load: bool) -> Any:
    model = Net(7 if load else 0)  # what is loaded counts, not what it starts from
    options = dataclasses.replace(QUICK, sync_every=3, dynamic=False, num_shards=2)
    if rank == 0:
        with AsyncServer(model, DelayedNesterov(buffer_size=3, share=0.2), options) as server:
            if load:
                server.load_state_dict(torch.load(file, weights_only=True))

            def save(record: PushRecord) -> None:
                if record.number == save_at:
                    torch.save(server.state_dict(), file)

            server.serve(pushes=pushes, on_push=save)
        return weights(model), {n: b.clone() for n, b in model.named_buffers()}, server.stats
    with AsyncWorker(model, sgd(model), options) as worker:
        train(worker)
    return weights(model)


@pytest.mark.parametrize("cut", [2, 3])
def test_a_resumed_server_goes_on_bit_for_bit(tmp_path: Path, cut: int) -> None:
    """In the middle of a buffer, or between two; with one worker, whose order is always the same."""
    file = str(tmp_path / "server.pt")
    whole, buffers, stats = run_ranks(_resumable, 2, 8, file, 0, False)[0]
    run_ranks(_resumable, 2, cut, file, cut, False)
    resumed, their_buffers, their_stats = run_ranks(_resumable, 2, 8, file, 0, True)[0]
    assert_same(whole, resumed)
    assert_same(buffers, their_buffers)
    assert (stats.pushes, stats.steps) == (their_stats.pushes, their_stats.steps) == (8, 24)


# Errors.


def _server_fails(rank: int, world_size: int, servers: tuple[int, ...], failing: int) -> None:
    model = Net(0)
    # Whoever is not told waits for longer than the run may last.
    options = dataclasses.replace(QUICK, servers=servers, timeout_s=600.0)

    def fail(record: PushRecord) -> None:
        if rank == failing and record.number == 3:
            raise ZeroDivisionError("of the test")

    if rank in servers:
        with AsyncServer(model, DelayedNesterov(), options) as server:
            kind = ZeroDivisionError if rank == failing else RankFailure
            with pytest.raises(kind, match="of the test"):
                server.serve(pushes=50, on_push=fail)
    else:
        with AsyncWorker(model, sgd(model), options) as worker:
            with pytest.raises(RankFailure, match=r"rank \d failed: .*of the test"):
                train(worker, 0.005)
            assert not worker.training


@pytest.mark.parametrize(("servers", "failing"), [((0,), 0), ((0, 1), 0), ((0, 1), 1)])
def test_a_server_that_fails_is_named_on_all_ranks(servers: tuple[int, ...], failing: int) -> None:
    run_ranks(_server_fails, 4, servers, failing)


def _worker_fails(rank: int, world_size: int, policy: Any) -> Any:
    model = Net(0)
    options = dataclasses.replace(QUICK, on_worker_error=policy)
    if rank == 0:
        with AsyncServer(model, DelayedNesterov(), options) as server:
            if policy == "continue":
                return server.serve(pushes=30)
            with pytest.raises(RankFailure, match="rank 1 failed: KeyError: 'of the test'"):
                server.serve(pushes=30)
        return None

    def fail(worker: AsyncWorker) -> None:
        if rank == 1 and worker.step == 4:
            raise KeyError("of the test")

    def run() -> None:
        with AsyncWorker(model, sgd(model), options) as worker:
            train(worker, 0.005, fail)

    if rank == 1 or policy == "raise":
        with pytest.raises(KeyError if rank == 1 else RankFailure, match="of the test"):
            run()
    else:
        run()
    return None


@pytest.mark.parametrize("policy", ["raise", "continue"])
def test_a_worker_that_fails_ends_the_training_or_itself(policy: str) -> None:
    stats = run_ranks(_worker_fails, 3, policy)[0]
    if policy == "continue":
        assert stats.lost_workers == [1]
        assert stats.pushes == 30


def _silence(rank: int, world_size: int, file: str) -> None:
    model, gave_up = Net(0), Path(file)
    options = dataclasses.replace(QUICK, timeout_s=0.5)
    if rank == 0:
        with AsyncServer(model, DelayedNesterov(), options) as server:
            with pytest.raises(TimeoutError, match=r"workers \[1\] sent nothing for timeout_s=0.5"):
                server.serve(pushes=30)
            gave_up.touch()
        return
    # It waits for its first task for as long as that takes on a busy machine.
    worker = AsyncWorker(model, sgd(model), options)
    worker.options = dataclasses.replace(options, timeout_s=60.0)
    with worker:
        wait_for(gave_up)
        with pytest.raises(RankFailure, match="rank 0 failed: TimeoutError"):
            train(worker)


def test_silence_is_an_error_that_says_whose(tmp_path: Path) -> None:
    run_ranks(_silence, 2, str(tmp_path / "gave up"))


def _mute_server(rank: int, world_size: int, file: str) -> None:
    model, gave_up = Net(0), Path(file)
    options = dataclasses.replace(QUICK, timeout_s=0.5)
    if rank == 0:
        with AsyncServer(model, DelayedNesterov(), options):
            wait_for(gave_up)
        return
    with pytest.raises(TimeoutError, match=r"server rank 0 sent nothing for timeout_s=0.5"):
        AsyncWorker(model, sgd(model), options).start()
    gave_up.touch()


def test_a_mute_server_is_an_error_too(tmp_path: Path) -> None:
    run_ranks(_mute_server, 2, str(tmp_path / "gave up"))


def _refusals(rank: int, world_size: int) -> None:
    model = Net(0)
    mine = AsyncOptions(servers=(rank,))
    with pytest.raises(ValueError, match="make an AsyncServer there"):
        AsyncWorker(model, sgd(model), mine)
    with pytest.raises(ValueError, match="make an AsyncWorker there"):
        AsyncServer(model, DelayedNesterov(), AsyncOptions(servers=(1 - rank,)))
    options = AsyncOptions(sync_every=10 + rank)
    role: Any = (
        AsyncServer(model, DelayedNesterov(), options)
        if rank == 0
        else AsyncWorker(model, sgd(model), options)
    )
    with pytest.raises(RuntimeError, match=r"ranks disagree on options.sync_every: rank 0 has 10"):
        role.start()
    # A DistributedDataParallel over replicas.
    ddp = DistributedDataParallel(model)
    if rank == 0:
        with pytest.raises(RuntimeError, match="rank 1 refused to attach: a Distributed"):
            AsyncServer(model, DelayedNesterov()).start()
    else:
        with pytest.raises(RuntimeError, match="give AsyncWorker a plain module"):
            AsyncWorker(model, sgd(model)).start()
    del ddp
    # A rule that does not fit the number of workers.
    model = Net(0)
    if rank == 0:
        with pytest.raises(ValueError, match=r"share=0.5 .*0.25"):
            AsyncServer(model, DelayedNesterov(buffer_size=4, share=0.5)).start()
    dist.barrier()
    if rank == 0:
        with AsyncServer(model, DelayedNesterov(), QUICK) as server:
            with pytest.raises(ValueError, match=r"needs pushes=... or steps=..."):
                server.serve()
            server.serve(pushes=2)
        return
    inner = sgd(model)
    with AsyncWorker(model, inner, QUICK) as worker:
        train(worker)
        with pytest.raises(RuntimeError, match=r"leave the loop when worker.training is false"):
            inner.step()
    inner.step()  # nothing counts any more


def test_what_is_refused() -> None:
    run_ranks(_refusals, 2)


def _other_rules(rank: int, world_size: int) -> None:
    model = Net(0)
    options = dataclasses.replace(QUICK, servers=(0, 1))
    if rank == 0:
        with AsyncServer(model, DelayedNesterov(lr=0.7), options) as server:
            with pytest.raises(RankFailure, match="rank 1 failed: ValueError: servers disagree"):
                server.serve(pushes=3)
    elif rank == 1:
        with pytest.raises(ValueError, match=r'servers disagree on the rule: .*"lr": 0.5'):
            AsyncServer(model, DelayedNesterov(lr=0.5), options).start()
    else:
        with pytest.raises(RankFailure, match="servers disagree"):
            AsyncWorker(model, sgd(model), options).start()


def test_servers_with_different_rules_are_refused() -> None:
    run_ranks(_other_rules, 3)
