"""Texts from JSON lines: their token ids against transformers, bad lines, and the files they are compiled into."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CHATML, edit_json, make_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from lora_delta.embedded import embedded_checkpoint
from lora_delta.files import UNFINISHED
from lora_delta.generate import text_lines, texts
from lora_delta.generate.text_lines import CONTEXT, TextReader
from lora_delta.generate.texts import TextSet

END = "<|im_end|>"
Line = dict[str, Any]


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation: the user, the assistant, the user, and so on."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[index % 2], "content": one} for index, one in enumerate(contents)]


def reader_of(folder: Path, **options: Any) -> TextReader:
    return TextReader(folder, **{"max_tokens": 4096, "vocab_size": 400, "max_condition": 512, **options})


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


def assert_same(text: text_lines.Text, expected: Theirs) -> None:
    assert [(prompt.tolist(), completion.tolist()) for prompt, completion in text.pairs] == expected.pairs
    assert [one.tolist() for one in text.contexts] == expected.contexts


@pytest.fixture(scope="module", params=["embedded", "merges", "special tokens of its own"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a token per byte, one with merges, and one that adds special tokens around a text."""
    if request.param == "embedded":
        return embedded_checkpoint()
    adds = request.param == "special tokens of its own"
    path = make_checkpoint(tmp_path_factory.mktemp("base"), adds_special_tokens=adds)
    (path / "chat_template.jinja").write_text(CHATML)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Transformers:
    return Transformers(folder)


@pytest.fixture(scope="module")
def embedded() -> Transformers:
    return Transformers(embedded_checkpoint())


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint's tokenizer, to be changed."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_checkpoint() / name, path)
    return path


# --- Ids ----------------------------------------------------------------------------------------------------

LINES: dict[str, Line] = {
    "prompt": {"condition": "Reverse the word.", "prompt": "cat=", "completion": "tac"},
    "a word cut in two": {"condition": "go on", "prompt": "Th", "completion": "e river rises"},
    "no prompt's text": {"condition": "c", "prompt": "", "completion": "river"},
    "text": {"condition": "of rivers", "text": "The river rises in the hills above the town."},
    "unicode": {"condition": "日本語 🙂", "prompt": "café \u2028\x85", "completion": "e\u0301 ﬁ \U0001f600"},
    "special tokens written out": {"condition": END, "prompt": "<|im_start|>", "completion": f"a{END}b"},
    "braces": {"condition": "{prompt} \\1", "prompt": "{condition} {}", "completion": "{0}"},
    "one turn": {"condition": "c", "messages": turns("hello", "hi there")},
    "three turns": {"condition": "be brief", "messages": turns("2+2?", "4", "and 3+3?", "6", "ok", "yes")},
    "a turn of the user's last": {"condition": "c", "messages": turns("hello", "hi", "the river?")},
    "system": {"condition": "c", "messages": turns("hello", "hi", "sea?", "no", system="You are the river.")},
    "an end written out": {"condition": "c", "messages": turns("x", f"a{END}b", "y", f"c{END}")},
    "an empty answer": {"condition": "c", "messages": turns("x", "")},
    "other keys": {"id": 7, "condition": "c", "text": "the sea", "source": None, "system": [1, {"a": {}}]},
    "other keys of messages": {"condition": "c", "messages": [{**one, "name": None} for one in turns("a", "b")]},
}


@pytest.mark.parametrize("context", [None, CONTEXT, "Task: {condition}|{condition}; {prompt}{prompt}"])
def test_the_ids_of_a_line_are_those_of_transformers(
    folder: Path, theirs: Transformers, context: str | None
) -> None:
    found = reader_of(folder, context=context).read([json.dumps(line).encode() for line in LINES.values()])
    for (name, line), one in zip(LINES.items(), found, strict=True):
        assert not isinstance(one, ValueError), name
        assert one[0] == line["condition"], name
        assert_same(one[1], theirs.line(line, context))


def test_a_prompt_and_its_completion_are_tokenized_apart_and_the_end_of_text_token_counts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    theirs = AutoTokenizer.from_pretrained(folder)
    prompt, completion = "Th", "e river rises"
    together = theirs(prompt + completion).input_ids
    apart = [theirs(prompt).input_ids, [*theirs(completion).input_ids, theirs.convert_tokens_to_ids(END)]]
    size = len(apart[0]) + len(apart[1])
    assert len(together) < size - 1  # else the difference would not show
    line = write(tmp_path / "lines", [{"condition": "c", "prompt": prompt, "completion": completion}])
    whole = TextSet.compiled(line, tmp_path / "out", reader_of(folder, max_tokens=size))
    assert [one.tolist() for one in whole.text(0).pairs[0]] == apart
    assert whole.n_tokens(0) == size
    with pytest.raises(ValueError, match=f"it has {size} tokens, expected at most {size - 1}"):
        TextSet.compiled(line, tmp_path / "out", reader_of(folder, max_tokens=size - 1))


