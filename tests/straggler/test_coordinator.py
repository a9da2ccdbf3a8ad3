"""Coordinated training on threads: exactness, conservation, catching up, what cannot go on.

Who is late is decided by the test, not by the clock: a late worker does not finish until its round is over, and the
coordinator's clock waits for all others. Float64, so that only rounding is between schemes that are to be equal.
"""

from __future__ import annotations

import dataclasses
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from commkit import RankFailure
from commkit.compressors import BlockQuantize, TopK
from commkit.policy import Policy
from commkit.straggler import (
    Backup,
    Coding,
    CoordinationOptions,
    Coordinator,
    DynamicBackup,
    Method,
    Multiplexed,
    NotDecodable,
    SelectiveRepetition,
    Share,
    Worker,
)
from commkit.straggler.families import CyclicMDSFamily, CyclicRandomFamily

from .problem import (
    BATCH,
    PATIENCE_S,
    Late,
    Net,
    assert_close,
    assert_same,
    breathe,
    loss_on,
    nobody,
    place,
    synchronous,
    train,
    weights,
)

OPTIONS = CoordinationOptions(timeout_s=PATIENCE_S)
ALL = Policy(min_numel=0)


@pytest.fixture(autouse=True)
def _no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a DDP, which goes through all objects of the process, once for each worker."""
    monkeypatch.setattr("commkit.straggler.worker.wrapped_in_ddp", lambda parameters: None)


def options(**changes: Any) -> CoordinationOptions:
    return dataclasses.replace(OPTIONS, **changes)


# Exactness.


@pytest.mark.parametrize(
    ("method", "workers", "late"),
    [
        (Backup(num_backups=0), 4, nobody),
        (Coding(1), 4, lambda w, r: w == r % 4),
        (Coding(2), 6, lambda w, r: w in (r % 6, (r + 1) % 6)),
        (Coding(1, CyclicMDSFamily()), 6, lambda w, r: w == r % 6),
        (Coding(2, CyclicRandomFamily()), 4, lambda w, r: w in (r % 4, (r + 1) % 4)),
    ],
)
def test_without_s_workers_training_follows_full_synchronous_training_exactly(
    method: Method, workers: int, late: Late
) -> None:
    losses, reference = synchronous(10)
    coordinator, *others = train(method, workers, 10, late=late)
    assert [r.loss for r in coordinator.records] == pytest.approx(losses, rel=1e-10)
    assert_close(coordinator.weights, weights(reference), 1e-10)
    for other in others:
        assert_same(other.weights, coordinator.weights)
    for number, record in enumerate(coordinator.records):
        assert {w for w in range(workers) if late(w, number)} <= {r - 1 for r in record.late}
        assert not record.skipped


@pytest.mark.parametrize(
    ("method", "models"),
    [
        (SelectiveRepetition(1, 2, 2), 2),
        (Multiplexed(1, 2, 2), 2),
        (Multiplexed(2, 3, 4), 4),
    ],
)
def test_models_in_turn_are_each_trained_exactly_although_workers_are_late(
    method: Method, models: int
) -> None:
    """T + 1 models; worker 0 or 1 is late in every fourth round, which the models of stragglers admit."""
    steps = 4
    runs = train(
        method,
        4,
        steps * models,
        options(interleave="models"),
        lambda w, r: r % 4 == 1 and w == (r // 4) % 2,
        models=models,
    )
    for model in range(models):
        losses, reference = synchronous(steps, seed=model)
        found = [r.loss for r in runs[0].records if r.model == model]
        assert found == pytest.approx(losses, rel=1e-10)
        assert_close(weights(runs[0].rank.models[model]), weights(reference), 1e-10)
    assert any(r.late for r in runs[0].records)


@pytest.mark.parametrize("method", [SelectiveRepetition(1, 2, 2), Multiplexed(1, 2, 2)])
def test_one_model_takes_gradients_that_are_t_rounds_old(method: Method) -> None:
    """As plain training does whose gradients are taken at the weights of T steps ago."""
    jobs, delay = 8, 1
    model = Net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    at = [weights(model)]
    for job in range(jobs):
        old = Net(0)
        old.load_state_dict(at[max(0, job - delay)])
        loss_on(old, range(job * BATCH, (job + 1) * BATCH)).backward()
        for p, q in zip(model.parameters(), old.parameters(), strict=True):
            p.grad = q.grad
        optimizer.step()
        at.append(weights(model))
    runs = train(method, 4, jobs, late=lambda w, r: w == 2 and r % 3 == 1)
    assert_close(runs[0].weights, at[-1], 1e-10)


def test_backup_workers_take_the_mean_of_those_that_came() -> None:
    """Shares go round; each step is one on the shares of the first two."""
    runs = train(Backup(k=2), 3, 9, late=lambda w, r: w == r % 3)
    model = Net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    share = BATCH // 3
    for job in range(9):
        optimizer.zero_grad()
        for worker in range(3):
            if worker != job % 3:
                first = job * BATCH + (worker + job) % 3 * share
                (loss_on(model, range(first, first + share)) / 2).backward()
        optimizer.step()
    assert_close(runs[0].weights, weights(model), 1e-12)
    assert [r.contributors for r in runs[0].records[:3]] == [(2, 3), (1, 3), (1, 2)]
    assert runs[0].rank.stats.late == {1: 3, 2: 3, 3: 3}


def test_replicas_change_no_bit_of_training() -> None:
    """Fractional repetition: whoever is late, blocks are added up in the same order, in float32 as well."""
    kinds: dict[str, Any] = {"batch": 60, "dtype": torch.float32}
    runs = [
        train(Coding(1, mu=1.0), 6, 6, late=late, **kinds)
        for late in (nobody, lambda w, r: w == r % 6, lambda w, r: w in (r % 3, (r + 1) % 3))
    ]
    for other in runs[1:]:
        assert [r.loss for r in other[0].records] == [r.loss for r in runs[0][0].records]
        assert_same(other[0].weights, runs[0][0].weights)


def test_clipping_is_that_of_torch() -> None:
    model = Net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for job in range(5):
        optimizer.zero_grad()
        loss_on(model, range(job * BATCH, (job + 1) * BATCH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    runs = train(Coding(1), 4, 5, max_grad_norm=0.5)
    assert_close(runs[0].weights, weights(model), 1e-10)


# Several coordinators.


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (Coding(1), {}),
        (Backup(k=2), {"compressor": TopK(0.3), "policy": ALL}),
        (DynamicBackup(window=2), {"broadcast": BlockQuantize(8, 16, "nearest"), "policy": ALL}),
        (Multiplexed(1, 2, 1), {}),
    ],
    ids=["coding", "compressed", "dynamic", "m-sgc"],
)
def test_several_coordinators_give_the_bits_of_one(method: Method, changes: dict[str, Any]) -> None:
    late: Late = (lambda w, r: w == r % 3) if isinstance(method, Backup) else nobody
    kinds: dict[str, Any] = {"max_grad_norm": 0.7, "late": late, "dtype": torch.float32}
    kinds["in_order"] = isinstance(method, DynamicBackup)
    workers = 3 if isinstance(method, Backup) else 4
    one = train(method, workers, 8, options(**changes), **kinds)
    several = train(method, workers, 8, options(coordinators=(0, 1, 2), **changes), **kinds)
    assert_same(several[0].weights, one[0].weights)
    for run in several[3:]:
        assert_same(run.weights, one[0].weights)
    norms = [r.norm for r in one[0].records]
    for run in several[:3]:
        assert [r.norm for r in run.records] == norms
    held = [set(run.rank.names) for run in several[:3]]
    assert sum(map(len, held)) == len(set().union(*held)) == 4


# What is compressed, and what becomes of what was dropped.


class Counting(Worker):
    """Remembers the sums of all gradients that it has computed, and of what it sent in time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.computed: dict[str, Tensor] = {}
        self.arrived: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def _compute(self, *args: Any) -> Any:
        vectors, report = super()._compute(*args)
        if vectors is not None:
            for name, x in vectors[0].items():
                self.computed[name] = self.computed.get(name, torch.zeros_like(x)) + x
        return vectors, report

    def _send(self, plan: Any, vectors: Any, report: Any) -> None:
        super()._send(plan, vectors, report)
        self.last = {}
        for _, names, tensors in self.residuals._sent:
            self.last |= self.party.gradients.decode(tensors, names, plan.round)

    def _hear_fate(self, accepted: int) -> None:
        if self._sent >= 0 and accepted == self._sent:
            for name, x in self.last.items():
                self.arrived[name] = self.arrived.get(name, torch.zeros_like(x)) + x
        super()._hear_fate(accepted)


