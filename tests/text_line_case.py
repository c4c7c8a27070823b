"""Lines of texts and what they should become: the ids that transformers' tokenizers give, and a reader to compare."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_delta.embedded import embedded_checkpoint
from lora_delta.generate.text_lines import CONTEXT, Text, TextReader
from lora_delta.generate.texts import TextSet

END = "<|im_end|>"
Line = dict[str, Any]
GOOD: Line = {"condition": "c", "prompt": "a", "completion": "b"}


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation: the user, the assistant, the user, and so on."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[index % 2], "content": one} for index, one in enumerate(contents)]


def reader_of(folder: Path, **options: Any) -> TextReader:
    return TextReader(folder, **{"max_tokens": 4096, "vocab_size": 400, "max_condition": 512, **options})


def small_reader(**options: Any) -> TextReader:
    given = {"max_tokens": 100, "max_condition": 10, "context": CONTEXT, "vocab_size": 259, **options}
    return reader_of(embedded_checkpoint(), **given)


def write(path: Path, lines: Sequence[Line | str | bytes], newline: bytes = b"\n") -> Path:
    """Write a file of lines; dicts are written as JSON."""
    raw = [json.dumps(one, ensure_ascii=False) if isinstance(one, dict) else one for one in lines]
    path.write_bytes(b"".join((one.encode() if isinstance(one, str) else one) + newline for one in raw))
    return path


@dataclass
class Theirs:
    """A line's ids according to transformers."""

    pairs: list[tuple[list[int], list[int]]]
    contexts: list[list[int]]


class Transformers:
    """Tokenizes lines with AutoTokenizer and its apply_chat_template."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special).input_ids

    def rendered(self, messages: Sequence[dict[str, Any]], generates: bool, **variables: Any) -> str:
        given: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generates, **variables}
        return self.tokenizer.apply_chat_template(list(messages), **given)

    def line(self, line: Line, context: str | None = None, **variables: Any) -> Theirs:
        end, found = self.tokenizer.eos_token_id, Theirs([], [])
        if "messages" not in line:
            prompt, completion = line.get("prompt", ""), line["text" if "text" in line else "completion"]
            found.pairs.append((self.ids(prompt, True) if prompt else [], [*self.ids(completion), end]))
            if context is not None:
                given = context.split("{condition}")
                filled = line["condition"].join(part.replace("{prompt}", prompt) for part in given)
                found.contexts.append(self.ids(filled, True))
            return found
        messages = line["messages"]
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, whole = messages[:index], self.rendered(messages[: index + 1], False, **variables)
            prompt = self.rendered(before, True, **variables)
            assert whole.startswith(prompt)
            completion = whole[len(prompt) :]
            found.pairs.append((self.ids(prompt), self.ids(completion[: completion.rindex(END) + len(END)])))
            if context is not None:
                system, rest = line["condition"], before
                if before[0]["role"] == "system":
                    system, rest = f"{system}\n\n{before[0]['content']}", before[1:]
                told = [{"role": "system", "content": system}, *rest]
                found.contexts.append(self.ids(self.rendered(told, True, **variables)))
        return found


def assert_same(text: Text, expected: Theirs) -> None:
    assert [(prompt.tolist(), completion.tolist()) for prompt, completion in text.pairs] == expected.pairs
    assert [one.tolist() for one in text.contexts] == expected.contexts


@functools.cache
def of_embedded() -> Transformers:
    return Transformers(embedded_checkpoint())


def copy_tokenizer(path: Path) -> Path:
    """A copy of the embedded checkpoint's tokenizer, to be changed."""
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_checkpoint() / name, path)
    return path


def assert_holds(whole: TextSet, lines: Sequence[Line | str], theirs: Transformers, context: str | None) -> None:
    """Everything in a TextSet equals the lists and dicts computed here."""
    good = [(number, one) for number, one in enumerate(lines, 1) if isinstance(one, dict)]
    by_condition: dict[str, list[Theirs]] = {}
    every, first_pairs, n_pairs = [], {}, 0
    for _, line in good:
        expected = theirs.line(line, context)
        by_condition.setdefault(line["condition"], []).append(expected)
        every.append(expected)
        first_pairs[id(expected)] = n_pairs
        n_pairs += len(expected.pairs)
    assert list(whole.conditions) == list(by_condition)
    assert len(whole) == len(by_condition)
    assert whole.n_texts == len(good)
    assert whole.numbers.tolist() == [number for number, _ in good]
    lengths = [len(completion) - (not prompt) for one in every for prompt, completion in one.pairs]
    assert whole.completions.tolist() == lengths
    for index, of_it in enumerate(by_condition.values()):
        own = whole.texts(index)
        assert len(own) == len(of_it)
        for place, one in enumerate(of_it):
            assert_same(own[place], one)
            assert own[place].number == first_pairs[id(one)]
            assert own.n_tokens(place) == sum(len(prompt) + len(completion) for prompt, completion in one.pairs)
        assert_same(own[-1], of_it[-1])
        assert [one.number for one in own[1:]] == [first_pairs[id(one)] for one in of_it[1:]]
        with pytest.raises(IndexError):
            own[len(of_it)]
    for number, expected in enumerate(every):
        assert_same(whole.text(number), expected)
