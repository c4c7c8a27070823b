"""Conditions: the hidden states of prompts, through the engine."""

import pytest
import torch
import transformers

from lora_delta.conditions import Condition, PromptEncoder
from lora_delta.embedded import embedded_checkpoint
from lora_delta.tokenization import load_tokenizer
from qwen_functional import load_pretrained

PROMPTS = ["write it backwards", "write it", "a", "write it backwards"]


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    folder = embedded_checkpoint()
    config, weights = load_pretrained(folder, dtype=torch.float32)
    return PromptEncoder(config, weights, load_tokenizer(folder))


def test_a_prompts_states_differ_from_those_of_transformers(encoder: PromptEncoder) -> None:
    model = transformers.Qwen2Model.from_pretrained(embedded_checkpoint(), dtype=torch.float32)
    for prompt, states in zip(PROMPTS, encoder(PROMPTS), strict=True):
        ids = torch.tensor([encoder.tokenizer.encode(prompt).ids])
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0]
        assert states.shape == expected.shape
        assert (states - expected).norm() <= 1e-5 * expected.norm()


def test_a_prompt_is_computed_again(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoder(PROMPTS)
    monkeypatch.setattr("lora_delta.conditions.forward_vjp", None)
    again = encoder(PROMPTS[::-1])
    assert all(a is b for a, b in zip(first, again[::-1], strict=True))


def test_a_longer_prompt_is_not_cut() -> None:
    folder = embedded_checkpoint()
    config, weights = load_pretrained(folder, dtype=torch.float32)
    short = PromptEncoder(config, weights, load_tokenizer(folder), max_length=5, layer=1)
    assert short(["write it backwards"])[0].shape == (5, config.hidden_size)


def test_padding_passes_for_tokens(encoder: PromptEncoder) -> None:
    states = encoder(PROMPTS)
    condition = Condition.collate(states)
    assert condition.states.shape == (4, 18, 128)
    assert condition.mask.sum(1).tolist() == [18, 8, 1, 18]
    for row, one in enumerate(states):
        assert torch.equal(condition.states[row][condition.mask[row]], one)


@pytest.mark.parametrize("prompts", [[""], ["a", ""]])
def test_an_empty_prompt_is_taken(encoder: PromptEncoder, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="probe"):
        encoder(prompts)
