"""A worker that trains in virtual time, around the production state machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

from ...membership import ElasticOptions, Member, View
from .judge import Judge
from .network import VirtualNetwork, VirtualStore

_COMPUTE_S = (0.1, 1.2)
_TWICE = 0.05


class SimWorker:
    """Trains in steps: everybody's contribution goes to everybody, and then the news that all have arrived. What a
    step comes to is a number made of the last one and of all contributions.

    Args:
        name: of this worker.
        place: among those who start together.
        world_size: how many those are.
        steps: to train.
        peers: all workers by name, later ones too.
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
    ) -> None:
        self.name = name
        self.member = Member(name, options, world_size, place, network.clock.now)
        self.dead = False
        self.real = 0  # steps
        self._value = self._outcome = 0
        self._steps, self._options = steps, options
        self._network, self._store, self._judge, self._peers = network, store, judge, peers
        self._epoch = 0
        self._seen = self.member.view
        self._formed = False
        self._sent: set[tuple[int, str, int]] = set()
        self._mail: dict[tuple[int, str, int], dict[str, int]] = defaultdict(dict)
        self._computing = False
        self._asking = False
        self._beat = 0
        self._stopped: list[Callable[[], None]] | None = None
        self._later(0.0, self._look)
        self._later(0.0, self._show_life)

    @property
    def active(self) -> bool:
        """Whether it still has something to do."""
        member = self.member
        return not (self.dead or member.evicted or member.has_left or member.view.stop)

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

    def pause(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        if self._stopped is None:
            self._stopped = []
            self._network.clock.after(seconds, self._resume)

    def _resume(self) -> None:
        late, self._stopped = self._stopped or [], None
        for call in late:
            call()

    def kill(self, noticed: bool) -> None:
        """``noticed``: its system closes its connections."""
        if noticed and self._formed:
            self._disconnect()
        self.dead = True

    def give_up(self) -> None:
        """An exception ends its training."""
        self.member.leave("it raised an exception")

    # The driver of the state machine.

    def _look(self) -> None:
        if self.active and not self._asking:
            self._asking = True
            position, text = self.member.request(self._now)
            answered = lambda at, have: self._guarded(lambda: self._answered(at, have))()
            self._store.append(self.name, position, text, answered)

    def _answered(self, position: int, text: str) -> None:
        more = self.member.answer(position, text, self._now)
        if self.member.view is not self._seen:
            self._seen = self.member.view
            self._judge.saw_view(self._seen)
        self._train()
        if self._asking:
            self._asking = False
            self._later(0.0 if more else self._options.poll_s, self._look)

    def _show_life(self) -> None:
        if self.active:
            self._beat += 1
            hear = lambda beats: self._guarded(lambda: self.member.heard(beats, self._now))()
            self._store.beat(self.name, self._beat, hear)
            self._later(self._options.heartbeat_s, self._show_life)

    def _disconnect(self) -> None:
        """Close all connections of the present epoch."""
        self._formed = False
        epoch, name = self._epoch, self.name
        for peer in list(self._peers.values()):
            if peer is not self:
                closed = peer._closed
                self._network.send(name, peer.name, peer._guarded(partial(closed, epoch, name)))

    def _closed(self, epoch: int, name: str) -> None:
        if self._formed and self._epoch == epoch:  # it has such a connection
            self.member.disconnected(epoch, [name])

    # Training.

    def _train(self) -> None:
        """Do what can be done now."""
        member, view = self.member, self.member.view
        if view.epoch != self._epoch and member.is_member:
            self._enter(view)
        # Until it has said so itself, it works on, whatever is known of the epoch by then.
        if view.epoch != self._epoch or self.name in member.ledger.ready or not member.is_member:
            if self._formed:  # what it says of itself comes before what its connections say
                self._disconnect()
            return
        self._send("hello", 0, 0)
        if len(self._mail[self._epoch, "hello", 0]) < len(view.members):
            return
        self._formed = True
        if self.name == view.sources[0]:
            self._send("state", 0, self._value)
        if not member.has_state and not self._receive_state(view):
            return
        self._step(member.committed + 1)

    def _enter(self, view: View) -> None:
        """The verdict on the step that was under way, and a new epoch."""
        if self.name in view.sources:
            self._judge.saw_verdict(self.name, self.real, view)
            if view.step > self.real:
                self._make_real(view.step)
        self._epoch, self._formed, self._computing = view.epoch, False, False

    def _receive_state(self, view: View) -> bool:
        arrived = self._mail[self._epoch, "state", 0]
        if not arrived or not self.member.received(self._epoch):
            return False
        self._value, self.real = arrived[view.sources[0]], view.step
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
            self._outcome = hash((self._value, *sorted(parts.values())))
        self._send("done", step, 0)
        if len(self._mail[epoch, "done", step]) == count and self.member.commit(epoch, step):
            self._make_real(step)
            self._train()

    def _computed(self, epoch: int, step: int) -> None:
        if epoch == self._epoch:
            self._computing = False
            # The number is made of integers alone: hashes of text differ from run to run.
            self._send("part", step, hash((self._value, list(self._peers).index(self.name), epoch)))
            self._train()

    def _make_real(self, step: int) -> None:
        self._value, self.real = self._outcome, step
        self._judge.saw_commit(self.name, self._epoch, step, self._value)

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

    def _arrival(
        self, peer: SimWorker, key: tuple[int, str, int], value: int
    ) -> Callable[[], None]:
        def arrive() -> None:
            peer._mail[key][self.name] = value
            peer._train()

        return peer._guarded(arrive)