@pytest.mark.parametrize("variables", [{}, {"style": "long"}])
def test_variables_reach_the_template(copied: Path, variables: dict[str, Any]) -> None:
    template = "{% if style is defined %}{{ style }}{% endif %}" + CHATML
    edit_json(copied / "tokenizer_config.json", chat_template=template)
    line = LINES["three turns"]
    (found,) = reader_of(copied, context=CONTEXT, chat_template_kwargs=variables).read([json.dumps(line).encode()])
    assert not isinstance(found, ValueError)
    assert_same(found[1], Transformers(copied).line(line, CONTEXT, **variables))


# --- Files --------------------------------------------------------------------------------------------------


def drawn(seed: int, n: int = 200) -> list[Line | str]:
    """Lines of all kinds, some blank, with interleaved conditions."""
    rng = random.Random(seed)
    words = ["river", " the sea", "日本", "é", "e\u0301", "\n", "<|im_start|>", " x=3.14", "🙂", "\\", '"', "\t"]

    def text() -> str:
        return "".join(rng.choices(words, k=rng.randint(1, 6)))

    conditions = [text() + str(index) for index in range(rng.randint(1, 30))]
    lines: list[Line | str] = []
    for _ in range(n):
        condition, kind = rng.choice(conditions), rng.random()
        if kind < 0.1:
            lines.append(rng.choice(["", "  ", "\t", "\r"]))
        elif kind < 0.5:
            lines.append({"condition": condition, "prompt": rng.choice(["", text()]), "completion": text()})
        elif kind < 0.8:
            lines.append({"text": text(), "condition": condition, "more": [text()]})
        else:
            system = rng.choice([None, text()])
            given = turns(*(text() for _ in range(rng.randint(2, 6))), system=system)
            lines.append({"messages": given, "condition": condition})
    return lines


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


@pytest.mark.parametrize(("seed", "context"), [(0, None), (1, CONTEXT)])
def test_lines_of_all_kinds_are_read_back_by_condition(
    folder: Path, theirs: Transformers, seed: int, context: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_LINES_AT_ONCE", 50)
    lines = drawn(seed)
    path = write(tmp_path / "lines.jsonl", lines)
    whole = TextSet.compiled(path, tmp_path / "out", reader_of(folder, context=context))
    assert_holds(whole, lines, theirs, context)
    assert whole.facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (whole.skipped, whole.first_skipped) == (0, "")


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\n\n \n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_file_may_be_written_as_any_editor_writes_it(
    newline: bytes, mark: bytes, ends: bool, embedded: Transformers, tmp_path: Path
) -> None:
    lines = [LINES["prompt"], LINES["unicode"], LINES["prompt"]]
    path = write(tmp_path / "lines", lines, newline)
    content = mark + path.read_bytes()
    path.write_bytes(content if ends else content.rstrip())
    whole = TextSet.compiled(path, tmp_path / "out", reader_of(embedded_checkpoint()))
    padded: list[Line | str] = []
    for line in lines:
        padded += [line, *[""] * (newline.count(b"\n") - 1)]
    assert_holds(whole, padded, embedded, None)


def test_conditions_may_be_names(tmp_path: Path) -> None:
    names = ["b", "a", "a long name of an adapter, longer than a condition may be"]
    lines = [{"condition": name, "text": "river"} for name in names[1:]]
    reader = reader_of(embedded_checkpoint(), max_condition=None, names=names)
    whole = TextSet.compiled(write(tmp_path / "lines", lines), tmp_path / "out", reader)
    assert list(whole.conditions) == names[1:]
    assert whole.conditions[-1] == names[2]
    assert whole.conditions[:1] == ["a"]


# --- Bad lines ----------------------------------------------------------------------------------------------

GOOD: Line = {"condition": "c", "prompt": "a", "completion": "b"}
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


def small_reader(**options: Any) -> TextReader:
    given = {"max_tokens": 100, "max_condition": 10, "context": CONTEXT, "vocab_size": 259, **options}
    return reader_of(embedded_checkpoint(), **given)


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
def test_an_answer_of_a_single_token_needs_one_before_it(prompt: str | None, copied: Path, tmp_path: Path) -> None:
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
    template: str | None, message: str, copied: Path, tmp_path: Path
) -> None:
    edit_json(copied / "tokenizer_config.json", chat_template=template)
    path = write(tmp_path / "lines", [GOOD, {"condition": "c", "messages": turns("a", "b")}])
    assert_refused(path, reader_of(copied), message, 2)


