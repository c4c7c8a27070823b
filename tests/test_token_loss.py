"""The language model's loss through a frozen head, against torch on full logits; through adapters, against PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import CONFIGS, assert_gradients, call, hf_model, one_by_one, peft_model, random_lora, relative_error
from reference import tiny_config as tiny
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_functional import LoraSpec, init_weights, pack, pack_each
from qwen_functional.forward import forward_vjp
from qwen_functional.heads import Hidden, TokenLoss
from qwen_functional.ops import lm_head
from qwen_functional.ops.lm_head import Ordered, StateTargets, Targets, lm_head_divergence, lm_head_loss

F64 = torch.float64
V, H = 53, 8
SPEC = LoraSpec(rank=3, alpha=7)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def drawn_targets(n: int, n_rows: int, k: int = 1, seed: int = 0) -> Targets:
    """Targets for random rows, some of them repeated, with random weights, one of them 0."""
    chance = torch.Generator().manual_seed(seed)
    rows = torch.randint(n_rows, (n,), generator=chance)
    indices = torch.stack([torch.randperm(V, generator=chance)[:k] for _ in range(n)])
    probs = torch.rand(n, k, generator=chance, dtype=F64)
    probs = torch.ones(n, 1, dtype=F64) if k == 1 else 0.9 * probs / probs.sum(1, keepdim=True)
    weights = torch.rand(n, generator=chance, dtype=F64)
    weights[0] = 0
    return Targets(rows, indices, probs, weights)


def loss(
    h: Tensor, weight: Tensor, targets: Targets, label_smoothing: float = 0.0, **options: Any
) -> tuple[Tensor, Tensor | None]:
    dtype = F64 if h.dtype == F64 else torch.float32
    return lm_head_loss(h, weight, Ordered.of(targets, h.device, dtype, label_smoothing), **options)


def whole_logits(h: Tensor, weight: Tensor, targets: Targets, smoothing: float, temperature: float) -> Tensor:
    """The losses (T,), by torch's own functions on all logits."""
    log_q = F.log_softmax(h @ weight.T / temperature, -1)[targets.rows]
    p = torch.zeros(len(targets.rows), V, dtype=F64).scatter_add_(1, targets.indices, targets.probs)
    entropy = torch.special.xlogy(targets.probs, targets.probs).sum(1)
    smooth = (1 - smoothing) * p + smoothing * p.sum(1, keepdim=True) / V
    return targets.weights * (entropy - (smooth * log_q).sum(1))


@pytest.mark.parametrize("rows_at_once", [1, 4, 256])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(("smoothing", "temperature"), [(0.0, 1.0), (0.1, 1.0), (0.0, 2.5), (0.3, 0.7)])
def test_losses_and_their_gradient_equal_those_of_whole_logits(
    rows_at_once: int, k: int, smoothing: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "ROWS", rows_at_once)
    monkeypatch.setattr(lm_head, "_CACHED", 4 * V * 2)
    h, weight, targets = normal(12, H).requires_grad_(), normal(V, H, seed=1), drawn_targets(17, 11, k)  # one has none
    expected = whole_logits(h, weight, targets, smoothing, temperature)
    (gradient,) = torch.autograd.grad(expected.sum(), h)
    options: dict[str, Any] = {"label_smoothing": smoothing, "temperature": temperature}
    losses, dh = loss(h.detach(), weight, targets, **options)
    assert relative_error(losses, expected.detach()) <= 1e-13
    assert dh is not None
    assert relative_error(dh, gradient) <= 1e-13
    alone, none = loss(h.detach(), weight, targets, **options, keep=False)
    assert none is None
    assert relative_error(alone, losses) <= 1e-14


