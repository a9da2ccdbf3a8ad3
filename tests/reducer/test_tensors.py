"""What a Reducer accepts: dtypes side by side, views of one buffer, any layout, nothing at all."""

from __future__ import annotations

import pytest
import torch

from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.schemes import make_reducer
from commkit.sim import ThreadComm

from .inputs import Tensors, on_ranks, sample

BLOCKS = [
    {"name": "ddp"},
    {"name": "bf16"},
    {"name": "topk", "density": 0.1, "min_numel": 0},
    {"name": "randomk", "density": 0.1, "min_numel": 0},
    {"name": "powersgd", "rank": 1, "min_compression_rate": 0.0},
    {"name": "sign", "min_numel": 0},
    {"name": "int8", "min_numel": 0},
]
every_scheme = pytest.mark.parametrize("block", BLOCKS, ids=[str(b["name"]) for b in BLOCKS])
DTYPES = {"single": torch.float32, "brain": torch.bfloat16, "half": torch.float16}


@every_scheme
def test_half_precision_gradients(block) -> None:
    """Arithmetic and residuals are float32, results have the gradient's dtype."""

    def body(reducer: Reducer, comm: ThreadComm) -> list[Tensors]:
        outs = []
        for step in range(3):
            named = {
                key: sample((20, 30), 10 * step + comm.rank, dtype) for key, dtype in DTYPES.items()
            }
            outs.append({k: x.clone() for k, x in reducer.reduce(named, comm).items()})
            reducer.end_step()
        for key, value in reducer.state_dict().items():
            assert key == "shared/step" or value.dtype == torch.float32, key
        return outs

    ranks = on_ranks(2, lambda: make_reducer(block), body)
    for first, second in zip(*ranks, strict=True):
        for key, dtype in DTYPES.items():
            assert first[key].dtype == dtype
            assert torch.equal(first[key], second[key])


@every_scheme
def test_float64_beside_float32(block) -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        named = {
            "single": sample((20, 30), comm.rank),
            "double": sample((20, 30), comm.rank, torch.float64),
        }
        outs = reducer.reduce(named, comm)
        assert {key: x.dtype for key, x in outs.items()} == {
            "single": torch.float32,
            "double": torch.float64,
        }

    on_ranks(2, lambda: make_reducer(block), body)


def test_integers_are_left_to_the_dense_path_or_refused() -> None:
    """Never silently truncated: a mean of integers is not an integer."""

    def body(reducer: Reducer, comm: ThreadComm) -> float:
        out = reducer.reduce({"count": torch.tensor([comm.rank])}, comm)["count"]
        return float(out)

    try:
        results = on_ranks(2, lambda: make_reducer("topk"), body)
    except (TypeError, RuntimeError):
        return
    assert results == [0.5, 0.5]


def test_half_precision_sums_do_not_overflow() -> None:
    """Each rank's value fits float16 and so does the mean, but not the sum."""

    def body(reducer: Reducer, comm: ThreadComm) -> torch.Tensor:
        return reducer.reduce({"w": torch.full((10,), 6e4, dtype=torch.float16)}, comm)["w"]

    for name in ("ddp", "fp16"):
        for out in on_ranks(3, lambda n=name: make_reducer(n), body):
            torch.testing.assert_close(out.float(), torch.full((10,), 6e4), rtol=2**-9, atol=0)


def test_a_result_that_overflows_is_not_counted_as_sent() -> None:
    """Gradient and residual together may leave float16. A scaler then skips the step, and what was sent
    would be lost: the result is finite, or the step is given up."""

    def body(reducer: Reducer, comm: ThreadComm) -> None:
        for _ in range(2):
            before = reducer.state_dict().get("rank/w")
            out = reducer.reduce({"w": torch.full((10,), 4e4, dtype=torch.float16)}, comm)["w"]
            stats = reducer.end_step()
            if not out.isfinite().all():
                assert stats.nonfinite
                assert torch.equal(reducer.state_dict()["rank/w"], before)

    block = {"name": "topk", "density": 0.5, "min_numel": 0}
    on_ranks(2, lambda: make_reducer(block), body)


