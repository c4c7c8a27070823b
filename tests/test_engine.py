"""``forward_vjp`` against transformers and PEFT under autograd: values, and the gradient of every LoRA tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from qwen_functional.lora import PROJECTIONS

TOLERANCE = 1e-9
# Prefixes shared and not, a sequence within another, one twice, one of a single token.
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20, 21], [5, 6, 7], [30], [5, 6, 7], [31, 6, 7, 8]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_parity(
    config: Qwen2Config,
    spec: LoraSpec,
    tensors: dict[str, Tensor],
    sequences: Sequence[Sequence[int]] = SEQUENCES,
    layer: int | Sequence[int] = -1,
    wrt: Sequence[str] | None = None,
    fields: dict[str, Any] | None = None,
    negligible: float = 1e-5,
    **options: Any,
) -> None:
    """Values and gradients are those of PEFT, one sequence and one adapter at a time."""
    weights = init_weights(config, dtype=torch.float64)
    lora = spec.bind(config, tensors)
    value, vjp = forward_vjp(config, weights, pack(sequences), lora, layer=layer, wrt=wrt, **options)
    cotangent = normal(*value.shape)
    gradients = vjp(cotangent)
    model = peft_model(hf_model(config, weights, fields=fields), spec)
    expected, expected_grads = reference_value_and_grads(model, tensors, sequences, cotangent, layer)
    assert value.dtype == torch.float64
    assert relative_error(value, expected) < TOLERANCE
    wanted = [name for name in tensors if wrt is None or name in wrt]
    if wanted:
        assert_gradients(gradients, {name: expected_grads[name] for name in wanted}, TOLERANCE, negligible)
    else:
        assert gradients == {}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_value_or_gradient_differs_from_peft(changes: dict[str, Any]) -> None:
    config, spec = tiny_config(**changes), LoraSpec(rank=3, alpha=4)
    assert_parity(config, spec, random_lora(config, spec, 2), fields=tiny_fields(**changes))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_an_inner_layers_value_or_gradient_differs_from_peft(changes: dict[str, Any]) -> None:
    config, spec = tiny_config(**changes), LoraSpec(rank=2)
    top = config.num_hidden_layers - 1
    assert_parity(config, spec, random_lora(config, spec, 2), layer=(top, 0, -1, top // 2, 0))


@pytest.mark.parametrize("n_adapters", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_value_or_gradient_of_some_adapters_differs_from_peft(spec: LoraSpec, n_adapters: int | None) -> None:
    config = tiny_config()
    assert_parity(config, spec, random_lora(config, spec, n_adapters))


@pytest.mark.parametrize("layer", [0, 1, 2, -1, (1,), (-1,), (0, 1), (2, -1), (-1, 0, -1)], ids=str)
@pytest.mark.parametrize("n_adapters", [None, 2])
def test_layers_are_read_out_elsewhere_than_in_peft(layer: Any, n_adapters: int | None) -> None:
    config, spec = tiny_config(), SPECS["patterns"]
    assert_parity(config, spec, random_lora(config, spec, n_adapters), layer=layer)


def test_an_inner_layer_is_not_that_of_transformers_hidden_states() -> None:
    config = tiny_config()
    weights = init_weights(config, dtype=torch.float64)
    value, _ = forward_vjp(config, weights, pack([SEQUENCES[0]]), layer=(0, 1, -1))
    output = call(hf_model(config, weights), input_ids=torch.tensor([SEQUENCES[0]]), output_hidden_states=True)
    expected = torch.stack([output.hidden_states[i][:, -1] for i in (1, 2, 3)], 1)
    assert relative_error(value[:, :, 0], expected) < TOLERANCE


def test_the_bare_model_differs_from_transformers() -> None:
    for changes in CONFIGS.values():
        config = tiny_config(**changes)
        weights = init_weights(config, dtype=torch.float64)
        value, vjp = forward_vjp(config, weights, pack(SEQUENCES), layer=(0, -1))
        expected = reference_values(hf_model(config, weights), {}, SEQUENCES, (0, -1))
        assert relative_error(value, expected) < TOLERANCE
        assert vjp(torch.ones_like(value)) == {}


def test_modules_without_tensors_have_a_gradient_or_a_part_in_it() -> None:
    config, spec = tiny_config(), LoraSpec(rank=3)
    for part in ("layers.1", "q_proj", "v_proj", "up_proj", "self_attn", "layers.2.mlp.gate"):
        tensors = {name: t for name, t in random_lora(config, spec, 2).items() if part in name}
        assert_parity(config, spec, tensors)


def test_texts_longer_than_a_tile_differ_from_peft() -> None:
    for changes in ({}, CONFIGS["windows"]):
        config, spec = tiny_config(**changes, max_position_embeddings=256), LoraSpec(rank=2)
        long = [[i * i % 61 for i in range(150)], [i * i % 61 for i in range(70)] + [3] * 20, [0, 1, 9]]
        assert_parity(config, spec, random_lora(config, spec, 2), long)


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_adapters_in_chunks_differ_from_peft(monkeypatch: pytest.MonkeyPatch, at_once: int, checkpoint: str) -> None:
    """Adapters of many tokens go through a block in chunks: here of few."""
    config, spec = tiny_config(), SPECS["some layers"]
    gate_up_of_one = len(pack(SEQUENCES)) * 2 * config.intermediate_size * 8
    monkeypatch.setattr("qwen_functional.engine.CHUNK_BYTES", gate_up_of_one * at_once)
    assert_parity(config, spec, random_lora(config, spec, 5), layer=(1, -1), checkpoint=checkpoint)


def test_forward_differs_from_forward_vjp() -> None:
    config, spec = tiny_config(), SPECS["patterns"]
    tensors, weights = random_lora(config, spec, 2), init_weights(config, dtype=torch.float64)
    value, _ = forward_vjp(config, weights, pack(SEQUENCES), spec.bind(config, tensors))
    for g, adapter in enumerate(one_by_one(tensors)):
        for p, sequence in enumerate(SEQUENCES):
            output = forward(
                config, weights, torch.tensor([sequence]), lora=spec.bind(config, adapter)
            ).last_hidden_state
            assert relative_error(value[g, p], output[0, -1]) < TOLERANCE


def test_the_gradient_is_not_linear_in_the_cotangent() -> None:
    config, spec = tiny_config(), LoraSpec(rank=3)
    weights = init_weights(config, dtype=torch.float64)
    lora = spec.bind(config, random_lora(config, spec, 2))

    def gradients(cotangent: Tensor) -> dict[str, Tensor]:
        return forward_vjp(config, weights, pack(SEQUENCES), lora)[1](cotangent)

    one, two = normal(2, len(SEQUENCES), 24), normal(2, len(SEQUENCES), 24, seed=1)
    together, first, second = gradients(one - 3 * two), gradients(one), gradients(two)
    assert_gradients(together, {name: first[name] - 3 * second[name] for name in first})
    assert not any(gradient.any() for gradient in gradients(torch.zeros_like(one)).values())
    # An adapter or a sequence whose cotangent is zero takes no part.
    only = torch.zeros_like(one)
    only[1] = one[1]
    for name, gradient in gradients(only).items():
        assert not gradient[0].any()
        assert relative_error(gradient[1], first[name][1]) < TOLERANCE


@pytest.mark.parametrize("wanted", ["lora_A", "lora_B", "layers.1", "q_proj", "v_proj.lora_A", "up_proj", "2.mlp"])
@pytest.mark.parametrize("n_adapters", [None, 2])
def test_a_gradient_asked_for_alone_differs_from_peft(wanted: str, n_adapters: int | None) -> None:
    config, spec = tiny_config(), SPECS["patterns"]
    tensors = random_lora(config, spec, n_adapters)
    assert_parity(config, spec, tensors, wrt=[name for name in tensors if wanted in name])


# Anything goes: small configs, specs, sequences of few tokens (so that they share prefixes), and what is asked.


@st.composite
def configs(draw: st.DrawFn) -> Qwen2Config:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n_layers = draw(st.integers(1, 3))
    windows: dict[str, Any] = {}
    if draw(st.booleans()):
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        layer_types = draw(st.lists(kinds, min_size=n_layers, max_size=n_layers))
        windows = {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 5))}
        windows["layer_types"] = layer_types
    ropes = [changes for name, changes in CONFIGS.items() if "rope" in name or "yarn" in name]
    return tiny_config(
        hidden_size=draw(st.integers(3, 12)),
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=n_layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        initializer_range=0.3,
        **draw(st.sampled_from([{}, *ropes])),
        **windows,
    )


@st.composite
def specs(draw: st.DrawFn, config: Qwen2Config) -> LoraSpec:
    modules = draw(st.lists(st.sampled_from(list(PROJECTIONS)), min_size=1, unique=True))
    layers = st.lists(st.integers(0, config.num_hidden_layers - 1), min_size=1, unique=True)
    patterned = st.sampled_from(modules)
    return LoraSpec(
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from([0.5, 2, 7])),
        target_modules=modules,
        rank_pattern=draw(st.dictionaries(patterned, st.integers(1, 5), max_size=2)),
        alpha_pattern=draw(st.dictionaries(patterned, st.sampled_from([0.3, 5, -2]), max_size=2)),
        use_rslora=draw(st.booleans()),
        layers_to_transform=draw(st.none() | layers),
    )


SEQUENCE = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sequences=st.lists(SEQUENCE, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_something_random_differs_from_peft(data: st.DataObject, sequences: list[list[int]], seed: int) -> None:
    config = data.draw(configs(), "config")
    spec = data.draw(specs(config), "spec")
    tensors = random_lora(config, spec, data.draw(st.none() | st.integers(1, 4), "adapters"), seed)
    layers = st.integers(-1, config.num_hidden_layers - 1)
    assert_parity(
        config,
        spec,
        tensors,
        sequences,
        layer=data.draw(layers | st.lists(layers, min_size=1, max_size=3), "layer"),
        wrt=data.draw(st.none() | st.lists(st.sampled_from(list(tensors)), unique=True), "wrt"),
        checkpoint=data.draw(st.sampled_from(["none", "block", "auto"]), "checkpoint"),
        memory_budget=data.draw(st.none() | st.integers(0, 100_000), "memory_budget"),
        negligible=1e-3,  # gradients of such texts and sizes may cancel altogether, and what is left be 5e-14
    )
