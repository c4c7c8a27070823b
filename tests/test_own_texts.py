"""Adapters that each read their own texts: values and gradients against transformers and PEFT, text by text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import (
    CONFIGS,
    SPECS,
    assert_gradients,
    hf_model,
    one_by_one,
    peft_model,
    random_lora,
    reference_value_and_grads,
    relative_error,
    tiny_config,
)
from torch import Tensor

from qwen_functional import LoraSpec, Plan, Qwen2Config, init_weights, pack, pack_each
from qwen_functional.backends.cpu import Cpu
from qwen_functional.forward import forward_vjp
from qwen_functional.heads import Hidden

F64 = torch.float64
SPEC = LoraSpec(rank=3, alpha=7)
# Each adapter's texts: several lengths, a shared prefix, a duplicate, a single token.
TEXTS = [
    [[3, 1, 4, 1, 5], [3, 1, 4, 9, 2, 6], [7]],
    [[8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8], [1, 2]],
    [[5, 4, 3, 2], [5, 4, 3, 2], [5, 4]],
]


# How adapters are computed: all together, each alone, or some of each.
TOGETHER = {
    "together": None,
    "each alone": [slice(0, 1), slice(1, 2), slice(2, 3)],
    "two together": [slice(0, 2), slice(2, 3)],
}


@pytest.fixture(params=TOGETHER)
def groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    own = TOGETHER[request.param]
    if own is not None:
        monkeypatch.setattr(Cpu, "together", lambda self, sizes: own)
    return own


def expected_of(
    config: Qwen2Config, weights: Any, spec: LoraSpec, tensors: dict[str, Tensor], cotangent: Tensor, layer: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients, adapter by adapter; the cotangent is (ΣP, H) or (layers, ΣP, H)."""
    model = peft_model(hf_model(config, weights), spec)
    values, gradients, first = [], [], 0
    for own, texts in zip(one_by_one(tensors), TEXTS, strict=True):
        part = cotangent[..., first : first + len(texts), :][None]
        value, grads = reference_value_and_grads(model, own, texts, part, layer)
        values.append(value[0])
        gradients.append(grads)
        first += len(texts)
    return torch.cat(values, -2), {name: torch.stack([one[name] for one in gradients]) for name in tensors}


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("checkpoint", ["none", "block", "auto"])
@pytest.mark.parametrize("layer", [-1, 1, (0, -1)], ids=str)
def test_own_texts_equal_those_alone_in_peft(layer: Any, checkpoint: str) -> None:
    config = tiny_config()
    weights, tensors = init_weights(config, dtype=F64), random_lora(config, SPEC, 3)
    options: dict[str, Any] = {"layer": layer, "checkpoint": checkpoint}
    value, vjp = forward_vjp(config, weights, pack_each(TEXTS), SPEC.bind(config, tensors), **options)
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    expected, gradients = expected_of(config, weights, SPEC, tensors, cotangent, layer)
    assert relative_error(value, expected) <= 1e-11
    assert_gradients(vjp(cotangent), gradients)


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_own_texts_equal_those_alone_in_peft_for_every_config(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    weights, tensors = init_weights(config, dtype=F64), random_lora(config, SPEC, 3)
    value, vjp = forward_vjp(config, weights, pack_each(TEXTS), SPEC.bind(config, tensors))
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    expected, gradients = expected_of(config, weights, SPEC, tensors, cotangent, -1)
    assert relative_error(value, expected) <= 1e-11
    assert_gradients(vjp(cotangent), gradients)


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("spec", SPECS)
def test_own_texts_equal_those_alone_in_peft_for_every_spec(spec: str) -> None:
    config = tiny_config()
    weights, tensors = init_weights(config, dtype=F64), random_lora(config, SPECS[spec], 3)
    value, vjp = forward_vjp(config, weights, pack_each(TEXTS), SPECS[spec].bind(config, tensors))
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    expected, gradients = expected_of(config, weights, SPECS[spec], tensors, cotangent, -1)
    assert relative_error(value, expected) <= 1e-11
    assert_gradients(vjp(cotangent), gradients)


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("read", ["last", "all"])
def test_the_same_texts_for_each_adapter_give_the_numbers_of_shared_ones(read: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(Cpu, "chunks", lambda self, config, n_tokens, n, compute: [slice(0, 1), slice(1, n)])
    config = tiny_config(**CONFIGS["windows"])
    weights, tensors = init_weights(config, dtype=F64), random_lora(config, SPEC, 3)
    lora = SPEC.bind(config, tensors)
    shared, shared_vjp = forward_vjp(config, weights, pack(TEXTS[0]), lora, read=read)
    own, own_vjp = forward_vjp(config, weights, pack_each([TEXTS[0]] * 3), lora, read=read)
    assert relative_error(own, shared.flatten(0, 1)) <= 1e-13
    cotangent = torch.randn(own.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert_gradients(own_vjp(cotangent), shared_vjp(cotangent.view(shared.shape)), 1e-12)


def test_the_bare_model_reads_the_texts_of_each() -> None:
    config = tiny_config()
    weights = init_weights(config, dtype=F64)
    value, _ = forward_vjp(config, weights, pack_each(TEXTS), wrt=())
    alone = [forward_vjp(config, weights, pack(texts), wrt=())[0][0] for texts in TEXTS]
    assert relative_error(value, torch.cat(alone)) <= 1e-13


@pytest.mark.usefixtures("groups")
def test_several_heads_have_the_gradients_of_their_sum() -> None:
    config = tiny_config()
    weights, tensors = init_weights(config, dtype=F64), random_lora(config, SPEC, 3)
    lora, tokens = SPEC.bind(config, tensors), pack_each(TEXTS)
    heads = Hidden(layer=(0, -1)), Hidden(layer=1, read="all"), Hidden()
    values, vjp = forward_vjp(config, weights, tokens, lora, heads=heads)
    cotangents = [torch.randn(value.shape, dtype=F64) for value in values]
    together, total = vjp(cotangents), dict[str, Tensor]()
    for head, value, cotangent in zip(heads, values, cotangents, strict=True):
        assert isinstance(head.read, str)
        alone, back = forward_vjp(config, weights, tokens, lora, layer=head.layer, read=head.read)
        assert relative_error(value, alone) <= 1e-13
        for name, gradient in back(cotangent).items():
            total[name] = total[name] + gradient if name in total else gradient
    assert_gradients(together, total, 1e-12)


def test_what_is_counted_of_own_texts_is_what_all_of_them_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes and FLOP of adapters computed one by one; computed together, padding counts too."""
    monkeypatch.setattr(Cpu, "together", lambda self, sizes: TOGETHER["each alone"])
    config = tiny_config()
    weights, tensors = init_weights(config, dtype=F64), random_lora(config, SPEC, 3)
    lora = SPEC.bind(config, tensors)
    whole = Plan(config, weights, pack_each(TEXTS), lora).cost
    each = [Plan(config, weights, pack(texts), lora[slice(g, g + 1)]).cost for g, texts in enumerate(TEXTS)]
    assert whole.base_flop() == sum(cost.base_flop() for cost in each)
    assert whole.low_rank_flop() == sum(cost.low_rank_flop() for cost in each)
    assert whole.kept_bytes() == sum(cost.kept_bytes() for cost in each)
    monkeypatch.undo()
    joint = Plan(config, weights, pack_each(TEXTS), lora)
    longest = max(map(len, pack_each(TEXTS)))
    (tables,) = joint.tables
    assert tuple(tables.ids.shape) == (3, longest)
    rows = [[list(range(2, 2 + longest))]] * 3  # one text each, all of it read
    whole = Plan(config, weights, pack_each(rows), lora, read="all").cost
    assert joint.cost.base_flop() == whole.base_flop()


def test_rows_of_few_tokens_go_together_up_to_many_and_long_ones_alone() -> None:
    assert Cpu().together([100] * 5) == [slice(0, 5)]
    assert Cpu().together([100] * 45) == [slice(0, 20), slice(20, 40), slice(40, 45)]
    assert Cpu().together([10, 256, 300, 20, 30]) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert Cpu().together([9000]) == [slice(0, 1)]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "sequences is empty, expected a list of token sequences for each adapter"),
        ("ab", "sequences is a str, expected a list of token sequences for each adapter"),
        ([[[1]], []], "adapter 1: sequences is empty, expected at least one token sequence"),
        ([[[1], []]], "adapter 0: sequence 1 is empty, expected at least one token"),
        ([[[1]], [["x"]]], "adapter 1: sequence 0 holds 'x', expected integer token ids"),
    ],
)
def test_bad_texts_are_refused_by_their_adapter(texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_each(texts)


def test_texts_that_do_not_fit_the_model_or_the_adapters_are_refused() -> None:
    config = tiny_config()
    weights, lora = init_weights(config, dtype=F64), SPEC.bind(config, random_lora(config, SPEC, 3))
    with pytest.raises(ValueError, match="tokens are for 2 adapters, expected 3 as in the LoRA"):
        forward_vjp(config, weights, pack_each(TEXTS[:2]), lora)
    with pytest.raises(ValueError, match="adapter 1: token id 61 is outside the vocabulary"):
        forward_vjp(config, weights, pack_each([[[1]], [[61]], [[1]]]), lora)
    with pytest.raises(ValueError, match="adapter 2: sequence 0 has 65 tokens, expected at most"):
        forward_vjp(config, weights, pack_each([[[1]], [[2]], [[3] * 65]]), lora)
    plan = Plan(config, weights, pack_each(TEXTS), lora)
    with pytest.raises(ValueError, match="the plan is for each adapter's texts"):
        plan.fill(pack(TEXTS[0]))
    with pytest.raises(ValueError, match="plan was made for other tokens"):
        forward_vjp(config, weights, pack_each([TEXTS[1], TEXTS[0], TEXTS[2]]), lora, plan=plan)
    with pytest.raises(ValueError, match="heads is empty, expected at least one"):
        Plan(config, weights, pack_each(TEXTS), lora, heads=[])