@pytest.mark.parametrize("compressor", [None, TopK(0.2)])
def test_what_is_dropped_stays_with_its_worker(
    compressor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sum of what arrived + residual == sum of gradients, for every worker; and what arrived is what was applied."""
    monkeypatch.setattr("tests.straggler.problem.Worker", Counting)

    begun = [threading.Event() for _ in range(12)]

    def tardy(worker: Worker) -> None:
        """The worker whose turn it is begins its round before the others do, and finishes when it is over."""
        me = place(worker)

        def loss_of(share: Share) -> Tensor:
            if worker.round % 3 != me:
                assert begun[worker.round].wait(PATIENCE_S)
            else:
                begun[worker.round].set()
                while not worker._superseded(worker.round):
                    breathe()
            return loss_on(worker.model, share.samples)

        worker.run(loss_of)

    runs = train(
        Backup(k=2),
        3,
        12,
        options(compressor=compressor, keep_dropped=True, policy=ALL, interrupt=False),
        around=tardy,
    )
    for run in runs[1:]:
        worker = run.rank
        assert worker.abandoned == 4
        residual = worker.residuals.state_dict()["0"]
        for name, total in worker.computed.items():
            kept = residual.get(name, torch.zeros_like(total))
            torch.testing.assert_close(worker.arrived[name] + kept, total, rtol=1e-12, atol=1e-12)
            assert compressor is None or float(kept.norm()) > 0
    model = Net(0)
    moved = {n: weights(model)[n] - runs[0].weights[n] for n in runs[0].weights}
    assert any(float(x.norm()) > 0 for x in moved.values())


def test_what_was_sent_and_dropped_is_put_back() -> None:
    """Of a vector whose fate is "too late" all that had been sent becomes residual again."""
    from commkit.runtime.codec import Codec
    from commkit.straggler.residuals import Residuals

    like = {"w": torch.zeros(40, 10, dtype=torch.float64)}
    generator = torch.Generator().manual_seed(0)
    for keep in (True, False):
        residuals = Residuals(Codec(TopK(0.1), ALL, 0, like), 1, keep)
        put, got = torch.zeros(40, 10, dtype=torch.float64), torch.zeros(40, 10)
        for number in range(6):
            x = torch.randn(40, 10, generator=generator, dtype=torch.float64)
            in_time = number not in (2, 4)
            residuals.stage(number, [number])
            tensors = residuals.encode(0, {"w": x.clone()}, ["w"], 1)
            sent = residuals.codec.decode(tensors, ["w"], number)["w"]
            residuals.settle(in_time)
            put += x * (in_time or keep)
            got = got + sent * in_time
        left = residuals.state_dict()["0"]["w"]
        torch.testing.assert_close(got + left, put, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [Coding(1), SelectiveRepetition(1, 2, 2)])
def test_the_broadcast_may_be_compressed(method: Method) -> None:
    """Workers compute with what was decoded, the same bits on all, and what was left unsent comes later: training goes
    on to the same loss."""
    coarse = BlockQuantize(4, 16, "nearest")
    seen: dict[tuple[int, int], Tensor] = {}
    lock = threading.Lock()

    def watch(worker: Worker) -> None:
        def loss_of(share: Share) -> Tensor:
            with lock:
                flat = torch.cat([p.detach().view(-1) for p in worker.model.parameters()])
                expected = seen.setdefault((share.job, 0), flat.clone())
            assert torch.equal(flat, expected)
            return loss_on(worker.model, share.samples)

        worker.run(loss_of)

    # Slowly, as a gradient that is a step old needs it.
    runs = train(method, 4, 40, options(broadcast=coarse, policy=ALL), around=watch, lr=0.02)
    plain = train(method, 4, 40, lr=0.02)
    first, last = plain[0].records[0].loss, plain[0].records[-1].loss
    assert runs[0].records[-1].loss < last + 0.1 * (first - last)
    assert (
        0
        < runs[0].rank.residual_norm
        < 0.2 * float(torch.cat([x.view(-1) for x in runs[0].weights.values()]).norm())
    )
    sent = [run.rank.transport.sent.payload_bytes for run in (runs[0], plain[0])]
    assert sent[0] < sent[1]


@pytest.mark.parametrize("compressor", [TopK(0.3), BlockQuantize(8, 16, "nearest")])
def test_coded_vectors_may_be_compressed(compressor: Any) -> None:
    runs = train(Coding(1, mu=1.0), 4, 40, options(compressor=compressor, policy=ALL))
    losses, _ = synchronous(40)
    assert runs[0].records[-1].loss < losses[-1] + 0.15 * (losses[0] - losses[-1])
    assert all(run.rank.residuals.norm() > 0 for run in runs[1:])


# Stragglers that come back, and those that do not.


@pytest.mark.parametrize("coordinators", [(0,), (0, 1)])
def test_a_straggler_fast_forwards_into_the_round_under_way(coordinators: tuple[int, ...]) -> None:
    """A worker sleeps through 30 rounds and wakes up in the middle of the next. It passes over those in its queue, gets
    all weights, and its vector is in that very round."""
    asleep, awake = threading.Event(), threading.Event()
    back, first = 31, len(coordinators)
    seen: list[int] = []

    def around(worker: Worker) -> None:
        def loss_of(share: Share) -> Tensor | None:
            if worker.party.rank == first:
                seen.append(worker.round)
                if worker.round == 1:
                    asleep.set()
                    assert awake.wait(PATIENCE_S)
            elif worker.round == 1:
                assert asleep.wait(PATIENCE_S)
            elif worker.round == back:
                awake.set()
            return loss_on(worker.model, share.samples)

        worker.run(loss_of)

    runs = train(
        Coding(1, mu=1.0),
        4,
        back + 3,
        options(coordinators=coordinators),
        lambda w, r: w == 0 and 1 <= r < back,
        around=around,
    )
    records, stats = runs[0].records, runs[0].rank.stats
    assert [r.job for r in records if r.late] == list(range(1, back))
    assert stats.used[first] == 4
    assert stats.returned == 1
    last = OPTIONS.max_behind  # the last round that it was sent while it slept
    assert seen in (
        [0, 1, *between, *range(back, back + 3)] for between in ([], [last])
    )  # 4: if the news of round 31 took a while
    # Those that it was sent while it slept it passes over, gives up, or is too late for.
    rank = runs[first].rank
    assert rank.skipped + rank.abandoned + rank.dropped == last
    assert rank.skipped >= last - 2
    for run in runs[first:]:
        assert_same(run.weights, runs[0].weights)
    _, reference = synchronous(len(records))
    assert_close(runs[0].weights, weights(reference), 1e-8)


def test_a_round_that_needs_a_straggler_goes_on_when_it_is_back() -> None:
    """It waits for a worker that was sent nothing of it: both that have a block were asleep, one after the other."""
    asleep, awake = threading.Event(), threading.Event()

    def around(worker: Worker) -> None:
        def loss_of(share: Share) -> Tensor | None:
            rank, number = worker.party.rank, worker.round
            if rank == 1 and number == 1:
                asleep.set()
                assert awake.wait(PATIENCE_S)
            elif number == 1:
                assert asleep.wait(PATIENCE_S)
            elif rank == 3 and number == 9:  # its replica
                awake.set()
                while not share.superseded():
                    breathe()
                return None
            return loss_on(worker.model, share.samples)

        worker.run(loss_of)

    runs = train(Coding(1), 4, 12, around=around)
    assert 1 in runs[0].records[9].contributors
    assert_close(runs[0].weights, weights(synchronous(12)[1]), 1e-10)


@pytest.mark.parametrize(
    "method", [Coding(1), Backup(num_backups=1), DynamicBackup(), SelectiveRepetition(1, 2, 2)]
)
def test_a_worker_that_dies_is_a_straggler(method: Method) -> None:
    dead = threading.Event()

    def around(worker: Worker) -> None:
        def loss_of(share: Share) -> Tensor:
            if worker.party.rank == 3 and worker.round >= 2:  # a slow one may pass over the second
                worker._transport.die()  # type: ignore[union-attr]
                dead.set()
                raise SystemExit
            if worker.round >= 3:
                assert dead.wait(PATIENCE_S)
            return loss_on(worker.model, share.samples)

        try:
            worker.run(loss_of)
        except SystemExit:
            pass

    runs = train(method, 4, 8, around=around)
    assert [r.skipped for r in runs[0].records] == [False] * 8
    assert runs[0].rank.stats.lost_workers == [3]
    assert all(3 not in r.contributors for r in runs[0].records[-3:])
    if isinstance(method, Coding):
        assert_close(runs[0].weights, weights(synchronous(8)[1]), 1e-10)


@pytest.mark.parametrize(
    ("method", "dying"),
    [(Coding(1), (1, 3)), (Backup(num_backups=0), (2,)), (Multiplexed(1, 2, 2), (4,))],
)
def test_without_whom_it_cannot_go_on_the_error_says(
    method: Method, dying: tuple[int, ...]
) -> None:
    told: dict[int, str] = {}

    def around(worker: Worker) -> None:
        def loss_of(share: Share) -> Tensor:
            if worker.party.rank in dying and worker.round >= 2:
                worker._transport.die()  # type: ignore[union-attr]
                raise SystemExit
            return loss_on(worker.model, share.samples)

        try:
            worker.run(loss_of)
        except SystemExit:
            pass
        except RankFailure as error:
            told[worker.party.rank] = str(error)

    with pytest.raises(NotDecodable) as error:
        train(method, 4, 8, around=around)
    assert set(dying) <= set(error.value.workers)  # type: ignore[attr-defined]
    assert str(sorted(dying)) in str(error.value) or len(error.value.workers) > len(dying)
    assert "which are lost" in str(error.value)
    assert told
    assert all("cannot be had" in text for text in told.values())


@pytest.mark.parametrize("policy", ["raise", "continue"])
def test_an_exception_on_a_worker(policy: Any) -> None:
    raised = threading.Event()

    def around(worker: Worker) -> None:
        def loss_of(share: Share) -> Tensor:
            if worker.party.rank == 2 and worker.round == 1:
                raised.set()
                raise ZeroDivisionError("of its own")
            if worker.party.rank == 4 and worker.round == 1:  # has the same block: one has to come
                assert raised.wait(60)
            return loss_on(worker.model, share.samples)

        try:
            with worker:
                worker.run(loss_of)
        except (ZeroDivisionError, RankFailure):
            pass

    if policy == "continue":
        runs = train(Coding(1), 4, 6, options(on_worker_error="continue"), around=around)
        assert runs[0].rank.stats.lost_workers == [2]
    else:
        with pytest.raises(RankFailure, match="rank 2 failed: ZeroDivisionError: of its own"):
            train(Coding(1), 4, 6, around=around)


# Values that are not finite.


def test_a_result_that_is_not_finite_counts_as_late() -> None:
    def around(worker: Worker) -> None:
        def loss_of(share: Share) -> Tensor:
            loss = loss_on(worker.model, share.samples)
            bad = worker.party.rank == 2 and worker.round in (1, 4)
            return loss * float("nan") if bad else loss

        worker.run(loss_of)

    runs = train(Coding(1, mu=1.0), 4, 6, around=around)
    assert runs[0].rank.stats.nonfinite == 2
    assert [r.late for r in runs[0].records] == [(), (2,), (), (), (2,), ()]
    assert_close(runs[0].weights, weights(synchronous(6)[1]), 1e-10)


def test_a_step_that_nobody_can_give_is_skipped_and_too_many_are_an_error() -> None:
    def poisoned(rounds: range) -> Any:
        def around(worker: Worker) -> None:
            def loss_of(share: Share) -> Tensor:
                loss = loss_on(worker.model, share.samples)
                return loss * float("inf") if worker.round in rounds else loss

            try:
                worker.run(loss_of)
            except RankFailure:
                pass

        return around

    runs = train(Backup(num_backups=0), 2, 6, around=poisoned(range(2, 4)))
    assert [r.skipped for r in runs[0].records] == [False, False, True, True, False, False]
    with pytest.raises(FloatingPointError, match="last 10 jobs"):
        train(Backup(num_backups=0), 2, 30, around=poisoned(range(2, 99)))


# Going on from a checkpoint.


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (Coding(1, mu=1.0), {}),
        (DynamicBackup(window=2), {}),
        (Backup(k=4), {"compressor": TopK(0.2), "broadcast": BlockQuantize(8, 16, "nearest")}),
        (SelectiveRepetition(1, 2, 2), {}),
        (Multiplexed(2, 3, 2), {"compressor": TopK(0.5)}),
    ],
    ids=["coding", "dynamic", "compressed", "sr-sgc", "m-sgc"],
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    method: Method, changes: dict[str, Any]
) -> None:
    """State taken in the middle, with jobs under way; workers save theirs when they are asked to."""
    chosen = options(policy=ALL, **changes)
    states: dict[int, Any] = {}

    def copied(state: Any) -> Any:
        """As from a file."""
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def on_step(coordinator: Coordinator, record: Any) -> None:
        if record.job == 5:
            states[0] = copied(coordinator.state_dict())
            coordinator.save_workers(6)

    def note(rank: Any) -> None:
        if isinstance(rank, Worker):
            rank.on_save = lambda tag: states.__setitem__(
                rank.party.rank, copied(rank.state_dict())
            )

    kinds: dict[str, Any] = {"batch": 96, "in_order": isinstance(method, DynamicBackup)}
    whole = train(method, 4, 12, chosen, on_step=on_step, prepare=note, **kinds)
    assert sorted(states) == [0, 1, 2, 3, 4]

    def load(rank: Any) -> None:
        rank.load_state_dict(states[rank.party.rank])

    rest = train(method, 4, 12, chosen, prepare=load, **kinds)
    assert [r.job for r in rest[0].records] == list(range(6, 12))
    assert [r.awaited for r in rest[0].records] == [r.awaited for r in whole[0].records[6:]]
    assert_same(rest[0].weights, whole[0].weights)


def test_another_number_of_workers_goes_on_from_the_weights() -> None:
    states: list[Any] = []

    def on_step(coordinator: Coordinator, record: Any) -> None:
        if record.job == 3:
            states.append(coordinator.state_dict())
            coordinator.stop()

    train(Coding(1), 4, 10, on_step=on_step)

    def load(rank: Any) -> None:
        if isinstance(rank, Coordinator):
            with pytest.raises(ValueError, match="of 4 workers and there are 6"):
                rank.load_state_dict(states[0])
            rank.load_state_dict(states[0], job=4)

    runs = train(Coding(1), 6, 10, prepare=load)
    assert [r.job for r in runs[0].records] == list(range(4, 10))
    assert_close(runs[0].weights, weights(synchronous(10)[1]), 1e-10)


# Refusals.


def test_a_batch_that_cannot_be_cut_is_refused_everywhere() -> None:
    with pytest.raises(ValueError, match="batch=50 must be a multiple of units=4"):
        train(Coding(1), 4, 2, batch=50)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coding(4).build(4), "num_stragglers=4"),
        (lambda: Backup(k=5).build(4), r"k=5 must be in 1\.\.4"),
        (lambda: Backup(num_backups=4).build(4), "num_backups=4"),
        (lambda: options(coordinators=()), r"coordinators=\(\)"),
        (lambda: options(coordinators=(0, 1)).workers(2), "leaves none of 2 ranks"),
        (lambda: options(coordinators=(7,)).workers(3), "must be ranks of a group of 3"),
        (lambda: options(grace_s=-1.0), "grace_s=-1.0"),
        (lambda: options(max_behind=0), "max_behind=0"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
