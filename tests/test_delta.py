"""Deltas and their gradients against transformers + PEFT under autograd, probe by probe, adapter by adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from devices import tolerance
from reference import (
    hf_model,
    hidden_states_at_end,
    one_by_one,
    peft_model,
    random_lora,
    relative_error,
    tiny_config,
)
from torch import Tensor

from lora_delta import DifferentiableDeltaCompute
from qwen_functional import LoraSpec, Qwen2Config, init_weights

PROBES = [[5, 6, 7, 8], [5, 6, 9], [1], [5, 6, 7, 8, 9, 10]]  # 1 is not shared, one probe is a prefix of another
CONFIG = tiny_config()
SPEC = LoraSpec(rank=3, alpha=5)
F64 = torch.float64


def make_delta(
    config: Qwen2Config = CONFIG,
    spec: LoraSpec = SPEC,
    dtype: torch.dtype = F64,
    probes: Sequence[Sequence[int]] = PROBES,
    device: str = "cpu",
    **options: Any,
) -> DifferentiableDeltaCompute:
    weights = init_weights(config, dtype=dtype, device=device)
    return DifferentiableDeltaCompute(config, weights, probes, spec, **options)


def peft_delta(
    config: Qwen2Config,
    spec: LoraSpec,
    tensors: Mapping[str, Tensor],
    layers: Sequence[int] = (-1,),
    probes: Sequence[Sequence[int]] = PROBES,
) -> Tensor:
    """(G, layers, P, H) on float64 weights on the tensors' device; differentiable in the tensors."""
    weights = init_weights(config, dtype=F64, device=next(iter(tensors.values())).device)
    bare, model = hf_model(config, weights), peft_model(hf_model(config, weights), spec)
    batched = next(iter(tensors.values())).dim() == 3
    with torch.no_grad():
        base = torch.stack([hidden_states_at_end(bare, None, ids, layers) for ids in probes], 1)
    return torch.stack(
        [
            torch.stack([hidden_states_at_end(model, adapter, ids, layers) for ids in probes], 1) - base
            for adapter in (one_by_one(tensors) if batched else [dict(tensors)])
        ]
    )


def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def gradients(loss: Tensor, tensors: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()), **options), strict=True))


def squared(delta: Tensor) -> Tensor:
    """A loss that weights every entry differently."""
    factors = torch.linspace(1, 2, delta.numel(), dtype=delta.dtype).view(delta.shape).to(delta.device)
    return (delta * factors).square().sum()


def assert_like_peft(
    delta: DifferentiableDeltaCompute,
    tensors: Mapping[str, Tensor],
    shaped: Callable[[Tensor], Tensor],
    layers: Sequence[int] = (-1,),
    on_cpu: float = 1e-9,
) -> None:
    """Value and gradients are PEFT's; ``shaped`` turns its (G, layers, P, H) into the expected delta."""
    allowed = tolerance(delta.base_activation.device.type, on_cpu)
    ours, theirs = leaves(tensors), leaves({name: tensor.double() for name, tensor in tensors.items()})
    value = delta(ours)
    expected = shaped(peft_delta(delta.config, delta.spec, theirs, layers))
    assert relative_error(value, expected) <= allowed
    got = gradients(squared(value), ours)
    want = gradients(squared(expected), theirs, materialize_grads=True)  # zeros above the layers that are read
    for name in want:
        assert got[name].device == value.device == delta.base_activation.device
        assert relative_error(got[name], want[name]) <= allowed, name


# --- Values and gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "on_cpu"), [(F64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize("n_adapters", [None, 1, 3])
def test_a_delta_and_its_gradients_equal_peft(
    n_adapters: int | None, dtype: torch.dtype, on_cpu: float, device: str
) -> None:
    tensors = random_lora(CONFIG, SPEC, n_adapters, dtype=dtype, device=device)
    shaped = lambda d: d[0, 0].mean(0) if n_adapters is None else d[:, 0].mean(1)  # noqa: E731
    delta = make_delta(dtype=dtype, device=device)
    assert delta(tensors).dtype == dtype
    assert_like_peft(delta, tensors, shaped, on_cpu=on_cpu)