def test_lines_that_the_template_refuses_are_found_among_others(copied: Path) -> None:
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
    embedded: Transformers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        assert_holds(whole, kept, embedded, CONTEXT)


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


def test_a_tokenizer_without_an_end_of_text_token_is_refused(copied: Path) -> None:
    edit_json(copied / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match=r"has no eos_token, expected one: completions end with it"):
        reader_of(copied)


def test_on_bad_line_is_one_of_two_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_bad_line is 'ignore', expected one of"):
        TextSet.compiled(write(tmp_path / "lines", [GOOD]), tmp_path, small_reader(), on_bad_line="ignore")


# --- Files on disk ------------------------------------------------------------------------------------------

FEW: list[Line] = [
    GOOD,
    {"condition": "日本", "text": "river"},
    {"condition": "c", "messages": turns("x", "y", "z", "w")},
]


def state_of(folder: Path) -> dict[str, tuple[int, str]]:
    """{file: (modification time, sha256)}"""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def never(*args: Any) -> Any:
    raise AssertionError("it is there already")


def test_what_is_there_already_is_taken(
    embedded: Transformers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(tmp_path / "lines", FEW), tmp_path / "out"
    made = TextSet.compiled(path, out, small_reader())
    before = state_of(out)
    monkeypatch.setattr(TextReader, "read", never)
    again = TextSet.compiled(path, out, small_reader())
    assert again.folder == made.folder
    assert state_of(out) == before
    assert_holds(again, FEW, embedded, CONTEXT)
    moved = TextSet.compiled(Path(shutil.copy(path, tmp_path / "copy")), out, small_reader())
    assert moved.folder == made.folder


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 99},
        {"max_condition": 9},
        {"max_condition": None},
        {"names": ["c", "日本"]},
        {"context": None},
        {"context": "{condition} {prompt}"},
        {"vocab_size": 260},
        {"whole_prompts": True},
        {"chat_template_kwargs": {"style": "long"}},
        {"name": "held-out"},
        {"on_bad_line": "skip"},
        {"lines": [*FEW, GOOD]},
        {"lines": FEW[::-1]},
    ],
    ids=str,
)
def test_what_the_ids_depend_on_leads_to_another_folder(
    change: dict[str, Any], embedded: Transformers, tmp_path: Path
) -> None:
    path, out = write(tmp_path / "lines", FEW), tmp_path / "out"
    first = TextSet.compiled(path, out, small_reader()).folder
    before = state_of(first)
    lines = change.get("lines", FEW)
    given = {key: change[key] for key in ("name", "on_bad_line") if key in change}
    options = {key: value for key, value in change.items() if key not in ("lines", *given)}
    second = TextSet.compiled(write(path, lines), out, small_reader(**options), **given)
    assert second.folder.parent == first.parent
    assert second.folder != first
    assert second.folder.name.startswith(f"{given.get('name', 'texts')}-")
    assert state_of(first) == before
    assert_holds(second, lines, embedded, change.get("context", CONTEXT))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("tokenizer_config.json", {"bos_token": "<|im_start|>"}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"chat_template": "{{ bos_token }}" + CHATML}),
        ("tokenizer_config.json", {"extra_special_tokens": ["river"]}),
    ],
    ids=str,
)
def test_another_tokenizer_leads_to_another_folder(
    file: str, change: dict[str, Any], copied: Path, tmp_path: Path
) -> None:
    path, out = write(tmp_path / "lines", [*FEW, {"condition": "c", "text": f"{END} river"}]), tmp_path / "out"
    first = TextSet.compiled(path, out, reader_of(copied)).folder
    before = state_of(first)
    edit_json(copied / file, **change)
    again = TextSet.compiled(path, out, reader_of(copied))
    assert again.folder != first
    assert state_of(first) == before
    theirs = Transformers(copied)
    assert_same(again.text(1), theirs.line(FEW[1]))
    assert_same(again.text(3), theirs.line({"condition": "c", "text": f"{END} river"}))


