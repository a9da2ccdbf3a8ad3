"""Records as OpenTelemetry metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .sink import missing, numbers

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

_PREFIX = "commkit."
_ADDED_UP = ("rounds", "nonfinite")  # and all bytes


class OpenTelemetrySink:
    """One instrument per number of a record, named ``commkit.NAME``.

    Bytes (unit ``By``), ``rounds`` and ``nonfinite`` are counters, and so is ``commkit.steps``, the number of
    records; seconds (unit ``s``) are histograms; all others (loss, lr, residual_norm ...) are gauges.

    Args:
        provider: whose meter is used, and flushed by :meth:`close`; its owner shuts it down. None is the global
            one, which ``opentelemetry-instrument`` and ``set_meter_provider`` set.
        attributes: of every measurement, e.g. ``{"commkit.scheme": "powersgd", "rank": 0}``.

    Raises:
        ModuleNotFoundError: the ``opentelemetry-sdk`` package is missing.
    """

    def __init__(
        self,
        provider: MeterProvider | None = None,
        attributes: Mapping[str, str | int | float | bool] | None = None,
    ) -> None:
        try:
            import opentelemetry.sdk  # noqa: F401  (the API alone would drop everything)
            from opentelemetry.metrics import get_meter_provider
        except ModuleNotFoundError as error:
            raise missing("opentelemetry-sdk", "opentelemetry", "OpenTelemetrySink") from error
        self._provider = get_meter_provider() if provider is None else provider
        self._meter = self._provider.get_meter("commkit")
        self._attributes = dict(attributes or {})
        self._steps = self._meter.create_counter(
            _PREFIX + "steps", description="records written so far"
        )
        self._instruments: dict[str, Any] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        self._steps.add(1, self._attributes)
        for name, value in numbers(record):
            self._measure(name, value)

    def close(self) -> None:
        """Hand over what is not exported yet."""
        flush = getattr(self._provider, "force_flush", None)  # the API's own providers have none
        if flush is not None:
            flush()

    def _measure(self, name: str, value: float) -> None:
        full = _PREFIX + name
        if name.endswith("_bytes") or name in _ADDED_UP:
            unit = "By" if name.endswith("_bytes") else "1"
            self._instrument(full, self._meter.create_counter, unit).add(value, self._attributes)
        elif name.endswith("_seconds"):
            histogram = self._instrument(full, self._meter.create_histogram, "s")
            histogram.record(value, self._attributes)
        else:
            self._instrument(full, self._meter.create_gauge, "1").set(value, self._attributes)

    def _instrument(self, name: str, create: Any, unit: str) -> Any:
        if name not in self._instruments:
            self._instruments[name] = create(name, unit=unit)
        return self._instruments[name]
