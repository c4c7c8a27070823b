"""Texts from JSON lines: their token ids against transformers, and those of a file, by condition."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHATML, edit_json, make_checkpoint
from text_line_case import (
    END,
    Line,
    Transformers,
    assert_holds,
    assert_same,
    copy_tokenizer,
    of_embedded,
    reader_of,
    turns,
    write,
)
from transformers import AutoTokenizer

from lora_delta.embedded import embedded_checkpoint
from lora_delta.generate import texts
from lora_delta.generate.text_lines import CONTEXT
from lora_delta.generate.texts import TextSet

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
def test_variables_reach_the_template(tmp_path: Path, variables: dict[str, Any]) -> None:
    copied = copy_tokenizer(tmp_path / "checkpoint")
    template = "{% if style is defined %}{{ style }}{% endif %}" + CHATML
    edit_json(copied / "tokenizer_config.json", chat_template=template)
    line = LINES["three turns"]
    (found,) = reader_of(copied, context=CONTEXT, chat_template_kwargs=variables).read([json.dumps(line).encode()])
    assert not isinstance(found, ValueError)
    assert_same(found[1], Transformers(copied).line(line, CONTEXT, **variables))


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
    newline: bytes, mark: bytes, ends: bool, tmp_path: Path
) -> None:
    lines = [LINES["prompt"], LINES["unicode"], LINES["prompt"]]
    path = write(tmp_path / "lines", lines, newline)
    content = mark + path.read_bytes()
    path.write_bytes(content if ends else content.rstrip())
    whole = TextSet.compiled(path, tmp_path / "out", reader_of(embedded_checkpoint()))
    padded: list[Line | str] = []
    for line in lines:
        padded += [line, *[""] * (newline.count(b"\n") - 1)]
    assert_holds(whole, padded, of_embedded(), None)


def test_conditions_may_be_names(tmp_path: Path) -> None:
    names = ["b", "a", "a long name of an adapter, longer than a condition may be"]
    lines = [{"condition": name, "text": "river"} for name in names[1:]]
    reader = reader_of(embedded_checkpoint(), max_condition=None, names=names)
    whole = TextSet.compiled(write(tmp_path / "lines", lines), tmp_path / "out", reader)
    assert list(whole.conditions) == names[1:]
    assert whole.conditions[-1] == names[2]
    assert whole.conditions[:1] == ["a"]
