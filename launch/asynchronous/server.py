"""A rank that holds the weights, or a part of them; the first one also does all that is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from tqdm import tqdm

import commkit
from commkit.comm import DistComm, new_group_like
from commkit.outer import AsyncServer
from commkit.outer.async_local_sgd import PushRecord
from launch.asynchronous.account import Account
from launch.asynchronous.position import Position
from launch.facts import facts_of
from launch.gpt import count_parameters
from launch.loop import means_of, measured
from launch.records import Records
from launch.world import LauncherWatch, leave

if TYPE_CHECKING:
    from launch.train import Job


class Server:
    """
    Args:
        job: what is to be done.
        server: not started.
    """

    def __init__(self, job: Job, server: AsyncServer) -> None:
        self.job, self.server = job, server
        self.writes = server.party.rank == server.party.first
        self.position = Position(job.task.digest)
        self.records = Records(job.run, job.settings)
        self.reducer = commkit.schemes.ddp()  # checkpoints hold one; this has no state
        self._watch = LauncherWatch()
        self._account: Account | None = None
        self._bar: tqdm[Any] | None = None
        self._comm: DistComm | None = None  # among the servers

    def train(self) -> None:
        """Serve until all steps are done, and write what there is to write."""
        settings = self.job.settings
        workers = len(self.server.party.workers)
        with self.server as server:
            # Now, not before: torch names a group by how many there are, which is the same on all ranks until here.
            party = server.party
            self._comm = DistComm(new_group_like(party.group, None, party.options.servers))
            if self.job.resume:
                self.load()
            if self.writes:
                self.records.open(self.position.step)
                print(self.describe(), flush=True)
            if self.job.meter:
                self.job.meter.start()
            total, done, name = settings.steps, self.position.step, settings.scheme["name"]
            self._account = Account(self.job, server, self.position)
            with tqdm(
                total=total, initial=done, desc=name, unit="step", disable=not self.writes
            ) as bar:
                self._bar = bar
                server.serve(steps=settings.steps * workers, on_push=self.on_push)
            self.gather()
            validation = self.evaluate() if self.writes else {}
            self.save()
        if self.writes:
            if settings.eval.every:
                self.records.validation(self.position.step, validation)
            self.records.close(self.facts(validation))
        leave()

    def on_push(self, push: PushRecord) -> None:
        """Note what was pushed; write the records of the steps that this completes."""
        account, settings = self._account, self.job.settings
        assert account is not None
        self._watch.check()
        account.add(push)
        workers = len(self.server.party.workers)
        reached = min(settings.steps, self.server.stats.steps // workers)
        before = self.position.step
        if reached == before:
            return
        lines = account.lines(reached)
        for line in lines:
            self.records.step(line)
        if self._bar is not None:
            self._bar.update(reached - before)
            self._bar.set_postfix(loss=f"{lines[-1]['loss']:.3f}", refresh=False)
        every = settings.eval.every
        if every and reached // every > before // every and reached < settings.steps:
            self.server.write_back()
            self.records.validation(reached, self.evaluate())
        every = settings.checkpoint.every
        if every and reached // every > before // every:
            self.save()
        account.restart()

    def gather(self) -> None:
        """Bring all servers' parts of the final weights to the first one, whose model is then whole."""
        party = self.server.party
        for rank in party.others:
            for name in party.parts[rank]:
                p = party.parameters[name].detach()
                if party.rank == party.first:
                    dist.recv(p, src=rank)
                elif party.rank == rank:
                    dist.send(p.contiguous(), dst=party.first)

    def evaluate(self) -> dict[str, float]:
        """Means over all validation samples, of the model as it is here."""
        task, precision = self.job.task, self.job.settings.precision
        batches = task.validation(0, 1)
        sums = measured(self.server.model, task, batches, self.job.device, precision)
        return means_of(task, sums)

    def save(self) -> None:
        """A checkpoint of the servers: workers begin anew after a resumption, on the shards where these were."""
        run = self.job.run
        commkit.checkpoint.save(run.checkpoint(self.position.step), **self.contents())
        if self.writes:
            run.prune_checkpoints()

    def load(self) -> None:
        """Continue from the newest complete checkpoint of the run, or from the start.

        Raises:
            ValueError: saved by another number of servers, or on other data.
        """
        newest = commkit.checkpoint.latest(self.job.run.checkpoints)
        if newest is not None:
            commkit.checkpoint.load(newest, **self.contents(), on_resize="error")

    def contents(self) -> dict[str, Any]:
        return {
            "replicated": {"position": self.position},
            "per_rank": {"server": self.server},
            "reducer": self.reducer,
            "comm": self._comm,
        }

    def describe(self) -> str:
        """One line: what is about to run."""
        party, settings = self.server.party, self.job.settings
        return (
            f"{settings.scheme['name']}: {count_parameters(self.server.model):,} parameters, "
            f"{len(party.workers)} workers and {1 + len(party.others)} servers on {self.job.device.type}, "
            f"{self.job.task.headline()}, step {self.position.step} of {settings.steps}, into {self.job.run.path}"
        )

    def facts(self, validation: Mapping[str, float]) -> dict[str, Any]:
        """What ``summary.json`` says besides the totals of the records."""
        stats = self.server.stats
        return facts_of(
            self.job.settings,
            self.job.task,
            self.server.model,
            self.job.device,
            world_size=self.job.world.size,
            steps=self.position.step,
            seconds=self.position.seconds,
            validation=validation,
        ) | {
            "workers": len(self.server.party.workers),
            "pushes": stats.pushes,
            "mean_staleness": stats.mean_staleness,
            "lost_workers": list(stats.lost_workers),
        }
