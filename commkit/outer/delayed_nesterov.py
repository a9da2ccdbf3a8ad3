"""What a server does with a pseudo-gradient that arrives: delayed Nesterov, and what it is compared with.

Pure arithmetic on named tensors: no communication, no clock. The order in which pushes come is all that matters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..aggregators.health import are_finite
from ..registry import register


class PushRule(ABC):
    """The server's weights, and how a push changes them.

    A push is the pseudo-gradient of one worker, ``g = weights it downloaded - weights it reached``, so it is
    subtracted. Weights and all that is kept beside them are float32 (float64 for float64 weights).

    Attributes:
        weights: by parameter name, shape of the parameter; the rule's own copies. Empty before :meth:`bind`.
        pushes: how many were counted.
        version: how often the weights changed; what staleness is measured in.
    """

    kept: ClassVar[tuple[str, ...]] = ()
    """Attributes that are tensors by parameter name, saved beside the weights."""

    counted: ClassVar[tuple[str, ...]] = ("pushes", "version")
    """Attributes that are numbers, and saved."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.pushes = self.version = 0

    @torch.no_grad()
    def bind(self, weights: Mapping[str, Tensor], num_workers: int) -> None:
        """Start from ``weights``, which are copied; called once.

        Raises:
            ValueError: fewer than one worker, or a setting that the number of workers rules out.
            RuntimeError: bound before.
        """
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers} must be >= 1")
        if self.weights:
            raise RuntimeError("the rule is bound to weights already; make another one per server")
        self.resolve(num_workers)
        self.weights = {
            name: w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True)
            for name, w in weights.items()
        }
        for what in self.kept:
            setattr(self, what, {n: torch.zeros_like(w) for n, w in self.weights.items()})

    @torch.no_grad()
    def push(self, delta: Mapping[str, Tensor], staleness: int = 0) -> bool:
        """Take in one push.

        Args:
            delta: of every weight's name and shape, in its dtype. Not changed.
            staleness: how many versions came between download and push.

        Returns:
            False: it was dropped and leaves no trace, because it holds inf or NaN or is too stale.
        """
        if not self.admits(staleness) or not are_finite(delta.values()):
            return False
        self.pushes += 1
        self.apply(delta, staleness)
        return True

    def admits(self, staleness: int) -> bool:
        """Whether a push so stale is taken at all."""
        return True

    def resolve(self, num_workers: int) -> None:
        """Settle what depends on the number of workers."""
        return

    @abstractmethod
    def apply(self, delta: Mapping[str, Tensor], staleness: int) -> None:
        """Bring weights and state up to date; ``delta`` is finite and counted already."""

    def flush(self) -> None:
        """The end of training: apply what waits in a buffer that is not full, as if it were."""
        return

    def spec(self) -> dict[str, Any]:
        """The rule and its settings, as plain data."""
        own = {k: v for k, v in vars(self).items() if isinstance(v, int | float | None)}
        return {"rule": type(self).__name__} | {
            k: v for k, v in own.items() if k not in self.counted and not k.startswith("_")
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights, what is kept beside them, and counters; no copies."""
        state: dict[str, Any] = {name: getattr(self, name) for name in self.counted}
        for what in ("weights", *self.kept):
            state[what] = dict(getattr(self, what))
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, of the same rule. It may hold more parameters than this rule has, as when several
        servers' states were put together.

        Raises:
            ValueError: saved by another rule, or a parameter is missing.
        """
        for what in ("weights", *self.kept):
            if what not in state:
                raise ValueError(
                    f"the state has no {what!r}, which {type(self).__name__} keeps; resume with the rule that saved it"
                )
            for name, mine in getattr(self, what).items():
                if name not in state[what]:
                    raise ValueError(f"the state has no {what} of parameter {name!r}")
                mine.copy_(state[what][name])
        for name in self.counted:
            setattr(self, name, state[name])


@register("push_rule", "delayed_nesterov")
class DelayedNesterov(PushRule):
    """Delayed Nesterov momentum (Liu et al. 2024, "Asynchronous Local-SGD Training for Language Modeling").

    Every push moves the weights by its share ``g / N`` at once, but momentum, which stale pushes would feed
    too often, is renewed only every N pushes, at a milestone::

        D <- D + g
        milestone:  m <- beta m + D / N;  w <- w - lr ((1 - c N + c) beta m + g / N);  D <- 0
        else:                             w <- w - lr (             c  beta m + g / N)

    With ``c = 0`` a buffer of N pushes moves the weights exactly by one synchronous Nesterov step on their mean;
    with ``c = 1/N`` the momentum of a milestone is spread evenly over it and the N - 1 pushes that follow. With
    N = 1 it is ordinary Nesterov momentum (``torch.optim.SGD(nesterov=True)``). The order of pushes inside a
    buffer does not change m.

    State: 12 bytes per parameter, weights included.

    Args:
        lr: of a whole buffer, as in synchronous DiLoCo: 0.7. (A push alone moves lr / N; code that passes
            lr N means the same.)
        momentum: beta; the paper uses 0.9 on language models. Staleness is a delay inside the momentum's loop:
            where a task moves far (small models, long tasks) 0.9 oscillates or diverges; 0.6 then.
        buffer_size: N. None is the number of workers. Larger is smoother and slower to react.
        share: c, from 0 (all momentum at the milestone; the paper's best) to 1/N (even).

    Raises:
        ValueError: a value out of range; a ``share`` above 1/N when N is known.
    """

    kept = ("momenta", "sums")
    counted = ("pushes", "version", "pending", "settled")

    def __init__(
        self,
        lr: float = 0.7,
        momentum: float = 0.9,
        buffer_size: int | None = None,
        share: float = 0.0,
    ) -> None:
        super().__init__()
        _check(lr, momentum, buffer_size)
        self.lr, self.momentum, self.buffer_size, self.share = lr, momentum, buffer_size, share
        self.pending = 0
        self.settled = True  # nothing of the current momentum is still to be spread
        self.momenta: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self._check_share()

    def resolve(self, num_workers: int) -> None:
        self.buffer_size = self.buffer_size or num_workers
        self._check_share()

    def _check_share(self) -> None:
        limit = 1.0 if self.buffer_size is None else 1 / self.buffer_size
        if not 0 <= self.share <= limit:
            raise ValueError(
                f"share={self.share} must be from 0 to 1/buffer_size={limit:g}; use 0, which applies all momentum at "
                "the milestone"
            )

    def apply(self, delta: Mapping[str, Tensor], staleness: int) -> None:
        assert self.buffer_size is not None
        size = self.buffer_size
        self.version += 1
        self.pending += 1
        milestone = self.pending == size
        share = 1 - self.share * size + self.share if milestone else self.share
        if self.settled and not milestone:
            share = 0.0
        for name, weight in self.weights.items():
            g, m, total = delta[name], self.momenta[name], self.sums[name]
            total.add_(g)
            if milestone:
                m.mul_(self.momentum).add_(total, alpha=1 / size)
                total.zero_()
            step = g.div(size)
            if share:
                step.add_(m, alpha=share * self.momentum)
            weight.add_(step, alpha=-self.lr)
        if milestone:
            self.pending, self.settled = 0, False

    @torch.no_grad()
    def flush(self) -> None:
        """Make what is pending a milestone of its own size, and pay what is still to be spread of the momentum
        before it: all pushes then add up to synchronous steps, whatever ``share`` is."""
        assert self.buffer_size is not None
        size, pending = self.buffer_size, self.pending
        owed = 0.0 if self.settled else self.share * (size - 1 - pending)
        if not pending and not owed:
            return
        for name, weight in self.weights.items():
            m, total = self.momenta[name], self.sums[name]
            step = m * (owed * self.momentum)
            if pending:
                m.mul_(self.momentum).add_(total, alpha=1 / pending)
                step.add_(total, alpha=1 / pending - 1 / size).add_(m, alpha=self.momentum)
                total.zero_()
            weight.add_(step, alpha=-self.lr)
        self.version += 1
        self.pending, self.settled = 0, True


@register("push_rule", "stale_nesterov")
class StaleNesterov(PushRule):
    """The obvious asynchronous server, "vanilla": a Nesterov step on every push, weighted by staleness.

    ``g <- g (1 + staleness)^-0.5 / sqrt(K)`` for K workers, then ``m <- beta m + g; w <- w - lr (g + beta m)``.
    A baseline: momentum sees K times as many steps as in a synchronous run, and stale ones.

    State: 8 bytes per parameter, weights included.

    Args:
        lr: about a tenth of the synchronous one: 0.07.
        momentum: beta; 0.9.

    Raises:
        ValueError: a value out of range.
    """

    kept = ("momenta",)

    def __init__(self, lr: float = 0.07, momentum: float = 0.9) -> None:
        super().__init__()
        _check(lr, momentum, None)
        self.lr, self.momentum = lr, momentum
        self.num_workers: int | None = None
        self.momenta: dict[str, Tensor] = {}

    def resolve(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def apply(self, delta: Mapping[str, Tensor], staleness: int) -> None:
        assert self.num_workers is not None
        weight_of_push = 1 / math.sqrt(self.num_workers * (1 + staleness))
        self.version += 1
        for name, weight in self.weights.items():
            g = delta[name] * weight_of_push
            m = self.momenta[name].mul_(self.momentum).add_(g)
            weight.add_(g.add_(m, alpha=self.momentum), alpha=-self.lr)


class _Buffered(PushRule):
    """Weights stand still until N pushes are in."""

    kept: ClassVar[tuple[str, ...]] = ("sums",)
    counted: ClassVar[tuple[str, ...]] = ("pushes", "version", "pending")

    def __init__(self, buffer_size: int | None) -> None:
        super().__init__()
        self.buffer_size = buffer_size
        self.pending = 0
        self.sums: dict[str, Tensor] = {}

    def resolve(self, num_workers: int) -> None:
        self.buffer_size = self.buffer_size or num_workers

    def weight_of(self, staleness: int) -> float:
        return 1.0

    def apply(self, delta: Mapping[str, Tensor], staleness: int) -> None:
        weight = self.weight_of(staleness)
        for name, total in self.sums.items():
            total.add_(delta[name], alpha=weight)
        self.pending += 1
        if self.pending == self.buffer_size:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        if not self.pending:
            return
        for name, total in self.sums.items():
            self.step(name, total.div_(self.pending))
            total.zero_()
        self.pending = 0
        self.version += 1

    @abstractmethod
    def step(self, name: str, mean: Tensor) -> None:
        """Move the weight ``name`` by the buffer's ``mean``, which may be overwritten."""


@register("push_rule", "delayed_sgd")
class DelayedSGD(_Buffered):
    """A Nesterov step on the mean of every N pushes, and nothing in between: a baseline.

    State: 12 bytes per parameter, weights included.

    Args:
        lr: 0.7, as in synchronous DiLoCo.
        momentum: beta; 0.9.
        buffer_size: N; None is the number of workers.

    Raises:
        ValueError: a value out of range.
    """

    kept = ("sums", "momenta")

    def __init__(
        self, lr: float = 0.7, momentum: float = 0.9, buffer_size: int | None = None
    ) -> None:
        super().__init__(buffer_size)
        _check(lr, momentum, buffer_size)
        self.lr, self.momentum = lr, momentum
        self.momenta: dict[str, Tensor] = {}

    def step(self, name: str, mean: Tensor) -> None:
        m = self.momenta[name].mul_(self.momentum).add_(mean)
        self.weights[name].add_(mean.add_(m, alpha=self.momentum), alpha=-self.lr)


@register("push_rule", "fedbuff")
class FedBuff(_Buffered):
    """Buffered asynchronous aggregation (Nguyen et al. 2022): ``w <- w - lr mean_k(g_k / sqrt(1 + staleness_k))``
    over every N pushes. Pushes that are too stale are dropped.

    State: 8 bytes per parameter, weights included.

    Args:
        lr: 1 is averaging. Lower it when staleness is high.
        buffer_size: N. The paper finds 10 enough for hundreds of workers; None is the number of workers.
        max_staleness: pushes with more versions between download and push are dropped; None takes all. A
            limit below the number of workers over N starves the slow ones.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self, lr: float = 1.0, buffer_size: int | None = 10, max_staleness: int | None = None
    ) -> None:
        super().__init__(buffer_size)
        _check(lr, 0.0, buffer_size)
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(
                f"max_staleness={max_staleness} must be >= 0; use None to take everything"
            )
        self.lr, self.max_staleness = lr, max_staleness

    def admits(self, staleness: int) -> bool:
        return self.max_staleness is None or staleness <= self.max_staleness

    def weight_of(self, staleness: int) -> float:
        return 1 / math.sqrt(1 + staleness)

    def step(self, name: str, mean: Tensor) -> None:
        self.weights[name].add_(mean, alpha=-self.lr)


def _check(lr: float, momentum: float, buffer_size: int | None) -> None:
    if lr <= 0:
        raise ValueError(f"lr={lr} must be > 0; use 0.7")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be in [0, 1); use 0.9")
    if buffer_size is not None and buffer_size < 1:
        raise ValueError(
            f"buffer_size={buffer_size} must be >= 1; use None for the number of workers"
        )
