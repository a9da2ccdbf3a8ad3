"""DGC: what section 2 of the paper and plain SGD say about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commkit.aggregators import AllGather
from commkit.compressors import TopK
from commkit.feedback import MomentumCorrection
from commkit.optim import DGCSGD
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads

from .replica import SHAPES, Make, Replica, Tensors, gradients, parameters, random, same

COMPRESSED = ("matrix", "conv")
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, numbers of size 1 to 100
every_world = pytest.mark.parametrize("world_size", [1, 2, 3])


def maker(**knobs: Any) -> Make:
    return lambda params: DGCSGD(
        params, **{"lr": 0.1, "density": 0.05, "min_numel": 0, "momentum": 0.9, **knobs}
    )


def zeros() -> Tensors:
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def history(make: Make, world_size: int, steps: int, grads: Any = gradients) -> list[list[Any]]:
    """Per rank and step: (messages that arrived, this rank's own message, state)."""

    def body(comm: ThreadComm) -> list[Any]:
        replica, seen = Replica(make, comm), []
        inner = replica.reducer.aggregator
        own: Tensors = {}

        class Recorder:
            def aggregate(self, xs: Any, ctxs: Any, comm: Any) -> Any:
                outcomes = inner.aggregate(xs, ctxs, comm)
                own.update({c.key: o.sent.clone() for c, o in zip(ctxs, outcomes, strict=True)})
                return outcomes

            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

        replica.reducer.aggregator = Recorder()
        for step in range(steps):
            replica.step(grads(comm.rank, step))
            arrived = {name: replica.message(name) for name in SHAPES}
            seen.append((arrived, dict(own), replica.state(), replica.values()))
        return seen

    return run_threads(body, world_size)


@every_world
def test_without_momentum_everything_is_sent_or_kept(world_size: int) -> None:
    for rank, seen in enumerate(history(maker(momentum=0.0), world_size, 12)):
        for name in COMPRESSED:
            sent = sum(own[name] for _, own, _, _ in seen)
            put = sum(gradients(rank, step)[name] for step in range(12))
            torch.testing.assert_close(sent + seen[-1][2][f"rank/{name}"], put, **EXACT)


@pytest.mark.parametrize("nesterov", [False, True])
@every_world
def test_without_masking_all_velocity_is_sent_or_kept(world_size: int, nesterov: bool) -> None:
    make = maker(masking=False, nesterov=nesterov)
    for rank, seen in enumerate(history(make, world_size, 12)):
        for name in COMPRESSED:
            buffer, put = torch.zeros(()), torch.zeros(())
            for step in range(12):
                g = gradients(rank, step)[name]
                buffer = 0.9 * buffer + g
                put = put + (g + 0.9 * buffer if nesterov else buffer)
            sent = sum(own[name] for _, own, _, _ in seen)
            torch.testing.assert_close(sent + seen[-1][2][f"rank/{name}"], put, **EXACT)


def test_masking_forgets_velocity_where_something_was_sent() -> None:
    for seen in history(maker(), 2, 5):
        for _, own, state, _ in seen:
            for name in COMPRESSED:
                sent = own[name] != 0
                assert int(sent.sum()) == TopK(0.05).k(sent.numel())
                assert not state[f"rank/velocity::{name}"][sent].any()
                assert state[f"rank/velocity::{name}"][~sent].all()
                rounding = state[f"rank/{name}"][sent].abs()  # values travel as float32
                assert bool((rounding <= 2**-24 * own[name][sent].abs()).all())


@pytest.mark.parametrize("nesterov", [False, True])
def test_sending_all_with_masking_is_plain_sgd(nesterov: bool) -> None:
    """The velocity is wiped in each step, which is why density=1 is refused."""

    def body(comm: ThreadComm) -> None:
        feedback = MomentumCorrection(0.9, nesterov)
        reducer = Reducer(AllGather(TopK(1.0)), feedback, Policy(min_numel=0))
        for step in range(4):
            mean = sum(gradients(rank, step)["matrix"] for rank in range(2)) / 2
            result = reducer.reduce({"m": gradients(comm.rank, step)["matrix"]}, comm)["m"]
            reducer.end_step()
            # Nesterov's look-ahead is all that is left of the momentum
            expected = 1.9 * mean if nesterov else mean
            # values below 16 travel as float32, and what that cut off comes in the next step
            torch.testing.assert_close(result, expected, rtol=0, atol=2 * 2**-24 * 16)

    run_threads(body, 2)


@every_world
def test_the_mean_of_messages_arrives_with_equal_bits(world_size: int) -> None:
    ranks = history(maker(), world_size, 8)
    for step in range(8):
        for name in COMPRESSED:
            sent = sum(seen[step][1][name] for seen in ranks) / world_size
            torch.testing.assert_close(ranks[0][step][0][name], sent, **EXACT)
        for seen in ranks[1:]:
            assert same(seen[step][0], ranks[0][step][0])
            assert same(seen[step][3], ranks[0][step][3])


def test_equal_ranks_receive_what_each_sent() -> None:
    for seen in history(maker(), 3, 6, lambda rank, step: gradients(0, step)):
        for arrived, own, _, _ in seen:
            for name in COMPRESSED:
                torch.testing.assert_close(arrived[name], own[name], **EXACT)


def sgd(steps: int, world_size: int, grads: Any = gradients, **knobs: Any) -> Tensors:
    """torch's SGD on the mean gradient."""
    named = parameters()
    optimizer = torch.optim.SGD(named.values(), **{"lr": 0.1, "momentum": 0.9, **knobs})
    for step in range(steps):
        for name, p in named.items():
            p.grad = sum(grads(rank, step)[name] / world_size for rank in range(world_size))
        optimizer.step()
    return {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_never_compressing_is_torchs_sgd_bit_for_bit(momentum: float, nesterov: bool) -> None:
    knobs = {"momentum": momentum, "nesterov": nesterov and momentum > 0}

    def body(comm: ThreadComm) -> Tensors:
        replica = Replica(maker(start_step=10**9, **knobs), comm)
        for step in range(10):
            replica.step(gradients(comm.rank, step))
        return replica.values()

    for values in run_threads(body, 2):
        assert same(values, sgd(10, 2, **knobs))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("start_step", [0, 4, 10**9])
def test_weight_decay_and_handover_are_those_of_sgd(start_step: int, nesterov: bool) -> None:
    """All of it sent and nothing masked is SGD with momentum, through the change from dense steps too."""
    knobs = {"weight_decay": 0.03, "nesterov": nesterov}
    make = maker(density=0.99999, masking=False, start_step=start_step, **knobs)

    def body(comm: ThreadComm) -> Tensors:
        replica = Replica(make, comm)
        for step in range(12):
            replica.step(gradients(comm.rank, step))
        return replica.values()

    expected = sgd(12, 2, **knobs)
    for values in run_threads(body, 2):
        for name, value in values.items():
            # v still holds the float32 rounding of the last message: lr 2^-24 |v|, |v| < 40
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0.1 * 2**-24 * 40)


def test_decay_alone_is_exact_on_compressed_tensors() -> None:
    seen = history(maker(weight_decay=0.1), 2, 20, lambda rank, step: zeros())
    expected = sgd(20, 2, lambda rank, step: zeros(), weight_decay=0.1)
    for name, value in seen[0][-1][3].items():
        torch.testing.assert_close(value, expected[name], **EXACT)


def test_local_clipping_is_of_the_whole_gradient_and_comes_first() -> None:
    """tau sqrt(W) over all tensors, dense ones too; what is below the limit is left alone."""
    world_size, limit = 2, 1.5

    def clipped(rank: int, step: int) -> Tensors:
        own = gradients(rank, step)
        if step == 2:
            own = {name: g * 1e-3 for name, g in own.items()}
        norm = sum(float(g.square().sum()) for g in own.values()) ** 0.5
        factor = min(1.0, limit * world_size**0.5 / norm)
        assert (factor == 1) == (step == 2)
        return {name: g * factor for name, g in own.items()}

    def raw(rank: int, step: int) -> Tensors:
        own = gradients(rank, step)
        return {name: g * (1e-3 if step == 2 else 1) for name, g in own.items()}

    by_optimizer = history(maker(clip_norm=limit), world_size, 4, raw)
    by_hand = history(maker(), world_size, 4, clipped)
    for mine, other in zip(by_optimizer, by_hand, strict=True):
        for name, value in mine[-1][3].items():
            torch.testing.assert_close(value, other[-1][3][name], **EXACT)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["matrix", "bias"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_bad_step_changes_nothing_on_any_rank(bad: float, where: str, clip_norm: float) -> None:
    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(weight_decay=0.1, start_step=1, clip_norm=clip_norm), comm)
        for step in range(3):
            if step == 1:  # the step at which momentum is handed over
                before = (replica.values(), replica.state(), replica.optimizer.state_dict())
                grads = gradients(comm.rank, step)
                if comm.rank == 1:
                    grads[where].view(-1)[3] = bad
                assert replica.step(grads).nonfinite
                assert not replica.message(where).isfinite().all()
                assert same(replica.values(), before[0])
                assert same(replica.state(), before[1])
                after = replica.optimizer.state_dict()["state"]
                for i, entries in before[2]["state"].items():
                    assert same(after[i], entries)
            assert not replica.step(gradients(comm.rank, step)).nonfinite

    run_threads(body, 2)


def test_density_comes_down_with_the_steps() -> None:
    make = maker(density=0.01, warmup_steps=8)
    for seen in history(make, 2, 10):
        counts = [int((own["matrix"] != 0).sum()) for _, own, _, _ in seen]
        assert counts == [240, 240, 60, 60, 15, 15, 10, 10, 10, 10]


def test_all_zero_gradients_are_no_special_case() -> None:
    for seen in history(maker(), 2, 3, lambda rank, step: zeros()):
        assert all(bool(x.isfinite().all()) for x in seen[-1][2].values())
        assert same(seen[-1][3], {n: p.detach() for n, p in parameters().items()})


def test_what_was_unsent_is_applied_once_when_a_tensor_goes_dense() -> None:
    """Not as a gradient, which momentum would multiply by 10."""

    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(), comm)
        for step in range(4):
            replica.step(gradients(comm.rank, step))
        left = replica.state()
        replica.reducer.policy = Policy(start_step=10**9)
        before = replica.values()["matrix"]
        grads = gradients(comm.rank, 4)
        replica.step(grads)
        own = left["rank/matrix"] + 0.9 * left["rank/velocity::matrix"] + grads["matrix"]
        whole = comm.all_reduce(own) / comm.world_size
        torch.testing.assert_close(replica.values()["matrix"], before - 0.1 * whole, **EXACT)
        assert not any("matrix" in key for key in replica.state())
        before = replica.values()["matrix"]
        replica.step(zeros())
        assert torch.equal(replica.values()["matrix"], before)

    run_threads(body, 2)


