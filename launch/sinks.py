"""Where the records of a run go besides its own files: ``tensorboard``, ``wandb`` and ``opentelemetry`` in a recipe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from commkit.metrics import (
    JsonLinesSink,
    MetricsSink,
    OpenTelemetrySink,
    TensorBoardSink,
    WandbSink,
)
from launch.rundir import RunDirectory
from launch.settings import TrainSettings


def _tensorboard(run: RunDirectory, settings: TrainSettings) -> MetricsSink:
    return TensorBoardSink(run.path / "tensorboard")


def _wandb(run: RunDirectory, settings: TrainSettings) -> MetricsSink:
    return WandbSink(run.path, config=settings.model_dump(mode="json"))


class OtlpSink(OpenTelemetrySink):
    """Exports over OTLP/HTTP, every ``OTEL_METRIC_EXPORT_INTERVAL`` milliseconds and at the end, to
    ``OTEL_EXPORTER_OTLP_ENDPOINT``; these and other variables of OpenTelemetry's are read as it does."""

    def __init__(self, attributes: Mapping[str, str]) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        self._owned = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
        super().__init__(self._owned, attributes)

    def close(self) -> None:
        self._owned.shutdown()  # exports the rest


def _opentelemetry(run: RunDirectory, settings: TrainSettings) -> MetricsSink:
    return OtlpSink({"commkit.scheme": settings.scheme["name"], "commkit.run": str(run.path)})


@dataclass(frozen=True)
class _Optional:
    """A sink that a recipe asks for by a field of its name.

    Args:
        modules: that it imports.
        make: opens it.
    """

    modules: tuple[str, ...]
    make: Callable[[RunDirectory, TrainSettings], MetricsSink]


_OPTIONAL = {
    "tensorboard": _Optional(("tensorboard",), _tensorboard),
    "wandb": _Optional(("wandb",), _wandb),
    "opentelemetry": _Optional(
        ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"), _opentelemetry
    ),
}


def require_packages(settings: TrainSettings) -> None:
    """
    Raises:
        ValueError: a sink that the settings ask for is not installed.
    """
    for name in _asked_for(settings):
        if not all(map(_installed, _OPTIONAL[name].modules)):
            raise ValueError(
                f"{name}: got true, but the package is missing; pip install 'commkit[{name}]', "
                f"or say --set {name}=false"
            )


def open_sinks(
    run: RunDirectory, settings: TrainSettings
) -> tuple[list[MetricsSink], list[MetricsSink]]:
    """Where records of steps and of evaluations go: JSON lines, and what the settings ask for.

    Raises:
        RuntimeError: one of these cannot be opened, for example without a login.
    """
    extra = []
    for name in _asked_for(settings):
        try:
            extra.append(_OPTIONAL[name].make(run, settings))
        except Exception as error:  # whatever other people's packages raise
            raise RuntimeError(
                f"{name}: got true, but it does not start ({type(error).__name__}: {error}); mend that, "
                f"or say --set {name}=false"
            ) from error
    return [JsonLinesSink(run.metrics), *extra], [JsonLinesSink(run.validation), *extra]


def _asked_for(settings: TrainSettings) -> list[str]:
    return [name for name in _OPTIONAL if getattr(settings, name)]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor are its parents
        return False
