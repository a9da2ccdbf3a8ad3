"""The CUDA kernels on a GPU: the same bits as the reference has on a CPU, on the current stream, in order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commkit import ops
from commkit.ops import native, reference

from .test_cuda_emulated import CASES, LENGTHS
from .test_native import BLOCK, DTYPES, assert_same, codes, finite, values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not native.served("cuda"), reason=f"CUDA kernels: {native.status()['CUDA library']}"
    ),
]

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda")
MORE = (10**6 + 3, 10**7 + 3)
# What the kernels serve: float64 is the reference's, whose division is not a CPU's to the last bit.
SERVED = [name for name in CASES if "float64" not in name]


def moved(x: Any, device: torch.device) -> Any:
    """Tensors moved, as far from a vector's boundary as they were."""
    if isinstance(x, torch.device):
        return device
    if isinstance(x, list | tuple):
        return type(x)(moved(each, device) for each in x)
    if not isinstance(x, torch.Tensor):
        return x
    at = x.storage_offset() % 16
    memory = torch.empty(x.numel() + at, dtype=x.dtype, device=device)
    return memory[at:].view(x.shape).copy_(x)


def listed(x: Any) -> list[torch.Tensor]:
    """The tensors of an argument."""
    parts = x if isinstance(x, list | tuple) else [x]
    return [part for part in parts if isinstance(part, torch.Tensor)]


