"""How patient workers are with each other."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class ElasticOptions:
    """
    Args:
        min_workers: with fewer than these, training stops on all that are left.
        heartbeat_s: seconds between two signs of life of a worker.
        limit_s: a worker that gives no sign of life for so long is left out. A process that ends is noticed at
            once; this is for those that stop, hang or lose their network. Longer than any pause of a healthy
            worker in which Python cannot run another thread.
        start_s: how long to wait for ``WORLD_SIZE`` workers at the start; then those that are there begin, if
            they are ``min_workers``.
        grace_s: how long too few workers wait for others to join before training stops.
        step_limit_s: a step that takes longer is given up by all and done again, together with those that are
            there, and so is finding together and handing the training state over; None is for ever. For networks on
            which some pairs may be cut off while all reach the store.
        max_tries: so many times in a row the same workers try a step before training stops.
        poll_s: seconds between two looks at the store; half of it is what the news of a loss takes on average.

    Raises:
        ValueError: a value out of range.
    """

    min_workers: int = 1
    heartbeat_s: float = 0.5
    limit_s: float = 5.0
    start_s: float = 300.0
    grace_s: float = 0.0
    step_limit_s: float | None = None
    max_tries: int = 5
    poll_s: float = 0.02

    def __post_init__(self) -> None:
        for name in ("min_workers", "max_tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1; use 1 or more")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_s") and value is not None and value < 0:
                raise ValueError(f"{field.name}={value} must be >= 0; leave it out for the default")
        if not 0 < 2 * self.heartbeat_s <= self.limit_s:
            raise ValueError(
                f"limit_s={self.limit_s} must be at least twice heartbeat_s={self.heartbeat_s} > 0, or a healthy "
                "worker is left out; raise limit_s"
            )
        if self.poll_s == 0:
            raise ValueError("poll_s=0 would keep the store busy; use for example 0.02")
