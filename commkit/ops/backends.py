"""The two compiled libraries behind one face: how a function is called on a CPU and on a GPU."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .library import chosen_mode


class Backend(Protocol):
    """Kernels for one kind of device."""

    library: Any
    max_rows: int
    """How many rows one call can add up."""

    def usable(self, device: torch.device) -> bool:
        """Whether the kernels run on this device."""
        ...

    def run(self, name: str, device: torch.device, *arguments: Any) -> Any:
        """Call a function, whose name is that of the CPU's, with what is last in its signature."""
        ...

    def scalar(self, x: Tensor) -> Any:
        """A float32 argument of one element, as the library takes it."""
        ...


class Cpu:
    """On torch's number of threads."""

    max_rows = 2**31 - 1

    def __init__(self, library: Any) -> None:
        self.library = library

    def usable(self, device: torch.device) -> bool:
        return True

    def run(self, name: str, device: torch.device, *arguments: Any) -> Any:
        return getattr(self.library, name)(*arguments, torch.get_num_threads())

    def scalar(self, x: Tensor) -> Any:
        return float(x)


class Cuda:
    """On the current stream of the tensors' device, and without waiting for it."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.max_rows = int(library.ck_cuda_max_rows())
        self._problems: dict[int, str] = {}

    def usable(self, device: torch.device) -> bool:
        index = torch.cuda.current_device() if device.index is None else device.index
        return not self.problem(index)

    def problem(self, index: int) -> str:
        """Why these kernels do not run on GPU ``index``; "" if they do.

        Raises:
            RuntimeError: COMMKIT_CUDA=1 and they do not.
        """
        if index not in self._problems:
            with torch.cuda.device(index):
                code = self.library.ck_cuda_probe()
            self._problems[index] = self._explain(code) if code else ""
        if self._problems[index] and chosen_mode("COMMKIT_CUDA") == "1":
            raise RuntimeError(f"COMMKIT_CUDA=1 but on cuda:{index}: {self._problems[index]}")
        return self._problems[index]

    def run(self, name: str, device: torch.device, *arguments: Any) -> Any:
        with torch.cuda.device(device):
            self.launch(name, *arguments, torch.cuda.current_stream(device).cuda_stream)

    def launch(self, name: str, *arguments: Any) -> None:
        """Raises:
        RuntimeError: the GPU refused.
        """
        code = getattr(self.library, name.replace("ck_", "ck_cuda_", 1))(*arguments)
        if code:
            raise RuntimeError(f"{name} failed on the GPU: {self._explain(code)}")

    def scalar(self, x: Tensor) -> Any:
        return x.data_ptr()

    def _explain(self, code: int) -> str:
        words = self.library.ck_cuda_error(code).decode()
        return f"{words} (CUDA error {code})"