@pytest.mark.parametrize("of_states", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_losses_and_gradient_are_float32_unless_the_states_are_float64(dtype: torch.dtype, of_states: bool) -> None:
    h, weight, drawn = normal(11, H).to(dtype), normal(V, H, seed=1).to(dtype), drawn_targets(17, 11)
    if of_states:
        found = lm_head_divergence(h, weight, StateTargets(drawn.rows, normal(17, H), drawn.weights))
    else:
        found = loss(h, weight, drawn)
    assert {one.dtype for one in found if one is not None} == {F64 if dtype == F64 else torch.float32}


def test_cross_entropy_is_torchs() -> None:
    h, weight = normal(9, H), normal(V, H, seed=1)
    tokens, weights = torch.randint(V, (9,)), torch.rand(9, dtype=F64)
    targets = Targets.of_tokens(torch.arange(9), tokens, weights)
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(h @ weight.T, tokens, reduction="none", label_smoothing=smoothing) * weights
        assert relative_error(loss(h, weight, targets, label_smoothing=smoothing)[0], expected) <= 1e-13


def test_a_whole_distribution_gives_torchs_kl_and_its_largest_part_may_give_less_than_zero() -> None:
    h, weight, other = normal(6, H), normal(V, H, seed=1), normal(6, V, seed=2)
    log_p = other.log_softmax(-1)
    whole = Targets(torch.arange(6), torch.arange(V).expand(6, V), log_p.exp(), torch.ones(6, dtype=F64))
    expected = F.kl_div((h @ weight.T).log_softmax(-1), log_p, reduction="none", log_target=True).sum(1)
    assert relative_error(loss(h, weight, whole)[0], expected) <= 1e-12
    own = (h @ weight.T).log_softmax(-1).topk(3)
    part = Targets(torch.arange(6), own.indices, 0.5 * own.values.exp(), torch.ones(6, dtype=F64))
    assert (loss(h, weight, part)[0] < 0).all()  # the mass that p leaves out does not count


@pytest.mark.parametrize("rows_at_once", [1, 4, 256])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_from_a_teachers_states_is_that_of_whole_logits(
    rows_at_once: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "ROWS", rows_at_once)
    monkeypatch.setattr(lm_head, "_CACHED", 4 * V * 2)
    h, weight, states = normal(12, H).requires_grad_(), normal(V, H, seed=1), normal(17, H, seed=2)
    rows, weights = torch.randint(11, (17,)), torch.rand(17, dtype=F64)
    log_p, log_q = ((x @ weight.T / temperature).log_softmax(-1) for x in (states, h[rows]))
    expected = weights * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    (gradient,) = torch.autograd.grad(expected.sum(), h)
    targets = StateTargets(rows, states, weights)
    losses, dh = lm_head_divergence(h.detach(), weight, targets, temperature=temperature)
    assert relative_error(losses, expected.detach()) <= 1e-12
    assert dh is not None
    assert relative_error(dh, gradient) <= 1e-12
    alone, none = lm_head_divergence(h.detach(), weight, targets, temperature=temperature, keep=False)
    assert none is None
    assert torch.equal(alone, losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_a_narrow_dtype_the_gradient_is_no_further_off_than_torchs(dtype: torch.dtype) -> None:
    """Even where the model is nearly certain, and softmax − p is a difference of nearly equal numbers."""
    weight = normal(V, H, seed=1).to(dtype)
    tokens = torch.arange(40) % V
    h = (6 * weight[tokens] / weight[tokens].norm(dim=1, keepdim=True) + normal(40, H, seed=3).to(dtype)).to(dtype)
    targets = Targets.of_tokens(torch.arange(40), tokens, torch.ones(40))
    wide = h.double().requires_grad_()
    exact = F.cross_entropy(wide @ weight.double().T, tokens, reduction="none")
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    narrow = h.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(F.cross_entropy((narrow @ weight.T).float(), tokens, reduction="sum"), narrow)
    losses, dh = loss(h, weight, targets)
    assert losses.dtype == torch.float32
    assert dh is not None
    assert relative_error(dh, expected) <= 1.1 * relative_error(theirs, expected)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made, not counting views."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


def test_no_more_than_a_few_rows_of_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "ROWS", 4)
    weight, peaks = normal(5000, H, seed=1), []
    for n in (16, 160):
        targets = Targets.of_tokens(torch.arange(n), torch.arange(n), torch.ones(n))
        h = normal(n, H)
        with Largest() as largest:
            loss(h, weight, targets)
        peaks.append(largest.numel)
    assert peaks == [4 * 5000] * 2


# --- Through adapters -------------------------------------------------------------------------------------

EXAMPLES: list[list[tuple[list[int], list[int]]]] = [
    [([3, 1, 4], [1, 5, 9]), ([3, 1, 4], [2, 6]), ([7, 7], [8])],
    [([1], [2, 3, 4, 5, 6, 7, 8])],
    [([5, 5, 5], [5, 5]), ([5, 5, 5, 5], [1])],
]


def packed(examples: Sequence[Sequence[tuple[list[int], list[int]]]]) -> tuple[Any, list[Targets]]:
    tokens = pack_each([[prompt + completion[:-1] for prompt, completion in own] for own in examples])
    targets = []
    for tree, own in zip(tokens, examples, strict=True):
        rows = torch.cat([path[len(p) - 1 :] for path, (p, _) in zip(tree.paths, own, strict=True)])
        wanted = torch.tensor([token for _, completion in own for token in completion])
        weights = torch.cat([torch.full((len(c),), 1 / len(c) / len(own), dtype=F64) for _, c in own])
        targets.append(Targets.of_tokens(rows, wanted, weights))
    return tokens, targets


def in_peft(
    model: Any, tensors: dict[str, Tensor], loss: Callable[[Tensor, list[int]], Tensor], cotangent: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values and gradients per adapter and example; ``loss`` takes a completion and the logits that predict it."""
    values, gradients = list[Tensor](), []
    for own, examples in zip(one_by_one(tensors), EXAMPLES, strict=True):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
        each = []
        for prompt, completion in examples:
            logits = call(model, leaves, input_ids=torch.tensor([prompt + completion])).logits[0]
            each.append(loss(logits[len(prompt) - 1 : -1], completion))
        value = torch.stack(each).mean()
        value.backward(cotangent[len(values)])
        values.append(value.detach())
        gradients.append({n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()})
    return torch.stack(values), {name: torch.stack([one[name] for one in gradients]) for name in tensors}


def cross_entropy(smoothing: float) -> Callable[[Tensor, list[int]], Tensor]:
    return lambda logits, tokens: F.cross_entropy(logits, torch.tensor(tokens), label_smoothing=smoothing)


@pytest.mark.parametrize("checkpoint", ["none", "block"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["grouped heads", "tied", "windows", "qwen3", "one block"])
def test_cross_entropy_of_own_examples_equals_peft(name: str, smoothing: float, checkpoint: str) -> None:
    config = tiny(**CONFIGS[name])
    weights, tensors = init_weights(config, dtype=F64), random_lora(config, SPEC, 3)
    tokens, targets = packed(EXAMPLES)
    heads = [TokenLoss(targets, label_smoothing=smoothing)]
    (value,), vjp = forward_vjp(config, weights, tokens, SPEC.bind(config, tensors), checkpoint, heads=heads)
    cotangent = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    model = peft_model(hf_model(config, weights), SPEC)
    expected, gradients = in_peft(model, tensors, cross_entropy(smoothing), cotangent)
    assert relative_error(value, expected) <= 1e-11
    assert_gradients(vjp((cotangent,)), gradients)


def test_examples_that_all_adapters_share_give_what_each_alone_gives() -> None:
    config = tiny()
    weights, tensors = init_weights(config, dtype=F64), random_lora(config, SPEC, 3)
    lora, cotangent = SPEC.bind(config, tensors), torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    (tree,), (targets,) = packed(EXAMPLES[:1])
    (shared,), shared_vjp = forward_vjp(config, weights, tree, lora, heads=[TokenLoss([targets])])
    each = pack_each([[p + c[:-1] for p, c in EXAMPLES[0]]] * 3)
    (own,), own_vjp = forward_vjp(config, weights, each, lora, heads=[TokenLoss([targets] * 3)])
    assert relative_error(shared, own) <= 1e-13
    assert_gradients(shared_vjp((cotangent,)), own_vjp((cotangent,)), 1e-12)


def test_a_loss_and_hidden_states_go_back_together() -> None:
    config = tiny()
    weights, tensors = init_weights(config, dtype=F64), random_lora(config, SPEC, 3)
    lora, (tokens, targets) = SPEC.bind(config, tensors), packed(EXAMPLES)
    heads = TokenLoss(targets), Hidden(layer=(1, -1))
    values, vjp = forward_vjp(config, weights, tokens, lora, heads=heads)
    cotangents = [normal(*value.shape, seed=5) for value in values]
    together = vjp(cotangents)
    parts = []
    for index, cotangent in enumerate(cotangents):
        _, back = forward_vjp(config, weights, tokens, lora, heads=heads[index : index + 1])
        parts.append(back((cotangent,)))
    assert_gradients(together, {name: sum(part[name] for part in parts) for name in together}, 1e-12)  # type: ignore[misc]


def test_a_head_stored_in_float16_is_multiplied_in_float32_on_a_cpu() -> None:
    config = tiny()
    weights, tensors = init_weights(config, dtype=torch.float16), random_lora(config, SPEC, 3, dtype=torch.float32)
    tokens, targets = packed(EXAMPLES)
    (value,), vjp = forward_vjp(config, weights, tokens, SPEC.bind(config, tensors), heads=[TokenLoss(targets)])
    cotangent = torch.tensor([1.0, -2.0, 0.5])
    model, wide = peft_model(hf_model(config, weights).double(), SPEC), {n: t.double() for n, t in tensors.items()}
    expected, gradients = in_peft(model, wide, cross_entropy(0.0), cotangent)
    assert relative_error(value, expected) <= 1e-5
    assert_gradients(vjp((cotangent,)), gradients, 1e-4)


def test_without_gradients_nothing_is_kept() -> None:
    config = tiny()
    weights, lora = init_weights(config, dtype=F64), SPEC.bind(config, random_lora(config, SPEC, 3))
    tokens, targets = packed(EXAMPLES)
    (value,), vjp = forward_vjp(config, weights, tokens, lora, heads=[TokenLoss(targets)], wrt=())
    (same,), _ = forward_vjp(config, weights, tokens, lora, heads=[TokenLoss(targets)])
    assert relative_error(value, same) <= 1e-14
    assert vjp._way_back.kept == (None,)  # type: ignore[union-attr]
    assert vjp((torch.ones(3, dtype=F64),)) == {}


def test_bad_targets_are_refused() -> None:
    config = tiny()
    weights, lora = init_weights(config, dtype=F64), SPEC.bind(config, random_lora(config, SPEC, 3))
    tokens, targets = packed(EXAMPLES)

    def refused(message: str, heads: Any, weights: Any = weights, tokens: Any = tokens) -> None:
        with pytest.raises(ValueError, match=message):
            forward_vjp(config, weights, tokens, lora, heads=heads)

    refused("there are 2 targets, expected one for each row", [TokenLoss(targets[:2])])
    refused("weights have no lm_head, which a loss needs", [TokenLoss(targets)], replace(weights, lm_head=None))
    odd = replace(targets[0], indices=torch.full_like(targets[0].indices, 61))
    refused("token id 61 is outside the vocabulary, expected 0 to 60", [TokenLoss([odd, *targets[1:]])])
    refused("there are 3 targets, expected 1", [TokenLoss(targets)], tokens=pack([list(range(9))] * 2))
    refused("targets 0 are for rows 2 to 7, expected some of 0 to 2", [TokenLoss(targets)], tokens=pack([[1, 2, 3]]))
    states = [StateTargets(one.rows, torch.ones(len(one.rows), config.hidden_size), one.weights) for one in targets]
    refused("label_smoothing is 0.1, expected 0 for targets from", [TokenLoss(states, label_smoothing=0.1)])
    none = Targets.of_tokens(*(torch.empty(0, dtype=torch.int64) for _ in range(3)))
    refused("targets 0 are for rows none, expected some of 0 to", [TokenLoss([none, *targets[1:]])])
    for options, message in (
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected from 0 to below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"temperature": 0}, "temperature is 0, expected above 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenLoss(targets, **options)
