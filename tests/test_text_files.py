"""The folder that texts are compiled into: taken again, made anew where something changed, and never half written."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CHATML, edit_json
from safetensors import safe_open
from safetensors.torch import save_file
from text_line_case import (
    END,
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
from torch import Tensor

from lora_delta.embedded import embedded_checkpoint
from lora_delta.files import UNFINISHED
from lora_delta.generate import texts
from lora_delta.generate.text_lines import CONTEXT, TextReader
from lora_delta.generate.texts import TextSet

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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(tmp_path / "lines", FEW), tmp_path / "out"
    made = TextSet.compiled(path, out, small_reader())
    before = state_of(out)
    monkeypatch.setattr(TextReader, "read", never)
    again = TextSet.compiled(path, out, small_reader())
    assert again.folder == made.folder
    assert state_of(out) == before
    assert_holds(again, FEW, of_embedded(), CONTEXT)
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
    change: dict[str, Any], tmp_path: Path
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
    assert_holds(second, lines, of_embedded(), change.get("context", CONTEXT))


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
    file: str, change: dict[str, Any], tmp_path: Path
) -> None:
    copied = copy_tokenizer(tmp_path / "checkpoint")
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
def test_a_changed_byte_is_found_and_the_folder_is_made_anew(name: str, tmp_path: Path) -> None:
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
    assert_holds(again, FEW, of_embedded(), CONTEXT)
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


def test_what_a_killed_process_of_this_number_has_left_is_no_hindrance(tmp_path: Path) -> None:
    path, out = write(tmp_path / "lines", FEW), tmp_path / "out"
    made = TextSet.compiled(path, out, small_reader()).folder
    made.rename(out / f"{made.name}.{os.getpid()}{UNFINISHED}")
    again = TextSet.compiled(path, out, small_reader())
    assert list(out.iterdir()) == [again.folder] == [made]
    assert_holds(again, FEW, of_embedded(), CONTEXT)


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
