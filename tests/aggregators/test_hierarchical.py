"""Hierarchical reductions: the scheme between nodes sees node means, nodes get its results, and no more."""

from __future__ import annotations

import pytest
import torch

from commkit.aggregators import AllReduce, Hierarchical, PowerSGD
from commkit.aggregators.hierarchical import server_of
from commkit.aggregators.nodes import placement
from commkit.compressors import NoCompression
from commkit.feedback import ErrorFeedback
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.schemes import hierarchical, make_reducer
from commkit.sim import ThreadComm, run_threads

from .hierarchy import SCHEMES, SHAPES, Run, Tensors, between, gradients, node_mean, run, unsent

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_layout = pytest.mark.parametrize(("nodes", "local"), [(2, 2), (3, 2), (2, 3), (1, 3), (3, 1)])
several_nodes = pytest.mark.parametrize(("nodes", "local"), [(2, 2), (3, 2), (2, 3)])

# Float64 arithmetic on numbers of size 1 to 10: what is left is rounding.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def equal(first: list[Tensors], second: list[Tensors]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def full_precision(local: int) -> Reducer:
    between_nodes = AllReduce(NoCompression())
    return Reducer(Hierarchical(between_nodes, local_size=local), policy=Policy(min_numel=0))


@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_full_precision_is_the_plain_mean(nodes: int, local: int, dtype) -> None:
    world_size = nodes * local
    runs = run(
        lambda: full_precision(local), world_size, range(2), lambda r, s: gradients(r, s, dtype)
    )
    eps = torch.finfo(dtype).eps
    for step in range(2):
        for key in SHAPES:
            xs = torch.stack([gradients(r, step, dtype)[key] for r in range(world_size)])
            error = (runs[0].outs[step][key].double() - xs.double().mean(0)).abs()
            # one rounding of each addend and sum, and one to the gradient's dtype
            assert bool((error <= 2 * world_size * eps * xs.double().abs().mean(0)).all())
    assert all(equal(other.outs, runs[0].outs) for other in runs[1:])


def test_float32_and_float64_tensors_in_one_reduction() -> None:
    def mixed(rank: int, step: int) -> Tensors:
        grads = gradients(rank, step)
        return {k: x.float() if i % 2 else x for i, (k, x) in enumerate(grads.items())}

    runs = run(lambda: full_precision(2), 4, range(1), mixed)
    for key, out in runs[0].outs[0].items():
        mean = sum(mixed(rank, 0)[key] for rank in range(4)) / 4
        assert out.dtype == mean.dtype
        torch.testing.assert_close(out, mean, rtol=1e-6, atol=1e-6)


@every_scheme
@pytest.mark.parametrize("world_size", [1, 3])
def test_one_rank_per_node_is_the_scheme_alone(scheme: str, world_size: int) -> None:
    flat = run(lambda: make_reducer(SCHEMES[scheme]), world_size, range(6), gradients)
    runs = run(between(scheme, 1), world_size, range(6), gradients)
    for one, other in zip(flat, runs, strict=True):
        assert equal(one.outs, other.outs)


@every_scheme
@several_nodes
def test_nodes_are_the_ranks_of_the_scheme(scheme: str, nodes: int, local: int) -> None:
    """Bit for bit: the scheme on as many ranks as there are nodes, with the nodes' means for gradients."""

    def of_node(node: int, step: int) -> Tensors:
        return node_mean([gradients(node * local + r, step) for r in range(local)])

    flat = run(lambda: make_reducer(SCHEMES[scheme]), nodes, range(6), of_node)
    runs = run(between(scheme, local), nodes * local, range(6), gradients)
    assert all(equal(other.outs, runs[0].outs) for other in runs[1:])
    dense = [
        key for key in SHAPES if not make_reducer(SCHEMES[scheme]).policy.compresses(_ctx(key))
    ]
    for expected, outs in zip(flat[0].outs, runs[0].outs, strict=True):
        for key in SHAPES:
            if key in dense:  # over all ranks at once: another order of summation
                torch.testing.assert_close(outs[key], expected[key], **EXACT)
            else:
                assert torch.equal(outs[key], expected[key]), key
    for key in SHAPES:
        held = [f"aggregator/node/{key}" in seen.state for seen in runs]
        assert sum(held) in (0, nodes), "one rank of each node keeps the node's residual"


