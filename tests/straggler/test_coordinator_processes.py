"""Coordinated training on real processes, over torch.distributed and over MPI: a worker is killed, not slow."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from commkit import RankFailure
from commkit.compressors import TopK
from commkit.policy import Policy
from commkit.straggler import (
    Coding,
    CoordinationOptions,
    Coordinator,
    DynamicBackup,
    Method,
    NotDecodable,
    Share,
    Worker,
)
from commkit.transport import MPINetwork, Network, TorchNetwork
from tests.harness import run_ranks
from tests.mpi import needs_mpi, run_mpi

from .problem import (
    BATCH,
    PATIENCE_S,
    Net,
    Script,
    assert_close,
    assert_same,
    loss_on,
    nobody,
    sgd,
    synchronous,
    weights,
)

pytestmark = pytest.mark.timeout(240)  # processes start slowly on a busy machine

JOBS = 8
CODING = Coding(1, mu=1.0)  # rounds wait for everybody who lives
LIMIT = CoordinationOptions(timeout_s=PATIENCE_S)
DEADLINE_S = 200.0


def one_rank(
    network: Network,
    method: Method,
    options: CoordinationOptions,
    killed: dict[int, int],
    before: Any = None,
) -> Any:
    """Train; of ``killed``, rank -> round in which its process ends. Weights, and the stragglers' story."""
    net = Net(0 if network.rank in options.coordinators else 99)
    if network.rank in options.coordinators:
        records: list[Any] = []
        clock = Script(nobody)
        with Coordinator(
            [net], [sgd(net)], method, options, batch=BATCH, network=network, clock=clock
        ) as it:
            clock.coordinator = it if it.is_first else None
            try:
                it.run(JOBS, records.append)
            except NotDecodable as error:
                return str(error)
        return weights(net), records, it.stats
    with Worker(net, method, options, batch=BATCH, network=network) as worker:

        def loss_of(share: Share) -> Tensor:
            if worker.round == killed.get(network.rank, -1):
                os.kill(os.getpid(), signal.SIGKILL)
            return loss_on(net, share.samples)

        try:
            worker.run(loss_of)
        except RankFailure as error:
            return str(error)
    return weights(net), worker.in_time + worker.abandoned + worker.dropped


def both_stories(network: Network) -> Any:
    """First a run in which all live, then one in which the last worker dies."""
    lively = CoordinationOptions(
        timeout_s=PATIENCE_S, compressor=TopK(0.3), policy=Policy(min_numel=0), interrupt=False
    )
    first = one_rank(network, DynamicBackup(window=2), lively, {})
    second = one_rank(network, CODING, LIMIT, {network.world_size - 1: 3})
    return first, second


def over_torch(rank: int, world_size: int) -> Any:
    return both_stories(TorchNetwork())


def over_mpi(rank: int, world_size: int) -> Any:
    return both_stories(MPINetwork())


def check(results: list[Any]) -> None:
    coordinator, *workers = results
    first, second = coordinator
    for other, _ in workers[:-1]:
        assert_same(other[0], first[0])
    assert len(first[1]) == JOBS
    assert first[2].lost_workers == []
    final, records, stats = second
    assert stats.lost_workers == [len(workers)]
    assert len(records) == JOBS
    assert_close(final, weights(synchronous(JOBS)[1]), 1e-10)
    for _, other in workers[:-1]:
        assert_same(other[0], final)
    assert workers[-1] is None


def test_a_killed_worker_over_torch() -> None:
    check(run_ranks(over_torch, 5, dying=[4], deadline_s=DEADLINE_S))


@pytest.mark.mpi
@needs_mpi
@pytest.mark.timeout(
    330
)  # each rank imports torch, while those that are there keep processors busy
def test_a_killed_worker_over_mpi() -> None:
    check(run_mpi(over_mpi, 3, dying=[2], deadline_s=300.0))


def _two_die(rank: int, world_size: int) -> Any:
    return one_rank(TorchNetwork(), CODING, LIMIT, {1: 2, 3: 4})


def test_without_two_of_one_block_the_error_names_them() -> None:
    """Fractional repetition for 4 and 1: workers 0 and 2, of ranks 1 and 3, have the same block."""
    results = run_ranks(_two_die, 5, dying=[1, 3], deadline_s=DEADLINE_S)
    told = [results[rank] for rank in (0, 2, 4)]
    assert all("without the workers of ranks [1, 3], which are lost" in text for text in told)


def _sharded(rank: int, world_size: int, coordinators: tuple[int, ...]) -> Any:
    options = CoordinationOptions(coordinators=coordinators, timeout_s=PATIENCE_S)
    result = one_rank(TorchNetwork(), Coding(1), options, {})  # whoever is first in each block
    return result[0]


def test_two_coordinators_give_the_bits_of_one() -> None:
    whole, *_ = run_ranks(_sharded, 5, (0,), deadline_s=DEADLINE_S)
    first, _, *workers = run_ranks(_sharded, 6, (0, 1), deadline_s=DEADLINE_S)
    assert_same(first, whole)
    for other in workers:
        assert_same(other, whole)


def _disagree(rank: int, world_size: int) -> str:
    method = Coding(1, mu=1.0) if rank == 2 else Coding(1)
    with pytest.raises(RuntimeError, match=r"ranks disagree on method\.mu") as error:
        one_rank(TorchNetwork(), method, LIMIT, {})
    return str(error.value)


def test_ranks_that_disagree_all_say_so() -> None:
    assert len(set(run_ranks(_disagree, 3, deadline_s=DEADLINE_S))) == 1


def _foreign(rank: int, world_size: int) -> str:
    """A worker that sends what nobody sends."""
    from commkit.straggler.protocol import ProtocolError
    from commkit.transport import Message

    if rank == 0:
        net = Net(0)
        with Coordinator([net], [sgd(net)], Coding(1), LIMIT, batch=BATCH) as it:
            with pytest.raises(ProtocolError, match="rank 1 sent a message of") as error:
                it.run(JOBS)
            return str(error.value)
    net = Net(0)
    with Worker(net, Coding(1), LIMIT, batch=BATCH) as worker:

        def loss_of(share: Share) -> Tensor:
            if rank == 1:
                assert worker._transport is not None
                number = {0: 99, 1: 5}[share.job % 2]
                worker._transport.isend(0, Message(77 if number == 99 else 4, number))
            return loss_on(net, share.samples)

        with pytest.raises(RankFailure, match="ProtocolError"):
            worker.run(loss_of)
    return ""


def test_a_foreign_message_is_refused() -> None:
    assert "kind 77" in run_ranks(_foreign, 3, deadline_s=DEADLINE_S)[0]


def _wrapped(rank: int, world_size: int) -> str:
    alone = dist.new_group([1])
    net = Net(0)
    ddp = DistributedDataParallel(net, process_group=alone) if rank == 1 else net
    mine: Any = Worker(net, Coding(1), LIMIT, batch=BATCH) if rank else None
    mine = mine or Coordinator([net], [sgd(net)], Coding(1), LIMIT, batch=BATCH)
    with pytest.raises(RuntimeError, match="give Worker a plain module") as error:
        mine.start()
    assert ddp is not None  # it lives until here
    return str(error.value)


def test_a_model_in_ddp_is_refused_on_all_ranks() -> None:
    told = run_ranks(_wrapped, 3, deadline_s=DEADLINE_S)
    assert "rank 1" in told[0]
    assert told[0] == told[2]
