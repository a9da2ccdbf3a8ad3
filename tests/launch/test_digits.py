import json
import sys
from itertools import chain, islice

import pytest
import torch

from commkit.config import validate
from launch.rundir import read_records
from launch.settings import TrainSettings

pytest.importorskip("sklearn")

from launch.digits import DigitsTask, build, images_and_labels, load_rows
from launch.tasks import make_task

TASK = {"task": "digits", "batch__per_rank": "16", "schedule__length": "200"}


def settings(**fields):
    data = {"task": "digits", "scheme": {"name": "ddp"}, **fields}
    return validate(TrainSettings, data, "test.yaml")


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def test_split_is_the_same_always_and_nobody_is_on_both_sides():
    train, validation = load_rows()
    assert (len(train), len(validation)) == (1438, 359)
    assert all(torch.equal(*pair) for pair in zip(load_rows(), (train, validation), strict=True))
    for side in (train, validation):  # about a tenth each
        counts = images_and_labels(side)[1].bincount(minlength=10)
        assert (counts > 0.06 * len(side)).all()
    assert not {bytes(row) for row in train.numpy()} & {bytes(row) for row in validation.numpy()}


def test_images_are_between_black_and_white():
    images, labels = images_and_labels(load_rows()[0])
    assert images.shape[1:] == (1, 8, 8)
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_do_not_depend_on_the_world_size(world_size):
    def batches(size, rank):
        task = DigitsTask(settings(batch={"per_rank": 8 // size}, seed=3))
        return list(islice(iter(task.loader(rank, size)), 4))

    parts = zip(*(batches(world_size, rank) for rank in range(world_size)), strict=True)
    for together, alone in zip(map(torch.cat, parts), batches(1, 0), strict=True):
        assert torch.equal(together, alone)


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_share_the_validation_images(world_size):
    task = DigitsTask(settings())
    share = chain.from_iterable(task.validation(rank, world_size) for rank in range(world_size))
    found = torch.cat(list(share))
    assert sorted(found.tolist()) == sorted(task.validation_rows.tolist())


def test_building_is_reproducible_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first, second = (build(settings().digits, 1).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())


def test_measure_is_the_loss_and_the_share_of_right_answers():
    task = DigitsTask(settings())
    rows = task.validation_rows[:10]

    class Oracle(torch.nn.Module):
        def forward(self, images):
            scores = torch.nn.functional.one_hot(images_and_labels(rows)[1], 10) * 50.0
            scores[0] = scores[0].roll(1)  # one of ten is wrong
            return scores

    loss, accuracy = task.measure(Oracle(), rows).tolist()
    assert accuracy == pytest.approx(0.9)
    assert loss == pytest.approx(5.0)  # 50 nats for that one, 0 for the others


def test_task_brings_its_own_defaults_and_recipes_go_before_them():
    plain, given = settings(), settings(optim={"lr": 0.01})
    assert (plain.optim.name, plain.optim.lr, plain.batch.per_rank) == ("sgd", 0.05, 32)
    assert (given.optim.name, given.optim.lr) == ("sgd", 0.01)
    again = validate(TrainSettings, given.model_dump(mode="json"), "again")
    assert again == given
    text = validate(TrainSettings, {"scheme": {"name": "ddp"}}, "test.yaml")
    assert (text.task, text.optim.name) == ("gpt", "adamw")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"task: got 'digits'.*pip install 'commkit\[digits\]'"):
        make_task(settings())


def test_one_process_learns_more_than_nine_in_ten(launcher, tmp_path):
    launcher.run("ddp", tmp_path, "--steps", 200, ranks=1, **TASK)
    summary = summary_of(tmp_path)
    assert summary["task"] == "digits"
    assert summary["val_accuracy"] > 0.9
    assert summary["val_loss"] < 0.5
    assert read_records(tmp_path / "metrics.jsonl")[-1]["tokens"] == 200 * 16


@pytest.fixture(scope="module")
def unbroken(launcher, tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    launcher.run("powersgd", out, "--steps", 60, eval__every="20", **TASK)
    return out


@pytest.mark.timeout(180)
def test_two_processes_learn_with_compression(unbroken):
    summary = summary_of(unbroken)
    records = read_records(unbroken / "metrics.jsonl")
    assert summary["val_accuracy"] > 0.8
    assert summary["buffer_bytes"] == 4 * 2 * (32 + 64 + 128) + 3 * 8
    assert all(0 < record["payload_bytes"] < record["dense_bytes"] / 2 for record in records)
    curve = read_records(unbroken / "validation.jsonl")
    assert [point["step"] for point in curve] == [20, 40, 60]
    assert curve[-1]["val_accuracy"] == summary["val_accuracy"]


@pytest.mark.timeout(240)
def test_resuming_changes_no_bit(launcher, unbroken, tmp_path):
    launcher.run("powersgd", tmp_path, "--steps", 25, eval__every="20", **TASK)
    launcher.run("powersgd", tmp_path, "--steps", 60, "--resume", eval__every="20", **TASK)
    for file in ("metrics.jsonl", "validation.jsonl"):
        resumed, whole = (read_records(out / file) for out in (tmp_path, unbroken))
        for name in ("step", "loss", "residual_norm", "val_loss", "val_accuracy"):
            assert [r.get(name) for r in resumed] == [r.get(name) for r in whole]