def _ctx(key: str):
    return Reducer(PowerSGD())._ctx(key, gradients(0, 0)[key])


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "int8"])
@every_layout
def test_the_mean_gradient_arrives_or_is_kept(scheme: str, nodes: int, local: int) -> None:
    world_size, steps = nodes * local, 8
    runs = run(between(scheme, local), world_size, range(steps), gradients)
    states = [seen.state for seen in runs]
    for key in SHAPES:
        arrived = sum(outs[key] for outs in runs[0].outs) + unsent(states, key)
        given = sum(gradients(r, s)[key] for r in range(world_size) for s in range(steps))
        torch.testing.assert_close(arrived, given / world_size, **EXACT)
    if nodes > 1:
        assert any(bool(unsent(states, key).any()) for key in SHAPES), "it proves nothing otherwise"


@several_nodes
def test_bytes_leave_a_node_once(nodes: int, local: int) -> None:
    """PowerSGD's messages have no headers: what a node sends is to the byte what a rank alone would."""

    def matrices(rank: int, step: int) -> Tensors:
        return {key: gradients(rank, step)[key] for key in ("first", "third", "conv", "last")}

    (flat, *_) = run(lambda: make_reducer(SCHEMES["powersgd"]), nodes, range(3), matrices)
    runs = run(between("powersgd", local), nodes * local, range(3), matrices)
    for node in range(nodes):
        of_node = [seen.bytes for seen in runs[node * local : (node + 1) * local]]
        sent = sum(counter.labelled("inter") for counter in of_node)
        # every collective rounds its bytes down
        assert abs(sent - flat.bytes.wire_bytes) <= sum(counter.rounds for counter in of_node)
    for seen in runs:
        counter = seen.bytes
        assert counter.labelled("inter") + counter.labelled("intra") == counter.wire_bytes
        assert counter.by_op["intra/all_to_all"] == counter.labelled("intra")


def test_two_collectives_inside_a_node() -> None:
    def body(comm: ThreadComm) -> tuple[int, int]:
        reducer = between("int8", 2)()
        reducer.reduce(gradients(comm.rank, 0), comm)
        return comm.bytes.rounds, reducer.step

    assert [rounds for rounds, _ in run_threads(body, 4)] == [4] * 4  # and two-shot's two


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("bad_rank", range(4))
@pytest.mark.parametrize("scheme", ["powersgd", "sign", "topk"])
def test_a_bad_step_is_dense_and_leaves_no_trace(scheme: str, bad_rank: int, bad: float) -> None:
    """Whoever holds it and whoever serves it: all four ranks give the step up together."""

    def spoilt(rank: int, step: int, which: str) -> Tensors:
        grads = gradients(rank, step, torch.float32)
        if rank == bad_rank:
            grads[which][3, 4] = bad
        return grads

    def body(comm: ThreadComm) -> None:
        place = placement(comm, 2, None)
        servers = {server_of(key, place) for key in ("first", "third", "last")}
        assert servers == {0, 1}, "both local ranks serve one of the tensors to spoil"
        reducer = between(scheme, 2)()
        for step in range(2):
            reducer.reduce(gradients(comm.rank, step, torch.float32), comm)
            reducer.end_step()
        before = {key: x.clone() for key, x in reducer.state_dict().items()}
        for step, which in enumerate(("first", "third", "last"), 2):
            outs = reducer.reduce(spoilt(comm.rank, step, which), comm)
            for key in SHAPES:
                expected = sum(spoilt(rank, step, which)[key] / 4 for rank in range(4))
                assert torch.equal(outs[key].nan_to_num(9.0), expected.nan_to_num(9.0)), key
            assert not outs[which][3, 4].isfinite()
            assert reducer.end_step().nonfinite
            after = reducer.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[k], after[k]) for k in before if k != "shared/step")
        reducer.reduce(gradients(comm.rank, 9, torch.float32), comm)
        assert not reducer.end_step().nonfinite

    run_threads(body, 4, timeout_s=20)


def test_a_bad_tensor_on_a_single_node_is_dense_too() -> None:
    def body(comm: ThreadComm) -> None:
        reducer = between("powersgd", 3)()
        grads = gradients(comm.rank, 0)
        if comm.rank == 1:
            grads["first"][0, 0] = torch.nan
        outs = reducer.reduce(grads, comm)
        assert not outs["first"][0, 0].isfinite()
        assert reducer.end_step().nonfinite

    run_threads(body, 3, timeout_s=20)


