"""Losses on deltas against torch.nn.functional."""

from __future__ import annotations

import math

import pytest
import torch
from loss_case import randn, relative
from torch import Tensor
from torch.nn import functional as F

from lora_delta.delta_losses import adapters_delta_loss, delta_cosine, delta_loss, delta_mse

NAN = math.nan


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 2, 3, 6)])
def test_the_loss_of_a_delta_is_that_of_its_formula(shape: tuple[int, ...]) -> None:
    delta, target = randn(*shape), randn(*shape, seed=1)
    cosine = 1 - F.cosine_similarity(delta, target, dim=-1).mean()
    relative_mse = ((delta - target).norm(dim=-1) / target.norm(dim=-1)).square().mean()
    torch.testing.assert_close(delta_mse(delta, target), F.mse_loss(delta, target), rtol=1e-12, atol=0)
    torch.testing.assert_close(delta_mse(delta, target, normalize=True), relative_mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(delta_cosine(delta, target), cosine, rtol=1e-12, atol=0)
    both = delta_loss(delta, target, mse_weight=0.5, cosine_weight=3, normalize=True)
    torch.testing.assert_close(both, 0.5 * relative_mse + 3 * cosine, rtol=1e-12, atol=0)
    assert delta_loss(delta, target, cosine_weight=0) == delta_mse(delta, target)
    assert delta_loss(delta, target, mse_weight=0) == delta_cosine(delta, target)


def test_the_cosine_of_nearly_equal_deltas_survives_rounding() -> None:
    delta, noise = randn(896, dtype=torch.float32), 1e-5 * randn(896, seed=1, dtype=torch.float32)
    exact = 1 - F.cosine_similarity(delta.double(), (delta + noise).double(), dim=0)
    assert 1e-12 < exact < 1e-9
    assert relative(delta_cosine(delta, delta + noise), exact) < 1e-2  # 1 − cos in float32 is off by 6e-8
    assert delta_cosine(delta, delta) == 0


@pytest.mark.parametrize("zero", ["delta", "target", "both"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_delta_or_a_target_of_zero_has_a_finite_gradient(zero: str, dtype: torch.dtype) -> None:
    delta, target = randn(2, 6).to(dtype), randn(2, 6, seed=1).to(dtype)
    delta[0] *= zero == "target"
    target[0] *= zero == "delta"
    leaves = delta.requires_grad_(), target.requires_grad_()
    cosine = delta_cosine(*leaves)
    kept = 1 - F.cosine_similarity(delta[1].double(), target[1].double(), dim=0)
    assert relative(cosine, (1 + kept) / 2) < 1e-5
    for gradient in torch.autograd.grad(cosine, leaves):
        assert not gradient[0].any()
        assert gradient[1].any()
    loss = delta_mse(*leaves, normalize=True)
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("length", [1e30, 1e18, 1.2e-19])
def test_a_cosine_does_not_depend_on_lengths_whose_squares_float32_lacks(length: float) -> None:
    delta, target = (F.normalize(randn(3, 6, seed=seed), dim=-1) for seed in (0, 1))
    expected = 1 - F.cosine_similarity(delta, target, dim=-1).mean()
    long, other = ((length * v).float().requires_grad_() for v in (delta, target))
    loss = delta_cosine(long, other)
    assert relative(loss, expected) < 1e-5
    leaf = delta.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(1 - F.cosine_similarity(leaf, target, dim=-1).mean(), leaf)
    (gradient,) = torch.autograd.grad(loss, long)
    torch.testing.assert_close(gradient.double() * length, wanted, rtol=1e-4, atol=1e-6)


def test_a_vector_shorter_than_the_root_of_the_smallest_number_has_no_angle() -> None:
    delta, target = F.normalize(randn(2, 6), dim=-1).float(), randn(2, 6, seed=1).float()
    shortest = torch.finfo(torch.float32).tiny ** 0.5
    for short, other in ((delta, target), (target, delta)):
        assert delta_cosine(0.9 * shortest * short / short.norm(dim=-1, keepdim=True), other) == 1
        assert delta_cosine(1.1 * shortest * short / short.norm(dim=-1, keepdim=True), other) != 1


def test_nan_in_a_delta_or_a_target_shows_in_every_loss() -> None:
    delta, spoilt = randn(2, 6), randn(2, 6, seed=1)
    spoilt[1, 3] = NAN
    for loss in (delta_mse, delta_cosine):
        assert loss(delta, spoilt).isnan()
        assert loss(spoilt, delta).isnan()


OWN = torch.tensor([2, 0, 0, 2, 1, 2])  # whose vector each one is


def test_the_loss_of_adapters_with_unequally_many_vectors_is_that_of_its_formula() -> None:
    deltas, targets = randn(2, 6, 4), randn(2, 6, 4, seed=1)
    targets[1, OWN == 0] = 0  # an adapter whose targets in a layer are all zero
    expected = []
    for adapter in range(3):
        layers = []
        for d, t in zip(deltas[:, adapter == OWN], targets[:, adapter == OWN], strict=True):
            error, scale = (d - t).square().sum(), t.square().sum() if t.any() else t.numel()
            layers.append(0.7 * error / scale + 1.3 * (1 - F.cosine_similarity(d, t, dim=-1)).mean())
        expected.append(torch.stack(layers).mean())
    loss = adapters_delta_loss(deltas, targets, OWN, 3, mse_weight=0.7, cosine_weight=1.3)
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-12, atol=0)


def test_a_square_of_weight_zero_is_not_computed() -> None:
    deltas, targets = 1e25 * randn(2, 6, 4).float(), 1e25 * randn(2, 6, 4, seed=1).float()  # their squares overflow
    assert adapters_delta_loss(deltas, targets, OWN, 3, mse_weight=0).isfinite().all()
    assert delta_loss(deltas, targets, mse_weight=0).isfinite()


@pytest.mark.parametrize(
    ("shape", "own", "found"),
    [((6, 4), OWN, r"\(6, 4\) and adapters \(6,\)"), ((2, 6, 4), OWN[:5], r"\(2, 6, 4\) and adapters \(5,\)"),
     ((2, 6, 4), OWN[None], r"\(2, 6, 4\) and adapters \(1, 6\)")],
)  # fmt: skip
def test_vectors_and_adapters_of_other_shapes_are_refused(shape: tuple[int, ...], own: Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=rf"deltas have shape {found}, expected \(layers, V, H\) and \(V,\)"):
        adapters_delta_loss(randn(*shape), randn(*shape, seed=1), own, 3)