class Elsewhere:
    """The operators of ``ops``, run on another device and brought back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            there = [moved(x, self._device) for x in arguments]
            result = getattr(torch.ops.commkit, name)(*there)
            if name.endswith("_"):
                for here, x in zip(arguments, there, strict=True):
                    for own, result_there in zip(listed(here), listed(x), strict=True):
                        own.copy_(result_there)
            return moved(result, torch.device("cpu"))

        return call


@pytest.mark.parametrize("name", SERVED)
def test_same_bits_as_the_reference(name: str) -> None:
    for n in (*LENGTHS, MORE[0]):
        call = CASES[name](n)
        assert_same(call(Elsewhere(GPU)), call(reference))


@pytest.mark.parametrize("name", ["pack_signs torch.float32", "pack_ternary", "pack_nibbles"])
def test_packing_ten_million(name: str) -> None:
    call = CASES[name](MORE[1])
    assert_same(call(Elsewhere(GPU)), call(reference))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_sampled_threshold_is_the_references(dtype: torch.dtype) -> None:
    for n in (1, 31, 4097, MORE[0], MORE[1]):
        for k in {1, max(1, n // 100), n}:
            x = values(n, dtype)
            got = Elsewhere(GPU).sample_threshold(x, k, n + k)
            assert_same(got.nan_to_num(-1), reference.sample_threshold(x, k, n + k).nan_to_num(-1))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("make", [values, lambda n, dtype: codes(n, 3).to(dtype)])
def test_the_largest_of_rows_are_the_references(make: Any, dtype: torch.dtype) -> None:
    for rows, n in ((1, 1), (3, 7), (500, 64), (70, 4096), (2, 100_000)):
        for k in {1, n // 2 + 1, n}:
            x = make(rows * n, dtype).view(rows, n)
            assert_same(Elsewhere(GPU).largest_of_rows(x, k), reference.largest_of_rows(x, k))


@pytest.mark.parametrize("n", [0, 1, 7, 1000, 4097, *MORE])
def test_the_mean_size_is_as_near_as_the_references(n: int) -> None:
    x = finite(n)
    exact = float(x.double().abs().mean()) if n else 0.0
    wanted = float(reference.encode_signs(x)[1])
    got = [float(Elsewhere(GPU).encode_signs(x)[1]) for _ in range(3)]
    assert len(set(got)) == 1, "one result, whatever order the blocks run in"
    assert abs(got[0] - exact) <= max(2 * abs(wanted - exact), abs(exact) * 2**-24)


def in_line(x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    """Operators that do not wait for the GPU, each on the results of the one before."""
    bits, size = ops.encode_signs(x)
    ops.accumulate_signs_(out, [bits], -size)
    packed, scales = ops.quantize_blocks(out, 8, BLOCK, True, 3)
    ops.accumulate_blocks_(out, [packed], [scales], 8, BLOCK, 2)
    fields = ops.pack_ternary(ops.ternarize(out, ops.sample_threshold(out, 10, 1), 7))
    u, v = torch.empty_like(x), torch.empty_like(x)
    ops.correct_momentum_(u, v, out, x, out, 0.9, True)
    return [bits, packed, scales, fields, u, v, out, ops.largest_of_rows(v.view(1, -1), 5)]


def test_work_is_done_on_the_current_stream() -> None:
    x, out = finite(MORE[0]).to(GPU), torch.zeros(MORE[0], device=GPU)
    wanted = in_line(x, out.clone())
    torch.cuda.synchronize()
    late, stream = torch.full_like(x, torch.nan), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # what runs on another stream reads NaN
        late.copy_(x)
        got = in_line(late, out.clone())
    stream.synchronize()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_nothing_waits_for_the_gpu() -> None:
    """A graph cannot be captured of what does, nor of what uses another stream."""
    x, out = finite(MORE[0]).to(GPU), torch.zeros(MORE[0], device=GPU)
    wanted = in_line(x, out.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = in_line(x, out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_is_done_where_the_tensors_are() -> None:
    other = torch.device("cuda:1")
    with torch.cuda.device(0):
        for name in ("pack_signs torch.float32", "accumulate_blocks_ 8 3", "noise"):
            call = CASES[name](5000)
            assert_same(call(Elsewhere(other)), call(reference))
        assert torch.cuda.current_device() == 0
        bits, out = ops.pack_signs(finite(5000).to("cuda:0")), torch.zeros(5000, device=other)
        with pytest.raises(ValueError, match="bits"):
            ops.write_signs_(out, [bits], torch.ones(1, device=other))


def test_mixed_devices_are_refused() -> None:
    bits = ops.pack_signs(finite(100))
    with pytest.raises(ValueError, match="bits"):
        ops.write_signs_(torch.zeros(100, device=GPU), [bits], torch.ones(1, device=GPU))


def test_strided_input_is_served_too() -> None:
    x = finite(999)
    strided = torch.stack([x, x]).t().reshape(-1).to(GPU)[::2]
    assert_same(ops.pack_signs(strided).cpu(), reference.pack_signs(x))


def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    x = torch.zeros(n, dtype=torch.bfloat16, device=GPU)
    x[-4100::2] = -1.0
    bits = ops.pack_signs(x)
    tail = n // 8 * 8 - 4096  # from a byte on
    assert torch.equal(bits[tail // 8 :].cpu(), reference.pack_signs(x[tail:].cpu()))
    assert bool((bits[: tail // 8 - 1] == 255).all())
    found = ops.select_at_least(x, torch.ones((), device=GPU))
    assert torch.equal(found, torch.arange(n - 4100, n, 2, device=GPU))
    packed, scales = ops.quantize_blocks(x, 8, BLOCK, False, 0)
    assert torch.equal(packed[-4100:].view(torch.int8), (x[-4100:] * 127).to(torch.int8))
    assert scales.numel() == -(-n // BLOCK)


def test_an_index_outside_is_an_error_of_the_gpu() -> None:
    """In a process of its own: the GPU does nothing for that one afterwards."""
    code = (
        "import torch; from commkit import ops; g = 'cuda'\n"
        "ops.scatter_accumulate_(torch.zeros(4, device=g), torch.tensor([4], device=g), torch.ones(1, device=g))\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode != 0
    assert "an index is outside of out" in done.stdout + done.stderr


@pytest.mark.parametrize(("mode", "said"), [("0", "none: COMMKIT_CUDA=0"), ("1", "loaded")])
def test_a_new_process_obeys_the_variable(
    mode: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMKIT_CUDA", mode)
    code = "from commkit.ops import native; print(native.status()['CUDA library'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == said, done.stderr


def test_every_operator_with_a_kernel_is_tried_here() -> None:
    tried = " ".join([*SERVED, "sample_threshold largest_of_rows encode_signs noise"])
    assert not {
        name for name in native.served("cuda") if name not in tried and name != "uniform_noise"
    }
