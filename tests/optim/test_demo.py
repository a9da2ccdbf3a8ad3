"""DeMo: its recursion, the sign, and what stays dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commkit.compressors import DCTTopK
from commkit.optim import DeMo
from commkit.sim import ThreadComm, run_threads
from commkit.types import TensorCtx

from .replica import SHAPES, Make, Replica, Tensors, gradients, parameters, same

COMPRESSED = ("matrix", "conv")
DENSE = ("bias", "scale", "empty")
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, numbers of size 1 to 100
every_world = pytest.mark.parametrize("world_size", [1, 2, 3])


def maker(**knobs: Any) -> Make:
    return lambda params: DeMo(
        params, **{"lr": 0.01, "decay": 0.9, "top_k": 4, "chunk": 8, "min_numel": 0, **knobs}
    )


def zeros() -> Tensors:
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


@every_world
def test_the_recursion(world_size: int) -> None:
    """m = decay m + g; q = the largest coefficients; m = m - q; x = x (1 - lr lambda) - lr sign(mean q)."""
    lr, decay, weight_decay = 0.01, 0.9, 0.2
    compressor = DCTTopK(4, 8)

    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(weight_decay=weight_decay), comm)
        m = {rank: zeros() for rank in range(world_size)}
        x = {name: p.detach().clone() for name, p in parameters().items()}
        for step in range(8):
            replica.step(gradients(comm.rank, step))
            for name in SHAPES:
                ctx = TensorCtx(name, x[name].shape, torch.float64, x[name].device, step, 0)
                sent = []
                for rank in range(world_size):
                    m[rank][name] = decay * m[rank][name] + gradients(rank, step)[name]
                    sent.append(compressor.compress(m[rank][name], ctx))
                    if name in COMPRESSED:
                        m[rank][name] -= compressor.decompress(sent[rank], ctx)
                if name in COMPRESSED:
                    mean = compressor.combine(sent, ctx)
                    assert torch.equal(replica.message(name), mean), "p.grad is the mean itself"
                    kept = replica.state()[f"rank/{name}"]
                    torch.testing.assert_close(kept, m[comm.rank][name], **EXACT)
                else:
                    mean = sum(m[rank][name] for rank in range(world_size)) / world_size
                x[name] = x[name] * (1 - lr * weight_decay) - lr * mean.sign()
                torch.testing.assert_close(replica.values()[name], x[name], **EXACT)

    run_threads(body, world_size)


@every_world
def test_everything_is_sent_kept_or_forgotten_at_the_set_rate(world_size: int) -> None:
    """m(T) + sum decay^(T-t) q(t) == sum decay^(T-t) g(t), rank by rank."""
    steps = 20

    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(), comm)
        sent, put = zeros(), zeros()
        inner = replica.reducer.aggregator

        class Recorder:
            def aggregate(self, xs: Any, ctxs: Any, comm: Any) -> Any:
                outcomes = inner.aggregate(xs, ctxs, comm)
                for c, o in zip(ctxs, outcomes, strict=True):
                    sent[c.key] = 0.9 * sent[c.key] + o.sent
                return outcomes

            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

        replica.reducer.aggregator = Recorder()
        for step in range(steps):
            replica.step(gradients(comm.rank, step))
            put = {n: 0.9 * put[n] + g for n, g in gradients(comm.rank, step).items()}
        for name in COMPRESSED:
            whole = replica.state()[f"rank/{name}"] + sent[name]
            torch.testing.assert_close(whole, put[name], **EXACT)

    run_threads(body, world_size)


def test_replicas_hold_equal_bits_over_many_steps() -> None:
    def body(comm: ThreadComm) -> Tensors:
        replica = Replica(maker(weight_decay=0.1), comm, torch.float32)
        for step in range(200):
            replica.step(gradients(comm.rank, step, torch.float32))
        return replica.values()

    first, *others = run_threads(body, 3)
    assert all(same(first, other) for other in others)


def test_sending_everything_without_memory_is_sign_sgd() -> None:
    """The compressor sends what would not shrink as it is; here that is everything."""

    def body(comm: ThreadComm) -> None:
        make = maker(top_k=10**6, values="fp32", decay=1e-9)
        replica = Replica(make, comm, torch.float32)
        x = replica.values()
        for step in range(5):
            replica.step(gradients(comm.rank, step, torch.float32))
            for name in ("matrix", "conv", "bias"):
                mean = sum(gradients(rank, step, torch.float32)[name] / 2 for rank in range(2))
                clear = mean.abs() > 1e-6  # where 1e-9 of the past decides nothing
                change = replica.values()[name] - x[name]
                expected = -0.01 * mean.sign()
                # a parameter of size 1 takes steps of 0.01 up to its own rounding
                off = (change - expected)[clear].abs().max()
                assert float(off) <= 2**-24 * float(replica.values()[name].abs().max())
            x = replica.values()

    run_threads(body, 2)


def test_one_rank_that_sends_all_takes_the_sign_of_its_momentum() -> None:
    """Coefficients in bfloat16, all of them: what a step leaves is rounding, which the next one sends."""

    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(top_k=10**6, min_ndim=0), comm)
        before, kept = replica.values()["matrix"], torch.zeros(SHAPES["matrix"])
        for step in range(4):
            m = 0.9 * kept + gradients(0, step)["matrix"]
            replica.step(gradients(0, step))
            kept = replica.state()["rank/matrix"]
            assert float(kept.norm()) < 2**-8 * float(m.norm())
            change = replica.values()["matrix"] - before
            clear = m.abs() > kept.abs()
            assert bool((change[clear].sign() == -m[clear].sign()).all())
            before = replica.values()["matrix"]

    run_threads(body, 1)


def test_tensors_that_would_expand_are_dense() -> None:
    def body(comm: ThreadComm) -> None:
        p = {
            "prime": torch.nn.Parameter(torch.ones(67, 71)),
            "even": torch.nn.Parameter(torch.ones(64, 64)),
            "vector": torch.nn.Parameter(torch.ones(4096)),
            "scalar": torch.nn.Parameter(torch.ones(())),
        }
        optimizer = DeMo(p.values(), lr=0.1)
        optimizer.bind(p, comm)
        named = {name: torch.ones_like(x) for name, x in p.items()}
        optimizer.reducer.reduce(dict(named), comm)
        optimizer.reducer.end_step()
        assert optimizer.reducer.compressed == {"even"}

    run_threads(body, 2)


def test_without_the_sign_means_are_applied() -> None:
    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(sign=False, weight_decay=0.5), comm)
        for step in range(3):
            before = replica.values()
            replica.step(gradients(comm.rank, step))
            for name in SHAPES:
                expected = before[name] * (1 - 0.01 * 0.5) - 0.01 * replica.message(name)
                torch.testing.assert_close(replica.values()[name], expected, **EXACT)
        assert not replica.optimizer.state

    run_threads(body, 2)


def test_learning_rate_zero_leaves_parameters_alone() -> None:
    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(lr=0.0, weight_decay=0.1), comm)
        for step in range(3):
            replica.step(gradients(comm.rank, step))
        assert same(replica.values(), {n: p.detach() for n, p in parameters().items()})

    run_threads(body, 2)


def test_nothing_moves_without_gradients() -> None:
    """sign(0) = 0."""

    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(), comm)
        for _ in range(3):
            replica.step(zeros())
        assert same(replica.values(), {n: p.detach() for n, p in parameters().items()})

    run_threads(body, 2)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("where", ["matrix", "bias"])
def test_a_bad_step_changes_nothing_on_any_rank(bad: float, where: str) -> None:
    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(weight_decay=0.1), comm)
        replica.step(gradients(comm.rank, 0))
        before = (replica.values(), replica.state())
        momentum = {
            name: replica.optimizer.state[replica.parameters[name]]["momentum"].clone()
            for name in DENSE
        }
        grads = gradients(comm.rank, 1)
        if comm.rank == 1:
            grads[where].view(-1)[3] = bad
        assert replica.step(grads).nonfinite
        assert same(replica.values(), before[0])
        assert same(replica.state(), before[1])
        for name, m in momentum.items():
            assert torch.equal(replica.optimizer.state[replica.parameters[name]]["momentum"], m)
        assert not replica.step(gradients(comm.rank, 2)).nonfinite
        assert not same(replica.values(), before[0])

    run_threads(body, 2)


def test_memory_is_four_bytes_per_parameter() -> None:
    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(weight_decay=0.1), comm, torch.float32)
        for step in range(3):
            replica.step(gradients(comm.rank, step, torch.float32))
        kept = sum(x.numel() * x.element_size() for x in replica.state().values())
        assert kept == 4 * sum(replica.parameters[name].numel() for name in COMPRESSED)
        for name, p in replica.parameters.items():
            state = replica.optimizer.state.get(p, {})
            assert sum(x.numel() * x.element_size() for x in state.values()) == (
                4 * p.numel() if name in DENSE else 0
            )

    run_threads(body, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    """Momentum is float32 and the sign is that of the unrounded mean."""

    def body(comm: ThreadComm) -> Tensors:
        replica = Replica(maker(lr=2.0**-6), comm, dtype)
        for step in range(5):
            tiny = {n: g * 2.0**-30 for n, g in gradients(comm.rank, step, dtype).items()}
            before = replica.values()
            replica.step(tiny)
            arrived = replica.optimizer.arrived("matrix")
            assert arrived.dtype == replica.state()["rank/matrix"].dtype == torch.float32
            update = (before["matrix"].float() - 2.0**-6 * arrived.sign()).to(dtype)
            assert torch.equal(replica.values()["matrix"], update)
        return replica.values()

    first, second = run_threads(body, 2)
    assert same(first, second)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"decay": 0.0}, r"decay=0.0 must be in \(0, 1\]"),
        ({"decay": 1.5}, r"decay=1.5 must be in \(0, 1\]"),
        ({"top_k": 0}, r"top_k=0 must be >= 1"),
        ({"chunk": 1000}, r"chunk=1000 must be in \[2, 181\]"),
        ({"values": "int8"}, r"values='int8' must be"),
        ({"lr": -1.0}, r"lr=-1.0 must be >= 0"),
        ({"weight_decay": -1.0}, r"weight_decay=-1.0 must be >= 0"),
        ({"exclude": "*"}, r"exclude='\*' must be a list"),
    ],
)
def test_bad_settings_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maker(**knobs)([torch.zeros(3)])


def test_groups_set_what_is_theirs_alone() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"sets 'decay', which DeMo does not read per group"):
        DeMo([{"params": [p], "decay": 0.5}], lr=0.1)
