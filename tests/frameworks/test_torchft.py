"""commkit among replicas of torchft: a real lighthouse and a manager in each process."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commkit
from tests.adapters import problem
from tests.harness import run_ranks

pytest.importorskip("torchft")
pytestmark = pytest.mark.timeout(180)

STEPS, JOINS_AT, DIES_AT = 8, 2, 5
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {},
    "sign": {},
    "powersgd": {"rank": 2},
    "topk": {"density": 0.1},
}


class Replica:
    """A model in a process of its own, with all that torchft asks for."""

    def __init__(self, number: int, lighthouse: str, scheme: str, **options: Any) -> None:
        import torchft

        import commkit.torchft

        self.net = problem.model()
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.group = torchft.ProcessGroupGloo(timeout=timedelta(seconds=20))
        self.manager = torchft.Manager(
            pg=self.group,
            load_state_dict=self._load,
            state_dict=self._state,
            min_replica_size=2,
            use_async_quorum=False,
            timeout=timedelta(seconds=20),
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=self.store.port,
            lighthouse_addr=lighthouse,
            replica_id=f"replica_{number}",
            hostname="127.0.0.1",
            init_sync=False,  # all begin with the same weights
        )
        self.inner = optimizer
        self.optimizer = commkit.torchft.attach(
            self.manager, self.group, self.net, scheme, optimizer, **options
        )

    def _state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.inner.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.inner.load_state_dict(state["optimizer"])

    @property
    def weights(self) -> torch.Tensor:
        return problem.parameters(self.net).clone()


def _like_plain(rank: int, world_size: int, lighthouses: list[str]) -> list[dict[str, bool]]:
    """Every scheme, against the same one over torch.distributed."""
    told = []
    for (scheme, knobs), lighthouse in zip(SCHEMES.items(), lighthouses, strict=True):
        replica = Replica(rank, lighthouse, scheme, **knobs)
        net = problem.model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        handle: Any = commkit.attach(net, scheme, optimizer, **knobs)
        same = {"sent": True}
        # Servers' shares go by rank, and which replica is first is the lighthouse's choice: so the data does too.
        for number in range(5):
            replica.optimizer.zero_grad()
            replica.manager.wait_quorum()
            place = replica.group.parent.rank()
            problem.loss_of(replica.net, number, place).backward()
            replica.optimizer.step()
            optimizer.zero_grad()
            problem.loss_of(net, number, rank).backward()
            optimizer.step()
            sent = replica.optimizer.last_step.wire_bytes, handle.last_step.wire_bytes
            same["sent"] &= sent[0] == sent[1] > 0
        same["weights"] = torch.equal(replica.weights, problem.parameters(net))
        same["steps"] = replica.manager.current_step() == 5
        told.append(same)
        handle.close()
        dist.barrier()
        replica.manager.shutdown()
    return told


def _with_changes(rank: int, world_size: int, lighthouse: str, folder: str) -> Any:
    """Replica 2 comes late and is killed inside a step. The weights after each step and how many made it, and whether
    steps that did not count left weights and residuals as they were."""
    wanted, there = Path(folder, "wanted"), Path(folder, "there")
    _await(wanted, unless=rank != 2)
    replica = Replica(rank, lighthouse, "sign")
    manager, optimizer = replica.manager, replica.optimizer
    if rank == 2:
        there.touch()
    after: dict[int, tuple[torch.Tensor, int]] = {}
    given_up = []
    while manager.current_step() < STEPS:
        if rank != 2 and manager.current_step() == JOINS_AT:
            wanted.touch()
            _await(there)
            time.sleep(0.5)  # in which the lighthouse hears of it
        optimizer.zero_grad()
        step = manager.current_step()  # of the others, where it has just healed
        problem.loss_of(replica.net, step, rank).backward()
        if rank == 2 and step == DIES_AT:
            torch.save(after, Path(folder, "of 2"))
            os.kill(os.getpid(), signal.SIGKILL)
        before = {k: x.clone() for k, x in optimizer.reducer.state_dict().items()}
        weights = replica.weights
        optimizer.step()
        if manager.current_step() > step:
            after[step] = (replica.weights, manager.num_participants())
        else:
            state = optimizer.reducer.state_dict()
            same = before.keys() == state.keys() and torch.equal(weights, replica.weights)
            given_up.append(same and all(torch.equal(before[k], state[k]) for k in before))
    manager.shutdown()
    return after, given_up


def _await(file: Path, unless: bool = False) -> None:
    while not (unless or file.exists()):
        time.sleep(0.05)


@pytest.fixture
def lighthouse() -> Any:
    """Makes lighthouses; gives their addresses."""
    from torchft.coordination import LighthouseServer

    servers = []

    def make(replicas: int) -> str:
        servers.append(
            LighthouseServer(
                bind="127.0.0.1:0",
                min_replicas=replicas,
                join_timeout_ms=2000,
                heartbeat_timeout_ms=2000,
            )
        )
        return f"http://127.0.0.1:{servers[-1].address().rpartition(':')[2]}"

    yield make
    for server in servers:
        server.shutdown()


def test_replicas_train_as_over_torch_distributed(lighthouse: Any) -> None:
    addresses = [lighthouse(2) for _ in SCHEMES]
    for told in run_ranks(_like_plain, 2, addresses, deadline_s=100.0):
        for scheme, same in zip(SCHEMES, told, strict=True):
            assert same == {"sent": True, "weights": True, "steps": True}, scheme


def test_a_replica_comes_and_goes(lighthouse: Any, tmp_path: Path) -> None:
    first, second, _ = run_ranks(
        _with_changes, 3, lighthouse(2), str(tmp_path), deadline_s=100.0, dying=[2]
    )
    third = torch.load(tmp_path / "of 2")
    assert list(third) == list(range(JOINS_AT, DIES_AT))
    for step in range(STEPS):
        together = [after[step] for after in (first[0], second[0], third) if step in after]
        expected = 3 if JOINS_AT <= step < DIES_AT else 2
        assert [count for _, count in together] == [expected] * expected
        assert all(torch.equal(weights, together[0][0]) for weights, _ in together)
    for _, given_up in (first, second):
        assert given_up  # the one in which it died
        assert all(given_up)
