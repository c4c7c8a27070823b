"""The Triton kernels that go over logits against torch in float64. Without a GPU, they run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
from qwen_functional.backends.kernels.lm_head import divergence_, softmax_  # noqa: E402

N = 3
# A unit in the last place, not half of one: Triton's interpreter cuts bfloat16 off.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SIZES = [7, 300, 4096, 9001]  # tokens: less than a tile, several, one, and a part of one
cases = pytest.mark.parametrize(("size", "scale"), [*((size, 1.0) for size in SIZES), (300, 0.4), (9001, 3.0)])


def logits(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows amid NaN, one with a token far above the others and one with all far below zero."""
    chance = torch.Generator().manual_seed(seed)
    memory = torch.full((N + 2, size), torch.nan, dtype=dtype)
    memory[1:-1] = 3 * torch.randn(N, size, generator=chance)
    memory[1, size // 2] = 200.0
    memory[2] -= 500.0
    return memory.to(DEVICE)[1:-1]


def rounding(z: Tensor, scale: float) -> float:
    """The relative error of ``exp(z · scale)``, from that of a float32 exponent."""
    return ROUNDING[z.dtype] + 2.0**-22 * float(z.float().abs().max()) * scale


def kl(z: Tensor, t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q), and q − p, in float64."""
    log_p, log_q = ((x.double() * scale).log_softmax(-1) for x in (t, z))
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1), log_q.exp() - log_p.exp()


@cases
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_softmax_overwrites_its_logits_and_its_sum_is_torchs(size: int, scale: float, dtype: torch.dtype) -> None:
    z = logits(size, dtype)
    wide = z.double() * scale
    expected, sums, error = wide.softmax(-1), wide.logsumexp(-1), rounding(z, scale)
    most, log_sum = softmax_(z, scale)
    torch.testing.assert_close(most.double(), wide.amax(-1), rtol=1e-7, atol=0)
    torch.testing.assert_close(log_sum.double(), sums - wide.amax(-1), rtol=0, atol=error)
    torch.testing.assert_close(z.double(), expected, rtol=error, atol=1e-7)


@cases
def test_without_keeping_the_softmax_its_sum_is_the_same_and_the_logits_stay(size: int, scale: float) -> None:
    z = logits(size, torch.float32)
    before = z.clone()
    found = softmax_(z, scale, keep=False)
    assert torch.equal(z, before)
    assert all(map(torch.equal, found, softmax_(z, scale)))


@cases
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_divergence_is_torchs_and_its_gradient_overwrites_the_logits(
    size: int, scale: float, dtype: torch.dtype
) -> None:
    z, t = logits(size, dtype), logits(size, dtype, seed=1)
    before, teacher = z.clone(), t.clone()
    (losses, gradient), error = kl(z, t, scale), rounding(z, scale)
    alone = divergence_(z, t, scale, keep=False)
    assert torch.equal(z, before)
    found = divergence_(z, t, scale)
    assert torch.equal(found, alone)
    assert torch.equal(t, teacher)
    torch.testing.assert_close(found.double(), losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z.double(), gradient, rtol=error, atol=error / 100)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_a_sum_and_a_divergence_of_nan(bad: float) -> None:
    for size in (7, 9001):
        z = logits(size, torch.float32)
        z[0, -1] = bad
        losses = divergence_(z, logits(size, torch.float32, seed=1), keep=False)
        assert losses.isnan().tolist() == [True, False, False]
        assert softmax_(z)[1].isnan().tolist() == [True, False, False]
