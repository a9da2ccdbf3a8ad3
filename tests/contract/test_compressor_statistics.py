"""What compressors claim on average: unbiasedness, contraction, error bounds."""

from __future__ import annotations

import pytest
import torch

from .compressor_cases import CASES, CompressorCase, sample, transmit

DRAWS, SIGMAS = 400, 5


def heavy_tailed(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (sample((n,), torch.float64) ** 3).to(dtype)


def sparse(n: int) -> torch.Tensor:
    x = sample((n,))
    x[torch.arange(n) % 100 != 0] = 0
    return x


def full_range(case: CompressorCase) -> bool:
    """float16 ends at 65504, as documented; its aggregators refuse what overflows."""
    return "fp16" not in case.fields.values()


INPUTS = {
    "gaussian": sample((4000,)),
    "heavy_tailed": heavy_tailed(4000),
    "sparse": sparse(4000),
    "constant": torch.full((4000,), -0.3),
    "tiny": sample((4000,)) * 2.0**-100,
    "huge": sample((4000,)) * 2.0**100,
}


@pytest.mark.parametrize("case", [c for c in CASES if c.unbiased], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "heavy_tailed", "sparse"])
def test_unbiased(case: CompressorCase, kind: str) -> None:
    x = INPUTS[kind][:257].double()
    compressor = case.build()
    draws = torch.stack(
        [transmit(compressor, x.float(), salt=i, step=i).double() for i in range(DRAWS)]
    )
    error = draws.mean(0) - x
    deviation = draws.std(0) / DRAWS**0.5
    # The spread of an element that changed in fewer draws than this is not known well enough.
    known = (draws != draws.mode(0).values).sum(0) >= 25
    assert bool((error[known].abs() <= SIGMAS * deviation[known]).all())
    # Shrinking or growing of all elements together, small ones included.
    drift = (error * torch.sign(x)).sum().abs()
    assert float(drift) <= SIGMAS * float(deviation.square().sum().sqrt()) + 1e-6 * x.abs().sum()


@pytest.mark.parametrize("case", [c for c in CASES if c.salted], ids=str)
def test_ranks_round_independently(case: CompressorCase) -> None:
    """Errors of two ranks on the same input are uncorrelated, so the mean's variance falls as 1/W."""
    x = sample((20_000,))
    compressor = case.build()
    target = torch.stack([transmit(compressor, x, salt=s, step=s) for s in range(50)]).mean(0)
    errors = torch.stack([transmit(compressor, x, salt=s).sub(target) for s in range(6)])
    correlation = torch.corrcoef(errors) - torch.eye(6)
    # 1/50 of common error comes from the estimate of the target itself
    assert correlation.abs().max() < 1 / 50 + SIGMAS / x.numel() ** 0.5


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{kind}-{case}")
        for case in CASES
        for kind in sorted(INPUTS)
        if case.contraction and (full_range(case) or kind not in ("tiny", "huge"))
    ],
)
def test_contraction(case: CompressorCase, kind: str) -> None:
    x = INPUTS[kind]
    bound = case.contraction(x.double())
    left = torch.stack(
        [(x.double() - transmit(case.build(), x, step=step)).square().sum() for step in range(20)]
    )
    share = left / x.double().square().sum()
    spread = 0.0 if torch.equal(left[1:], left[:-1]) else SIGMAS * float(share.std()) / 20**0.5
    # float32 rounding of scale and values
    assert float(share.mean()) <= bound + spread + 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if c.error is not None], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "heavy_tailed", "sparse", "constant"])
def test_error_of_every_element_is_bounded(case: CompressorCase, kind: str) -> None:
    x = INPUTS[kind]
    error = (transmit(case.build(), x, salt=1) - x).abs()
    assert float(error.max()) <= case.error * float(x.abs().max())


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("case", [c for c in CASES if full_range(c)], ids=str)
def test_scaling_the_input_scales_the_output(case: CompressorCase, exponent: int) -> None:
    """No absolute threshold hides in a compressor; 2^+-100 are about 1e30 and 1e-30."""
    x = sample((4000,))
    expected = transmit(case.build(), x)
    decoded = transmit(case.build(), x * 2.0**exponent) * 2.0 ** -(exponent * case.magnitudes)
    # powers of two are exact; float32 sums inside a scale may round differently
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=0)
