"""A TCPStore in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..membership.network import STORE, VirtualNetwork
from .turns import Turns

T = TypeVar("T")


class StoreHost:
    """
    Attributes:
        lost: it has died: whoever asks gets an error.
        resumes: until when it is stopped.
        texts: by key.
    """

    def __init__(self) -> None:
        self.lost = False
        self.resumes = 0.0
        self.texts: dict[str, str] = {}


class StoreClient:
    """What an agent asks of its store; each call takes two messages.

    Args:
        host: that is asked.
        name: of who asks.
    """

    def __init__(self, host: StoreHost, name: str, turns: Turns, network: VirtualNetwork) -> None:
        self._host, self._name, self._turns, self._network = host, name, turns, network

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        def carry_out() -> bytes:
            texts = self._host.texts
            if desired and texts.get(key, "") == expected:
                texts[key] = desired
            return texts.get(key, "").encode()

        return self._call(carry_out)

    def set(self, key: str, value: str) -> None:
        self._call(lambda: self._host.texts.update({key: value}))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._call(lambda: [self._host.texts[key].encode() for key in keys])

    def _call(self, carry_out: Callable[[], T]) -> T:
        turns, network, host = self._turns, self._network, self._host
        answers: list[T | None] = []

        def arrive() -> None:
            if network.clock.now < host.resumes:
                network.clock.after(host.resumes - network.clock.now, arrive)
                return
            answer = None if host.lost else carry_out()
            lost = host.lost
            network.send(
                STORE, self._name, lambda: answers.extend([answer, None] if lost else [answer])
            )

        network.send(self._name, STORE, arrive)
        turns.wait(lambda: bool(answers))
        if len(answers) > 1:
            raise RuntimeError("the connection to the store was reset")
        return answers[0]  # type: ignore[return-value]
