"""Conditions: the hidden states of prompts, through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lora_delta.embedded import embedded_checkpoint
from lora_delta.generate import conditions
from lora_delta.generate.conditions import Condition, PromptEncoder
from lora_delta.probes.tokenization import load_tokenizer
from qwen_functional import load_pretrained

PROMPTS = ["write it backwards", "write it", "a", "write it backwards"]


def encoder_on(device: str, **options: Any) -> PromptEncoder:
    folder = embedded_checkpoint()
    config, weights = load_pretrained(folder, dtype=torch.float32, device=device)
    return PromptEncoder(config, weights, load_tokenizer(folder), **options)


@pytest.fixture(scope="module")
def encoder(device: str) -> PromptEncoder:
    return encoder_on(device)


def test_a_prompts_states_are_those_of_transformers(encoder: PromptEncoder) -> None:
    model = transformers.Qwen2Model.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    for prompt, states in zip(PROMPTS, encoder(PROMPTS), strict=True):
        ids = torch.tensor([encoder.tokenizer.encode(prompt).ids])
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0]
        assert states.shape == expected.shape
        assert states.device == expected.device == torch.device("cpu")
        assert (states - expected).norm() <= 1e-5 * expected.norm()


def test_a_prompt_is_computed_once(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoder(PROMPTS)
    monkeypatch.setattr("lora_delta.generate.conditions.forward_vjp", None)
    again = encoder.lazily(PROMPTS)
    assert all(again[index] is states for index, states in enumerate(first))
    assert again[-1] is first[-1]
    assert [one is other for one, other in zip(again[1:3], first[1:3], strict=True)] == [True, True]
    with pytest.raises(IndexError):
        again[4]


def test_a_longer_prompt_is_cut(device: str) -> None:
    short = encoder_on(device, max_length=5, layer=1)
    assert short(["write it backwards"])[0].shape == (5, short.config.hidden_size)


MANY = [f"task {index}, {'do it ' * (index % 5)}now" for index in range(21)]


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each pass has, from now on."""
    sizes: list[int] = []
    tokenize = conditions.tokenize_probes

    def counted(tokenizer: Any, texts: Sequence[str], max_length: int) -> Any:
        sizes.append(len(texts))
        return tokenize(tokenizer, texts, max_length)

    monkeypatch.setattr(conditions, "tokenize_probes", counted)
    return sizes


def test_only_the_pass_of_a_prompt_that_is_asked_for_is_computed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = encoder_on(device)
    sizes, states = passes_of(monkeypatch), fresh.lazily(MANY)
    assert len(states) == 21
    assert not sizes
    assert states[20].shape == states[-1].shape
    assert sizes == [5]
    states[3], states[7]
    assert sizes == [5, 8]
    fresh(MANY)
    assert sizes == [5, 8, 8]


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_states_are_the_same_to_the_bit_whatever_is_kept_and_what_is_kept_is_bounded(
    passes: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoder_on(device)
    expected = whole(MANY)
    largest = max(sum(one.nbytes for one in expected[start : start + 8]) for start in (0, 8, 16))
    bound = passes * largest
    short = encoder_on(device, keep_bytes=bound)
    sizes, states, order = passes_of(monkeypatch), short.lazily(MANY), [20, 3, 12, 4, 11, 20, 0, 9, 17, 2]
    for index in order:
        assert torch.equal(states[index], expected[index]), index
        assert kept_bytes(short) <= bound
    assert len(sizes) == {0: 10, 1: 10, 2: 8}[passes]
    assert (kept_bytes(short) > 0) == (passes > 0)


def kept_bytes(encoder: PromptEncoder) -> int:
    kept: list[Tensor] = [one for states in encoder._kept.values() for one in states]
    return sum(one.nbytes for one in kept)


def test_what_was_used_longest_ago_goes_first(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[f"{word}ish"] for word in ("red", "sea", "oak")]
    size = encoder_on(device)(prompts[0])[0].nbytes
    short = encoder_on(device, keep_bytes=2 * size)
    assert {short(one)[0].nbytes for one in prompts[:2]} == {size}
    short(prompts[0])
    short(prompts[2])  # takes the room of the second
    sizes = passes_of(monkeypatch)
    short(prompts[0])
    assert not sizes
    short(prompts[1])
    assert sizes == [1]


def test_padding_is_no_token(encoder: PromptEncoder) -> None:
    states = encoder(PROMPTS)
    condition = Condition.collate(states)
    assert condition.states.shape == (4, 18, 128)
    assert condition.mask.sum(1).tolist() == [18, 8, 1, 18]
    for row, one in enumerate(states):
        assert torch.equal(condition.states[row][condition.mask[row]], one)


def test_a_condition_moves_as_a_whole(device: str) -> None:
    condition = Condition.collate([torch.ones(2, 3), torch.ones(1, 3)])
    moved = condition.to(device)
    assert moved.states.device.type == moved.mask.device.type == device
    again = Condition.collate([states[mask] for states, mask in zip(moved.states, moved.mask, strict=True)])
    assert again.mask.device == moved.mask.device
    assert torch.equal(again.states.cpu(), condition.states)
    assert torch.equal(again.mask.cpu(), condition.mask)


@pytest.mark.parametrize("prompts", [[""], ["a", ""]])
def test_an_empty_prompt_is_refused(encoder: PromptEncoder, prompts: list[str]) -> None:
    for call in (encoder, encoder.lazily):
        with pytest.raises(ValueError, match=r"probe . is empty"):
            call(prompts)


@pytest.mark.parametrize("layer", [-2, 4, 99])
def test_a_layer_that_the_model_lacks_is_refused(layer: int, device: str) -> None:
    with pytest.raises(ValueError, match=f"layer is {layer}, expected -1 or 0 to 3"):
        encoder_on(device, layer=layer)


def test_states_are_those_after_the_block_that_was_asked_for(device: str) -> None:
    model = transformers.Qwen2Model.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    lower = encoder_on(device, layer=1)
    ids = torch.tensor([lower.tokenizer.encode(PROMPTS[0]).ids])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[2][0]
    assert (lower(PROMPTS)[0] - expected).norm() <= 1e-5 * expected.norm()
