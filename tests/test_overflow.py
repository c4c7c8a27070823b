"""Large numbers: finite results are right, however large; what overflows is NaN or infinite, never finite and wrong.

transformers' own norm overflows in float32, so the reference is float64, where nothing here overflows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_lora, relative_error, tiny_config
from test_delta import leaves
from torch import Tensor

import qwen_functional.forward
import qwen_functional.plan as plan_module
from lora_delta import DifferentiableDeltaCompute
from lora_delta.embedded import embedded_checkpoint
from qwen_functional import LoraSpec, init_weights, load_pretrained, pack
from qwen_functional.ops.rmsnorm import rmsnorm, rmsnorm_to, rmsnorm_vjp

EPS = 1e-6
LARGE = [1e8, 1e12, 1e15, 1e18, 1e19, 1e25, 1e37, 3.4e38]


def formula(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return x * rstd * weight, rstd


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- The norm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [7, 64, 896])
@pytest.mark.parametrize("largest", LARGE)
def test_a_norm_of_large_numbers_and_its_vjp_equal_those_in_float64(largest: float, width: int) -> None:
    x = (drawn(0, 3, width).double().clamp(-3, 3) / 3 * largest).float()
    weight, dy = drawn(1, width), drawn(2, 3, width)
    exact = x.double().requires_grad_()
    y, rstd = formula(exact, weight.double())
    (dx,) = torch.autograd.grad(y, exact, dy.double())
    ours = x.clone().requires_grad_()
    tracked, rstd_tracked = rmsnorm(ours, weight, EPS)
    fast, rstd_fast = rmsnorm_to(x, weight, EPS, torch.float32)
    assert relative_error(tracked, y) < 1e-6
    assert relative_error(fast, y) < 1e-6
    for one in (rstd_tracked, rstd_fast):
        assert relative_error(one.double() * largest, rstd * largest) < 1e-6
    assert relative_error(torch.autograd.grad(tracked, ours, dy)[0].double() * largest, dx * largest) < 1e-6
    assert relative_error(rmsnorm_vjp(dy, x, weight, rstd_fast).double() * largest, dx * largest) < 1e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 300), st.floats(-12, 14))
def test_a_norm_of_other_numbers_has_the_bits_of_its_formula(seed: int, width: int, exponent: float) -> None:
    """Even next to a row that overflows, for realistic and far larger magnitudes."""
    x, weight, dy = drawn(seed, 4, width), drawn(seed + 1, width), drawn(seed + 2, 4, width)
    x *= 10 ** (exponent + drawn(seed + 3, 4, 1).clamp(-1, 1))
    beside = torch.cat((x, torch.full((1, width), 1e30)))
    y, rstd = formula(x, weight)
    for got, expected in zip(rmsnorm(beside, weight, EPS), (y, rstd), strict=True):
        assert torch.equal(got[:4], expected)
    fast, rstd = rmsnorm_to(x, weight, EPS, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    assert torch.equal(rstd, (norm.square() / width + EPS).rsqrt())
    assert torch.equal(fast, x * rstd * weight)
    for got, expected in zip(rmsnorm_to(beside, weight, EPS, torch.float32), (fast, rstd), strict=True):
        assert torch.equal(got[:4], expected)
    g = dy * weight
    expected = g.addcmul(x, -(rstd.square() * (g * x).mean(-1, keepdim=True))) * rstd
    assert torch.equal(rmsnorm_vjp(dy, x, weight, rstd), expected)
    both = torch.cat((dy, dy[:1])), beside, weight, rmsnorm_to(beside, weight, EPS, torch.float32)[1]
    assert torch.equal(rmsnorm_vjp(*both)[:4], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_norm_of_what_is_not_finite_is_not_finite(bad: float) -> None:
    x, weight = drawn(0, 2, 8), drawn(1, 8)
    x[0, 3] = bad
    for y, rstd in (rmsnorm(x, weight, EPS), rmsnorm_to(x, weight, EPS, torch.float32)):
        assert y[0, 3].isnan()
        assert y[1].isfinite().all()
        assert not rmsnorm_vjp(torch.ones(2, 8), x, weight, rstd)[0].isfinite().any()


# --- The engine -------------------------------------------------------------------------------------------


def delta_and_gradients(dtype: torch.dtype, std: float, **options: Any) -> tuple[Tensor, list[Tensor]]:
    delta = DifferentiableDeltaCompute.from_pretrained(embedded_checkpoint(), dtype=dtype, device="cpu", **options)
    generator = torch.Generator().manual_seed(0)
    tensors = leaves(
        {n: (std * torch.randn(2, *s, generator=generator)).to(dtype) for n, s in delta.lora_shapes.items()}
    )
    value = delta(tensors)
    return value, list(torch.autograd.grad(value.square().sum(), list(tensors.values())))


@pytest.mark.parametrize("options", [{}, {"checkpoint": "block"}, {"prepack": False, "adapters_per_pass": 1}], ids=str)
@pytest.mark.parametrize("std", [500.0, 1e5])
def test_a_delta_of_large_adapters_equals_that_in_float64(std: float, options: dict[str, Any]) -> None:
    expected, wanted = delta_and_gradients(torch.float64, std)
    value, gradients = delta_and_gradients(torch.float32, std, **options)
    assert relative_error(value, expected) < 1e-5
    assert sum(bool(gradient.any()) for gradient in wanted) > len(wanted) // 2
    for gradient, want in zip(gradients, wanted, strict=True):
        assert gradient.isfinite().all()
        assert (gradient - want).norm() <= 1e-4 * want.norm()


def test_a_delta_of_adapters_that_overflow_is_not_finite() -> None:
    value, gradients = delta_and_gradients(torch.float32, 1e8)
    assert not value.isfinite().all(-1).any()
    assert not any(gradient.isfinite().all() for gradient in gradients)


def test_a_forward_with_large_adapters_equals_that_in_float64() -> None:
    found: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = {}
    for dtype in (torch.float32, torch.float64):
        config, weights = load_pretrained(embedded_checkpoint(), dtype=dtype)
        spec = LoraSpec()
        tensors = leaves({n: 5e3 * t for n, t in random_lora(config, spec, 2, dtype=torch.float32).items()})
        ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
        lora = spec.bind(config, {name: tensor.to(dtype) for name, tensor in tensors.items()})
        last = qwen_functional.forward.forward(config, weights, ids, lora=lora).last_hidden_state[:, -1]
        found[dtype] = last, list(torch.autograd.grad(last.square().sum(), list(tensors.values())))
    (value, gradients), (expected, wanted) = found.values()
    assert relative_error(value, expected) < 1e-5
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_the_backends_values_and_gradients_of_large_adapters_equal_those_in_float64(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:
        pytest.importorskip("triton")
    from qwen_functional.backends.cuda import Cuda
    from qwen_functional.backends.plain import Plain

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Not q and k: for scores that large, float32 has too few digits to tell keys apart.
    spec = LoraSpec(rank=3, target_modules=("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    config, tokens = tiny_config(num_hidden_layers=2), pack([[5, 6, 7, 8], [5, 6, 20]])
    tensors = {n: 1e6 * t.float() for n, t in random_lora(config, spec, 2, device=device).items()}
    results = []
    for dtype in (torch.float64, torch.float32):
        backend = Cuda() if fused and dtype == torch.float32 else Plain()
        monkeypatch.setattr(plan_module, "choose", lambda *_, backend=backend: backend)
        weights = init_weights(config, dtype=dtype, device=device)
        lora = spec.bind(config, {name: tensor.to(dtype) for name, tensor in tensors.items()})
        value, vjp = qwen_functional.forward.forward_vjp(config, weights, tokens, lora, layer=(0, -1))
        largest = value[:, 0].abs().max()
        cotangent = torch.stack((torch.zeros_like(value[:, 0]), torch.ones_like(value[:, 1])), 1)
        results.append((value[:, 1], vjp(cotangent)))
        assert 1e21 < largest < 1e38  # after the first block: squares overflow, nothing else does
    (expected, wanted), (got, gradients) = results
    assert relative_error(got, expected) < 1e-5
    for name, want in wanted.items():
        assert (gradients[name] - want).norm() <= 1e-4 * want.norm(), name
