import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from commkit.config import ConfigError
from launch import baselines
from launch.rundir import METRIC_KEYS, read_records
from tests.harness import run_ranks

STEPS = 6


def train(rank, world_size, scheme, bucket_cap_mb=25.0):
    """Losses, weights and the cost of the last step of a small model."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8), torch.nn.Tanh()
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = None
    if scheme:
        handle = baselines.attach(ddp, optimizer, scheme)
    data = torch.Generator().manual_seed(rank + 1)
    losses = []
    for _ in range(STEPS):
        loss = ddp(torch.randn(4, 32, generator=data)).square().mean()
        loss.backward()
        if hasattr(handle, "backward_ended"):
            handle.backward_ended()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return losses, weights, None if handle is None else handle.last_step


def test_torch_ddp_is_ddp_itself():
    plain, baseline = (run_ranks(train, 2, scheme) for scheme in (None, {"name": "torch:ddp"}))
    for (losses, weights, _), (wanted, expected, _) in zip(baseline, plain, strict=True):
        assert losses == wanted
        assert torch.equal(weights, expected)


@pytest.mark.parametrize(
    "scheme",
    [
        {"name": "torch:fp16"},
        {"name": "torch:powersgd", "rank": 2, "start_step": 3},
    ],
    ids=lambda scheme: scheme["name"],
)
def test_hooks_that_run_keep_replicas_equal_and_near_ddp(scheme):
    plain, ranks = run_ranks(train, 2, None), run_ranks(train, 2, scheme, 1000.0)
    assert torch.equal(ranks[0][1], ranks[1][1])
    assert not torch.equal(ranks[0][1], plain[0][1])
    torch.testing.assert_close(ranks[0][1], plain[0][1], atol=0.05, rtol=0)


def test_post_local_sgd_is_ddp_first_and_averages_later():
    scheme = {"name": "torch:post_local_sgd", "start_step": 3, "period": 3}
    plain, local = run_ranks(train, 2, None), run_ranks(train, 2, scheme)
    for (losses, _, _), (wanted, _, _) in zip(local, plain, strict=True):
        assert losses[:4] == wanted[:4]
        assert losses[4:] != wanted[4:]
    assert not torch.equal(local[0][1], local[1][1])  # 6 steps end between two averages


def test_cost_is_known_as_far_as_torch_tells():
    (_, weights, cost), _ = run_ranks(train, 2, {"name": "torch:fp16"})
    assert cost.dense_bytes == 4 * weights.numel()
    assert 0 < cost.exposed_comm_seconds < 5
    unknown = (cost.wire_bytes, cost.payload_bytes, cost.rounds, cost.comm_seconds)
    assert unknown == (None,) * 4


def test_commkit_s_own_schemes_are_not_touched():
    (_, _, cost), _ = run_ranks(train, 2, {"name": "powersgd", "rank": 1})
    assert 0 < cost.wire_bytes < cost.dense_bytes


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"name": "torch:powresgd"}, r"scheme\.name: .*'torch:powresgd'.*'torch:powersgd'"),
        ({"name": "torch:fp16", "rank": 2}, r"scheme torch:fp16: rank: unknown field"),
        ({"name": "torch:powersgd", "rank": 0}, r"scheme torch:powersgd: rank=0"),
        (
            {"name": "torch:powersgd", "start_step": 1},
            r"start_step=1: .*greater than or equal to 2",
        ),
    ],
)
def test_bad_baselines_are_named(scheme, message):
    with pytest.raises(ConfigError, match=message):
        baselines.check(scheme, resume=False)


def test_resuming_a_hook_with_state_is_refused():
    with pytest.raises(ValueError, match=r"--resume: torch:powersgd keeps state.*--out"):
        baselines.check({"name": "torch:powersgd"}, resume=True)
    baselines.check({"name": "torch:fp16"}, resume=True)
    baselines.check({"name": "powersgd"}, resume=True)


@pytest.mark.timeout(180)
def test_records_have_null_where_torch_does_not_count(launcher, tmp_path):
    ddp, torch_ddp = tmp_path / "ddp", tmp_path / "torch"
    launcher.run("ddp", ddp, "--steps", STEPS)
    launcher.run("ddp", torch_ddp, "--steps", STEPS, scheme="{name: 'torch:ddp'}")
    records = read_records(torch_ddp / "metrics.jsonl")
    losses = [record["loss"] for record in read_records(ddp / "metrics.jsonl")]
    assert [record["loss"] for record in records] == losses
    for record in records:
        assert tuple(record) == METRIC_KEYS
        assert record["wire_bytes"] is record["residual_norm"] is None
        assert 0 < record["exposed_comm_seconds"] < record["step_seconds"]
        both = record["compute_seconds"] + record["exposed_comm_seconds"]
        assert math.isclose(both, record["step_seconds"])
