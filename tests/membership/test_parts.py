"""The parts of membership that need no other process."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

import commkit
from commkit import Elastic
from commkit.connections import Wiring, tcp_connections
from commkit.membership import (
    Alarm,
    ElasticOptions,
    Join,
    Leave,
    Ledger,
    Member,
    Place,
    Ready,
    View,
    decode,
    default_group,
    encode,
)
from commkit.membership.agent import Agent
from commkit.membership.epoch_store import EpochStore

OPTIONS = ElasticOptions(min_workers=2, heartbeat_s=1.0, limit_s=3.0)
TWO = View(1, ("a", "b"), ("a",), 0)


@pytest.mark.parametrize(
    "record",
    [
        Join("a", 3),
        Leave("a", "why"),
        Alarm(2, "a", "lost"),
        Ready(2, "a", None),
        Ready(2, "a", 7),
        View(3, ("a", "b"), ("b",), 7, ""),
    ],
    ids=str,
)
def test_records_survive_the_log(record: Any) -> None:
    assert decode(encode(record)) == record


def test_what_belongs_to_another_epoch_has_no_effect() -> None:
    ledger = Ledger()
    for record in (Join("a"), Join("b"), TWO):
        ledger.apply(record)
    for late in (
        Alarm(0, "a", "old"),
        Ready(1, "a", 5),
        View(1, ("a",), ("a",), 9),
        View(3, (), (), 0),
    ):
        ledger.apply(late)
    assert (ledger.view, ledger.alarm, ledger.ready) == (TWO, None, {})
    ledger.apply(Alarm(1, "stranger", "not mine"))
    assert ledger.alarm is None


def _feed(member: Member, *records: Any, now: float = 0.0) -> None:
    for record in records:
        position, _ = member.request(now)
        assert member.answer(position, encode(record), now)


def _member(name: str, *records: Any) -> Member:
    member = Member(name, OPTIONS, 2, 0, 0.0)
    _feed(member, Join("a"), Join("b"), TWO, *records)
    return member


def _wish(member: Member, now: float) -> Any:
    _, text = member.request(now)
    return decode(text) if text else None


def test_a_silent_worker_is_given_up_after_the_limit() -> None:
    member = _member("a")
    for now in (1.0, 2.0, 3.0, 4.0):
        assert _wish(member, now) is None
        member.heard({"b": 1}, now)
    alarm = _wish(member, 4.1)
    assert isinstance(alarm, Alarm)
    assert "worker b gave no sign of life for limit_s=3 s" in alarm.reason


def test_who_was_deaf_gives_nobody_up() -> None:
    """The store was stopped for a minute, and so nobody's signs of life were to be heard."""
    member = _member("a")
    member.heard({"b": 1}, 1.0)
    assert _wish(member, 61.0) is None
    member.heard({"b": 1}, 61.0)  # b has not had its turn yet
    assert _wish(member, 61.5) is None
    member.heard({"b": 2}, 62.0)
    assert _wish(member, 62.5) is None
    for now in (63.0, 64.0, 65.0):
        member.heard({"b": 2}, now)
    assert isinstance(_wish(member, 65.1), Alarm)


def test_a_slow_store_makes_patient_but_not_for_ever() -> None:
    member, now = _member("a"), 1.0
    while _wish(member, now) is None:
        member.heard({"b": 1}, now)
        now += 10.0
        assert now < 60.0
    assert now > 30.0


def test_making_a_group_has_a_limit_too() -> None:
    options = ElasticOptions(min_workers=2, heartbeat_s=1.0, limit_s=30.0, step_limit_s=5.0)
    member = Member("a", options, 2, 0, 0.0)
    _feed(member, Join("a"), Join("b"), TWO)
    assert _wish(member, 20.0) is None  # its owner builds a model
    member.begin_step(20.0)
    assert _wish(member, 24.0) is None
    assert _wish(member, 25.1).reason == "a step took longer than step_limit_s=5"
    member.rest()
    assert _wish(member, 29.0) is None


def test_a_worker_that_ends_is_given_up_at_once() -> None:
    member = _member("a")
    member.disconnected(1, ["b"])
    assert "worker b has ended" in _wish(member, 0.1).reason


def test_who_joins_leaves_the_others_time_for_a_step() -> None:
    member = _member("a", Join("c"))
    assert _wish(member, 0.1) is None
    assert member.prepare(1, 1)
    assert member.commit(1, 1)
    assert "worker c joins" in _wish(member, 0.2).reason


