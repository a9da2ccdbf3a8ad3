"""What one training step cost, where such records go, and ranges for torch's profiler."""

from .json_lines import JsonLinesSink
from .opentelemetry import OpenTelemetrySink
from .ranges import profiler_range
from .recorder import Recorder
from .sink import MetricsSink, finite
from .stats import StepStats
from .summary import RunSummary, summary
from .tensorboard import TensorBoardSink
from .wandb import WandbSink

__all__ = [
    "JsonLinesSink",
    "MetricsSink",
    "OpenTelemetrySink",
    "Recorder",
    "RunSummary",
    "StepStats",
    "TensorBoardSink",
    "WandbSink",
    "finite",
    "profiler_range",
    "summary",
]
