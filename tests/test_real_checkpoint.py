"""Parity on trained weights: float32 within a tolerance, bfloat16 and float16 no worse than transformers and PEFT."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from reference import (
    call,
    hf_model,
    peft_model,
    random_lora,
    reference_value_and_grads,
    reference_values,
    relative_error,
)
from torch import Tensor

from lora_delta import create_generic_probes
from lora_delta.probes.tokenization import load_tokenizer, tokenize_probes
from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, load_pretrained, pack
from qwen_functional.dtypes import cpu_multiplies_bfloat16
from qwen_functional.forward import forward, forward_vjp
from qwen_functional.hub import resolve_checkpoint

pytestmark = pytest.mark.real_checkpoint

SPEC = LoraSpec()
N_ADAPTERS = 2
NO_WORSE = 1.1  # times the error of transformers in the same dtype
HALVES = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Reference:
    """What transformers and PEFT give in float32."""

    sequences: list[list[int]]
    tensors: dict[str, Tensor]  # (G, …), exact in bfloat16 and float16
    logits: Tensor  # of the padded batch at real tokens, without LoRA
    hidden_states: list[Tensor]
    cotangent: Tensor
    value: Tensor
    gradients: dict[str, Tensor]

    def padded(self) -> dict[str, Any]:
        longest = max(map(len, self.sequences))
        mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in self.sequences])
        ids = torch.tensor([[0] * (longest - len(s)) + s for s in self.sequences])
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def adapters(config: Qwen2Config, n_adapters: int | None) -> dict[str, Tensor]:
    """Adapters about as large as trained ones: each changes its projection's output by roughly a tenth."""
    tensors = random_lora(config, SPEC, n_adapters, size=0.1)
    return {name: tensor.bfloat16().half().float() for name, tensor in tensors.items()}


