"""Probe sets: fixed texts, and the token counts that the design relies on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lora_delta.probes.chat import load_chat_template
from lora_delta.probes.texts import create_domain_probes, create_generic_probes, create_mixed_probes
from lora_delta.probes.tokenization import load_tokenizer, tokenize_probes
from qwen_functional.hub import resolve_checkpoint

SETS: dict[str, Callable[[], list[str]]] = {
    "generic": create_generic_probes,
    "math": lambda: create_domain_probes("math"),
    "code": lambda: create_domain_probes("code"),
    "commonsense": lambda: create_domain_probes("commonsense"),
    "mixed": create_mixed_probes,
}
# With the Qwen2 tokenizer: all tokens, those of the longest probe, and those of the prefix tree.
PLAIN = {
    "generic": (158, 33, 155),
    "math": (91, 26, 90),
    "code": (108, 35, 107),
    "commonsense": (84, 21, 84),
    "mixed": (357, 35, 352),
}
# In the template that names Qwen as the assistant: 29 more tokens per probe, the first 24 of them shared.
CHAT = {
    "generic": (303, 62, 204),
    "math": (236, 55, 139),
    "code": (253, 64, 156),
    "commonsense": (229, 50, 133),
    "mixed": (792, 64, 451),
}


def test_each_probe_set_has_its_number_of_probes() -> None:
    assert {name: len(create()) for name, create in SETS.items()} == {
        "generic": 5,
        "math": 5,
        "code": 5,
        "commonsense": 5,
        "mixed": 15,
    }


def test_mixed_probes_are_generic_then_math_then_code() -> None:
    assert create_mixed_probes() == [
        *create_generic_probes(),
        *create_domain_probes("math"),
        *create_domain_probes("code"),
    ]


def test_no_probe_appears_twice_or_has_blanks_around_it() -> None:
    probes = create_mixed_probes() + create_domain_probes("commonsense")
    assert len(set(probes)) == len(probes) == 20
    assert all(probe.strip() == probe != "" for probe in probes)


@pytest.mark.parametrize("name", SETS)
def test_what_a_caller_does_to_its_probes_does_not_reach_the_next_one(name: str) -> None:
    before = SETS[name]()
    SETS[name]().clear()
    assert SETS[name]() == before != []


@pytest.mark.parametrize("domain", ["physics", "", "Math", None, ["math"]])
def test_an_unknown_domain_is_refused(domain: object) -> None:
    with pytest.raises(ValueError, match="'math', 'code', 'commonsense'"):
        create_domain_probes(domain)  # type: ignore[arg-type]


@pytest.mark.real_checkpoint
@pytest.mark.parametrize("name", SETS)
def test_real_token_ids_and_counts_of_a_probe_set_equal_transformers(
    real_checkpoint: str, name: str
) -> None:
    folder = resolve_checkpoint(real_checkpoint)
    ours, theirs = _tokenizers(folder)
    probes = SETS[name]()

    plain = tokenize_probes(ours, probes, 256)
    assert plain.ids == theirs(probes, truncation=True, max_length=256)["input_ids"]
    assert plain.truncated == ()
    assert _counts(plain.ids) == PLAIN[name]

    cut = tokenize_probes(ours, probes, 20)
    assert cut.ids == theirs(probes, truncation=True, max_length=20)["input_ids"]
    assert cut.truncated == tuple(i for i, ids in enumerate(plain.ids) if len(ids) > 20)


@pytest.mark.real_checkpoint
@pytest.mark.parametrize("name", SETS)
def test_real_chat_token_ids_and_counts_of_a_probe_set_equal_transformers(
    real_checkpoint: str, name: str
) -> None:
    folder = resolve_checkpoint(real_checkpoint)
    ours, theirs = _tokenizers(folder)
    if theirs.chat_template is None:
        pytest.skip("this checkpoint has no chat template")
    template = load_chat_template(folder)
    texts = template.render(SETS[name]())
    chats = [[{"role": "user", "content": probe}] for probe in SETS[name]()]
    got = tokenize_probes(ours, texts, 256, add_special_tokens=False)
    assert got.ids == theirs.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    if "created by Alibaba Cloud" in texts[0]:
        assert _counts(got.ids) == CHAT[name]


@cache  # takes seconds
def _tokenizers(folder: Path) -> tuple[Tokenizer, Any]:
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def _counts(ids: list[list[int]]) -> tuple[int, int, int]:
    prefixes = {tuple(probe[:end]) for probe in ids for end in range(1, len(probe) + 1)}
    return sum(map(len, ids)), max(map(len, ids)), len(prefixes)
