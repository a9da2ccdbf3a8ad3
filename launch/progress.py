"""What a checkpoint holds besides model, optimizer and scheme: position and random state."""

import time
from typing import Any

import torch
from torch import Tensor
from torchdata.stateful_dataloader import (  # type: ignore[import-untyped]
    StatefulDataLoader,
)


class Progress:
    """How far a run has come, data position included. The same on every rank.

    Args:
        loader: its state travels along.
        data_digest: a position means something in the same text only, so the text is remembered.
    """

    def __init__(self, loader: "StatefulDataLoader[Tensor]", data_digest: str) -> None:
        self.step = 0  # optimizer steps done
        self.tokens = 0  # bytes of text trained on, all ranks
        self.seconds = 0.0  # wall time spent training, also before the last resumption
        self.loader = loader
        self.data_digest = data_digest
        self._last_tick = time.perf_counter()

    def tick(self) -> None:
        """Add the wall time since the last tick."""
        now = time.perf_counter()
        self.seconds += now - self._last_tick
        self._last_tick = now

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data_digest": self.data_digest,
            "loader": self.loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            ValueError: the text is not the one that the run began with.
        """
        if state["data_digest"] != self.data_digest:
            raise ValueError(
                f"--resume: the data has digest {self.data_digest}, but the run began with "
                f"{state['data_digest']}; restore the data (and the Python version, if it is the "
                "standard library's) or give another --out"
            )
        self.step = state["step"]
        self.tokens = state["tokens"]
        self.seconds = state["seconds"]
        self._last_tick = time.perf_counter()
        self.loader.load_state_dict(state["loader"])


class RandomState:
    """torch's global random state, which dropout draws from. Each rank has its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
