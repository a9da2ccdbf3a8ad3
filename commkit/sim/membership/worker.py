"""A worker that trains in virtual time, around the production state machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ...membership import ElasticOptions, Member, View
from .judge import Judge
from .network import VirtualNetwork, VirtualStore

_COMPUTE_S = (0.1, 1.2)
_TWICE = 0.05


class _Outcome(NamedTuple):
    """Of a step: what it comes to, of whose parts, and what of this worker's is left unsent."""

    value: int
    parts: dict[str, int]
    computed: int
    residual: int


class SimWorker:
    """Trains in steps: everybody's contribution goes to everybody, and then the news that all have arrived. What a
    step comes to is a number made of the last one and of all contributions. A contribution is a part of what the worker
    has computed; the rest is its residual.

    Args:
        name: of this worker.
        place: among those who start together.
        world_size: how many those are.
        steps: to train.
        peers: all workers by name, later ones too.
        reached: called with what this worker has just done and itself.
    """

    def __init__(
        self,
        name: str,
        place: int,
        world_size: int,
        steps: int,
        options: ElasticOptions,
        network: VirtualNetwork,
        store: VirtualStore,
        judge: Judge,
        peers: dict[str, SimWorker],
        reached: Callable[[str, SimWorker], None],
    ) -> None:
        self.name, self.place = name, place
        self.member = Member(name, options, world_size, place, network.clock.now)
        self.dead = False
        self.lost_store = False
        self.real = 0  # steps
        self._number = len(peers)  # hashes of text differ from run to run
        self._value = self._residual = self._computed_in_all = 0
        self._outcome = _Outcome(0, {}, 0, 0)
        self._steps, self._options = steps, options
        self._network, self._store, self._judge, self._peers = network, store, judge, peers
        self._reached = reached
        self._epoch = 0
        self._seen = self.member.view
        self._formed = False
        self._sent: set[tuple[int, str, int]] = set()
        self._mail: dict[tuple[int, str, int], dict[str, int]] = defaultdict(dict)
        self._own: tuple[int, int] = 0, 0  # computed in this step, and what will be left of it
        self._computing = False
        self._asking = False
        self._beat = 0
        self._next_beat = 0.0
        self._stopped: list[Callable[[], None]] | None = None
        self._later(0.0, self._turn)

    @property
    def active(self) -> bool:
        """Whether it still has something to do."""
        member = self.member
        ended = self.dead or self.lost_store or member.evicted or member.has_left
        return not (ended or member.view.stop)

    @property
    def formed_with(self) -> list[SimWorker]:
        """Those that it has connections to."""
        members = self.member.view.members if self._formed else ()
        return [self._peers[name] for name in members if name != self.name]

    @property
    def _now(self) -> float:
        return self._network.clock.now

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._network.clock.after(seconds, self._guarded(call))

    def _guarded(self, call: Callable[[], None]) -> Callable[[], None]:
        """``call``, later if the process is stopped then, never if it has ended."""

        def run() -> None:
            if self._stopped is not None:
                self._stopped.append(run)
            elif not self.dead:
                call()

        return run

    # Faults.

    def pause(self, seconds: float, alone: bool = True) -> None:
        """SIGSTOP, and SIGCONT later. ``alone``: others are not."""
        if self._stopped is None:
            self._judge.hit(self.name, seconds if alone else 0.0)
            self._stopped = []
            self._network.clock.after(seconds, self._resume)

    def _resume(self) -> None:
        late, self._stopped = self._stopped or [], None
        for call in late:
            self._guarded(call)()

    def kill(self, noticed: bool) -> None:
        """``noticed``: its system closes its connections."""
        self._judge.hit(self.name, float("inf"))
        if noticed and self._formed:
            self._disconnect()
        self.dead = True
        self._network.ended.add(self.name)

    def give_up(self) -> None:
        """An exception ends its training."""
        self._judge.hit(self.name, float("inf"))
        self.member.leave("it raised an exception")

    def reset(self, peer: SimWorker) -> None:
        """The connection between the two breaks, although both live."""
        if self._formed and peer._formed and self._epoch == peer._epoch:
            for one, other in ((self, peer), (peer, self)):
                self._judge.hit(one.name, float("inf"))
                one._guarded(partial(one._closed, one._epoch, other.name))()

    def stumble(self) -> None:
        """Something that it does together with others fails, and nobody is lost."""
        if self._formed:
            self.member.fail(self._epoch, f"{self.name} stumbled")

    # The driver of the state machine: what the agent's thread does.

    def _turn(self) -> None:
        if not self.active or self._asking:
            return
        self._asking = True
        if self._now < self._next_beat:
            self._look()
            return
        self._beat += 1
        self._next_beat = self._now + self._options.heartbeat_s
        hear = lambda beats: self._guarded(lambda: self._hear(beats))()
        self._store.beat(self.name, self._beat, hear, self._guarded(self._store_lost))

    def _hear(self, beats: dict[str, int]) -> None:
        self.member.heard(beats, self._now)
        self._look()

    def _look(self) -> None:
        position, text = self.member.request(self._now)
        answered = lambda at, have: self._guarded(lambda: self._answered(at, have))()
        self._store.append(self.name, position, text, answered, self._guarded(self._store_lost))

    def _answered(self, position: int, text: str) -> None:
        more = self.member.answer(position, text, self._now)
        if self.member.view is not self._seen:
            self._seen = self.member.view
            self._judge.saw_view(self.name, self._seen, self.member.ledger.left)
            if self._seen.stop:
                self._hear_verdict(self._seen)
        self._train()
        if self._asking:
            self._asking = False
            self._later(0.0 if more else self._options.poll_s, self._turn)

    def _store_lost(self) -> None:
        if self._formed:
            self._disconnect()
        self.lost_store = True

    def _disconnect(self) -> None:
        """Close all connections of the present epoch."""
        self._formed = False
        epoch, name = self._epoch, self.name
        for peer in list(self._peers.values()):
            if peer is not self:
                closed = peer._guarded(partial(peer._closed, epoch, name))
                self._network.send(name, peer.name, closed, sure=True)

    def _closed(self, epoch: int, name: str) -> None:
        if self._formed and self._epoch == epoch:  # it has such a connection
            self.member.disconnected(epoch, [name])
            if self._network.random.random() < 0.5:  # it waits on that one
                self.member.fail(epoch, f"{self.name}: connection closed by {name}")

    # Training.

    def _train(self) -> None:
        """Do what can be done now."""
        member, view = self.member, self.member.view
        if view.epoch != self._epoch and member.is_member:
            self._enter(view)
        # Until it has said so itself, it works on, whatever is known of the epoch by then.
        if (
            not self.active
            or view.epoch != self._epoch
            or self.name in member.ledger.ready
            or not member.is_member
        ):
            if self._formed:  # what it says of itself comes before what its connections say
                self._disconnect()
            return
        for kind in ("hello", "connected"):
            self._send(kind, 0, 0)
            if len(self._mail[self._epoch, kind, 0]) < len(view.members):
                return
        self._formed = True
        if self.name == view.sources[0]:
            self._send("state", 0, self._value)
        if not member.has_state and not self._receive_state(view):
            return
        self._step(member.committed + 1)

    def _hear_verdict(self, view: View) -> None:
        """On the step that was under way."""
        if self.name in view.sources:
            self._judge.saw_verdict(self.name, self.real, view)
            if view.step > self.real:
                self._make_real(view.step)

    def _enter(self, view: View) -> None:
        self._hear_verdict(view)
        self._epoch, self._formed, self._computing = view.epoch, False, False
        self.member.begin_step(self._now)
        self._reached("enters", self)

    def _receive_state(self, view: View) -> bool:
        arrived = self._mail[self._epoch, "state", 0]
        if not arrived or not self.member.received(self._epoch):
            return False
        self._value, self.real = arrived[view.sources[0]], view.step
        self._judge.saw_state(self.name, self.real)
        self._reached("has the state", self)
        return True

    def _step(self, step: int) -> None:
        if step > self._steps:
            self.member.leave()
            return
        epoch, count = self._epoch, len(self.member.view.members)
        if (epoch, "part", step) not in self._sent:
            if not self._computing:
                self._computing = True
                self.member.begin_step(self._now)
                seconds = self._network.random.uniform(*_COMPUTE_S)
                self._later(seconds, lambda: self._computed(epoch, step))
            return
        parts = self._mail[epoch, "part", step]
        if len(parts) < count:
            return
        if self.member.prepared < step:
            if not self.member.prepare(epoch, step):
                return
            told = sorted((self._peers[name]._number, sent) for name, sent in parts.items())
            value = hash((self._value, epoch, *told))
            self._outcome = _Outcome(value, dict(parts), *self._own)
            self._reached("has prepared", self)
        self._send("done", step, 0)
        if len(self._mail[epoch, "done", step]) == count and self.member.commit(epoch, step):
            self._make_real(step)
            self._reached("has committed", self)
            self._train()

    def _computed(self, epoch: int, step: int) -> None:
        if epoch == self._epoch:
            self._computing = False
            computed = self._network.random.randint(1, 1000)
            sent = (self._residual + computed) // 2
            self._own = computed, self._residual + computed - sent
            self._send("part", step, sent)
            self._train()

    def _make_real(self, step: int) -> None:
        value, parts, computed, self._residual = self._outcome
        if step not in self._judge.values:
            self._judge.saw_outcome(step, parts)
        self._value, self.real = value, step
        self._computed_in_all += computed
        self._judge.saw_commit(self.name, self._epoch, step, value, parts)

    def tell_end(self) -> None:
        """To the judge, of a run that is over."""
        if not (self.dead or self.lost_store or self.member.evicted) and self.member.has_state:
            self._judge.saw_end(self.name, self.real, self._computed_in_all, self._residual)

    def _send(self, kind: str, step: int, value: int) -> None:
        key = (self._epoch, kind, step)
        if key in self._sent:
            return
        self._sent.add(key)
        self._mail[key][self.name] = value
        for name in self.member.view.members:
            if name != self.name:
                arrive = self._arrival(self._peers[name], key, value)
                self._network.send(self.name, name, arrive, _TWICE)
        if kind == "state":
            self._reached("sends the state", self)

    def _arrival(
        self, peer: SimWorker, key: tuple[int, str, int], value: int
    ) -> Callable[[], None]:
        def arrive() -> None:
            peer._mail[key][self.name] = value
            peer._train()

        return peer._guarded(arrive)