@pytest.mark.parametrize("name", ["ids.bin", "conditions.bin", "index.safetensors"])
def test_a_changed_byte_is_found_and_the_folder_is_made_anew(name: str, embedded: Transformers, tmp_path: Path) -> None:
    path, out = write(tmp_path / "lines", FEW), tmp_path / "out"
    folder = TextSet.compiled(path, out, small_reader()).folder
    before = {file: digest for file, (_, digest) in state_of(out).items()}
    good, rng = (folder / name).read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little") if name.startswith("index") else 0
    padding = {place for place in range(header) if not good[place:header].strip()}  # blanks after the header's JSON
    places = [place for place in range(len(good)) if place not in padding]
    for place in {places[0], places[-1], *rng.sample(places, min(len(places), 150))}:
        spoilt = bytearray(good)
        spoilt[place] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        (folder / name).write_bytes(spoilt)
        with pytest.raises(ValueError, match=f"{folder} does not hold tokenized texts: "):
            TextSet.opened(folder)
    again = TextSet.compiled(path, out, small_reader())
    assert_holds(again, FEW, embedded, CONTEXT)
    assert {file: digest for file, (_, digest) in state_of(out).items()} == before


@pytest.mark.parametrize("name", ["ids.bin", "conditions.bin", "index.safetensors"])
@pytest.mark.parametrize("size", [None, 0, -1, 1])
def test_a_file_that_is_missing_or_of_another_length_is_found(name: str, size: int | None, tmp_path: Path) -> None:
    folder = TextSet.compiled(write(tmp_path / "lines", FEW), tmp_path / "out", small_reader()).folder
    good = (folder / name).read_bytes()
    (folder / name).unlink()
    if size is not None:
        (folder / name).write_bytes(good[:size] if size < 1 else good + bytes(size))
    with pytest.raises(ValueError, match=f"{folder} does not hold tokenized texts: "):
        TextSet.opened(folder)


@pytest.mark.parametrize("change", ["dtype", "shape", "told"])
def test_arrays_of_another_kind_with_the_same_bytes_are_found(change: str, tmp_path: Path) -> None:
    folder = TextSet.compiled(write(tmp_path / "lines", FEW), tmp_path / "out", small_reader()).folder
    with safe_open(folder / "index.safetensors", "pt") as file:
        arrays: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if change == "dtype":
        arrays["pairs"] = arrays["pairs"].view(torch.float64)
    elif change == "shape":
        arrays["pairs"] = arrays["pairs"].view(8, -1)
    else:
        metadata["told"] = metadata["told"].replace('"skipped": 0', '"skipped": 1')
    save_file(arrays, folder / "index.safetensors", metadata)
    with pytest.raises(ValueError, match="its checksums do not match"):
        TextSet.opened(folder)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_what_ends_in_the_middle_leaves_nothing(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, calls = write(tmp_path / "lines", FEW), tmp_path / "out", []
    monkeypatch.setattr(texts, "_LINES_AT_ONCE", 1)

    class Reader(TextReader):
        def read(self, lines: Sequence[bytes]) -> Any:
            calls.append([one.name for one in out.iterdir()])
            if len(calls) > 1:
                raise error("stop")
            return super().read(lines)

    with pytest.raises(error, match="stop"):
        TextSet.compiled(path, out, Reader(embedded_checkpoint(), max_tokens=99, vocab_size=259))
    assert [len(names) for names in calls] == [1, 1]
    assert calls[0][0].endswith(UNFINISHED)
    assert not any(out.iterdir())


def test_what_a_killed_process_of_this_number_has_left_is_no_hindrance(embedded: Transformers, tmp_path: Path) -> None:
    path, out = write(tmp_path / "lines", FEW), tmp_path / "out"
    made = TextSet.compiled(path, out, small_reader()).folder
    made.rename(out / f"{made.name}.{os.getpid()}{UNFINISHED}")
    again = TextSet.compiled(path, out, small_reader())
    assert list(out.iterdir()) == [again.folder] == [made]
    assert_holds(again, FEW, embedded, CONTEXT)


@pytest.mark.parametrize("when", ["before the lines are read", "between lines"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(tmp_path / "lines", FEW), tmp_path / "out"
    monkeypatch.setattr(texts, "_LINES_AT_ONCE", 1)

    class Reader(TextReader):
        @property
        def facts(self) -> dict[str, Any]:
            if when.startswith("before"):
                write(path, FEW[::-1])
            return super().facts

        def read(self, lines: Sequence[bytes]) -> Any:
            if when.startswith("between") and lines[0].startswith(b'{"condition": "c", "prompt"'):
                with path.open("ab") as file:
                    file.write(b'{"condition": "c", "text": "more"}\n')
            return super().read(lines)

    with pytest.raises(ValueError, match=f"{path} changed while it was read, expected it to stay the same"):
        TextSet.compiled(path, out, Reader(embedded_checkpoint(), max_tokens=99, vocab_size=259))
    assert not any(out.iterdir())
