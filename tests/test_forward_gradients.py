"""``forward`` is differentiable to any order: autograd and torch.func through it, against PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from devices import tolerance
from reference import (
    CONFIGS,
    SPECS,
    call,
    hf_model,
    one_by_one,
    peft_model,
    random_lora,
    relative_error,
    tiny_config,
)
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, init_weights
from qwen_functional.forward import forward

Tensors = dict[str, Tensor]
IDS = torch.randint(61, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
EXACT = 1e-12
SPEC = SPECS["patterns"]


@pytest.fixture(autouse=True)
def attention_in_transformers_has_all_derivatives() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def losses(
    changes: dict[str, Any], device: str, spec: LoraSpec = SPEC
) -> tuple[Qwen2Config, Qwen2Weights, Callable[[Tensors], Tensor], Callable[[Tensors], Tensor]]:
    """The same scalar as a function of one adapter's tensors, by ``forward`` and by PEFT."""
    config = tiny_config(**changes)
    weights = init_weights(config, dtype=torch.float64, device=device)
    model = peft_model(hf_model(config, weights), spec)
    cotangent = torch.randn(10, 61, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    ids, mask = IDS.to(device), MASK.to(device)

    def loss(logits: Tensor) -> Tensor:
        return (logits[MASK.bool().to(logits.device)].log_softmax(-1) * cotangent.to(logits.device)).sum()

    def ours(tensors: Tensors) -> Tensor:
        return loss(forward(config, weights, ids, mask, lora=spec.bind(config, tensors)).logits)

    def theirs(tensors: Tensors) -> Tensor:
        return loss(call(model, tensors, input_ids=IDS, attention_mask=MASK).logits)

    return config, weights, ours, theirs


def leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def backward(function: Callable[[Tensors], Tensor], tensors: Tensors) -> Tensors:
    inputs = leaves(tensors)
    function(inputs).backward()
    return {name: tensor.grad for name, tensor in inputs.items() if tensor.grad is not None}


def assert_same(gradients: Tensors, expected: Tensors, device: str) -> None:
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance(device, EXACT), errors
    assert any(gradient.norm() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_gradients_equal_those_through_peft(changes: dict[str, Any], device: str) -> None:
    spec = LoraSpec(rank=3)
    config, _, ours, theirs = losses(changes, device, spec)
    tensors = random_lora(config, spec, device=device)
    assert_same(backward(ours, tensors), backward(theirs, tensors), device)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients_of_another_lora_equal_those_through_peft(spec: LoraSpec, device: str) -> None:
    config, _, ours, theirs = losses({}, device, spec)
    tensors = random_lora(config, spec, device=device)
    assert_same(backward(ours, tensors), backward(theirs, tensors), device)


def test_func_grad_equals_backward_through_peft(device: str) -> None:
    config, _, ours, theirs = losses({}, device)
    tensors = random_lora(config, SPEC, device=device)
    assert_same(grad(ours)(tensors), backward(theirs, tensors), device)


@pytest.mark.parametrize("index", [[1, 1], [2, 0], None], ids=["shared", "some unused", "one each"])
def test_each_row_sends_its_gradient_to_its_own_adapter(index: list[int] | None, device: str) -> None:
    n_adapters = 3 if index else 2
    config, weights, _, _ = losses({}, device)
    tensors = random_lora(config, SPEC, n_adapters, device=device)
    ids, mask = IDS.to(device), MASK.to(device)
    adapter_index = torch.tensor(index, device=device) if index else None

    def ours(tensors: Tensors) -> Tensor:
        lora = SPEC.bind(config, tensors)
        output = forward(config, weights, ids, mask, lora=lora, adapter_index=adapter_index)
        return (output.logits.log_softmax(-1)[..., 0] * mask).sum()

    model = peft_model(hf_model(config, weights), SPEC)

    def theirs(tensors: Tensors) -> Tensor:
        adapters, total = one_by_one(tensors), torch.zeros(())
        for row, adapter in enumerate(index or range(2)):
            inputs = {"input_ids": IDS[row : row + 1], "attention_mask": MASK[row : row + 1]}
            logits = call(model, adapters[adapter], **inputs).logits[0]
            total = total + (logits.log_softmax(-1)[:, 0] * MASK[row]).sum()
        return total

    gradients, expected = backward(ours, tensors), backward(theirs, tensors)
    for name, gradient in gradients.items():
        unused = set(range(n_adapters)) - set(index or range(2))
        assert not gradient[list(unused)].any(), "a gradient reached an adapter that no row uses"
        assert relative_error(gradient, expected[name]) < tolerance(device, EXACT)


def test_vmap_over_adapters_equals_peft_one_by_one(device: str) -> None:
    config, _, ours, theirs = losses({}, device)
    tensors = random_lora(config, SPEC, 3, device=device)
    values = torch.stack([theirs(adapter) for adapter in one_by_one(tensors)])
    assert relative_error(vmap(ours)(tensors), values) < tolerance(device, EXACT)
    expected = [backward(theirs, adapter) for adapter in one_by_one(tensors)]
    for adapter, gradients in zip(expected, one_by_one(vmap(grad(ours))(tensors)), strict=True):
        assert_same(gradients, adapter, device)


def test_vmap_over_some_tensors_equals_peft_one_by_one(device: str) -> None:
    config, _, ours, theirs = losses({}, device)
    many, one = random_lora(config, SPEC, 3, device=device), random_lora(config, SPEC, seed=1, device=device)
    mapped = {name: 0 if "lora_B" in name else None for name in many}
    mixed = {name: many[name] if axis == 0 else one[name] for name, axis in mapped.items()}
    expected = [theirs({name: t[g] if mapped[name] == 0 else t for name, t in mixed.items()}) for g in range(3)]
    assert relative_error(vmap(ours, in_dims=(mapped,))(mixed), torch.stack(expected)) < tolerance(device, EXACT)


def test_a_directional_derivative_equals_that_through_peft(device: str) -> None:
    config, _, ours, theirs = losses({}, device)
    tensors, tangents = random_lora(config, SPEC, device=device), random_lora(config, SPEC, seed=1, device=device)
    derivative = jvp(ours, (tensors,), (tangents,))
    gradients = backward(theirs, tensors)
    expected = torch.stack([(gradients[name] * tangents[name]).sum() for name in tensors]).sum()
    assert relative_error(derivative[0], theirs(tensors)) < tolerance(device, EXACT)
    assert relative_error(derivative[1], expected) < tolerance(device, EXACT)


def double_backward(function: Callable[[Tensors], Tensor], tensors: Tensors, tangents: Tensors) -> Tensors:
    inputs = leaves(tensors)
    first = torch.autograd.grad(function(inputs), list(inputs.values()), create_graph=True)
    product = torch.stack([(g * v).sum() for g, v in zip(first, tangents.values(), strict=True)]).sum()
    return dict(zip(inputs, torch.autograd.grad(product, list(inputs.values())), strict=True))


@pytest.mark.parametrize("changes", [{}, CONFIGS["windows"]], ids=["full", "windows"])
def test_a_hessian_vector_product_equals_that_through_peft(changes: dict[str, Any], device: str) -> None:
    config, _, ours, theirs = losses(changes, device)
    tensors, tangents = random_lora(config, SPEC, device=device), random_lora(config, SPEC, seed=1, device=device)
    expected = double_backward(theirs, tensors, tangents)
    assert_same(double_backward(ours, tensors, tangents), expected, device)
    assert_same(jvp(grad(ours), (tensors,), (tangents,))[1], expected, device)


def test_the_hessian_and_jacobian_of_a_tensor_equal_those_through_peft(device: str) -> None:
    spec = LoraSpec(rank=1, target_modules=("k_proj",))
    config, _, ours, theirs = losses({}, device, spec)
    tensors = random_lora(config, spec, device=device)
    name = next(iter(tensors))

    def of_one(function: Callable[[Tensors], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tensor: function({**tensors, name: tensor})

    expected = torch.autograd.functional.hessian(of_one(theirs), tensors[name])
    assert relative_error(hessian(of_one(ours))(tensors[name]), expected) < tolerance(device, EXACT)
    jacobian, gradient = jacrev(of_one(ours))(tensors[name]), backward(theirs, tensors)[name]
    assert relative_error(jacobian, gradient) < tolerance(device, EXACT)


def test_a_gradient_comes_in_the_dtype_of_its_tensor(device: str) -> None:
    config, spec = tiny_config(), LoraSpec(rank=2)
    for base, adapter in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        weights = init_weights(config, dtype=base, device=device)
        tensors = leaves(random_lora(config, spec, dtype=adapter, device=device))
        output = forward(config, weights, IDS.to(device), MASK.to(device), lora=spec.bind(config, tensors))
        output.last_hidden_state.square().sum().backward()
        assert output.last_hidden_state.dtype == base
        for tensor in tensors.values():
            assert tensor.grad is not None
            assert tensor.grad.dtype == adapter
            assert tensor.grad.isfinite().all()