def test_adjacent_views_are_reduced_in_place() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        flat = sample((50,), comm.rank)
        named = {"a": flat[:20].view(4, 5), "b": flat[20:21].view(()), "c": flat[21:]}
        outs = reducer.reduce(named, comm)
        for key, view in named.items():
            assert outs[key].data_ptr() == view.data_ptr(), key
            assert outs[key].shape == view.shape
        mean = (sample((50,), 0) + sample((50,), 1)) / 2
        torch.testing.assert_close(flat, mean)
        assert comm.bytes.rounds == 1

    on_ranks(2, lambda: make_reducer("ddp"), body)


@pytest.mark.parametrize("order", ["swapped", "gap", "overlap of storage", "strided"])
def test_views_that_are_not_adjacent_are_not_mixed_up(order: str) -> None:
    def views(flat: torch.Tensor) -> Tensors:
        return {
            "swapped": {"a": flat[10:20], "b": flat[:10]},
            "gap": {"a": flat[:10], "b": flat[11:21]},
            "overlap of storage": {"a": flat[:10], "b": sample((10,), 5)},
            "strided": {"a": flat[:20:2], "b": flat[20:40].view(4, 5).t()},
        }[order]

    def body(reducer: Reducer, comm: ThreadComm) -> None:
        outs = reducer.reduce(views(sample((50,), comm.rank)), comm)
        both = [views(sample((50,), rank)) for rank in range(2)]
        for key, out in outs.items():
            torch.testing.assert_close(out, (both[0][key] + both[1][key]) / 2)

    on_ranks(2, lambda: make_reducer("ddp"), body)


def test_bytes_outside_the_views_are_not_touched() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        flat = sample((50,), comm.rank)
        reducer.reduce({"a": flat[5:15], "b": flat[15:30]}, comm)
        assert torch.equal(flat[:5], sample((50,), comm.rank)[:5])
        assert torch.equal(flat[30:], sample((50,), comm.rank)[30:])

    on_ranks(2, lambda: make_reducer("ddp"), body)


@every_scheme
def test_memory_layout_does_not_matter(block) -> None:
    """channels_last and transposed gradients give what contiguous ones do."""

    def run(contiguous: bool) -> Tensors:
        def body(reducer: Reducer, comm: ThreadComm) -> Tensors:
            outs: Tensors = {}
            for step in range(2):
                named = {
                    "conv": sample((8, 4, 3, 3), step * 2 + comm.rank).to(
                        memory_format=torch.channels_last
                    ),
                    "linear": sample((30, 20), step * 2 + comm.rank).t(),
                }
                if contiguous:
                    named = {key: x.contiguous() for key, x in named.items()}
                outs = {key: x.clone() for key, x in reducer.reduce(named, comm).items()}
                reducer.end_step()
            return outs

        return on_ranks(2, lambda: make_reducer(block), body)[0]

    plain, odd = run(True), run(False)
    for key, expected in plain.items():
        # sums of magnitudes and matrix products may be taken in another order
        torch.testing.assert_close(odd[key], expected, rtol=1e-4, atol=1e-5)


@every_scheme
def test_nothing_to_reduce(block) -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        assert reducer.reduce({}, comm) == {}
        empty = torch.zeros(0, 3)
        assert reducer.reduce({"empty": empty}, comm)["empty"].shape == (0, 3)
        reducer.end_step()

    on_ranks(2, lambda: make_reducer(block), body)


def test_excluded_tensors_are_averaged_exactly() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        reducer.policy = Policy(min_numel=0, exclude=["*embed*"])
        named = {"tok_embed": sample((20, 30), comm.rank), "w": sample((20, 30), comm.rank + 5)}
        outs = reducer.reduce(named, comm)
        halves = [sample((20, 30), rank) / 2 for rank in range(2)]
        assert torch.equal(outs["tok_embed"], halves[0] + halves[1])
        reducer.end_step()
        assert reducer.feedback.holds("w")
        assert not reducer.feedback.holds("tok_embed")

    on_ranks(2, lambda: make_reducer("topk"), body)
