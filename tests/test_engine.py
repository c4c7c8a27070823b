"""``forward_vjp`` against transformers and PEFT under autograd: values, and the gradient of every LoRA tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from devices import tolerance
from reference import (
    CONFIGS,
    SPECS,
    assert_gradients,
    call,
    hf_model,
    one_by_one,
    peft_model,
    random_lora,
    reference_value_and_grads,
    reference_values,
    relative_error,
    tiny_config,
    tiny_fields,
)
from torch import Tensor

from qwen_functional import LoraSpec, Qwen2Config, init_weights, pack
from qwen_functional.forward import forward, forward_vjp

TOLERANCE = 1e-9
# Prefixes shared and not, a sequence that is a prefix of others, a duplicate, a single token.
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20, 21], [5, 6, 7], [30], [5, 6, 7], [31, 6, 7, 8]]


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def assert_parity(
    config: Qwen2Config,
    spec: LoraSpec,
    tensors: dict[str, Tensor],
    sequences: Sequence[Sequence[int]] = SEQUENCES,
    layer: int | Sequence[int] = -1,
    wrt: Sequence[str] | None = None,
    fields: dict[str, Any] | None = None,
    negligible: float = 1e-5,
    *,
    device: str,
    **options: Any,
) -> None:
    """Values and gradients are those of PEFT run on one sequence and one adapter at a time."""
    weights, allowed = init_weights(config, dtype=torch.float64, device=device), tolerance(device, TOLERANCE)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    lora = spec.bind(config, tensors)
    value, vjp = forward_vjp(config, weights, pack(sequences), lora, layer=layer, wrt=wrt, **options)
    cotangent = normal(*value.shape, device=device)
    gradients = vjp(cotangent)
    model = peft_model(hf_model(config, weights, fields=fields), spec)
    expected, expected_grads = reference_value_and_grads(model, tensors, sequences, cotangent, layer)
    assert value.dtype == torch.float64
    assert {value.device, *(gradient.device for gradient in gradients.values())} == {weights.device}
    assert relative_error(value, expected) < allowed
    wanted = [name for name in tensors if wrt is None or name in wrt]
    if wanted:
        assert_gradients(gradients, {name: expected_grads[name] for name in wanted}, allowed, negligible)
    else:
        assert gradients == {}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_values_and_gradients_equal_peft(changes: dict[str, Any], device: str) -> None:
    config, spec = tiny_config(**changes), LoraSpec(rank=3, alpha=4)
    assert_parity(config, spec, random_lora(config, spec, 2), fields=tiny_fields(**changes), device=device)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_an_inner_layers_value_and_gradients_equal_peft(changes: dict[str, Any], device: str) -> None:
    config, spec = tiny_config(**changes), LoraSpec(rank=2)
    top = config.num_hidden_layers - 1
    assert_parity(config, spec, random_lora(config, spec, 2), layer=(top, 0, -1, top // 2, 0), device=device)


@pytest.mark.parametrize("n_adapters", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_values_and_gradients_of_every_spec_and_number_of_adapters_equal_peft(
    spec: LoraSpec, n_adapters: int | None, device: str
) -> None:
    config = tiny_config()
    assert_parity(config, spec, random_lora(config, spec, n_adapters), device=device)


@pytest.mark.parametrize("layer", [0, 1, 2, -1, (1,), (-1,), (0, 1), (2, -1), (-1, 0, -1)], ids=str)
@pytest.mark.parametrize("n_adapters", [None, 2])
def test_layers_are_read_out_as_in_peft(layer: Any, n_adapters: int | None, device: str) -> None:
    config, spec = tiny_config(), SPECS["patterns"]
    assert_parity(config, spec, random_lora(config, spec, n_adapters), layer=layer, device=device)


def test_an_inner_layer_is_that_of_transformers_hidden_states(device: str) -> None:
    config = tiny_config()
    weights = init_weights(config, dtype=torch.float64, device=device)
    value, _ = forward_vjp(config, weights, pack([SEQUENCES[0]]), layer=(0, 1, -1))
    output = call(hf_model(config, weights), input_ids=torch.tensor([SEQUENCES[0]]), output_hidden_states=True)
    expected = torch.stack([output.hidden_states[i][:, -1] for i in (1, 2, 3)], 1)
    assert relative_error(value[:, :, 0], expected) < tolerance(device, TOLERANCE)


def test_the_bare_model_equals_transformers(device: str) -> None:
    for changes in CONFIGS.values():
        config = tiny_config(**changes)
        weights = init_weights(config, dtype=torch.float64, device=device)
        value, vjp = forward_vjp(config, weights, pack(SEQUENCES), layer=(0, -1))
        expected = reference_values(hf_model(config, weights), {}, SEQUENCES, (0, -1))
        assert relative_error(value, expected) < tolerance(device, TOLERANCE)
        assert vjp(torch.ones_like(value)) == {}


def test_modules_without_tensors_have_no_gradient_and_no_part_in_any(device: str) -> None:
    config, spec = tiny_config(), LoraSpec(rank=3)
    for part in ("layers.1", "q_proj", "v_proj", "up_proj", "self_attn", "layers.2.mlp.gate"):
        tensors = {name: t for name, t in random_lora(config, spec, 2).items() if part in name}
        assert_parity(config, spec, tensors, device=device)


def test_texts_longer_than_a_tile_equal_peft(device: str) -> None:
    for changes in ({}, CONFIGS["windows"]):
        config, spec = tiny_config(**changes, max_position_embeddings=256), LoraSpec(rank=2)
        long = [[i * i % 61 for i in range(150)], [i * i % 61 for i in range(70)] + [3] * 20, [0, 1, 9]]
        assert_parity(config, spec, random_lora(config, spec, 2), long, device=device)


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_adapters_in_chunks_equal_peft(monkeypatch: pytest.MonkeyPatch, at_once: int, checkpoint: str) -> None:
    """With many tokens, adapters go through a block in chunks; here, also with few."""
    config, spec = tiny_config(), SPECS["some layers"]
    gate_up_of_one = len(pack(SEQUENCES)) * 2 * config.intermediate_size * 8
    monkeypatch.setattr("qwen_functional.backends.cpu.CHUNK_BYTES", gate_up_of_one * at_once)
    assert_parity(config, spec, random_lora(config, spec, 5), layer=(1, -1), checkpoint=checkpoint, device="cpu")


def test_forward_equals_forward_vjp(device: str) -> None:
    config, spec = tiny_config(), SPECS["patterns"]
    weights = init_weights(config, dtype=torch.float64, device=device)
    tensors = random_lora(config, spec, 2, device=device)
    value, _ = forward_vjp(config, weights, pack(SEQUENCES), spec.bind(config, tensors))
    for g, adapter in enumerate(one_by_one(tensors)):
        for p, sequence in enumerate(SEQUENCES):
            output = forward(
                config, weights, torch.tensor([sequence], device=device), lora=spec.bind(config, adapter)
            ).last_hidden_state
            assert relative_error(value[g, p], output[0, -1]) < TOLERANCE


def test_the_gradient_is_linear_in_the_cotangent(device: str) -> None:
    config, spec = tiny_config(), LoraSpec(rank=3)
    weights = init_weights(config, dtype=torch.float64, device=device)
    lora = spec.bind(config, random_lora(config, spec, 2, device=device))

    def gradients(cotangent: Tensor) -> dict[str, Tensor]:
        return forward_vjp(config, weights, pack(SEQUENCES), lora)[1](cotangent)

    one, two = (normal(2, len(SEQUENCES), 24, seed=seed, device=device) for seed in (0, 1))
    together, first, second = gradients(one - 3 * two), gradients(one), gradients(two)
    assert_gradients(together, {name: first[name] - 3 * second[name] for name in first})
    assert not any(gradient.any() for gradient in gradients(torch.zeros_like(one)).values())
    # An adapter or a sequence with a zero cotangent contributes nothing.
    only = torch.zeros_like(one)
    only[1] = one[1]
    for name, gradient in gradients(only).items():
        assert not gradient[0].any()
        assert relative_error(gradient[1], first[name][1]) < TOLERANCE


@pytest.mark.parametrize("wanted", ["lora_A", "lora_B", "layers.1", "q_proj", "v_proj.lora_A", "up_proj", "2.mlp"])
@pytest.mark.parametrize("n_adapters", [None, 2])
def test_a_gradient_asked_for_alone_equals_peft(wanted: str, n_adapters: int | None, device: str) -> None:
    config, spec = tiny_config(), SPECS["patterns"]
    tensors = random_lora(config, spec, n_adapters)
    assert_parity(config, spec, tensors, wrt=[name for name in tensors if wanted in name], device=device)


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
def test_the_input_that_adapters_share_is_not_written_over(device: str) -> None:
    """Only down_proj is adapted: the second block's input is the sum of a shared term and one per adapter."""
    config = tiny_config()
    spec = LoraSpec(rank=3, target_modules=("down_proj",))
    tensors = random_lora(config, spec, 3)
    assert_parity(config, spec, tensors, wrt=[name for name in tensors if "layers.2" in name], device=device)