def test_learning_rate_zero_leaves_parameters_alone() -> None:
    seen = history(maker(lr=0.0, weight_decay=0.1), 2, 5)
    assert same(seen[0][-1][3], {n: p.detach() for n, p in parameters().items()})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_memory(weight_decay: float) -> None:
    """8 bytes per compressed element, 4 more with weight decay; the handed-over momentum is gone."""

    def body(comm: ThreadComm) -> None:
        replica = Replica(maker(weight_decay=weight_decay, start_step=2), comm, torch.float32)
        for step in range(4):
            replica.step(gradients(comm.rank, step, torch.float32))
        elements = sum(replica.parameters[name].numel() for name in COMPRESSED)
        kept = sum(x.numel() * x.element_size() for x in replica.state().values())
        assert kept == 8 * elements
        for name in COMPRESSED:
            state = replica.optimizer.state.get(replica.parameters[name], {})
            assert set(state) == ({"decay_momentum"} if weight_decay else set())

    run_threads(body, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters_lose_no_message(dtype: torch.dtype) -> None:
    """u, v and what arrives are float32; p.grad has the rounded mean."""

    def body(comm: ThreadComm) -> Tensors:
        replica = Replica(maker(masking=False, weight_decay=0.01), comm, dtype)
        total = torch.zeros(SHAPES["matrix"])
        buffer, put = torch.zeros(()), torch.zeros(())
        for step in range(6):
            grads = gradients(comm.rank, step, dtype)
            replica.step(grads)
            arrived = replica.optimizer.arrived("matrix")
            assert arrived.dtype == torch.float32
            assert torch.equal(arrived.to(dtype), replica.message("matrix"))
            total += arrived
            buffer = 0.9 * buffer + grads["matrix"].float()
            put = put + buffer
        left = put - replica.state()["rank/matrix"]
        mean = comm.all_reduce(left / comm.world_size)
        torch.testing.assert_close(total, mean, rtol=1e-5, atol=1e-5)  # six float32 sums
        assert all(p.dtype == dtype for p in replica.parameters.values())
        return replica.values()

    first, second = run_threads(body, 2)
    assert same(first, second)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"density": 1.0}, r"density=1.0 must be < 1.*torch.optim.SGD"),
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"momentum": 0.0, "nesterov": True}, r"nesterov=True needs momentum > 0"),
        ({"clip_norm": -1.0}, r"clip_norm=-1.0 must be >= 0"),
        ({"lr": -0.1}, r"lr=-0.1 must be >= 0"),
        ({"weight_decay": float("nan")}, r"weight_decay=nan must be >= 0"),
        ({"warmup_steps": -1}, r"warmup_steps=-1 must be >= 0"),
        ({"warmup_steps": 5, "start_step": 5}, r"warmup_steps=5 must be more than start_step=5"),
        ({"exclude": "bias"}, r"exclude='bias' must be a list"),
        ({"threshold": "guess"}, r"threshold='guess' must be"),
    ],
)
def test_bad_settings_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maker(**knobs)([torch.zeros(3)])