def test_who_joins_does_not_wait_for_ever_for_others_that_make_no_step() -> None:
    member = _member("a", Join("c"))
    for now in (1.0, 2.0, 3.0):
        member.heard({"b": int(now), "c": int(now)}, now)
        assert _wish(member, now) is None
    assert "worker c joins" in _wish(member, 3.1).reason


def test_who_would_make_a_number_that_cannot_train_waits_for_a_loss() -> None:
    member = _member("a", Join("c"), Join("d"), Join("e"))
    member.refuses = lambda size: "" if size in (2, 4) else f"{size} is no power of two"
    assert "worker c joins" in _wish(member, 3.5).reason
    _feed(member, Alarm(1, "a", "c joins"), Ready(1, "a", 0), Ready(1, "b", 0))
    assert _wish(member, 0.0) == View(2, ("a", "b", "c", "d"), ("a", "b"), 0)
    _feed(member, _wish(member, 0.0))
    assert _wish(member, 0.0) is None  # e waits
    _feed(member, Leave("b", "lost"), *(Ready(2, each, 0) for each in "acd"))
    assert _wish(member, 0.0) == View(3, ("a", "c", "d", "e"), ("a", "c", "d"), 0)


def test_workers_that_cannot_train_stop_and_say_why() -> None:
    member = _member("a", Join("c"), Alarm(1, "a", "c joins"), Ready(1, "a", 0), Ready(1, "b", 0))
    _feed(member, View(2, ("a", "b", "c"), ("a", "b"), 0))
    member.refuses = lambda size: "" if size == 3 else "three are asked for"
    _feed(member, Leave("b", "lost"), Ready(2, "a", 0), Ready(2, "c", 0))
    stop = _wish(member, 1.0)
    assert stop.stop == "2 workers are left, and three are asked for"
    assert stop.sources == ("a", "c")


def test_the_least_prepared_member_decides() -> None:
    member = _member("a")
    member.received(1)
    assert member.prepare(1, 1)
    assert member.commit(1, 1)
    assert member.prepare(1, 2)
    _feed(member, Alarm(1, "b", "lost"))
    assert not member.prepare(1, 3)
    assert not member.commit(1, 2)
    assert _wish(member, 0.0) == Ready(1, "a", 2)
    _feed(member, Ready(1, "a", 2), Ready(1, "b", 1))
    assert _wish(member, 0.0) == View(2, ("a", "b"), ("a", "b"), 1)
    _feed(member, View(2, ("a", "b"), ("a", "b"), 1))
    assert (member.committed, member.prepared) == (1, 1)


def test_nobody_proposes_before_all_are_ready_or_lost() -> None:
    member = _member("a", Alarm(1, "a", "lost"), Ready(1, "a", 0))
    for now in (1.0, 2.0, 3.0):
        assert _wish(member, now) is None
        member.heard({}, now)
    assert _wish(member, 3.1).stop == "1 workers are left, fewer than min_workers=2"


def test_a_late_worker_learns_that_it_is_out() -> None:
    member = _member("b", Alarm(1, "a", "silent"), Ready(1, "a", 0), Join("c"))
    _feed(member, View(2, ("a", "c"), ("a",), 0))
    assert member.evicted
    assert not member.prepare(1, 1)
    assert _wish(member, 0.0) is None


