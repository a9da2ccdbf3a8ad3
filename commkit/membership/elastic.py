"""``Elastic``: a training loop that goes on when workers are lost, and takes in new ones."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from .. import connections
from ..comm import CollectiveError, DistComm, made_in_wiring
from ..connections import ConnectionsCut
from ..runtime.session import Session
from ..types import Comm, Stateful
from . import default_group, hand_over
from .agent import Agent
from .epoch_store import EpochStore
from .errors import MembershipError, StepGivenUp
from .member import Member
from .options import ElasticOptions
from .place import Place
from .records import View
from .seal import Seal

_STORE_PATIENCE = 4  # times limit_s: how long an answer of the store is waited for
_NEWS_S = 1.0  # how long an error waits for the news that explains it


class Attached(Stateful, Protocol):
    """What follows the group, such as the handle of :func:`commkit.attach`."""

    @property
    def rounds(self) -> bool:
        """Whether workers meet in rounds of several steps, in which losses are survived; else in every step."""

    def give_up(self) -> None:
        """Undo what the step under way has changed, if there is one. Local."""

    def rebuild(self) -> None:
        """Go on with the default group, which is another one now. Collective over it."""

    def catch_up(self) -> bool:
        """Do what the others are about to do in the middle of a step, after their state was received. False: nothing."""

    def refusal(self, world_size: int) -> str:
        """Why it cannot work among so many workers; empty if it can. The same on all; asked from another thread."""


class Elastic(Session):
    """Workers that train together as long as they live.

    Takes the place of ``init_process_group``: it makes torch's default group (gloo), of the workers that are there,
    and another one whenever that changes. Inside ``with``, write the loop as::

        with commkit.Elastic(commkit.ElasticOptions(min_workers=2)) as members:
            handle = commkit.attach(model, "powersgd", optimizer, members=members)
            for step in members.steps(1000, model=model, optimizer=optimizer):
                with step:
                    loss = ...            # of this worker's share: members.rank of members.world_size
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()      # once per block

    If a worker is lost, the block is left, the others find together, and the loop gives the same step again; weights,
    optimizer and residuals are those before it, bit for bit. If all that are left have the step's outcome, it counts
    instead. Buffers that forward changes, and random-number generators, keep what the step that was given up did.

    A worker that starts later joins: between ``Elastic`` and its loop it may call no collective (``attach`` is none here);
    the loop gives it the state of what is passed to :meth:`steps`. A worker whose block raises anything else leaves, and the others go on without it.

    gloo only, as NCCL's collectives end otherwise. Models in DistributedDataParallel or FSDP keep groups of their own and
    are refused by ``attach(members=...)``: it takes plain modules. Groups that you make yourself with
    ``torch.distributed.new_group`` are not watched: whoever waits there waits for torch's timeout.

    Args:
        options: equal on all workers.
        place: where the others are; None reads the environment (:meth:`Place.from_environment`).

    Attributes:
        comm: collectives of all workers, for the training thread. Another object after each change.
        epoch: number of the present set of workers.
    """

    def __init__(self, options: ElasticOptions | None = None, place: Place | None = None) -> None:
        self.options = ElasticOptions() if options is None else options
        self._place = place
        self._agent: Agent | None = None
        self._worker = ""
        self._attached: list[Attached] = []
        self._items: dict[str, Stateful] = {}
        self._formed = self._followed = self._current = 0
        self._number = 0
        self._settled = False
        self._view = View(0, (), (), 0)

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def world_size(self) -> int:
        return self.comm.world_size

    @property
    def epoch(self) -> int:
        return self._view.epoch

    @property
    def agent(self) -> Agent:
        """
        Raises:
            RuntimeError: not started.
        """
        if self._agent is None:
            raise RuntimeError("Elastic is not started; use it in a with block")
        return self._agent

    def start(self) -> Elastic:
        """Find the others and make the default group.

        Raises:
            RuntimeError: there is a default group already.
            MembershipError: too few workers came.
        """
        if dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is initialised already; leave init_process_group out, Elastic makes the group"
            )
        self._agent = self._meet()
        while not self._formed:
            view = self._await_epoch()
            try:
                with self._in_time():
                    self._form(view)
            except RuntimeError as error:
                self._explain(view.epoch, error)
        return self

    def _meet(self) -> Agent:
        """Go to where the others are."""
        place = Place.from_environment() if self._place is None else self._place
        patience_s = _STORE_PATIENCE * self.options.limit_s
        store, self._store = place.stores(patience_s)
        self._hosts = place.hosts
        self._worker = f"{place.rank}-{secrets.token_hex(4)}"
        now, seal = Agent.now(), Seal(place.secret, place.job)
        return Agent(
            Member(self._worker, self.options, place.world_size, place.rank, now, seal), store
        )

    def close(self, error: str | None = None) -> None:
        """Leave: with ``error``, the others go on without this worker; else its work is done."""
        if self._agent is None:
            return
        agent, self._agent = self._agent, None
        agent.order(lambda m: m.leave(error or ""))
        agent.close(serve=self._hosts)  # nobody can agree on anything without the store
        connections.use(None)
        default_group.destroy()

    def remaining(self, timeout_s: float = 60.0) -> DistComm:
        """After :class:`TrainingStopped`: collectives of the workers that are left with the training state, for a last
        checkpoint. Collective over them; their default group from now on.

        Args:
            timeout_s: how long to wait for each other. It is what is left of patience: a loss is not survived any more.

        Raises:
            MembershipError: this worker has no state, or training has not stopped.
        """
        view = self.agent.ask(lambda m: m.view)
        if not view.stop or self._worker not in view.sources:
            raise MembershipError(
                f"worker {self._worker} is none of those that can save what they have: {view.sources or 'nobody'}"
            )
        connections.use(None)
        default_group.destroy()
        own = self._epoch_store = EpochStore(self._store, lambda: None)
        group = default_group.make(
            PrefixStore(f"stopped/{view.epoch}", own),
            view.sources.index(self._worker),
            len(view.sources),
            timedelta(seconds=timeout_s),
        )
        return DistComm(group)

    def add(self, attached: Attached) -> None:
        """From now on ``attached`` follows the group; called by ``attach``.

        Raises:
            RuntimeError: the loop has begun.
        """
        if self._current:
            raise RuntimeError("the loop has begun; attach before members.steps()")
        self._attached.append(attached)

    def steps(self, total: int, first: int = 0, **state: Stateful) -> Iterator[Step]:
        """Steps ``first`` to ``total - 1``, each as often as it takes. Run each in ``with step:``.

        Args:
            total: where to end.
            first: where to begin, after a checkpoint. A worker that joins later begins where the others are.
            state: what a worker that joins is given, besides the state of what is attached: model, optimizer,
                learning-rate schedule ... Equal on all workers but for what each has alone.

        Raises:
            MembershipError: this worker cannot go on; see the subclasses.
        """
        self._number = first
        own: dict[str, Stateful] = {"members": _Counter(self)}
        own |= {f"attached/{i}": each for i, each in enumerate(self._attached)}
        self._items = own | {f"state/{name}": item for name, item in state.items()}

        def ask_methods(member: Member) -> None:
            member.refuses = functools.cache(self._refusal)

        self.agent.order(ask_methods)
        self._regroup()
        # All of them, whatever they find.
        self._number += any([attached.catch_up() for attached in self._attached])
        while self._number < total:
            if not self._in_rounds:
                self.catch_up()
                self._settled = False
                self._begin_step()
            step = Step(self, self._number)
            yield step
            if not step.over:
                raise RuntimeError(
                    f"step {step.number} was not run in its block; write: for step in members.steps(...): with step:"
                )

    def require_together(self) -> None:
        """
        Raises:
            ConnectionsCut: a worker was lost or joins: what is done together now would come to nothing.
            MembershipError: this worker takes no part any more.
        """
        self.agent.require_epoch(self._current)

    def catch_up(self) -> None:
        """Find together with the others again, if workers were lost or have joined. Collective then."""
        if not self.agent.ask(lambda m: m.working and m.view.epoch == self._current):
            self._regroup()

    def settle(self, comm: Comm) -> None:
        """The outcome of this step is here: make it count if all have it. Collective over ``comm``, one small
        all-reduce.

        Raises:
            StepGivenUp: not all have it, so nobody may use it.
            RuntimeError: called twice in one block.
        """
        if self._settled:
            raise RuntimeError(
                "a second optimizer step in one block: if it failed, the first would be done twice; use a block for "
                "each"
            )
        self.settle_round(comm)
        self._settled = True

    def settle_round(self, comm: Comm) -> None:
        """As :meth:`settle`, of one of any number of rounds in a block."""
        agent, epoch = self.agent, self._current
        number = agent.ask(lambda m: m.committed) + 1
        if agent.ask(lambda m: m.prepare(epoch, number)):
            try:
                comm.all_reduce(torch.ones(1))
            except CollectiveError as error:
                text = str(error)
                agent.order(lambda m: m.fail(epoch, text))
            else:
                if agent.ask(lambda m: m.commit(epoch, number)):
                    return
        agent.wait_for(lambda m: m.view.epoch > epoch)
        if agent.ask(lambda m: m.committed) < number:
            raise StepGivenUp(f"step {self._number} was given up: not all workers have its outcome")

    # How it is done.

    @property
    def _in_rounds(self) -> bool:
        return any(attached.rounds for attached in self._attached)

    def _refusal(self, world_size: int) -> str:
        return next(filter(None, (each.refusal(world_size) for each in self._attached)), "")

    def survives_block(self, error: BaseException) -> bool:
        """See :meth:`survive`. Between rounds there is nothing that a loss could make fail."""
        return not self._in_rounds and self.survive(error)

    def finish_step(self) -> None:
        """The block of the present step has ended well."""
        self._number += 1

    def survive(self, error: BaseException) -> bool:
        """Whether ``error``, or what caused it, came of a loss, which the others survive together with this worker; if
        so, the step that is under way is undone."""
        if not isinstance(error, RuntimeError):
            return False
        try:
            self._explain(self._current, error)
        except RuntimeError as other:
            if other is error:
                return False
            raise
        for attached in self._attached:
            attached.give_up()
        return True

    def _await_epoch(self) -> View:
        """The present epoch, when this worker is a member of it and it is not over."""
        view = self.agent.wait_for(lambda m: m.view if m.working else None)
        assert view is not None
        return view

    def _regroup(self) -> None:
        """Form the group of the present epoch, and bring everything up to date."""
        while True:
            view = self._await_epoch()
            refusal = self._refusal(len(view.members))
            if refusal:  # at the start; later nobody proposes such an epoch
                self._end(view.epoch, refusal)
                continue
            try:
                with self._in_time():
                    if view.epoch != self._formed:
                        self._form(view)
                    if view.epoch != self._followed:
                        for attached in self._attached:
                            attached.rebuild()
                        self._followed = view.epoch
                    self._hand_over(view)
            except RuntimeError as error:
                self._explain(view.epoch, error)
            else:
                self._current = view.epoch
                return

    def _begin_step(self) -> None:
        now = self.agent.now()
        self.agent.ask(lambda m: m.begin_step(now))

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """What is done inside is given up as a step is that takes too long."""
        self._begin_step()
        yield
        self.agent.ask(Member.rest)

    def _form(self, view: View) -> None:
        agent, epoch = self.agent, view.epoch
        connections.use(agent.wired(view))
        default_group.destroy()
        # Kept: torch knows only the part of it that is its own.
        own = self._epoch_store = EpochStore(
            self._store, lambda: agent.require_epoch(epoch, complete=True)
        )
        rank, size = view.members.index(self._worker), len(view.members)
        store = PrefixStore(f"epoch/{epoch}", own)
        try:
            group = made_in_wiring(lambda: default_group.make(store, rank, size))
            made_in_wiring(lambda: dist.new_group(list(range(size))), watch=True)
        except RuntimeError as error:
            raise CollectiveError(f"the group of epoch {epoch} was not made: {error}") from error
        self.comm = DistComm(group)
        self._view, self._formed = view, epoch

    def _hand_over(self, view: View) -> None:
        others = [rank for rank, worker in enumerate(view.members) if worker not in view.sources]
        source = view.members.index(view.sources[0])
        if others and self.rank == source:
            hand_over.send(self._items, self.comm, others)
        elif self.rank in others:
            arrived = hand_over.receive(self._items, self.comm, source)
            if not arrived or not self.agent.ask(lambda m: m.received(view.epoch)):
                raise CollectiveError(f"rank {source} was lost while it sent the training state")

    def _explain(self, epoch: int, error: RuntimeError) -> None:
        """See to it that ``epoch`` is over, because of ``error`` or of what that came of.

        Raises:
            RuntimeError: ``error`` itself, which has nothing to do with other workers.
            MembershipError: this worker takes no part any more.
        """
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, MembershipError):
                raise cause
        if any(isinstance(cause, CollectiveError) for cause in causes):
            self._end(epoch, f"worker {self._worker}: {error}")
        elif any(isinstance(cause, StepGivenUp | ConnectionsCut) for cause in causes):
            self._await_end(epoch)
        elif not self._await_end(epoch, _NEWS_S):
            raise error

    def _end(self, epoch: int, reason: str) -> None:
        """See to it that ``epoch`` is over, if it is not yet, because of ``reason``."""
        self.agent.order(lambda m: m.fail(epoch, reason))
        self._await_end(epoch)

    def _await_end(self, epoch: int, timeout_s: float | None = None) -> bool:
        over = lambda m: m.view.epoch != epoch or not m.working
        return self.agent.wait_for(over, timeout_s)


class Step:
    """One attempt at a step.

    Attributes:
        number: of the step.
        over: whether its block was left.
    """

    def __init__(self, members: Elastic, number: int) -> None:
        self._members = members
        self.number = number
        self.over = False

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self.over = True
        if error is None:
            self._members.finish_step()
            return False
        return self._members.survives_block(error)


class _Counter:
    """Where the others are."""

    def __init__(self, members: Elastic) -> None:
        self._members = members

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._members._number}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._members._number = state_dict["number"]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error``, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