SPECS = {
    "attention of one layer": LoraSpec(2, 1, ("q_proj", "v_proj", "o_proj"), layers_to_transform=1),
    "mlp, rslora": LoraSpec(4, target_modules=("up_proj", "down_proj"), use_rslora=True),
    "patterns": LoraSpec(3, 5, rank_pattern={"q_proj": 1, "layers.2.*": 7}, alpha_pattern={"k_proj": 9}),
    "k of the last layer": LoraSpec(2, 4, ("k_proj",), layers_to_transform=[2]),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_delta_of_another_spec_equals_peft(name: str, device: str) -> None:
    delta = make_delta(spec=SPECS[name], adapters_per_pass=2, device=device)
    assert_like_peft(delta, random_lora(CONFIG, SPECS[name], 3, device=device), lambda d: d[:, 0].mean(1))


def test_a_delta_of_another_config_equals_peft(device: str) -> None:
    config = tiny_config(
        head_dim=10,
        num_hidden_layers=4,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=2,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    )
    tensors = random_lora(config, SPEC, 2, device=device)
    assert_like_peft(make_delta(config, device=device), tensors, lambda d: d[:, 0].mean(1))


def test_tensors_that_are_left_out_count_as_zero(device: str) -> None:
    every = random_lora(CONFIG, SPEC, 2, device=device)
    tensors = {n: t for n, t in every.items() if ".0.mlp.gate" in n or ".2.self" in n}
    whole = {n: torch.zeros(2, *shape, dtype=F64, device=device) for n, shape in SPEC.shapes(CONFIG).items()}
    expected = peft_delta(CONFIG, SPEC, {**whole, **tensors})[:, 0].mean(1)
    assert relative_error(make_delta(device=device)(tensors), expected) <= tolerance(device, 1e-9)


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_gradients_of_a_delta_are_those_of_finite_differences(checkpoint: str, device: str) -> None:
    config = tiny_config(num_hidden_layers=2, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    spec = LoraSpec(rank=1, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    delta = make_delta(config, spec, checkpoint=checkpoint, pooling="none", layer=(0, -1), device=device)
    tensors = leaves(random_lora(config, spec, 2, device=device))
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *flat: delta(dict(zip(names, flat, strict=True))), tuple(tensors.values()), fast_mode=True
    )


# --- Shapes -----------------------------------------------------------------------------------------------

SHAPED: dict[str, tuple[dict[str, Any], Sequence[int], Callable[[Tensor], Tensor]]] = {
    "per probe": ({"pooling": "none"}, (-1,), lambda d: d[:, 0]),
    "inner layer": ({"layer": 1}, (1,), lambda d: d[:, 0].mean(1)),
    "last block before the norm": ({"layer": 2}, (2,), lambda d: d[:, 0].mean(1)),
    "layers": ({"layer": [2, 0, -1]}, (2, 0, -1), lambda d: d.mean(2)),
    "a list of one layer": ({"layer": (0,)}, (0,), lambda d: d.mean(2)),
    "layers per probe": ({"layer": (1, 1, -1), "pooling": "none"}, (1, 1, -1), lambda d: d),
    "passes": ({"layer": (0, -1), "pooling": "none", "adapters_per_pass": 2}, (0, -1), lambda d: d),
}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("n_adapters", [None, 3])
def test_layers_and_probes_are_in_their_places(name: str, n_adapters: int | None, device: str) -> None:
    options, layers, shaped = SHAPED[name]
    delta = make_delta(**options, device=device)
    tensors = random_lora(CONFIG, SPEC, n_adapters, device=device)
    assert_like_peft(delta, tensors, shaped if n_adapters else lambda d: shaped(d)[0], layers)
    assert delta.base_activation.shape == delta(tensors).shape[0 if n_adapters is None else 1 :]


@pytest.mark.parametrize("name", SHAPED)
def test_the_base_activation_is_the_bare_models(name: str, device: str) -> None:
    options, layers, shaped = SHAPED[name]
    delta = make_delta(**options, device=device)
    bare = hf_model(CONFIG, init_weights(CONFIG, dtype=F64, device=device))
    expected = torch.stack([hidden_states_at_end(bare, None, ids, layers) for ids in PROBES], 1)
    assert relative_error(delta.base_activation, shaped(expected[None])[0]) <= tolerance(device, 1e-9)
    assert not delta.base_activation.requires_grad


def test_lora_shapes_equal_peft() -> None:
    model = peft_model(hf_model(CONFIG, init_weights(CONFIG)), SPEC)
    theirs = {n.replace(".default", ""): tuple(p.shape) for n, p in model.named_parameters() if "lora" in n}
    assert make_delta().lora_shapes == theirs


def test_the_defaults_are_the_seeds() -> None:
    delta = DifferentiableDeltaCompute(CONFIG, init_weights(CONFIG, dtype=torch.bfloat16), PROBES)
    assert delta.spec == LoraSpec(16, 32, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    assert len(delta.lora_shapes) == 3 * 7 * 2
    assert delta(random_lora(CONFIG, delta.spec)).dtype == delta.base_activation.dtype == torch.float32
    assert delta.truncated_probes == ()


def test_the_base_model_has_no_parameters_and_no_state() -> None:
    delta = make_delta()
    assert list(delta.parameters()) == list(delta.buffers()) == []
    assert delta.state_dict() == {}


# --- Batches ----------------------------------------------------------------------------------------------


def test_a_list_of_adapters_equals_the_stacked_dict_and_the_loop(device: str) -> None:
    delta, tensors = make_delta(device=device), leaves(random_lora(CONFIG, SPEC, 3, device=device))
    alone = [leaves(adapter) for adapter in one_by_one(tensors)]
    stacked, listed = delta(tensors), delta.forward_batch(alone)
    looped = torch.stack([delta(adapter) for adapter in alone])
    assert torch.equal(stacked, listed)
    assert relative_error(looped, listed) <= 1e-12
    of_stacked = gradients(squared(stacked), tensors)
    for value in (listed, looped):
        of_alone = [gradients(squared(value), adapter, retain_graph=True) for adapter in alone]
        for name, gradient in of_stacked.items():
            assert relative_error(torch.stack([g[name] for g in of_alone]), gradient) <= 1e-12


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_a_delta_on_other_weights_is_one_made_of_them(used: bool) -> None:
    weights, others = (init_weights(CONFIG, seed, F64) for seed in (0, 1))
    options: dict[str, Any] = {"layer": (0, -1), "pooling": "none", "adapters_per_pass": 2}
    delta = DifferentiableDeltaCompute(CONFIG, weights, PROBES, SPEC, **options)
    tensors = leaves(random_lora(CONFIG, SPEC, n_adapters=3, dtype=F64))
    before = delta(tensors) if used else None  # by now it holds plans and bases
    moved, made = delta.on(others), DifferentiableDeltaCompute(CONFIG, others, PROBES, SPEC, **options)
    assert moved.weights is others
    assert torch.equal(moved(tensors), made(tensors))
    assert torch.equal(moved.base_activation, made.base_activation)
    expected = gradients(squared(made(tensors)), tensors)
    for name, gradient in gradients(squared(moved(tensors)), tensors).items():
        assert torch.equal(gradient, expected[name])
    if before is not None:
        assert torch.equal(delta(tensors), before)


def test_a_delta_knows_its_options() -> None:
    delta = make_delta(adapters_per_pass=2, pooling="none", layer=(0, -1), memory_budget=7)
    assert (delta.adapters_per_pass, delta.pooling, delta.layer) == (2, "none", (0, -1))