def at_real_tokens(output: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    real = inputs["attention_mask"].bool()
    return output.logits[real], [hidden[real] for hidden in output.hidden_states]


@pytest.fixture
def reference(real_checkpoint: str) -> Reference:
    return compute_reference(real_checkpoint)


@pytest.fixture(scope="module", autouse=True)
def the_reference_is_dropped_at_the_end() -> Iterator[None]:
    yield
    compute_reference.cache_clear()


@functools.cache
def compute_reference(model_id: str) -> Reference:
    folder = resolve_checkpoint(model_id)
    sequences = tokenize_probes(load_tokenizer(folder), create_generic_probes(), 256).ids
    config, weights = load_pretrained(folder, torch.float32)
    tensors = adapters(config, N_ADAPTERS)
    model = hf_model(config, weights)
    found = Reference(sequences, tensors, torch.empty(0), [], torch.empty(0), torch.empty(0), {})
    with torch.no_grad():
        output = call(model, **found.padded(), output_hidden_states=True)
    logits, hidden_states = at_real_tokens(output, found.padded())
    shape = (N_ADAPTERS, len(sequences), config.hidden_size)
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    value, gradients = reference_value_and_grads(peft_model(model, SPEC), tensors, sequences, cotangent)
    return Reference(sequences, tensors, logits, hidden_states, cotangent, value, gradients)


def error(value: Tensor, expected: Tensor) -> float:
    """Relative to ``expected``; infinite where ``value`` is not finite."""
    found = relative_error(value, expected)
    return found if math.isfinite(found) else math.inf


def errors_of_gradients(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each tensor."""
    return {name: error(gradients[name], expected[name]) for name in expected}


def together(gradients: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in like])


def assert_no_worse(what: str, ours: float, theirs: float) -> None:
    print(f"{what}: error {ours:.3g}, transformers {theirs:.3g}, ratio {ours / theirs if theirs else 1:.2f}")
    assert math.isfinite(ours), f"{what} is not finite"
    assert ours <= NO_WORSE * theirs, f"{what}: error {ours:.3g}, transformers {theirs:.3g}"


# float32


def test_forward_in_float32_equals_transformers(
    real_checkpoint: str, reference: Reference, device: str
) -> None:
    config, weights = load_pretrained(real_checkpoint, torch.float32, device)
    inputs = {name: tensor.to(device) for name, tensor in reference.padded().items()}
    with torch.no_grad():
        output = forward(config, weights, **inputs, output_hidden_states=True)
    logits, hidden_states = at_real_tokens(output, inputs)
    pairs = zip(hidden_states, reference.hidden_states, strict=True)
    errors = [relative_error(mine, theirs) for mine, theirs in pairs]
    print(f"float32 forward: logits {relative_error(logits, reference.logits):.2g}, hidden {max(errors):.2g}")
    assert relative_error(logits, reference.logits) <= 1e-5
    assert max(errors) <= 1e-5, errors
    lora = SPEC.bind(config, {name: tensor.to(device) for name, tensor in reference.tensors.items()})
    for adapter, expected in enumerate(reference.value):
        index = torch.full((len(reference.sequences),), adapter, device=device)
        with torch.no_grad():
            under_lora = forward(config, weights, **inputs, lora=lora, adapter_index=index)
        found = relative_error(under_lora.last_hidden_state[:, -1], expected)
        print(f"float32 forward under adapter {adapter}: {found:.2g}")
        assert found <= 1e-5


def test_forward_vjp_in_float32_equals_peft(real_checkpoint: str, reference: Reference, device: str) -> None:
    config, weights = load_pretrained(real_checkpoint, torch.float32, device, lm_head=False)
    lora = SPEC.bind(config, {name: tensor.to(device) for name, tensor in reference.tensors.items()})
    value, vjp = forward_vjp(config, weights, pack(reference.sequences), lora)
    gradients = vjp(reference.cotangent.to(device))
    errors = errors_of_gradients(gradients, reference.gradients)
    print(f"float32 forward_vjp: value {relative_error(value, reference.value):.2g}, worst of {len(errors)} ", end="")
    print(f"gradients {max(errors.values()):.2g}, median {median(errors.values()):.2g}")
    assert relative_error(value, reference.value) <= 1e-5
    assert len(errors) == 14 * config.num_hidden_layers
    assert max(errors.values()) <= 1e-4, errors


# bfloat16 and float16


@pytest.mark.parametrize("dtype", HALVES)
def test_forward_in_half_precision_is_no_worse_than_transformers(
    real_checkpoint: str, reference: Reference, dtype: torch.dtype
) -> None:
    config, weights = load_pretrained(real_checkpoint, dtype)
    inputs = reference.padded()
    with torch.no_grad():
        ours = at_real_tokens(forward(config, weights, **inputs, output_hidden_states=True), inputs)
        theirs = at_real_tokens(call(hf_model(config, weights), **inputs, output_hidden_states=True), inputs)
    logits, hidden_states = reference.logits, reference.hidden_states
    assert_no_worse(f"{dtype} logits", error(ours[0], logits), error(theirs[0], logits))
    assert_no_worse(
        f"{dtype} last hidden state", error(ours[1][-1], hidden_states[-1]), error(theirs[1][-1], hidden_states[-1])
    )
    # In the middle blocks, five entries a thousand times the typical one dominate the norm, and with it the rounding
    # of just these to the output's dtype. So compare token by token: most tokens have no such entry.
    for layer, states in enumerate(zip(ours[1], theirs[1], hidden_states, strict=True)):
        mine, other = (median(map(error, half, states[2])) for half in states[:2])
        assert_no_worse(f"{dtype} hidden state {layer}, median token", mine, other)


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("storage", HALVES)
def test_gradients_in_bfloat16_are_no_worse_than_with_peft(
    real_checkpoint: str, reference: Reference, storage: torch.dtype, adapter: torch.dtype
) -> None:
    """On a processor without bfloat16 products transformers would take minutes: there, only on the first blocks."""
    config, weights = load_pretrained(real_checkpoint, storage, lm_head=False)
    if not cpu_multiplies_bfloat16():
        config, weights, reference = on_first_blocks(config, weights, reference)
    weights = weights.compute_in(torch.bfloat16)
    compare_in_half(f"{storage} in bfloat16, adapters in {adapter}", config, weights, reference, adapter)


def test_values_in_float16_are_no_worse_than_with_peft(real_checkpoint: str, reference: Reference) -> None:
    config, weights = load_pretrained(real_checkpoint, torch.float16)
    tensors = {name: tensor.half() for name, tensor in reference.tensors.items()}
    value, vjp = forward_vjp(config, weights, pack(reference.sequences), SPEC.bind(config, tensors))
    theirs = reference_values(peft_model(hf_model(config, weights), SPEC), tensors, reference.sequences)
    assert_no_worse("float16 value", error(value, reference.value), error(theirs, reference.value))
    # transformers would take minutes for gradients; ours should be close to those in float32.
    errors = errors_of_gradients(vjp(reference.cotangent), reference.gradients)
    print(f"float16 gradients: worst {max(errors.values()):.2g}, median {median(errors.values()):.2g}")
    assert max(errors.values()) < 0.01, errors


def test_gradients_in_float16_are_no_worse_than_with_peft(real_checkpoint: str, reference: Reference) -> None:
    """On the first blocks and a few tokens: on a CPU, the float16 backward is a hundred times slower."""
    config, weights = load_pretrained(real_checkpoint, torch.float16)
    config, weights, expected = on_first_blocks(config, weights, reference)
    compare_in_half("float16, first blocks", config, weights, expected, torch.float16)


def on_first_blocks(
    config: Qwen2Config, weights: Qwen2Weights, reference: Reference, n: int = 3
) -> tuple[Qwen2Config, Qwen2Weights, Reference]:
    """Only the first blocks, and their float32 results for one adapter on a few tokens."""
    config = dataclasses.replace(config, num_hidden_layers=n, layer_types=config.layer_types[:n])
    weights = dataclasses.replace(weights, blocks=tuple(weights.blocks[:n]))
    sequences = [sequence[:n] for sequence, n in zip(reference.sequences, (6, 3), strict=False)]
    tensors = adapters(config, None)
    cotangent = reference.cotangent[:1, : len(sequences)]
    exact = peft_model(hf_model(config, weights, torch.float32), SPEC)
    value, gradients = reference_value_and_grads(exact, tensors, sequences, cotangent)
    expected = dataclasses.replace(
        reference, sequences=sequences, tensors=tensors, cotangent=cotangent, value=value, gradients=gradients
    )
    return config, weights, expected


def compare_in_half(
    what: str, config: Qwen2Config, weights: Qwen2Weights, expected: Reference, adapter: torch.dtype
) -> None:
    """Our value and gradients and PEFT's, both with products in the weights' compute dtype, against float32."""
    tensors = {name: tensor.to(adapter) for name, tensor in expected.tensors.items()}
    sequences, cotangent = expected.sequences, expected.cotangent
    value, vjp = forward_vjp(config, weights, pack(sequences), SPEC.bind(config, tensors))
    ours = vjp(cotangent)
    model = peft_model(hf_model(config, weights, weights.multiplied_in), SPEC)
    their_value, theirs = reference_value_and_grads(model, tensors, sequences, cotangent)
    assert_no_worse(f"{what}: value", error(value, expected.value), error(their_value, expected.value))
    all_expected = together(expected.gradients, ours)
    all_ours, all_theirs = together(ours, ours), together(theirs, ours)
    assert_no_worse(f"{what}: all gradients", error(all_ours, all_expected), error(all_theirs, all_expected))
    mine, other = (errors_of_gradients(gradients, expected.gradients) for gradients in (ours, theirs))
    assert_no_worse(f"{what}: median gradient", median(mine.values()), median(other.values()))
    assert all(gradient.dtype == adapter for gradient in ours.values())
