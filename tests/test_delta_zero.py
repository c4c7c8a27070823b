"""A LoRA that changes nothing has a delta of exactly zero, and the same inputs give the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import random_lora, tiny_config
from torch import Tensor

from lora_delta import DifferentiableDeltaCompute
from qwen_functional import LoraSpec, init_weights

# Sizes at which a GEMM's order of summation depends on its number of rows.
CONFIG = tiny_config(hidden_size=96, intermediate_size=200, num_key_value_heads=1)
SPEC = LoraSpec(rank=5, rank_pattern={"v_proj": 3, "layers.1.mlp.up_proj": 8})
PROBES = [[3, 1, 4, *range(end)] for end in (23, 9, 40, 17)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def make_delta(dtype: torch.dtype, device: str, **options: Any) -> DifferentiableDeltaCompute:
    weights = init_weights(CONFIG, dtype=dtype, device=device)
    return DifferentiableDeltaCompute(CONFIG, weights, PROBES, SPEC, **options)


def lora(n_adapters: int | None, zero: str, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors, except that those whose names end in a letter of ``zero`` are zero."""
    tensors = random_lora(CONFIG, SPEC, n_adapters, dtype=dtype, device=device)
    return {n: t * 0 if n.removesuffix(".weight").endswith(tuple(zero)) else t for n, t in tensors.items()}


def assert_zero(delta: Tensor) -> None:
    assert torch.equal(delta, torch.zeros_like(delta)), f"up to {delta.abs().max():.1e}"


@pytest.mark.parametrize("n_adapters", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", ["AB", "B", "A"])
def test_the_delta_of_a_zero_lora_is_zero(
    zero: str, dtype: torch.dtype, n_adapters: int | None, device: str
) -> None:
    tensors = lora(n_adapters, zero, device)
    delta = make_delta(dtype, device)
    assert_zero(delta(tensors))
    with_gradients = delta({name: tensor.requires_grad_() for name, tensor in tensors.items()})
    assert with_gradients.requires_grad
    assert_zero(with_gradients)


@pytest.mark.parametrize("adapters_per_pass", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_delta_of_a_zero_lora_among_others_is_zero(
    dtype: torch.dtype, adapters_per_pass: int | None, device: str
) -> None:
    tensors, unchanged = lora(7, "", device, dtype), [0, 2, 3, 6]
    for name, tensor in tensors.items():
        tensor[[0, 6] if "lora_A" in name else unchanged] = 0
    delta = make_delta(dtype, device, adapters_per_pass=adapters_per_pass)
    for requires_grad in (False, True):
        values = delta({name: tensor.requires_grad_(requires_grad) for name, tensor in tensors.items()})
        assert_zero(values[unchanged])
        assert (values[[1, 4, 5]] != 0).any(1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"layer": 0},
        {"layer": 1, "adapters_per_pass": 2},
        {"layer": [2, -1, 0], "pooling": "none"},
        {"pooling": "none"},
        {"checkpoint": "none"},
        {"checkpoint": "block"},
        {"memory_budget": 300_000},
    ],
    ids=str,
)
def test_the_delta_of_a_zero_lora_is_zero_however_it_is_read_out_or_kept(
    options: dict[str, Any], device: str
) -> None:
    for dtype in DTYPES:
        delta = make_delta(dtype, device, **options)
        assert_zero(delta({name: tensor.requires_grad_() for name, tensor in lora(3, "B", device).items()}))


@pytest.mark.parametrize("left", ["layers.1.", "o_proj", "mlp", "layers.2.self_attn.k_proj", "gate_proj"])
def test_the_delta_of_a_zero_lora_of_some_modules_is_zero(left: str, device: str) -> None:
    for dtype in DTYPES:
        delta = make_delta(dtype, device)
        for n_adapters in (3, 5, None):  # one object: a base of other shapes would differ by rounding
            some = {name: tensor for name, tensor in lora(n_adapters, "B", device).items() if left in name}
            assert some
            assert_zero(delta(some))
            assert_zero(delta(lora(n_adapters, "B", device)))


def test_the_delta_of_no_lora_is_zero(device: str) -> None:
    for dtype in DTYPES:
        delta = make_delta(dtype, device)
        assert_zero(delta({}))
        assert_zero(delta.forward_batch([{}, {}, {}]))
        assert delta({}).shape == (96,)
        assert delta.forward_batch([{}, {}, {}]).shape == (3, 96)


def test_more_shapes_than_bases_are_kept_spoil_no_zero(device: str) -> None:
    delta = make_delta(torch.float64, device)
    for n_adapters in [*range(1, 13), 2, 12, 1]:
        assert_zero(delta(lora(n_adapters, "B", device)))


@pytest.mark.parametrize("options", [{}, {"adapters_per_pass": 2}, {"checkpoint": "block"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_inputs_give_the_same_bits(dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    def run(delta: DifferentiableDeltaCompute) -> list[Tensor]:
        tensors = {name: tensor.requires_grad_() for name, tensor in lora(3, "", device).items()}
        value = delta(tensors)
        return [value, *torch.autograd.grad(value.square().sum(), list(tensors.values()))]

    one = make_delta(dtype, device, **options)
    first = run(one)
    for again in (run(one), run(make_delta(dtype, device, **options))):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.real_checkpoint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_delta_of_a_zero_lora_on_real_weights_is_zero(
    real_checkpoint: str, dtype: torch.dtype, device: str
) -> None:
    delta = DifferentiableDeltaCompute.from_pretrained(real_checkpoint, dtype=dtype, device=device)
    torch.manual_seed(0)
    for n_adapters in (1, 3):
        tensors = {name: torch.zeros(n_adapters, *shape, device=device) for name, shape in delta.lora_shapes.items()}
        assert_zero(delta(tensors))
        for name, tensor in tensors.items():
            if "lora_A" in name:
                tensor.normal_()
        assert_zero(delta(tensors))
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[1].normal_(std=0.01)
    values = delta(tensors)
    assert_zero(values[[0, 2]])
    assert values[1].norm() > 0.01 * delta.base_activation.norm()
