"""DeMo: momentum that stays apart on every rank, of which only the strongest patterns are shared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..aggregators import AllGather
from ..compressors import DCTTopK
from ..feedback import ErrorFeedback
from ..policy import Policy
from ..types import Comm, TensorCtx
from .base import CommOptimizer, OptimizerReducer, Parameters, in_work_dtype
from .settings import check_group, without_own

_MOMENTUM = "momentum"


@dataclass(frozen=True, slots=True)
class WhereItShrinks(Policy):
    """A policy that leaves dense what the compressor cannot make smaller."""

    compressor: DCTTopK = field(default_factory=DCTTopK)

    def compresses(self, ctx: TensorCtx) -> bool:
        return Policy.compresses(self, ctx) and self.compressor.shrinks(ctx)


class DeMo(CommOptimizer):
    """Decoupled momentum (Peng, Quesnelle and Kingma 2024): ``m = decay m + g`` on each rank by itself; the
    largest cosine coefficients q of each tile of m are taken out of it and sent, and
    ``x = x (1 - lr lambda) - lr sign(mean q)``.

    Backward leaves the mean of q in ``p.grad``; its size means nothing, so there is nothing to clip. Biases
    and norms, and matrices whose coefficients would be no smaller, are all-reduced and take the sign of their
    ordinary momentum (Signum). Messages go to every rank, so it is for at most about a hundred.

    State: m, 4 bytes per parameter; different on every rank where compressed, equal where dense, where
    ``torch.distributed.optim.ZeroRedundancyOptimizer`` around it divides it among the ranks.

    Differences from the paper: the gradient enters m with weight 1, which the sign makes the same as
    ``1 - decay`` (second version) and as ``lr`` (public code) while the learning rate is constant. Dense
    tensors as above. See also :class:`~commkit.compressors.DCTTopK`.

    Args:
        params: as for any optimizer; groups may set ``lr`` and ``weight_decay``.
        lr: step of every element; about that of AdamW or a third of it. Needs a schedule to zero, as any
            sign method.
        weight_decay: decoupled.
        decay: beta of the momentum.
        top_k: coefficients of each tile that a rank sends; ranks send different ones, so what matters is
            ``top_k W`` beside the elements of a tile: the paper's 32 is for 64 ranks. With few ranks raise
            it, up to 1024 / W; halve it as long as the loss follows.
        chunk: largest side of a tile.
        values: precision of what is sent; m keeps the rounding error.
        sign: False applies means themselves: SGD without momentum, with error feedback that forgets, in the
            cosine basis; to measure what the sign does. ``lr`` is then that of SGD.
        min_numel: smaller tensors stay dense.
        min_ndim: tensors with fewer dimensions stay dense; 2 keeps biases and norms out.
        exclude: shell patterns of names that stay dense.

    Raises:
        ValueError: a value out of range.
    """

    supports_zero = True

    def __init__(
        self,
        params: Parameters,
        lr: float,
        weight_decay: float = 0.0,
        decay: float = 0.999,
        top_k: int = 32,
        chunk: int = 64,
        values: Literal["fp32", "bf16", "fp16"] = "bf16",
        sign: bool = True,
        min_numel: int = 1024,
        min_ndim: int = 2,
        exclude: Sequence[str] = (),
    ) -> None:
        self._own = {
            "decay": decay,
            "top_k": top_k,
            "chunk": chunk,
            "values": values,
            "sign": sign,
            "min_numel": min_numel,
            "min_ndim": min_ndim,
            "exclude": exclude,
        }
        compressor = DCTTopK(top_k, chunk, values)
        reducer = OptimizerReducer(
            AllGather(compressor),
            ErrorFeedback(decay),
            WhereItShrinks(0, min_numel, min_ndim, exclude, compressor),
        )
        self.decay, self.sign = decay, sign
        self.settings = {"sign": sign}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, reducer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer.

        Raises:
            ValueError: the group sets anything but ``lr`` and ``weight_decay``, or a negative one.
        """
        param_group = without_own(param_group, self._own)
        check_group(param_group, self.defaults, type(self).__name__)
        super().add_param_group(param_group)

    def outgoing(
        self, named: dict[str, Tensor], compressed: Collection[str], comm: Comm
    ) -> dict[str, Tensor]:
        # A mean in half precision may be zero where the sign of the true one is not.
        return in_work_dtype(named, compressed)

    def apply(self) -> None:
        for name, group in self._groups.items():
            p, update = self._parameters[name], self.arrived(name)
            if self.sign:
                dense = name not in self.reducer.compressed
                update = (self._momentum(p, update) if dense else update).sign()
            value = self.value(name)
            if group["weight_decay"]:
                update = update + value.to(update.dtype) * group["weight_decay"]
            value.add_(update, alpha=-group["lr"])

    def _momentum(self, p: Tensor, x: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[p]
        if _MOMENTUM in state:
            state[_MOMENTUM].mul_(self.decay).add_(x)
        else:
            state[_MOMENTUM] = x.clone()
        return state[_MOMENTUM]
