"""Deltas on each adapter's own texts, and their losses, against transformers and PEFT, differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_checkpoint
from devices import DEVICES, tolerance
from reference import call, hf_model, one_by_one, peft_model, random_lora, relative_error, tiny_config
from torch import Tensor
from torch.nn import functional as F

from lora_delta import DeltaTarget, DifferentiableTextDelta
from lora_delta.delta_losses import adapters_delta_loss
from qwen_functional import LoraSpec, init_weights, load_pretrained

F64 = torch.float64
SPEC = LoraSpec(rank=3, alpha=7)
CONFIG = tiny_config()
WEIGHTS = init_weights(CONFIG, dtype=F64)
ON = {device: WEIGHTS if device == "cpu" else init_weights(CONFIG, dtype=F64, device=device) for device in DEVICES}
# Shared prompts, a duplicate text, a completion of one token, no prompt at all.
EXAMPLES: list[list[tuple[list[int], list[int]]]] = [
    [([3, 1, 4], [1, 5, 9]), ([3, 1, 4], [2, 6]), ([7, 7], [8])],
    [([], [2, 3, 4, 5, 6, 7, 8])],
    [([5, 5, 5], [5, 5]), ([5, 5, 5], [5, 5]), ([5, 5, 5, 5], [1])],
]
CONTEXTS = [[[20, 21, *prompt] for prompt, _ in own] for own in EXAMPLES]
LAYERS: list[int | tuple[int, ...]] = [-1, (0, 1, -1)]


def make(device: str = "cpu", **options: Any) -> DifferentiableTextDelta:
    return DifferentiableTextDelta(CONFIG, ON[device], SPEC, **options)


def leaves(tensors: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    return {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in tensors.items()}


def hidden(
    model: Any, adapter: dict[str, Tensor] | None, ids: Sequence[int], rows: slice, layer: int | tuple[int, ...]
) -> Tensor:
    """(layers, rows, H) of one text, also for a single ``layer``."""
    states = call(model, adapter, input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    of = [layer] if isinstance(layer, int) else layer
    return torch.stack([states[one + 1 if one >= 0 else -1][0, rows] for one in of])


def rows_of(prompt: Sequence[int], completion: Sequence[int], positions: str) -> slice:
    n = len(prompt) + len(completion)
    return {"completion": slice(max(0, len(prompt) - 1), n - 1), "last": slice(n - 1, n), "all": slice(0, n)}[positions]


def in_peft(
    tensors: dict[str, Tensor], positions: str, layer: int | tuple[int, ...], device: str = "cpu"
) -> list[Tensor]:
    """The deltas (layers, P, H) of each adapter."""
    bare, model = hf_model(CONFIG, ON[device]), peft_model(hf_model(CONFIG, ON[device]), SPEC)
    found = []
    for own, adapter in zip(EXAMPLES, one_by_one(tensors), strict=True):
        parts = []
        for prompt, completion in own:
            read = (prompt + completion, rows_of(prompt, completion, positions), layer)
            parts.append(hidden(model, adapter, *read) - hidden(bare, None, *read))
        found.append(torch.cat(parts, 1))
    return found


def padded(deltas: Sequence[Tensor], pooling: str, single: bool) -> Tensor:
    n = max(one.shape[1] for one in deltas)
    each = [one.mean(1) if pooling == "mean" else F.pad(one, (0, 0, 0, n - one.shape[1])) for one in deltas]
    return torch.stack(each)[:, 0] if single else torch.stack(each)


def assert_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], most: float = 1e-9) -> None:
    floor = 1e-5 * max(float(tensor.grad.norm()) for tensor in theirs.values() if tensor.grad is not None)
    for name, tensor in theirs.items():
        found, expected = ours[name].grad, tensor.grad
        assert found is not None
        assert expected is not None
        assert float((found.cpu() - expected).norm()) <= most * max(floor, float(expected.norm())), name


@pytest.mark.parametrize("pooling", ["none", "mean"])
@pytest.mark.parametrize("positions", ["completion", "last", "all"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("per_pass", [None, 1, 2])
def test_deltas_and_gradients_are_those_of_peft(
    device: str, layer: int | tuple[int, ...], positions: str, pooling: str, per_pass: int | None
) -> None:
    tensors = random_lora(CONFIG, SPEC, 3)
    ours, theirs = leaves(tensors, device), leaves(tensors)
    delta = make(device, layer=layer, positions=positions, pooling=pooling, adapters_per_pass=per_pass)
    value = delta(ours, EXAMPLES).cpu()
    expected = padded(in_peft(theirs, positions, layer, device), pooling, isinstance(layer, int))
    assert relative_error(value.detach(), expected.detach()) <= tolerance(device, 1e-11)
    cotangent = torch.randn(value.shape, dtype=F64)
    (value * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    assert_gradients(ours, theirs)


def test_the_delta_of_one_adapter_has_no_leading_dimension() -> None:
    tensors = random_lora(CONFIG, SPEC)
    batch = {name: tensor[None] for name, tensor in tensors.items()}
    delta = make()
    assert torch.equal(delta(tensors, EXAMPLES[:1]), delta(batch, EXAMPLES[:1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["completion", "all"])
def test_a_lora_of_zeros_has_deltas_of_exactly_zero(positions: str, dtype: torch.dtype) -> None:
    weights = init_weights(CONFIG, dtype=dtype)
    zeros = {name: torch.zeros_like(one) for name, one in random_lora(CONFIG, SPEC, 3, dtype=dtype).items()}
    delta = DifferentiableTextDelta(CONFIG, weights, SPEC, layer=(0, -1), positions=positions)
    assert torch.equal(delta(zeros, EXAMPLES), torch.zeros_like(delta(zeros, EXAMPLES)))
    value = delta(random_lora(CONFIG, SPEC, 3, dtype=dtype), EXAMPLES)
    assert all(bool(one.abs().sum() > 0) for one in value)


def plain_loss(deltas: list[Tensor], targets: list[Tensor], mse: float, cosine: float, pooling: str) -> Tensor:
    """The mean over adapters of the formula in the docstring."""
    losses = []
    for d, w in zip(deltas, targets, strict=True):
        d, w = (one.mean(1, keepdim=True) if pooling == "mean" else one for one in (d, w))
        ratio = (d - w).square().sum((1, 2)) / w.square().sum((1, 2))
        losses.append((mse * ratio + cosine * (1 - F.cosine_similarity(d, w, dim=-1)).mean(1)).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("pooling", ["none", "mean"])
@pytest.mark.parametrize("positions", ["completion", "last", "all"])
@pytest.mark.parametrize("target", ["teacher", "context", "both"])
@pytest.mark.parametrize("per_pass", [None, 2])
def test_the_loss_to_a_teacher_and_to_the_prompted_base_is_that_of_peft(
    device: str, target: str, positions: str, pooling: str, per_pass: int | None
) -> None:
    layer = (1, -1)
    tensors, teachers = random_lora(CONFIG, SPEC, 3), random_lora(CONFIG, SPEC, 3, seed=9)
    bare, model = hf_model(CONFIG, ON[device]), peft_model(hf_model(CONFIG, ON[device]), SPEC)
    wanted = []
    for own, contexts, adapter in zip(EXAMPLES, CONTEXTS, one_by_one(teachers), strict=True):
        parts = []
        for (prompt, completion), context in zip(own, contexts, strict=True):
            rows = rows_of(prompt, completion, positions)
            base = hidden(bare, None, prompt + completion, rows, layer)
            before = context if target != "teacher" else prompt
            more = len(before) - len(prompt)
            moved = slice(rows.start + more, rows.stop + more)
            who, what = (bare, None) if target == "context" else (model, adapter)
            parts.append(hidden(who, what, before + completion, moved, layer) - base)
        wanted.append(torch.cat(parts, 1).detach())
    ours, theirs = leaves(tensors, device), leaves(tensors)
    delta = make(device, layer=layer, positions=positions, pooling=pooling, adapters_per_pass=per_pass)
    found = delta.target(
        EXAMPLES,
        tensors=None if target == "context" else leaves(teachers, device),
        contexts=None if target == "teacher" else CONTEXTS,
    )
    for one, expected_one in zip(found.deltas, wanted, strict=True):
        assert relative_error(one.cpu(), expected_one) <= tolerance(device, 1e-11)
    loss = partial(adapters_delta_loss, mse_weight=0.7, cosine_weight=1.3)
    value = delta.mean_loss(ours, EXAMPLES, found, loss).cpu()
    expected = plain_loss(in_peft(theirs, positions, layer, device), wanted, 0.7, 1.3, pooling)
    assert relative_error(value.detach(), expected.detach()) <= tolerance(device, 1e-11)
    value.backward()
    expected.backward()
    assert_gradients(ours, theirs)


def test_an_adapter_that_does_what_its_teacher_does_has_no_loss() -> None:
    tensors = random_lora(CONFIG, SPEC, 3)
    delta = make()
    target = delta.target(EXAMPLES, tensors=tensors)
    assert float(delta.mean_loss(tensors, EXAMPLES, target)) <= 1e-20


def test_the_loss_of_targets_that_are_zero_is_finite() -> None:
    tensors = leaves(random_lora(CONFIG, SPEC, 3))
    delta = make()
    base = delta.target(EXAMPLES, tensors={name: torch.zeros_like(one) for name, one in tensors.items()})
    value = delta.mean_loss(tensors, EXAMPLES, base)
    value.backward()
    assert math.isfinite(value.item())
    assert all(bool(one.grad.isfinite().all()) for one in tensors.values() if one.grad is not None)


def test_a_step_without_gradients_keeps_nothing_and_has_the_same_value() -> None:
    tensors = random_lora(CONFIG, SPEC, 3)
    delta = make()
    target = delta.target(EXAMPLES, contexts=CONTEXTS)
    with torch.no_grad():
        value = delta.mean_loss(tensors, EXAMPLES, target)
    assert not value.requires_grad
    assert torch.equal(value, delta.mean_loss(leaves(tensors), EXAMPLES, target).detach())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"positions": "first"}, "positions is 'first', expected one of"),
    ({"pooling": "max"}, "pooling is 'max', expected one of"),
    ({"layer": 7}, "layer"),
    ({"adapters_per_pass": 0}, "adapters_per_pass is 0"),
    ({"checkpoint": "some"}, "checkpoint"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_an_option_that_is_off_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_targets_of_other_texts_are_refused() -> None:
    tensors, delta = random_lora(CONFIG, SPEC, 3), make()
    target = delta.target(EXAMPLES, contexts=CONTEXTS)
    with pytest.raises(ValueError, match="target is for 2 adapters, expected 3 to match the examples"):
        delta.mean_loss(tensors, EXAMPLES, DeltaTarget(target.base[:2], target.wanted[:2]))
    wanted = [target.wanted[0], target.wanted[1][:, 1:], target.wanted[2]]
    with pytest.raises(ValueError, match=r"target: wanted of adapter 1 has shape \(1, 5, 24\), expected \(1, 6, 24\)"):
        delta.mean_loss(tensors, EXAMPLES, DeltaTarget(target.base, wanted))
    with pytest.raises(ValueError, match="tensors and contexts are both None"):
        delta.target(EXAMPLES)
    with pytest.raises(ValueError, match="examples are of length 2, expected a list for each of 3 adapters"):
        delta(tensors, EXAMPLES[:2])


def test_contexts_of_other_examples_are_refused() -> None:
    delta = make(positions="all")
    with pytest.raises(ValueError, match="contexts are for 2 adapters, expected 3 to match the examples"):
        delta.target(EXAMPLES, contexts=CONTEXTS[:2])
    with pytest.raises(ValueError, match="contexts of adapter 0 are for 1 examples, expected 3"):
        delta.target(EXAMPLES, contexts=[CONTEXTS[0][:1], *CONTEXTS[1:]])
    odd = [[CONTEXTS[0][0], [3, 1, 5], CONTEXTS[0][2]], *CONTEXTS[1:]]
    with pytest.raises(ValueError, match="the context of adapter 0, example 1, does not end with its prompt"):
        delta.target(EXAMPLES, contexts=odd)
    assert make().target(EXAMPLES, contexts=odd).deltas  # with only completions read, any context will do


def test_from_pretrained_reads_no_lm_head(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    config, weights = load_pretrained(tmp_path, dtype=F64)
    delta = DifferentiableTextDelta.from_pretrained(tmp_path, SPEC, dtype=F64, device="cpu", positions="last")
    assert delta.weights.lm_head is None
    tensors = random_lora(config, SPEC, 3)
    whole = DifferentiableTextDelta(config, weights, SPEC, positions="last")
    assert relative_error(delta(tensors, EXAMPLES), whole(tensors, EXAMPLES)) <= 1e-12