@every_scheme
def test_buckets_do_not_matter(scheme: str) -> None:
    """Also buckets in which a rank serves nothing."""
    keys = list(SHAPES)

    def in_buckets(comm: ThreadComm) -> list[Tensors]:
        reducer, outs = between(scheme, 2)(), []
        for step in range(4):
            order, size, seen = keys[step:] + keys[:step], 1 + step, {}
            for i in range(0, len(keys), size):
                grads = gradients(comm.rank, step)
                part = reducer.reduce({key: grads[key] for key in order[i : i + size]}, comm)
                seen |= {key: x.clone() for key, x in part.items()}
            reducer.end_step()
            outs.append(seen)
        return outs

    at_once = run(between(scheme, 2), 4, range(4), gradients)
    for seen, outs in zip(at_once, run_threads(in_buckets, 4), strict=True):
        assert all(torch.equal(a[k], b[k]) for a, b in zip(seen.outs, outs, strict=True) for k in a)


def test_what_a_silent_layer_left_unsent_waits() -> None:
    """A parameter that nobody used: DDP throws the result away, so it must not take the residual along."""

    def grads(rank: int, step: int) -> Tensors:
        own = gradients(rank, step)
        return own if step < 2 else {key: torch.zeros_like(x) for key, x in own.items()}

    two, four = (run(between("topk", 2), 4, range(n), grads) for n in (2, 4))
    assert not any(bool(x.any()) for seen in four for outs in seen.outs[2:] for x in outs.values())
    for before, after in zip(two, four, strict=True):
        assert all(
            torch.equal(before.state[k], after.state[k]) for k in before.state if "/" in k[7:]
        )


def test_feedback_belongs_inside() -> None:
    with pytest.raises(TypeError, match=r"use Hierarchical\(aggregator, feedback="):
        Reducer(Hierarchical(PowerSGD(), local_size=1), ErrorFeedback())


def test_the_scheme_keeps_policy_and_parts() -> None:
    block = {"name": "sign", "start_step": 7, "min_numel": 5}
    reducer = make_reducer({"name": "hierarchical", "scheme": block, "local_size": 2})
    flat = make_reducer(block).spec()
    assert reducer.spec() == {
        "aggregator": {
            "name": "hierarchical",
            "aggregator": flat["aggregator"],
            "feedback": flat["feedback"],
            "local_size": 2,
            "nodes": None,
        },
        "feedback": {"name": "none"},
        "policy": flat["policy"],
        "seed": 0,
        "max_grad_norm": 0.0,
    }
    assert make_reducer({**reducer.spec(), "name": "compose"}).spec() == reducer.spec()


def test_a_scheme_that_leaves_everything_dense_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would go by nodes; for full precision use"):
        hierarchical("ddp")


def test_parameters_are_spread_over_the_ranks_of_a_node() -> None:
    """At both levels of a nested hierarchy: the inner one must not deal like the outer."""

    def body(comm: ThreadComm) -> list[int]:
        outer = placement(comm, 2, None)
        inner = placement(outer.inter, 2, None)
        names = [f"layers.{i}.weight" for i in range(400)]
        mine = [name for name in names if server_of(name, outer) == outer.intra.rank]
        return [len(mine), sum(server_of(name, inner) == inner.intra.rank for name in mine)]

    for outer, inner in run_threads(body, 8):
        assert abs(outer - 200) < 50  # 5 standard deviations
        assert abs(inner - 100) < 45


def test_hierarchies_nest() -> None:
    """Two ranks to a node, two nodes to a site, two sites."""

    def make() -> Reducer:
        sites = Hierarchical(PowerSGD(2, 0.0), ErrorFeedback(), local_size=2)
        return Reducer(Hierarchical(sites, local_size=2), policy=Policy(min_numel=0))

    def of_site(site: int, step: int) -> Tensors:
        nodes = [[gradients(4 * site + 2 * node + r, step) for r in range(2)] for node in range(2)]
        return node_mean([node_mean(grads) for grads in nodes])

    runs: list[Run] = run(make, 8, range(3), gradients)
    flat = run(
        lambda: Reducer(PowerSGD(2, 0.0), ErrorFeedback(), Policy(min_numel=0)),
        2,
        range(3),
        of_site,
    )
    assert all(equal(seen.outs, flat[0].outs) for seen in runs)
