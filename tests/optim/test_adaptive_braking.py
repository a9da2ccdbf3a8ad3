"""Adaptive braking: its invariants, and gradients that come too late for plain momentum."""

from collections import deque

import pytest
import torch
from torch import nn

from commkit.optim import AdaptiveBrakingSGD
from commkit.sim import ThreadComm, run_threads

DIM = 20


def quadratic(delay: int, rho: float, lr: float = 0.02, steps: int = 400) -> list[float]:
    """Distances to the optimum of f = sum h_i x_i^2 / 2, h from 0.1 to 1, with noisy gradients of the weights
    ``delay`` steps ago."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-1, 0, DIM)
    x = nn.Parameter(torch.ones(DIM))
    optimizer = AdaptiveBrakingSGD([x], lr=lr, momentum=0.9, rho=rho)
    past: deque[torch.Tensor] = deque([x.detach().clone()], maxlen=delay + 1)
    distances = []
    for _ in range(steps):
        x.grad = curvature * past[0] + 0.01 * torch.randn(DIM, generator=generator)
        optimizer.step()
        past.append(x.detach().clone())
        distances.append(float(x.detach().norm() / DIM**0.5))
    return distances


@pytest.mark.parametrize("delay", [16, 32])
def test_delayed_gradients_diverge_with_momentum_and_converge_with_braking(delay: int) -> None:
    lr = 1.0 / delay
    plain, braked = (quadratic(delay, rho, lr) for rho in (0.0, 2.0))
    assert plain[-1] > 100
    assert max(braked[-50:]) < 0.3
    assert quadratic(0, 0.0, lr)[-1] < 0.1  # without delay plain momentum is fine at that rate


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_rho_it_is_momentum_sgd(nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(2))
    a = AdaptiveBrakingSGD([ours], lr=0.1, rho=0.0, nesterov=nesterov)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=nesterov)
    for _ in range(10):
        ours.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def scale(
    g: torch.Tensor, v: torch.Tensor, rho: float = 2.0, granularity: str = "row"
) -> torch.Tensor:
    """By what a gradient was multiplied, given the velocity; elementwise."""
    x = nn.Parameter(torch.zeros_like(g))
    optimizer = AdaptiveBrakingSGD([x], 1.0, 0.0, rho, granularity=granularity)  # type: ignore[arg-type]
    optimizer.state[x]["momentum_buffer"] = v.clone()
    x.grad = g.clone()
    optimizer.step()
    return -x.detach() / g


def test_scales() -> None:
    g = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(scale(g, 7 * g), torch.full((2,), -1.0))
    torch.testing.assert_close(scale(g, -0.1 * g), torch.full((2,), 3.0))
    torch.testing.assert_close(scale(g, torch.tensor([-4.0, 3.0])), torch.ones(2))
    torch.testing.assert_close(scale(g, torch.zeros(2)), torch.ones(2))
    tiny = 1e-18 * g  # whose square is 0 in float32 nearly; scale-free nevertheless down to there
    torch.testing.assert_close(scale(1e18 * g, tiny), torch.full((2,), -1.0))
    x = nn.Parameter(torch.ones(2))
    optimizer = AdaptiveBrakingSGD([x], 0.1)
    x.grad = torch.zeros(2)
    optimizer.step()
    assert x.isfinite().all()
    torch.testing.assert_close(x.detach(), torch.ones(2))


def test_cosines_are_taken_over_rows_tensors_or_everything() -> None:
    g = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    v = g * torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(scale(g, v), torch.tensor([[-1.0, -1.0], [3.0, 3.0]]))
    cosine = (g * v).sum() / (g.norm() * v.norm())
    for granularity in ("tensor", "global"):
        expected = (1 - 2 * cosine).expand(2, 2)
        torch.testing.assert_close(scale(g, v, granularity=granularity), expected)


@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_shards_brake_like_the_whole(granularity: str) -> None:
    generator = torch.Generator().manual_seed(2)
    start = [torch.randn(6, generator=generator) for _ in range(2)]
    gradients = [[torch.randn(6, generator=generator) for _ in range(2)] for _ in range(5)]

    def body(comm: ThreadComm) -> list[torch.Tensor]:
        part = slice(3 * comm.rank, 3 * comm.rank + 3) if comm.world_size > 1 else slice(None)
        xs = [nn.Parameter(x[part].clone()) for x in start]
        optimizer = AdaptiveBrakingSGD(xs, 0.1, granularity=granularity, comm=comm)  # type: ignore[arg-type]
        for step in gradients:
            for x, g in zip(xs, step, strict=True):
                x.grad = g[part].clone()
            optimizer.step()
        return [x.detach() for x in xs]

    whole = run_threads(body, 1)[0]
    halves = run_threads(body, 2)
    for i, x in enumerate(whole):
        torch.testing.assert_close(torch.cat([half[i] for half in halves]), x)


def test_weight_decay_is_decoupled_and_groups_have_their_own() -> None:
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdaptiveBrakingSGD([{"params": [x], "weight_decay": 0.5}, {"params": [y]}], lr=0.1)
    x.grad, y.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.full((2,), 0.95))
    torch.testing.assert_close(y.detach(), torch.ones(2))
    assert not optimizer.state[x]["momentum_buffer"].any()


def test_half_precision_keeps_a_float32_velocity_over_a_resume() -> None:
    def build() -> tuple[nn.Parameter, AdaptiveBrakingSGD]:
        x = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        return x, AdaptiveBrakingSGD([x], lr=0.1)

    x, optimizer = build()
    x.grad = torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16)
    for _ in range(3):
        optimizer.step()
    y, resumed = build()
    resumed.load_state_dict(optimizer.state_dict())
    velocity = resumed.state[y]["momentum_buffer"]
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, optimizer.state[x]["momentum_buffer"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -1.0}, r"rho=-1\.0 must be >= 0"),
        ({"momentum": 1.0}, r"momentum=1\.0 must be in \[0, 1\)"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov=True needs momentum > 0"),
        ({"lr": -0.1}, r"lr=-0\.1 must be >= 0"),
        ({"granularity": "layer"}, "granularity='layer' must be 'row'"),
        ({"comm": object()}, "granularity='row' cannot be had of shards"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveBrakingSGD([nn.Parameter(torch.ones(2))], **({"lr": 0.1} | settings))  # type: ignore[arg-type]


def test_unknown_group_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="does not read per group"):
        AdaptiveBrakingSGD([{"params": [nn.Parameter(torch.ones(2))], "rho": 1.0}], lr=0.1)
