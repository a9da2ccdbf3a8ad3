"""What one rank writes for all: the records of a run, on their way to files and other sinks."""

from collections.abc import Mapping
from typing import Any

from commkit.metrics import MetricsSink, finite
from launch.rundir import RunDirectory
from launch.settings import TrainSettings
from launch.sinks import open_sinks


class Records:
    """Goes nowhere before :meth:`open`, which only the rank calls that writes.

    Args:
        run: whose files.
        settings: which name further sinks.
    """

    def __init__(self, run: RunDirectory, settings: TrainSettings) -> None:
        self._run, self._settings = run, settings
        self._steps: list[MetricsSink] = []
        self._validations: list[MetricsSink] = []

    def open(self, step: int) -> None:
        """Make the run's directory ready to go on after ``step``.

        Raises:
            RuntimeError: see :func:`~launch.sinks.open_sinks`.
        """
        self._run.prepare(self._settings.model_dump(mode="json"), step)
        self._steps, self._validations = open_sinks(self._run, self._settings)

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``."""
        for sink in self._steps:
            sink.write(finite(record))

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of ``validation.jsonl``."""
        for sink in self._validations:
            sink.write(finite({"step": step, **metrics}))

    def close(self, facts: Mapping[str, Any]) -> None:
        """The end of the run: write ``summary.json`` and show it."""
        print(self._run.write_summary(facts), flush=True)
        for sink in {*self._steps, *self._validations}:
            sink.close()