def test_answers_may_come_twice() -> None:
    member = Member("a", OPTIONS, 2, 0, 0.0)
    assert member.answer(0, encode(Join("a")), 0.0)
    assert not member.answer(0, encode(Join("a")), 0.0)
    assert list(member.ledger.waiting) == ["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_workers": 0}, "min_workers=0 must be >= 1"),
        (
            {"limit_s": 0.5, "heartbeat_s": 0.5},
            "limit_s=0.5 must be at least twice heartbeat_s=0.5",
        ),
        ({"grace_s": -1.0}, "grace_s=-1.0 must be >= 0"),
        ({"poll_s": 0.0}, "poll_s=0"),
    ],
    ids=str,
)
def test_options_out_of_range(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticOptions(**settings)


def test_places() -> None:
    both = {"RANK": "0", "WORLD_SIZE": "2"}
    master = both | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert Place.from_environment(master).hosts
    assert not Place.from_environment(master | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts
    at = Place.from_environment(both | {"COMMKIT_STORE": "10.0.0.1:29400"})
    assert (at.host, at.port, at.hosts) == ("10.0.0.1", 29400, False)
    for given, message in (
        ({}, "RANK is not set"),
        (both | {"RANK": "x"}, "RANK='x' must be a whole number"),
        (both, "MASTER_ADDR is not set"),
        (both | {"COMMKIT_STORE": "here"}, "COMMKIT_STORE='here' must be host:port"),
    ):
        with pytest.raises(ValueError, match=message):
            Place.from_environment(given)


class _SlowStore:
    """A store that answers when the test lets it."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.asked, self.answers = threading.Event(), threading.Event()
        self.answers.set()

    def set(self, key: str, value: str) -> None:
        self.texts[key] = value

    def compare_set(self, key: str, expected: str, text: str) -> bytes:
        self.asked.set()
        assert self.answers.wait(10.0)
        if text:
            self.texts.setdefault(key, text)
        return self.texts.get(key, "").encode()


def test_a_worker_that_ends_while_its_agent_asks_the_store_says_so_afterwards() -> None:
    """Else the others took it for lost, and were too few to go on."""
    store = _SlowStore()
    agent = Agent(Member("a", ElasticOptions(), 1, 0, Agent.now()), store)  # type: ignore[arg-type]
    agent.wait_for(lambda m: m.working, 10.0)
    store.answers.clear()
    store.asked.clear()
    assert store.asked.wait(10.0)  # for news: it has nothing to say yet
    agent.order(lambda m: m.leave())
    closing = threading.Thread(target=agent.close)
    closing.start()
    closing.join(0.1)
    store.answers.set()
    closing.join(10.0)
    assert Leave("a") in [decode(text) for key, text in store.texts.items() if "log/" in key]


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


def test_whoever_waits_on_a_connection_that_is_cut_is_woken() -> None:
    wiring = Wiring()
    with wiring.opening() as opened:
        one, other = _pair()
    stranger, its_peer = _pair()
    with one, other, stranger, its_peer:
        # Of what was opened meanwhile, what leads to the members.
        wiring.keep(opened, [[other.getsockname()]])
        woken: list[bytes] = []
        thread = threading.Thread(target=lambda: woken.append(one.recv(1)))
        thread.start()
        wiring.cut()
        thread.join(5.0)
        assert woken == [b""]
        stranger.sendall(b"x")
        assert its_peer.recv(1) == b"x"
        with pytest.raises(RuntimeError, match="not together any more"), wiring.opening():
            pass


def test_connections_are_cut_before_it_is_known_whose_they_are() -> None:
    """Members tell each other their addresses over them, and may be lost then."""
    wiring = Wiring()
    with wiring.opening():
        one, other = _pair()
    with one, other:
        wiring.cut()
        one.settimeout(5.0)
        assert one.recv(1) == b""


def test_a_default_group_that_was_not_made_leaves_no_trace() -> None:
    def refuse() -> None:
        raise RuntimeError("epoch 1 is over")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="epoch 1 is over"):
            default_group.make(EpochStore(HashStore(), refuse), 0, 2)
    own = EpochStore(HashStore(), lambda: None)
    assert default_group.make(own, 0, 1).group_name == "0"
    default_group.destroy()
    assert not dist.is_initialized()


def test_a_closed_connection_is_seen_and_its_descriptor_is_not_taken_for_it() -> None:
    wiring = Wiring()
    with wiring.opening() as opened:
        one, other = _pair()
    wiring.keep(opened, [[], [other.getsockname()]], watch=True)
    assert wiring.closed() == set()
    one.close()
    other.close()
    again = _pair()  # has the same descriptors
    assert wiring.closed() == {1}
    wiring.cut()
    again[0].sendall(b"x")
    assert again[1].recv(1) == b"x"
    for each in again:
        each.close()


def test_connections_that_are_not_found_are_refused() -> None:
    wiring = Wiring()
    with wiring.opening() as opened:
        pass
    with pytest.raises(RuntimeError, match="TORCH_GLOO_LAZY_INIT"):
        wiring.keep(opened, [[], []])


def test_looking_at_connections_opens_none() -> None:
    before = {connection.inode for connection in tcp_connections()}
    for _ in range(50):
        tcp_connections()
    # Those of others in this process may have ended meanwhile.
    assert {connection.inode for connection in tcp_connections()} <= before


def test_wrapped_models_are_refused(tmp_path: Any) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    members = Elastic(OPTIONS)
    with pytest.raises(TypeError, match="leave process_group out"):
        commkit.attach(model, "topk", optimizer, members=members, process_group=object())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="use it in a with block"):
        members.require_together()
