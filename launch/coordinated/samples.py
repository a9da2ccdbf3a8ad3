"""The data by number: any rank may be told to compute any part of it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from launch.train import Job


class Samples:
    """The task's training samples by their number in the run, in the order of plain training."""

    def __init__(self, job: "Job") -> None:
        self.loader = job.task.loader(0, 1)  # whose position is not used
        self._data, self._order = self.loader.dataset, self.loader.batch_sampler
        self._device = job.device

    def __getitem__(self, numbers: range) -> Tensor:
        rows = [self._data[self._order.start_of(number)] for number in numbers]
        return torch.stack(rows).to(self._device)
