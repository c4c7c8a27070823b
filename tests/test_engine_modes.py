"""``forward_vjp`` in other modes, dtypes and devices; the same bits every time; bad inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference import SPECS, assert_gradients, random_lora, relative_error, tiny_config
from torch import Tensor
from watch import Watch

from qwen_functional import LoraSpec, PackedTokens, Qwen2Weights, init_weights, pack
from qwen_functional.forward import Vjp, forward_vjp

CONFIG = tiny_config(vocab_size=67, num_hidden_layers=4)
SPEC = LoraSpec(rank=2)
TOKENS = pack([[5, 6, 7, 8, 9], [5, 6, 7, 20], [30, 31, 32], [5, 6]])
WEIGHTS = init_weights(CONFIG)


def run(
    spec: LoraSpec = SPEC, tokens: PackedTokens = TOKENS, device: str = "cpu", **options: Any
) -> tuple[Tensor, Vjp]:
    weights = WEIGHTS if device == "cpu" else init_weights(CONFIG, device=device)
    lora = spec.bind(CONFIG, random_lora(CONFIG, spec, 3, dtype=torch.float32, device=device))
    return forward_vjp(CONFIG, weights, tokens, lora, **options)


def test_no_tape_is_made(device: str) -> None:
    drawn = random_lora(CONFIG, SPEC, 2, dtype=torch.float32, device=device)
    tensors = {name: tensor.requires_grad_() for name, tensor in drawn.items()}
    value, vjp = forward_vjp(CONFIG, init_weights(CONFIG, device=device), TOKENS, SPEC.bind(CONFIG, tensors))
    cotangent = torch.ones_like(value).requires_grad_()
    gradients = vjp(cotangent)
    assert not value.requires_grad
    assert not any(gradient.requires_grad for gradient in gradients.values())
    assert all(tensor.grad is None for tensor in tensors.values())


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_inference_mode_and_autocast_change_no_bit(checkpoint: str, device: str) -> None:
    value, vjp = run(checkpoint=checkpoint, device=device)
    expected = vjp(torch.ones_like(value))
    for mode in (torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16), torch.enable_grad()):
        with mode:
            other, other_vjp = run(checkpoint=checkpoint, device=device)
            gradients = other_vjp(torch.ones_like(value))
        assert torch.equal(other, value)
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    # A vjp may also be called in another mode than the forward.
    with torch.autocast(device, dtype=torch.bfloat16):
        _, vjp = run(checkpoint=checkpoint, device=device)
    gradients = vjp(torch.ones_like(value))
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_inputs_give_the_same_bits_and_are_not_changed(dtype: torch.dtype, device: str) -> None:
    weights = init_weights(CONFIG, dtype=dtype, device=device)
    tensors = random_lora(CONFIG, SPECS["patterns"], 3, dtype=torch.float32, device=device)
    base = {name: view.clone() for name, view in weights.named_views(CONFIG).items()}
    given, results = {name: tensor.clone() for name, tensor in tensors.items()}, []
    for _ in range(3):
        value, vjp = forward_vjp(CONFIG, weights, TOKENS, SPECS["patterns"].bind(CONFIG, tensors), layer=(1, -1))
        first_value, cotangent = value.clone(), torch.ones_like(value)
        results.append([value, *vjp(cotangent).values()])
        assert torch.equal(value, first_value)
        assert torch.equal(cotangent, torch.ones_like(value))
    assert all(torch.equal(a, b) for later in results[1:] for a, b in zip(results[0], later, strict=True))
    assert all(torch.equal(tensors[name], given[name]) for name in given)
    assert all(torch.equal(view, base[name]) for name, view in weights.named_views(CONFIG).items())


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("base", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("adapter", [torch.float64, torch.float32, *HALVES, None])
def test_a_gradient_comes_in_the_dtype_of_its_tensor(
    base: torch.dtype, adapter: torch.dtype | None, device: str
) -> None:
    tensors = random_lora(CONFIG, SPEC, 2, dtype=adapter or torch.float32, device=device)
    if adapter is None:  # mixed
        tensors = {n: t.to(d) for (n, t), d in zip(tensors.items(), [torch.float32, *HALVES] * 99, strict=False)}
    weights = init_weights(CONFIG, dtype=base, device=device)
    value, vjp = forward_vjp(CONFIG, weights, TOKENS, SPEC.bind(CONFIG, tensors))
    gradients = vjp(torch.ones_like(value))
    assert value.dtype == (torch.float64 if base == torch.float64 else torch.float32)
    for name, tensor in tensors.items():
        assert gradients[name].dtype == tensor.dtype
        assert gradients[name].isfinite().all()
    # The same adapters and weights in float64: half precision may be coarse, but not wrong.
    exact = {name: tensor.cpu().double() for name, tensor in tensors.items()}
    value64, vjp64 = forward_vjp(CONFIG, _upcast(base), TOKENS, SPEC.bind(CONFIG, exact))
    tolerance = 0.2 if {base, *(t.dtype for t in tensors.values())} & set(HALVES) else 1e-4
    assert relative_error(value, value64) < tolerance
    assert_gradients(gradients, vjp64(torch.ones_like(value64)), 2 * tolerance)


def _upcast(dtype: torch.dtype) -> Qwen2Weights:
    """Weights rounded to ``dtype``, in float64."""
    weights = init_weights(CONFIG, dtype=torch.float64)
    for view, rounded in zip(
        weights.named_views(CONFIG).values(),
        init_weights(CONFIG, dtype=dtype).named_views(CONFIG).values(),
        strict=True,
    ):
        view.copy_(rounded)
    return weights


def test_float16_on_a_cpu_is_multiplied_in_float32() -> None:
    weights = init_weights(CONFIG, dtype=torch.float16)
    tensors = random_lora(CONFIG, SPEC, 2, dtype=torch.float32)
    with Watch() as watch:
        value, vjp = forward_vjp(CONFIG, weights, TOKENS, SPEC.bind(CONFIG, tensors))
        gradients = vjp(torch.ones_like(value))
    assert watch.dtypes == {torch.float32}
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    value64, vjp64 = forward_vjp(CONFIG, _upcast(torch.float16), TOKENS, SPEC.bind(CONFIG, exact))
    assert relative_error(value, value64) < 1e-5
    assert_gradients(gradients, vjp64(torch.ones_like(value64)), 1e-4)


@pytest.mark.parametrize(
    ("storage", "compute", "tolerance"),
    [
        (torch.float16, torch.bfloat16, 5e-2),
        (torch.float32, torch.bfloat16, 5e-2),
        (torch.bfloat16, torch.float32, 1e-5),
        (torch.float32, torch.float64, 1e-12),
    ],
    ids=str,
)
@pytest.mark.parametrize("prepack", [False, True])
def test_a_compute_dtype_is_taken_and_does_not_change_the_weights(
    storage: torch.dtype, compute: torch.dtype, tolerance: float, prepack: bool
) -> None:
    stored = init_weights(CONFIG, dtype=storage)
    weights = stored.compute_in(compute)
    if prepack and not weights.can_prepack:
        pytest.skip("oneDNN does not multiply in this dtype here")
    weights = weights.prepack() if prepack else weights
    tensors = random_lora(CONFIG, SPEC, 2, dtype=torch.float32)
    with Watch() as watch:
        value, vjp = forward_vjp(CONFIG, weights, TOKENS, SPEC.bind(CONFIG, tensors))
        gradients = vjp(torch.ones_like(value))
    assert watch.dtypes == {compute}
    assert weights.dtype == storage
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    value64, vjp64 = forward_vjp(CONFIG, _upcast(storage), TOKENS, SPEC.bind(CONFIG, exact))
    assert relative_error(value, value64) < tolerance
    expected = vjp64(torch.ones_like(value64))
    together, wanted = (torch.cat([g[name].double().flatten() for name in expected]) for g in (gradients, expected))
    assert relative_error(together, wanted) < max(3 * tolerance, 1e-6)  # the gradients are float32
    assert weights.compute_in(storage if storage != torch.float16 else torch.float32).packed is None


def test_a_compute_dtype_that_a_cpu_cannot_multiply_is_refused() -> None:
    weights = init_weights(CONFIG)
    for dtype in (torch.float16, torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match=r"dtype is .*, expected one of \[torch.float32, torch.float64, torch.bfl"):
            weights.compute_in(dtype)  # type: ignore[arg-type]


# Bad input

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown checkpoint": (
        {"checkpoint": "all"},
        r"checkpoint is 'all', expected one of \('none', 'block', 'auto'\)",
    ),
    "a layer too high": ({"layer": 4}, "layer is 4, expected -1 or 0 to 3"),
    "a layer below -1": ({"layer": -2}, "layer is -2, expected -1 or 0 to 3"),
    "a layer in a list": ({"layer": [0, 9]}, "layer is 9, expected -1 or 0 to 3"),
    "a layer that is no integer": ({"layer": [1.0]}, "layer is 1.0, expected -1 or 0 to 3"),
    "no layers": ({"layer": []}, "layer is empty, expected at least one"),
    "an unknown tensor": ({"wrt": ["q_proj"]}, "wrt names 'q_proj', expected names of the bound LoRA tensors"),
    "a tensor of a layer without adapters": (
        {"wrt": list(SPEC.shapes(CONFIG))[:2], "spec": LoraSpec(rank=2, layers_to_transform=(1, 2))},
        r"wrt names 'base_model.model.model.layers.0.*', expected names of",
    ),
    "an id too high": ({"tokens": pack([[1], [67]])}, "token id 67 is outside the vocabulary, expected 0 to 66"),
    "an id below 0": ({"tokens": pack([[1, -1]])}, "token id -1 is outside the vocabulary, expected 0 to 66"),
    "too many tokens": (
        {"tokens": pack([[1], [2] * 65])},
        "sequence 1 has 65 tokens, expected at most max_position_embeddings = 64",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named_before_anything_is_multiplied(options: dict[str, Any], message: str) -> None:
    with Watch() as watch, pytest.raises(ValueError, match=message):
        run(**options)
    assert watch.gemms == []


def test_a_lora_on_another_device_is_named() -> None:
    tensors = {name: tensor.to("meta") for name, tensor in random_lora(CONFIG, SPEC).items()}
    with pytest.raises(ValueError, match=r"LoRA tensor '.*' is on meta, expected cpu like the weights"):
        forward_vjp(CONFIG, WEIGHTS, TOKENS, SPEC.bind(CONFIG, tensors))


@pytest.mark.parametrize(
    "shape", [(), (24,), (4, 24), (3, 24), (1, 4, 24), (3, 4, 23), (3, 5, 24), (3, 1, 4, 24)], ids=str
)
def test_a_cotangent_of_another_shape_is_refused(shape: Sequence[int]) -> None:
    _, vjp = run()
    with pytest.raises(ValueError, match=r"cotangent has shape \(.*\), expected \(3, 4, 24\) like the value"):
        vjp(torch.ones(shape))
    assert vjp(torch.ones(3, 4, 24)), "a cotangent that was refused used the vjp up"
    _, vjp = run(layer=(0, -1))
    with pytest.raises(ValueError, match=r"expected \(3, 2, 4, 24\) like the value"):
        vjp(torch.ones(3, 4, 24))


def test_a_second_call_of_vjp_is_refused() -> None:
    value, vjp = run()
    vjp(torch.ones_like(value))
    with pytest.raises(ValueError, match="vjp was called already, expected one call for each forward_vjp"):
        vjp(torch.ones_like(value))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_blocks_computed_again_give_the_bits_of_blocks_that_are_kept(dtype: torch.dtype) -> None:
    weights, results = init_weights(CONFIG, dtype=dtype), []
    lora = SPEC.bind(CONFIG, random_lora(CONFIG, SPEC, 3, dtype=torch.float32))
    for checkpoint in ("none", "block"):
        value, vjp = forward_vjp(CONFIG, weights, TOKENS, lora, checkpoint=checkpoint)
        results.append([value, *vjp(torch.ones_like(value)).values()])
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))