def test_groups_set_what_is_theirs_alone() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    groups = [{"params": [a], "weight_decay": 0.5}, {"params": [b], "lr": 0.2}]
    settings = [(g["lr"], g["weight_decay"]) for g in DGCSGD(groups, lr=0.1).param_groups]
    assert settings == [(0.1, 0.5), (0.2, 0.0)]
    with pytest.raises(ValueError, match=r"sets 'momentum', which DGCSGD does not read per group"):
        DGCSGD([{"params": [a], "momentum": 0.5}], lr=0.1)
    with pytest.raises(ValueError, match=r"lr=-1 must be >= 0"):
        DGCSGD([{"params": [a], "lr": -1}], lr=0.1)


def test_learning_rates_of_groups_and_schedules_are_used() -> None:
    def body(comm: ThreadComm) -> None:
        named = parameters()
        groups = [
            {"params": [named["matrix"]], "lr": 0.5},
            {"params": [p for name, p in named.items() if name != "matrix"]},
        ]
        optimizer = DGCSGD(groups, lr=0.0, min_numel=0)
        optimizer.bind(named, comm)
        before = {name: p.detach().clone() for name, p in named.items()}
        for name, p in named.items():
            p.grad = random(name, SHAPES[name])
        grads = {name: p.grad for name, p in named.items() if p.grad is not None}
        optimizer.reducer.reduce(grads, comm)
        optimizer.reducer.end_step()
        optimizer.step()
        changed = {n for n, p in named.items() if not torch.equal(p.detach(), before[n])}
        assert changed == {"matrix"}

    run_threads(body, 1)
