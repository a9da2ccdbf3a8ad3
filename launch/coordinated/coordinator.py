"""A rank that holds the weights, or a part of them; the first one also does all that is written."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from commkit.straggler import StepRecord, StragglerScheme
from commkit.transport import Network
from launch.coordinated.account import Account
from launch.coordinated.checkpoints import Checkpoints
from launch.coordinated.samples import Samples
from launch.facts import facts_of
from launch.gpt import count_parameters
from launch.loop import means_of, measured
from launch.optimizer import make_optimizer
from launch.progress import Progress
from launch.records import Records
from launch.schedule import set_learning_rate
from launch.world import LauncherWatch, leave

if TYPE_CHECKING:
    from launch.train import Job


class CoordinatorRun:
    """
    Args:
        job: what is to be done.
        scheme: of the recipe.
        network: all ranks.
        models: on the job's device.
        batch: samples of a model's step, over all workers.
    """

    def __init__(
        self,
        job: "Job",
        scheme: StragglerScheme,
        network: Network,
        models: Sequence[nn.Module],
        batch: int,
    ) -> None:
        self.job, self.scheme, self.network = job, scheme, network
        self.models, self.batch = models, batch
        self.optimizers = [make_optimizer(model, job.settings) for model in models]
        self.coordinator = scheme.coordinate(
            models,
            self.optimizers,
            batch=batch,
            max_grad_norm=job.settings.optim.grad_clip,
            before_step=self.set_rate,
            network=network,
        )
        samples = Samples(job)
        self.tokens_per_sample = job.task.tokens(samples[range(1)])
        self.progress = Progress(samples.loader, job.task.digest)
        self.checkpoints = Checkpoints(job.run, scheme.options.coordinators, network.rank)
        self.records = Records(job.run, job.settings)
        self._account: Account | None = None
        self._jobs: dict[int, list[StepRecord]] = {}  # done of a step that is not, by step
        self._bar: tqdm[Any] | None = None
        self._watch = LauncherWatch()

    @property
    def leads(self) -> bool:
        return self.coordinator.is_first

    def start(self) -> None:
        """Meet the others, and load the checkpoint if any.

        Raises:
            ValueError: it is of another number of workers, or of other data.
        """
        self.coordinator.start()
        if self.job.resume:
            self.load()

    def run(self) -> None:
        """Hand out weights and collect gradients to the end, with summary and checkpoints."""
        settings, meter = self.job.settings, self.job.meter
        with self.coordinator:
            self._account = Account(self.coordinator)
            if self.leads:
                self.records.open(self.progress.step)
                print(self.describe(), flush=True)
            self._bar = tqdm(
                total=settings.steps,
                initial=self.progress.step,
                desc=settings.scheme["name"],
                unit="step",
                disable=not self.leads,
                mininterval=0.5,
            )
            self.progress.tick()
            if meter:
                meter.start()
            with self._bar:
                jobs = settings.steps * len(self.models)
                self.coordinator.run(jobs, self.on_step, self.whole_at)
        if self.leads:
            self.records.close(self.facts(self.evaluate()))
        leave()

    def set_rate(self, model: int, step: int) -> None:
        set_learning_rate(self.optimizers[model], step + 1, self.job.settings)

    def whole_at(self, job: int) -> bool:
        """Whether rank 0 needs all weights after this job: to validate."""
        every, step = self.job.settings.eval.every, job // len(self.models) + 1
        return bool(every) and step % every == 0 and (job + 1) % len(self.models) == 0

    def on_step(self, record: StepRecord) -> None:
        """A job is finished; with the last model's, a step."""
        self._watch.check()
        done = self._jobs.setdefault(record.step, [])
        done.append(record)
        if len(done) < len(self.models):
            return
        del self._jobs[record.step]
        self.step_done(done)

    def step_done(self, jobs: Sequence[StepRecord]) -> None:
        """Write down what there is to write of it."""
        account, progress, meter = self._account, self.progress, self.job.meter
        assert account is not None
        progress.step += 1
        progress.tokens += account.samples_in(jobs, self.batch) * self.tokens_per_sample
        progress.tick()
        if self.leads:
            line = account.line(jobs, progress.step, progress.tokens)
            self.records.step(line)
            if meter:
                meter.stop(progress.step, line["wire_bytes"])
            every = self.job.settings.eval.every
            if every and progress.step % every == 0:
                self.records.validation(progress.step, self.evaluate())
        self.save_when_due()
        if self._bar is not None:
            self._bar.update()
        if meter:
            meter.start()

    def evaluate(self) -> dict[str, float]:
        """Means over all validation samples and models, on this rank alone."""
        task, device = self.job.task, self.job.device
        self.coordinator.write_buffers()
        # In full precision, whatever workers compute in.
        sums = [measured(m, task, task.validation(0, 1), device, "fp32") for m in self.models]
        validation = means_of(task, torch.stack(sums).sum(0))
        self.progress.tick()
        return validation

    def save_when_due(self) -> None:
        """Each coordinator's part, and a request to the workers to add theirs before they compute the next round."""
        step, settings = self.progress.step, self.job.settings
        every = settings.checkpoint.every
        if step != settings.steps and not (every and step % every == 0):
            return
        state = {
            "coordinator": self.coordinator.state_dict(),
            "progress": self.progress.state_dict(),
            "workers": len(self.coordinator.party.workers),
        }
        self.checkpoints.save_coordinator(step, state)
        if self.leads:
            self.coordinator.save_workers(step)

    def load(self) -> None:
        """Continue from the newest complete checkpoint of the run, or from the start."""
        found = self.checkpoints.load_coordinator()
        if found is None:
            return
        newest, state = found
        saved_by, workers = state["workers"], len(self.coordinator.party.workers)
        if saved_by != workers and self.job.settings.checkpoint.on_world_size_change == "error":
            raise ValueError(
                f"--resume: {newest} was saved with {saved_by} workers and there are {workers}; start as many, or say "
                "--set checkpoint.on_world_size_change=mean"
            )
        self.progress.load_state_dict(state["progress"])
        job = self.progress.step * len(self.models)
        self.coordinator.load_state_dict(state["coordinator"], job)

    def describe(self) -> str:
        """One line: what is about to run."""
        coordinators = len(self.scheme.options.coordinators)
        workers = len(self.coordinator.party.workers)
        settings = self.job.settings
        return (
            f"{settings.scheme['name']}: {count_parameters(self.models[0]):,} parameters, "
            f"{coordinators} coordinator{'s' * (coordinators > 1)} and {workers} worker{'s' * (workers > 1)} "
            f"over {self.scheme.transport}, {self.job.task.headline()}, step {self.progress.step} of "
            f"{settings.steps}, into {self.job.run.path}"
        )

    def facts(self, validation: Mapping[str, float]) -> dict[str, Any]:
        """What ``summary.json`` says besides the totals of the per-step records."""
        stats, workers = self.coordinator.stats, self.coordinator.party.workers
        return facts_of(
            self.job.settings,
            self.job.task,
            self.models[0],
            self.job.device,
            world_size=self.network.world_size,
            steps=self.progress.step,
            seconds=self.progress.seconds,
            validation=validation,
        ) | {
            "workers": len(workers),
            "transport": self.scheme.transport,
            "rounds": stats.rounds,
            "skipped_jobs": stats.skipped,
            "lost_workers": stats.lost_workers,
            "drop_rates": {str(rank): stats.drop_rate(rank) for rank in workers},
        }
