"""The end of a backward pass is noticed once, in order, and after a pass that failed too."""

from __future__ import annotations

import pytest
import torch

from commkit.runtime.backward import EndOfBackward


def watched(x: torch.Tensor, *ends: EndOfBackward) -> torch.Tensor:
    y = x * 2
    y.register_hook(lambda g: [end.arm() for end in ends] and None)
    return y


def test_once_for_each_pass_and_in_the_order_of_asking():
    calls: list[str] = []
    first = EndOfBackward(lambda: calls.append("first"))
    second = EndOfBackward(lambda: calls.append("second"))
    x = torch.ones(3, requires_grad=True)
    for number in (1, 2):
        y = watched(watched(x, second), first, first)
        y.sum().backward()
        assert calls == ["first", "second"] * number
        assert x.grad is not None  # the pass was over


def test_an_error_is_backwards_own():
    def fail() -> None:
        raise ArithmeticError("at the end")

    end = EndOfBackward(fail)
    with pytest.raises(ArithmeticError, match="at the end"):
        watched(torch.ones(1, requires_grad=True), end).sum().backward()


def test_a_pass_that_failed_does_not_hide_the_next():
    calls: list[int] = []
    end = EndOfBackward(lambda: calls.append(1))
    x = torch.ones(1, requires_grad=True)

    def broken(g: torch.Tensor) -> None:
        raise ArithmeticError

    z = x * 3
    z.register_hook(broken)
    with pytest.raises(ArithmeticError):
        watched(z, end).sum().backward()
    before = len(calls)
    watched(x, end).sum().backward()
    assert len(calls) == before + 1
