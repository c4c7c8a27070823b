"""Losses against their plain formulas: explicit weight updates, torch.nn.functional, finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_case import Q_A, Q_B, UP_A, UP_B, adapter, randn, relative, updates
from torch import Tensor
from torch.nn import functional as F

from lora_delta.delta_losses import delta_cosine, delta_loss, delta_mse
from lora_delta.generate.losses import product_l2, product_mse, tensors_l1, tensors_l2, tensors_mse, tokens_mse
from qwen_functional import LoraSpec

NAN = math.nan


def test_a_loss_of_half_precision_is_computed_in_float32() -> None:
    delta, target = (300 * randn(4, 64, seed=seed) for seed in (0, 1))  # their squares overflow float16
    for loss in (delta_mse, delta_cosine, tokens_mse):
        value = loss(delta.half(), target.half())
        assert value.dtype == torch.float32
        assert relative(value, loss(delta, target)) < 1e-3


def masked(*shape: int) -> Tensor:
    target = randn(*shape, seed=1)
    target[..., -2:, :-1] = NAN
    target[..., 0, 0] = NAN
    return target


@pytest.mark.parametrize("batch", [(), (2,)])
def test_padding_of_the_target_does_not_count_in_the_loss_of_tokens(batch: tuple[int, ...]) -> None:
    tokens, target = randn(*batch, 3, 5, 4), masked(*batch, 3, 5, 4)
    kept = ~target.isnan()
    loss = tokens_mse(tokens.requires_grad_(), target)
    torch.testing.assert_close(loss, F.mse_loss(tokens[kept], target[kept]), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, tokens)
    expected = torch.where(kept, 2 * (tokens - target) / kept.sum(), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    assert gradient[kept].all()
    assert not gradient[~kept].any()


def test_what_is_generated_into_the_padding_reaches_neither_the_loss_nor_its_gradient() -> None:
    target = masked(3, 5, 4)
    tokens = randn(3, 5, 4)
    expected = tokens_mse(tokens, target)
    spoilt = torch.where(target.isnan(), torch.tensor([NAN, math.inf, -math.inf, NAN]).double(), tokens)
    loss = tokens_mse(spoilt.requires_grad_(), target.requires_grad_())
    assert loss == expected
    for gradient in torch.autograd.grad(loss, (spoilt, target)):
        assert gradient.isfinite().all()
        assert not gradient[target.isnan()].any()
    assert tokens_mse(tokens * NAN, target).isnan()  # outside the padding it matters


def test_targets_of_tokens_may_be_tensors_of_their_own_one_for_each_adapter() -> None:
    tokens, target = randn(3, 2, 5, 4), masked(3, 2, 5, 4)
    assert tokens_mse(tokens, list(target)) == tokens_mse(tokens, target)
    assert tokens_mse(tokens.half(), [one.half() for one in target]).dtype == torch.float32
    with pytest.raises(ValueError, match=r"tokens have shape \(3, 2, 5, 4\), but there are 2 targets"):
        tokens_mse(tokens, list(target[:2]))
    with pytest.raises(ValueError, match=r"tokens is a list, expected a torch\.Tensor"):
        tokens_mse(list(tokens), list(target))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_loss_of_tensors_is_the_mean_over_their_elements(batch: tuple[int, ...]) -> None:
    ours, theirs = adapter(*batch), adapter(*batch, seed=1)
    flat, target = (torch.cat([tensors[name].flatten() for name in ours]) for tensors in (ours, theirs))
    torch.testing.assert_close(tensors_mse(ours, theirs), F.mse_loss(flat, target), rtol=1e-12, atol=0)
    spelt = {name[len("base_model.model.") : -len("weight")] + "default.weight": t for name, t in theirs.items()}
    assert tensors_mse(ours, dict(reversed(spelt.items()))) == tensors_mse(ours, theirs)


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("ranks", [(3, 2), (2, 4)])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_loss_of_products_is_that_of_explicit_updates(batch: int, ranks: tuple[int, int], scaled: bool) -> None:
    shape = (batch,) if batch else ()
    ours, theirs = adapter(*shape), adapter(*shape, seed=1, ranks=ranks)
    options: dict[str, Any] = {}
    scalings: tuple[tuple[float, float], tuple[float, float]] = (1, 1), (1, 1)
    if scaled:
        options["spec"] = LoraSpec(rank=3, alpha=6, rank_pattern={"up_proj": 2})
        options["target_spec"] = LoraSpec(rank=ranks[0], alpha=5, rank_pattern={"up_proj": ranks[1]}, use_rslora=True)
        scalings = (2, 3), (5 / ranks[0] ** 0.5, 5 / ranks[1] ** 0.5)
    update, target = updates(ours, scalings[0]), updates(theirs, scalings[1])
    torch.testing.assert_close(product_mse(ours, theirs, **options), F.mse_loss(update, target), rtol=1e-12, atol=0)
    expected = ((update - target).norm(dim=-1) / target.norm(dim=-1)).square().mean()
    torch.testing.assert_close(product_mse(ours, theirs, **options, normalize=True), expected, rtol=1e-12, atol=0)


def test_the_loss_of_products_depends_on_no_gauge_and_scales_the_target_by_its_spec() -> None:
    ours, theirs, M = adapter(ranks=(3, 3)), adapter(seed=1, ranks=(3, 3)), randn(3, 3, seed=5)
    spec = LoraSpec(rank=3, alpha=9)
    torch.testing.assert_close(product_mse(ours, theirs, spec=spec), 9 * product_mse(ours, theirs))
    turned = {**ours, Q_A: torch.linalg.inv(M) @ ours[Q_A], Q_B: ours[Q_B] @ M}
    torch.testing.assert_close(product_mse(turned, theirs), product_mse(ours, theirs), rtol=1e-10, atol=0)
    assert tensors_mse(turned, theirs) != pytest.approx(tensors_mse(ours, theirs).item(), rel=1e-2)
    assert product_mse(turned, ours) < 1e-12


# Turned factors are not closer: rounding them to float32 already moves the product.
@pytest.mark.parametrize(("distance", "turn"), [(0.1, False), (1e-3, False), (1e-6, False), (0.1, True), (1e-4, True)])
def test_the_distance_of_nearly_equal_products_survives_rounding(distance: float, turn: bool) -> None:
    r, sizes = 16, (896, 1152)
    A, B = randn(r, sizes[0]) / 30, randn(sizes[1], r, seed=1) / 10
    other_A, other_B = A * (1 + distance * randn(*A.shape, seed=2)), B * (1 + distance * randn(*B.shape, seed=3))
    if turn:
        M, _ = torch.linalg.qr(randn(r, r, seed=4))
        other_A, other_B = M.mT @ other_A, other_B @ M
    ours, theirs = {Q_A: A.float(), Q_B: B.float()}, {Q_A: other_A.float(), Q_B: other_B.float()}
    update, target = (t[Q_B].double() @ t[Q_A].double() for t in (ours, theirs))
    expected = (update - target).square().sum() / target.square().sum()
    assert distance / 2 < expected.sqrt() < 2 * distance
    value = product_mse(ours, theirs, normalize=True)
    assert value.dtype == torch.float32
    assert relative(value, expected) < 1e-6
    leaf = ours[Q_A].requires_grad_()
    (gradient,) = torch.autograd.grad(product_mse(ours, theirs), leaf)
    exact = 2 * B.float().double().mT @ (update - target) / update.numel()
    assert (gradient - exact).norm() < 1e-5 * exact.norm()


def test_equal_products_have_a_loss_and_a_gradient_of_zero() -> None:
    ours = {name: tensor.float().requires_grad_() for name, tensor in adapter(2).items()}
    theirs = {name: tensor.detach().clone() for name, tensor in ours.items()}
    for normalize in (False, True):
        loss = product_mse(ours, theirs, normalize=normalize)
        assert loss == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(ours.values())))


def test_equal_products_have_a_loss_of_zero_under_a_scale_that_float32_rounds() -> None:
    spec = LoraSpec(rank=3, alpha=1, rank_pattern={"up_proj": 2})
    ours = {name: tensor.float() for name, tensor in adapter().items()}
    assert product_mse(ours, {name: tensor.clone() for name, tensor in ours.items()}, spec=spec) == 0


def test_a_product_of_zero_as_target_has_a_finite_gradient() -> None:
    ours = {name: tensor.requires_grad_() for name, tensor in adapter(2).items()}
    theirs = adapter(2, seed=1)
    for name in (Q_B, UP_B):
        theirs[name][0] = 0
    loss = product_mse(ours, theirs, normalize=True)
    each = (updates(ours) - updates(theirs)).square()
    expected = (each[0].mean() + each[1].sum() / updates(theirs)[1].square().sum()) / 2
    torch.testing.assert_close(loss, expected)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(ours.values())))


def test_the_loss_of_products_keeps_no_float64_copies_until_the_backward() -> None:
    ours, theirs = ({name: t.float().requires_grad_() for name, t in adapter(seed=seed).items()} for seed in (0, 1))

    def keep(tensor: Tensor) -> Tensor:
        assert tensor.dtype != torch.float64 or tensor.numel() == 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        product_mse(ours, theirs)


def from_flat(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def function(*flat: Tensor) -> Tensor:
        return loss(*(dict(zip((Q_A, Q_B, UP_A, UP_B), side, strict=True)) for side in (flat[:4], flat[4:])), **options)

    return function


VECTORS = randn(2, 3, 4), randn(2, 3, 4, seed=1)
TENSORS = (*adapter(2).values(), *adapter(2, seed=1).values())
OTHER_RANK = (*adapter(2).values(), *adapter(2, seed=1, ranks=(2, 3)).values())
GRADCHECKED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "delta_mse": (delta_mse, VECTORS),
    "delta_mse, normalized": (lambda d, t: delta_mse(d, t, normalize=True), VECTORS),
    "delta_cosine": (delta_cosine, VECTORS),
    "delta_loss": (delta_loss, VECTORS),
    "tokens_mse": (lambda tokens: tokens_mse(tokens, masked(2, 3, 4)), VECTORS[:1]),
    "tensors_mse": (from_flat(tensors_mse), TENSORS),
    "product_mse": (from_flat(product_mse), TENSORS),
    "product_mse, normalized": (from_flat(product_mse, normalize=True), OTHER_RANK),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradients_and_second_ones_are_those_of_finite_differences(name: str) -> None:
    loss, arguments = GRADCHECKED[name]
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("name", GRADCHECKED)
def test_torch_func_gets_the_gradient_of_autograd(name: str) -> None:
    loss, arguments = GRADCHECKED[name]
    leaf = arguments[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, *arguments[1:]), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(*arguments), expected)


def test_a_loss_leaves_its_inputs() -> None:
    for loss, arguments in GRADCHECKED.values():
        before = [argument.clone() for argument in arguments]
        loss(*arguments)
        assert all(torch.equal(*pair) for pair in zip(arguments, before, strict=True))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: delta_mse(randn(2, 3), randn(3)), r"delta has shape \(2, 3\), its target \(3,\): expected the same"),
        (lambda: delta_cosine(randn(2, 3).long(), randn(2, 3)), "delta has dtype torch.int64, expected a floating"),
        (lambda: delta_mse(randn(2, 3), [0.0]), "the target of delta is a list, expected a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: delta_mse(randn(0, 3), randn(0, 3)), r"delta has shape \(0, 3\), expected one dimension or more"),
        (lambda: delta_mse(randn(3), randn(3).to("meta")), "delta is on cpu, its target on meta: expected the same"),
        (lambda: delta_loss(randn(3), randn(3), mse_weight=-1), "mse_weight is -1, expected a finite number of 0 or"),
        (lambda: delta_loss(randn(3), randn(3), mse_weight=0, cosine_weight=0), "are both 0, expected one above 0"),
        (lambda: tokens_mse(randn(1, 2, 3), randn(1, 2, 4)), r"tokens has shape \(1, 2, 3\), its target \(1, 2, 4\)"),
        (lambda: tokens_mse(randn(1, 2, 3), randn(1, 2, 3) * NAN), "target_tokens is NaN throughout, expected"),
    ],
)
def test_a_bad_delta_or_token_is_refused(loss: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss()


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


MIXED = {**adapter(2), UP_B: randn(3, 9, 2)}


@pytest.mark.parametrize("loss", [tensors_mse, product_mse])
@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({}, {}, "tensors is empty, expected LoRA tensors"),
        (without(adapter(), Q_A), adapter(), f"'{Q_A}' is in target_tensors and not in tensors, expected both"),
        (adapter(), without(adapter(), UP_B), f"'{UP_B}' is in tensors and not in target_tensors, expected both"),
        ({"lora_A": randn(2, 3)}, {}, f"'lora_A' fits nothing; expected names such as '{Q_A}'"),
        ({Q_A: randn(2, 3), Q_A.replace("base_model.model.", ""): randn(2, 3)}, {}, "is given twice, in two spellings"),
        ({Q_A: randn(2, 3)}, {Q_A: randn(2, 4)}, rf"'{Q_A}' has shape \(2, 3\), its target \(2, 4\)"),
        ({Q_A: randn(3)}, {Q_A: randn(3)}, rf"'{Q_A}' has shape \(3,\), its target \(3,\): expected two or three"),
        (adapter(2), adapter(), rf"'{Q_A}' has shape \(2, 3, 5\), its target \(3, 5\)"),
        (adapter(2), adapter(3), rf"'{Q_A}' has shape \(2, 3, 5\), its target \(3, 3, 5\)"),
        (MIXED, MIXED, rf"'{UP_B}' has shape \(3, 9, 2\), expected G as in \(2, 3, 5\)"),
        ({Q_A: randn(2, 3).long()}, {Q_A: randn(2, 3)}, f"'{Q_A}' has dtype torch.int64, expected a floating-point"),
    ],
)
def test_tensors_that_do_not_match_are_refused(
    loss: Callable[..., Tensor], ours: dict[str, Tensor], theirs: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(ours, theirs)


def test_a_product_without_a_factor_or_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=f"'{UP_B}' is missing, expected both A and B of each module"):
        product_mse(without(adapter(), UP_B), without(adapter(), UP_B))
    with pytest.raises(ValueError, match=r"shapes \(3, 5\) and \(7, 3\), expected rank 4"):
        product_mse(adapter(), adapter(), spec=LoraSpec(rank=4))
    with pytest.raises(ValueError, match=r"shapes \(3, 5\) and \(7, 2\), expected rank 3"):
        product_mse({**adapter(), Q_B: randn(7, 2)}, adapter())


@pytest.mark.parametrize("batch", [(), (3,)])
def test_regularizers_are_means_over_all_entries(batch: tuple[int, ...]) -> None:
    tensors = adapter(*batch)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    torch.testing.assert_close(tensors_l1(tensors), flat.abs().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(tensors_l2(tensors), flat.square().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(product_l2(tensors), updates(tensors).square().mean(), rtol=1e-12, atol=0)
    spec = LoraSpec(rank=3, alpha=6, rank_pattern={"up_proj": 2}, use_rslora=True)
    explicit = updates(tensors, (6 / math.sqrt(3), 6 / math.sqrt(2))).square().mean()
    torch.testing.assert_close(product_l2(tensors, spec=spec), explicit, rtol=1e-12, atol=0)


def test_the_norm_of_updates_needs_no_squares_that_float32_lacks() -> None:
    tensors = {name: tensor * (1e25 if "lora_B" in name else 1e-25) for name, tensor in adapter().items()}
    value = product_l2({name: tensor.float() for name, tensor in tensors.items()})
    assert value.dtype == torch.float32
    assert relative(value, updates(tensors).square().mean()) < 1e-6


@pytest.mark.parametrize("regularizer", [tensors_l1, tensors_l2, product_l2])
def test_gradients_of_regularizers_are_those_of_finite_differences(regularizer: Callable[..., Tensor]) -> None:
    names = list(adapter())
    given = [tensor.requires_grad_() for tensor in adapter(2).values()]
    assert torch.autograd.gradcheck(lambda *tensors: regularizer(dict(zip(names, tensors, strict=True))), given)


@pytest.mark.parametrize("regularizer", [tensors_l1, tensors_l2, product_l2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {}, "tensors is empty"),
        (lambda tensors: {"a": tensors[Q_A]}, "LoRA tensor 'a' fits nothing"),
        (lambda tensors: {**tensors, Q_A: tensors[Q_A].long()}, "expected a floating-point dtype"),
        (lambda tensors: {**tensors, Q_A: tensors[Q_A][0]}, "expected two or three dimensions, none empty"),
    ],
)
def test_regularizers_refuse_what_is_no_adapter(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, regularizer: Callable[..., Tensor]
) -> None:
    with pytest.raises(ValueError, match=message):
        regularizer(change(adapter()))


def test_the_norm_of_updates_needs_both_factors_and_the_specs_rank() -> None:
    tensors = adapter()
    with pytest.raises(ValueError, match="is missing, expected both A and B of each module"):
        product_l2({name: tensor for name, tensor in tensors.items() if name != UP_B})
    with pytest.raises(ValueError, match="expected rank 4"):
        product_l2(tensors, spec=LoraSpec(rank=4))


