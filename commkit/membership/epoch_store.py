"""A store for torch's process groups whose waits end when the epoch does."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

_POLL_S = 0.005


class EpochStore(Store):
    """Waiting for a worker that is gone would take torch's timeout; here it ends at once.

    Args:
        inner: where everything is kept.
        check: raises when waiting has become pointless.
    """

    def __init__(self, inner: Store, check: Callable[[], None]) -> None:
        super().__init__()
        self._inner = inner
        self._check = check
        self._timeout = timedelta(days=1)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._inner.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        limit = (self._timeout if timeout is None else timeout).total_seconds()
        deadline = time.monotonic() + limit
        while not self._inner.check(list(keys)):
            self._check()
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"{keys} did not appear within {limit:g} s")
            time.sleep(_POLL_S)

    def set(self, key: str, value: str | bytes) -> None:
        self._inner.set(key, value)  # type: ignore[arg-type]

    def add(self, key: str, amount: int) -> int:
        return self._inner.add(key, amount)

    def append(self, key: str, value: str | bytes) -> None:
        self._inner.append(key, value)  # type: ignore[attr-defined]

    def check(self, keys: list[str]) -> bool:
        return self._inner.check(list(keys))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._inner.compare_set(key, expected, desired)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        return self._inner.multi_get(list(keys))

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def delete_key(self, key: str) -> bool:
        return self._inner.delete_key(key)

    def num_keys(self) -> int:
        return self._inner.num_keys()

    def clone(self) -> EpochStore:
        """This one: nothing in it blocks others for long."""
        return self

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    @property
    def timeout(self) -> timedelta:
        return self._timeout
