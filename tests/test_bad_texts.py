"""Lines, files, templates and tokenizers that are no texts: each is refused, or skipped, with a line that says why."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHATML, edit_json, make_checkpoint
from text_line_case import (
    GOOD,
    Line,
    Transformers,
    assert_holds,
    assert_same,
    copy_tokenizer,
    of_embedded,
    reader_of,
    small_reader,
    turns,
    write,
)
from transformers import AutoTokenizer

from lora_delta.embedded import embedded_checkpoint
from lora_delta.generate import text_lines, texts
from lora_delta.generate.text_lines import CONTEXT, TextReader
from lora_delta.generate.texts import TextSet

BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "it is not valid JSON, expected"),
    "no UTF-8": (b'{"condition": "\xff"}', "it is not valid JSON, expected"),
    "nested": ("[" * 100_000, "it is nested too deeply"),
    "a list": ([GOOD], r"it is \[\{'condition': 'c', .*, expected \{\"condition\": \.\.\., \"prompt\""),
    "a number": (3, "it is 3, expected"),
    "null": (None, "it is None, expected"),
    "nothing in it": ({}, "it is {}, expected"),
    "no condition": ({"prompt": "a", "completion": "b"}, "it is {'prompt'.*, expected"),
    "no text": ({"condition": "c"}, "it is {'condition': 'c'}, expected"),
    "no completion": ({"condition": "c", "prompt": "a"}, "it is {.*, expected"),
    "no prompt": ({"condition": "c", "completion": "a"}, "it is {.*, expected"),
    "a prompt and a text": ({**GOOD, "text": "x"}, "it is {.*, expected"),
    "messages and a prompt": ({"condition": "c", "prompt": "a", "messages": turns("a", "b")}, "it is {.*, expected"),
    "messages and a text": ({"condition": "c", "text": "a", "messages": turns("a", "b")}, "it is {.*, expected"),
    "a condition that is no text": ({**GOOD, "condition": 3}, "condition is a int: expected a str"),
    "a prompt that is no text": ({**GOOD, "prompt": ["a"]}, "prompt is a list: expected a str"),
    "a prompt that is null": ({**GOOD, "prompt": None}, "prompt is a NoneType: expected a str"),
    "a completion that is no text": ({**GOOD, "completion": None}, "completion is a NoneType: expected a str"),
    "a text that is no text": ({"condition": "c", "text": {}}, "text is a dict: expected a str"),
    "an empty completion": ({**GOOD, "completion": ""}, "completion is empty"),
    "an empty text": ({"condition": "c", "text": ""}, "text is empty"),
    "an empty condition": ({**GOOD, "condition": ""}, "condition is empty"),
    "too many tokens": ({**GOOD, "prompt": "a" * 99}, "it has 101 tokens, expected at most 100"),
    "a turn of too many": ({"condition": "c", "messages": turns("a", "b", "c" * 90, "d")}, r"it has \d+ tokens, exp"),
    "a context of too many": ({**GOOD, "prompt": "a" * 96, "condition": "abc"}, "it, with its condition.* has 103 t"),
    "a condition of too many": ({**GOOD, "condition": "c" * 11}, "its condition has 11 tokens, expected at most 10"),
    "half a character": ({**GOOD, "prompt": "\ud800"}, "prompt, .*, is not valid Unicode"),
    "half a completion": ({**GOOD, "completion": "a\udfff"}, "completion, .*, is not valid Unicode"),
    "half a condition": ({**GOOD, "condition": "\udc00"}, "condition, .*, is not valid Unicode"),
    "half a message": ({"condition": "c", "messages": turns("\ud800", "b")}, "what the chat .* not valid Unicode"),
    "half an answer": ({"condition": "c", "messages": turns("a", "\ud83d")}, "what the chat .* not valid Unicode"),
    "messages that are a dict": ({"condition": "c", "messages": {}}, "messages is {}, expected a list of"),
    "messages that are texts": ({"condition": "c", "messages": ["a", "b"]}, r"messages is \['a', 'b'\], expected"),
    "no messages": ({"condition": "c", "messages": []}, r"messages have the roles \[\], expected a list"),
    "no answer": ({"condition": "c", "messages": turns("a")}, r"messages have the roles \['user'\], expected"),
    "the assistant first": (
        {"condition": "c", "messages": [{"role": "assistant", "content": "a"}, *turns("a", "b")]},
        r"messages have the roles \['assistant', 'user', 'assistant'\], expected",
    ),
    "no content": ({"condition": "c", "messages": [{"role": "user"}, *turns("a", "b")]}, "messages is .*, expected"),
    "no role": ({"condition": "c", "messages": [{"content": "a"}, *turns("a", "b")]}, "messages is .*, expected"),
    "content in pieces": (
        {"condition": "c", "messages": [{"role": "user", "content": [{"type": "text"}]}, *turns("a", "b")]},
        "messages is .*, expected",
    ),
}


def as_line(value: Any) -> bytes:
    return value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()


def assert_refused(path: Path, reader: TextReader, message: str, line: int) -> None:
    """It is refused at a line, and leaves nothing behind."""
    out = path.with_name("out")
    with pytest.raises(ValueError, match=f"^line {line} of {path}: {message}"):
        TextSet.compiled(path, out, reader)
    assert not any(out.iterdir())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_by_its_number(name: str, tmp_path: Path) -> None:
    value, message = BAD[name]
    path = write(tmp_path / "lines", [GOOD, "", as_line(value), GOOD, "{"])
    assert_refused(path, small_reader(), message, 3)


def test_a_name_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "lines", [GOOD, {**GOOD, "condition": "d"}])
    reader = small_reader(names=["c", "e"], max_condition=None)
    assert_refused(path, reader, "its condition is 'd', expected a name among the prompts", 2)


@pytest.mark.parametrize("kind", ["prompt", "completion", "condition"])
def test_a_token_that_the_model_lacks_is_refused(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "base")
    largest = max(AutoTokenizer.from_pretrained(folder)("river").input_ids)
    path = write(tmp_path / "lines", [{**GOOD, kind: "river"}])
    message = f"token {largest} is outside the vocabulary of {largest}"
    assert_refused(path, reader_of(folder, vocab_size=largest), message, 1)
    assert len(TextSet.compiled(path, tmp_path / "out", reader_of(folder, vocab_size=largest + 1))) == 1


def test_a_context_that_does_not_end_with_its_prompt_is_refused_where_all_of_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "lines", [GOOD, {"condition": "c", "text": "ab"}, {**GOOD, "prompt": "x: "}])
    odd = small_reader(context="{prompt} {condition}", whole_prompts=True)
    assert_refused(path, odd, "its context does not end with its prompt's tokens, which positions = 'all' needs", 1)
    reader = small_reader(context="{condition} {prompt}", whole_prompts=True)
    assert len(TextSet.compiled(path, tmp_path / "out", reader)) == 1


def test_an_end_of_text_token_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    end = AutoTokenizer.from_pretrained(embedded_checkpoint()).eos_token_id
    path = write(tmp_path / "lines", [{"condition": "c", "text": "ab"}])
    assert_refused(path, small_reader(vocab_size=end), f"token {end} is outside the vocabulary of {end}", 1)


@pytest.mark.parametrize("prompt", [None, "x"])
def test_an_answer_of_a_single_token_needs_one_before_it(prompt: str | None, tmp_path: Path) -> None:
    copied = copy_tokenizer(tmp_path / "checkpoint")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # writes nothing for an empty turn
    edit_json(copied / "tokenizer_config.json", chat_template=template)
    path = write(tmp_path / "lines", [{"condition": "c", "messages": turns(prompt or "", "b")}])
    if prompt is None:
        assert_refused(path, reader_of(copied), "it has no token after the first one", 1)
    else:
        whole = TextSet.compiled(path, tmp_path / "out", reader_of(copied))
        theirs = AutoTokenizer.from_pretrained(copied)
        assert [one.tolist() for one in whole.text(0).pairs[0]] == [theirs("x").input_ids, theirs("b").input_ids]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ raise_exception('no ' ~ m.role) }}{% endfor %}", "the chat template failed: .*no"),
        ("{% for %}", "the chat template is not valid Jinja"),
        ("{{ messages | length }}", "the chat template does not write an answer after the prompt"),
        ("always this", "the chat template does not write an answer after the prompt"),
        (None, "no chat template in"),
    ],
)
def test_messages_need_a_template_that_works(
    template: str | None, message: str, tmp_path: Path
) -> None:
    copied = copy_tokenizer(tmp_path / "checkpoint")
    edit_json(copied / "tokenizer_config.json", chat_template=template)
    path = write(tmp_path / "lines", [GOOD, {"condition": "c", "messages": turns("a", "b")}])
    assert_refused(path, reader_of(copied), message, 2)


def test_lines_that_the_template_refuses_are_found_among_others(tmp_path: Path) -> None:
    copied = copy_tokenizer(tmp_path / "checkpoint")
    template = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not ' ~ m.content) }}{% endif %}"
    edit_json(copied / "tokenizer_config.json", chat_template=template + "{% endfor %}" + CHATML)
    lines: list[Line] = [{"condition": "c", "messages": turns(f"u{index}", "b")} for index in range(70)]
    for index in (0, 69):
        lines[index]["messages"][1]["content"] = f"no {index}"
    theirs = Transformers(copied)
    for index, one in enumerate(reader_of(copied).read([json.dumps(line).encode() for line in lines])):
        if index in (0, 69):
            assert isinstance(one, ValueError)
            assert f"not no {index}" in str(one)
        else:
            assert not isinstance(one, ValueError)
            assert_same(one[1], theirs.line(lines[index]))


def test_exactly_the_bad_lines_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_LINES_AT_ONCE", 7)
    rng, lines = random.Random(0), [*(value for value, _ in BAD.values())]
    good = [{**GOOD, "condition": f"c{index % 3}", "completion": str(index)} for index in range(len(lines))]
    mixed: list[Any] = [*lines, *good, ""]
    rng.shuffle(mixed)
    path = write(tmp_path / "lines", [as_line(one) for one in mixed])
    first = next(number for number, one in enumerate(mixed, 1) if one != "" and one not in good)
    for _ in range(2):  # an existing set warns too
        message = f"^{len(lines)} bad lines of {path} are skipped; the first: line {first}: "
        with pytest.warns(UserWarning, match=message):
            whole = TextSet.compiled(path, tmp_path / "out", small_reader(), on_bad_line="skip")
        assert whole.skipped == len(lines)
        assert whole.first_skipped.startswith(f"line {first}: ")
        kept = [one if one in good else "" for one in mixed]
        assert_holds(whole, kept, of_embedded(), CONTEXT)


def test_a_line_of_too_many_bytes_is_bad_and_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (texts, text_lines):
        monkeypatch.setattr(module, "MOST_LINE", 200)
    sizes: list[int] = []

    class Reader(TextReader):
        def read(self, lines: Sequence[bytes]) -> Any:
            sizes.extend(len(one) for one in lines)
            return super().read(lines)

    long = [{**GOOD, "prompt": "a" * size} for size in (1000, 160, 161, 399)]
    mixed = [one for line in long for one in (GOOD, line)]
    path = write(tmp_path / "lines", mixed)
    reader = Reader(embedded_checkpoint(), max_tokens=5000, vocab_size=259)
    with pytest.warns(UserWarning, match="^4 bad lines of .*: line 2: it has more than 200 bytes"):
        whole = TextSet.compiled(path, tmp_path / "out", reader, on_bad_line="skip")
    assert whole.numbers.tolist() == [1, 3, 5, 7]
    assert max(sizes) == 201


@pytest.mark.parametrize("content", [b"", b"\n \n", b"{\n[]\n"])
def test_a_file_without_a_good_line_is_refused(content: bytes, tmp_path: Path) -> None:
    path, out = tmp_path / "lines", tmp_path / "out"
    path.write_bytes(content)
    first = "; line 1: it is not valid JSON" if content.strip() else "$"
    with pytest.raises(ValueError, match=f"{path} holds no text, expected JSON lines, .*{first}"):
        TextSet.compiled(path, out, small_reader(), on_bad_line="skip")
    assert not any(out.iterdir())


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, os.mkfifo], ids=["nothing", "folder", "pipe"])
def test_what_is_no_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "lines")
    with pytest.raises(ValueError, match=f"{tmp_path / 'lines'} is not a file, expected JSON lines"):
        TextSet.compiled(tmp_path / "lines", tmp_path / "out", small_reader())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "{prompt}"}, r"context is '\{prompt\}', expected a text with \{condition\}"),
        ({"context": ""}, "context is '', expected a text with"),
    ],
)
def test_a_context_without_the_condition_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_reader(**options)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path: Path) -> None:
    copied = copy_tokenizer(tmp_path / "checkpoint")
    edit_json(copied / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match=r"has no eos_token, expected one: completions end with it"):
        reader_of(copied)


def test_on_bad_line_is_one_of_two_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_bad_line is 'ignore', expected one of"):
        TextSet.compiled(write(tmp_path / "lines", [GOOD]), tmp_path, small_reader(), on_bad_line="ignore")
