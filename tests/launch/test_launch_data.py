import hashlib
import re
from itertools import chain, islice
from pathlib import Path, PurePosixPath

import pytest
import torch

from launch.data import (
    SampleOrder,
    list_stdlib,
    list_texts,
    load_corpus,
    split_by_file,
    split_by_position,
    train_loader,
    validation_batches,
)
from launch.settings import DataSettings

PATHS = [PurePosixPath(f"package{i % 7}/module{i}.py") for i in range(2000)]


def corpus_of(path, context=8, **settings):
    return load_corpus(DataSettings(path=str(path), **settings), context)


@pytest.fixture
def corpus(text):
    return corpus_of(text)


def test_every_file_is_on_exactly_one_side():
    train, validation = split_by_file(PATHS)
    assert sorted([*train, *validation]) == sorted(PATHS)
    assert not set(train) & set(validation)


def test_about_one_file_in_twenty_validates():
    _, validation = split_by_file(PATHS)
    # 2000 draws of probability 0.05 have mean 100 and standard deviation 9.7: six of them each way.
    assert 42 <= len(validation) <= 158


def test_a_file_keeps_its_side_when_others_come():
    few_train, few_validation = split_by_file(PATHS[:500])
    train, validation = split_by_file(PATHS)
    assert set(few_train) <= set(train)
    assert set(few_validation) <= set(validation)


def test_split_does_not_depend_on_the_order_of_listing():
    assert split_by_file(PATHS) == split_by_file(PATHS[::-1])


@pytest.mark.parametrize("count", range(2, 40))
def test_both_sides_get_a_file(count):
    assert all(split_by_file(PATHS[:count]))


def test_one_file_cannot_be_split_by_file():
    with pytest.raises(ValueError, match="got 1, but a split by file needs at least 2"):
        split_by_file(PATHS[:1])


def test_single_file_validates_on_its_last_twentieth(tmp_path):
    content = bytes(range(250)) * 4
    (tmp_path / "text").write_bytes(content)
    corpus = corpus_of(tmp_path / "text")
    assert bytes(corpus.train) + bytes(corpus.validation) == content
    assert corpus.validation.numel() == 50
    assert (bytes(corpus.train), bytes(corpus.validation)) == split_by_position(content)


def test_directory_gives_whole_files_to_each_side(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"<{i}>" * 10)
    corpus = corpus_of(tmp_path)
    train, validation = (
        set(re.findall(r"<\d+>", bytes(side).decode()))
        for side in (corpus.train, corpus.validation)
    )
    assert train | validation == {f"<{i}>" for i in range(60)}
    assert not train & validation


def test_hidden_and_binary_files_are_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "sub/b.md", ".git/config", "sub/.hidden"):
        (tmp_path / name).write_text("text")
    (tmp_path / "image").write_bytes(b"\x89PNG\0\0")
    assert list_texts(tmp_path) == [PurePosixPath("a.txt"), PurePosixPath("sub/b.md")]


def test_standard_library_is_the_default_and_always_the_same():
    corpus = load_corpus(DataSettings(max_megabytes=1.0), 128)
    again = load_corpus(DataSettings(max_megabytes=1.0), 128)
    assert torch.equal(corpus.train, again.train)
    assert torch.equal(corpus.validation, again.validation)
    assert corpus.digest == again.digest
    assert corpus.train.numel() == 950_000
    assert corpus.validation.numel() == 50_000


def test_standard_library_means_python_s_own_sources():
    root = Path(hashlib.__file__).parent
    paths = list_stdlib(root)
    assert PurePosixPath("hashlib.py") in paths
    unwanted = {"test", "tests", "site-packages", "dist-packages", "idlelib"}
    assert not unwanted.intersection(chain.from_iterable(path.parts for path in paths))


def test_different_texts_have_different_digests(tmp_path):
    (tmp_path / "a").write_text("a" * 1000)
    (tmp_path / "b").write_text("a" * 999 + "b")
    assert corpus_of(tmp_path / "a").digest != corpus_of(tmp_path / "b").digest


def test_missing_path_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path: '.*/nowhere' does not exist; give .* --set"):
        corpus_of(tmp_path / "nowhere")


def test_directory_without_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path: .* holds no text file; give"):
        corpus_of(tmp_path)


@pytest.mark.parametrize(
    ("size", "context", "side", "got"),
    [(0, 8, "training", 0), (100, 200, "training", 95), (100, 8, "validation", 5)],
)
def test_too_little_text_says_how_much_is_needed(tmp_path, size, context, side, got):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * size)
    with pytest.raises(ValueError, match=rf"gives {got} bytes of {side} text.* = {context + 1}"):
        corpus_of(path, context)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_order_does_not_depend_on_the_world_size(world_size):
    ranks = [
        SampleOrder(3, 10_000, 8 // world_size, rank, world_size) for rank in range(world_size)
    ]
    batches = [list(islice(iter(rank), 5)) for rank in ranks]
    together = [list(chain.from_iterable(parts)) for parts in zip(*batches, strict=True)]
    assert together == list(islice(iter(SampleOrder(3, 10_000, 8, 0, 1)), 5))
    assert {rank.position for rank in ranks} == {40}


def test_seeds_give_different_orders():
    first, second = (next(iter(SampleOrder(seed, 10_000, 8, 0, 1))) for seed in (0, 1))
    assert first != second


def test_windows_are_uniform_over_the_text():
    starts = next(iter(SampleOrder(0, 10, 10_000, 0, 1)))
    counts = torch.tensor(starts).bincount(minlength=10)
    # Chi-square with 9 degrees of freedom: one seed in 10,000 exceeds 33.7, and ours is fixed.
    assert ((counts - 1000) ** 2 / 1000).sum() < 33.7


@pytest.mark.parametrize("done", [0, 1, 7])
def test_loader_goes_on_where_its_state_was_saved(corpus, tmp_path, done):
    def loader():
        return train_loader(corpus, 8, seed=5, batch=3, rank=1, world_size=2)

    unbroken = loader()
    batches = iter(unbroken)
    for _ in range(done):
        next(batches)
    torch.save(unbroken.state_dict(), tmp_path / "state")
    expected = list(islice(batches if done else iter(unbroken), 4))

    resumed = loader()
    resumed.load_state_dict(torch.load(tmp_path / "state"))
    for batch, wanted in zip(islice(iter(resumed), 4), expected, strict=True):
        assert torch.equal(batch, wanted)
        assert batch.shape == (3, 9)
        assert batch.dtype == torch.int64


def test_loader_leaves_the_global_random_state_alone(corpus):
    before = torch.get_rng_state()
    next(iter(train_loader(corpus, 8, seed=5, batch=3, rank=0, world_size=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_pieces_of_the_training_text(corpus):
    loader = train_loader(corpus, 8, seed=0, batch=4, rank=0, world_size=1)
    content = bytes(corpus.train)
    for window in next(iter(loader)):
        assert bytes(window.tolist()) in content


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_validation_windows(corpus, world_size):
    def share(rank, world_size):
        return torch.cat(
            list(
                validation_batches(
                    corpus, 8, batches=2, batch_size=6, rank=rank, world_size=world_size
                )
            )
        ).tolist()

    together = list(chain.from_iterable(share(rank, world_size) for rank in range(world_size)))
    assert len(together) == 12
    assert sorted(together) == sorted(share(0, 1))
