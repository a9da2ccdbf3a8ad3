"""A rank that computes gradients."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from commkit.straggler import Share, StragglerScheme
from commkit.transport import Network
from launch.coordinated.checkpoints import Checkpoints
from launch.coordinated.samples import Samples
from launch.loop import autocast
from launch.world import LauncherWatch, leave

if TYPE_CHECKING:
    from launch.train import Job


class WorkerRun:
    """
    Args:
        job: what is to be done.
        scheme: of the recipe.
        network: all ranks.
        model: on the job's device.
        batch: samples of a step, over all workers.
    """

    def __init__(
        self, job: "Job", scheme: StragglerScheme, network: Network, model: nn.Module, batch: int
    ) -> None:
        self.job, self.model = job, model
        self.worker = scheme.work(model, batch=batch, network=network, on_save=self.save)
        self.samples = Samples(job)
        self.checkpoints = Checkpoints(job.run, scheme.options.coordinators, network.rank)
        self._watch = LauncherWatch()

    def start(self) -> None:
        """Meet the others, and load the checkpoint if any."""
        self.worker.start()
        if not self.job.resume:
            return
        state = self.checkpoints.load_worker(len(self.worker.party.workers))
        if state is not None:
            self.worker.load_state_dict(state)

    def run(self) -> None:
        """Compute until the coordinator has had enough."""
        with self.worker:
            self.worker.run(self.loss_of)
        self.save(self.job.settings.steps)
        leave()

    def loss_of(self, share: Share) -> Tensor:
        self._watch.check()
        settings, device = self.job.settings, self.job.device
        with torch.random.fork_rng(enabled=settings.model.dropout > 0):
            if settings.model.dropout > 0:  # the same masks wherever this share is computed
                torch.manual_seed(share.seed)
            with autocast(device, settings.precision):
                return self.job.task.loss(self.model, self.samples[share.samples])

    def save(self, step: int) -> None:
        """What this worker has left unsent, into the checkpoint of that step."""
        self.checkpoints.save_worker(step, self.worker.state_dict())
