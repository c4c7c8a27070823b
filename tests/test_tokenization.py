"""Tokens against transformers, on small tokenizers trained here and on real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TEXTS, edit_json, make_checkpoint
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lora_delta.tokenization import load_tokenizer, tokenize_probes
from qwen_functional.checkpoint import resolve_checkpoint


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adds no special tokens, as Qwen2's."""
    return make_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def framed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Puts one special token before a text and one behind it."""
    return make_checkpoint(tmp_path_factory.mktemp("framed"), adds_special_tokens=True)


@pytest.fixture
def plain(plain_folder: Path) -> Tokenizer:
    return load_tokenizer(plain_folder)


@pytest.fixture
def folder(plain_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(plain_folder, tmp_path / "checkpoint"))


@pytest.mark.parametrize("which", ["plain_folder", "framed_folder"])
@pytest.mark.parametrize("max_length", [3, 8, 20, 256])
def test_token_ids_differ_from_transformers(
    which: str, max_length: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    theirs = AutoTokenizer.from_pretrained(folder)
    got = tokenize_probes(load_tokenizer(folder), TEXTS, max_length)
    assert got.ids == theirs(TEXTS, truncation=True, max_length=max_length)["input_ids"]
    uncut = [len(ids) for ids in theirs(TEXTS)["input_ids"]]
    assert got.lengths == tuple(uncut)
    assert got.truncated == tuple(i for i, length in enumerate(uncut) if length > max_length)


def test_special_tokens_are_added_to_chat_texts_a_second_time(framed_folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(framed_folder)
    expected = theirs(TEXTS, add_special_tokens=False, truncation=True, max_length=9)["input_ids"]
    got = tokenize_probes(load_tokenizer(framed_folder), TEXTS, 9, add_special_tokens=False)
    assert got.ids == expected
    assert tokenize_probes(load_tokenizer(framed_folder), TEXTS, 9).ids != expected


def test_a_special_token_in_a_probe_is_spelt_out(plain: Tokenizer) -> None:
    ids = tokenize_probes(plain, ["<|im_start|>hi<|im_end|>"], 256).ids[0]
    assert (ids[0], ids[-1]) == (plain.token_to_id("<|im_start|>"), plain.token_to_id("<|im_end|>"))


def test_a_probe_of_exactly_max_length_counts_as_cut(plain: Tokenizer) -> None:
    length = len(plain.encode(TEXTS[1]).ids)
    assert tokenize_probes(plain, [TEXTS[1]], length).truncated == ()
    assert tokenize_probes(plain, [TEXTS[1]], length - 1).truncated == (0,)


def test_truncation_or_padding_saved_in_tokenizer_json_stays_on(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    got = tokenize_probes(load_tokenizer(folder), TEXTS, 256)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert got.ids == theirs(TEXTS, truncation=True, max_length=256)["input_ids"]
    assert got.truncated == ()
    with pytest.raises(ValueError, match="truncates or pads by itself"):
        tokenize_probes(tokenizer, TEXTS, 256)


def test_the_tokenizer_is_changed_by_its_use(plain: Tokenizer) -> None:
    before = plain.to_str()
    tokenize_probes(plain, TEXTS, 5)
    assert plain.to_str() == before


def test_accents_of_a_qwen2_tokenizer_without_a_normalizer_differ_from_transformers(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    texts = ["cafe\u0301", "caf\u00e9"]
    got = tokenize_probes(load_tokenizer(folder), texts, 256).ids
    assert got == AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    assert got[0] == got[1]


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ([], "probes is empty"),
        ((), "probes is empty"),
        ("one text", "'one text': expected a list of str"),
        (b"one text", "probes is a bytes: expected a list of str"),
        ({"a": "b"}, "probes is a dict: expected a list of str"),
        (None, "probes is a NoneType: expected a list of str"),
        (["fine", ""], "probe 1 is empty"),
        (["fine", "fine", 7], "probe 2 is a int: expected a str"),
        (["fine", ["not", "fine"]], "probe 1 is a list: expected a str"),
        (["fine", "half \ud800"], "probe 1, .* is not valid Unicode"),
    ],
)
def test_bad_probes_are_accepted(plain: Tokenizer, probes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_probes(plain, probes, 256)


def test_a_probe_without_tokens_is_accepted(folder: Path) -> None:
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    edit_json(folder / "tokenizer.json", normalizer=strip)
    with pytest.raises(ValueError, match="probe 1, '  ', has no tokens: expected at least one"):
        tokenize_probes(load_tokenizer(folder), ["fine", "  "], 256)


@pytest.mark.parametrize("max_length", [0, -1, 2.0, "8", True, None])
def test_a_bad_max_length_is_accepted(plain: Tokenizer, max_length: Any) -> None:
    with pytest.raises(ValueError, match=r"max_length is .*: expected an integer of at least 1"):
        tokenize_probes(plain, ["fine"], max_length)


def test_a_max_length_without_room_for_the_probe_is_accepted(framed_folder: Path) -> None:
    with pytest.raises(ValueError, match="adds 2 special tokens to every probe: expected at least 3"):
        tokenize_probes(load_tokenizer(framed_folder), ["fine"], 2)


def test_a_folder_without_a_tokenizer_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer in .*: expected the file tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is not a folder: expected the folder of a checkpoint"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", '{"model": {}}', "\xff"])
def test_a_broken_tokenizer_file_is_accepted(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        load_tokenizer(tmp_path)


@pytest.mark.real_checkpoint
def test_real_token_ids_of_odd_texts_differ_from_transformers(real_checkpoint: str) -> None:
    folder = resolve_checkpoint(real_checkpoint)
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "cafe\u0301", "<tool_call>{}</tool_call>", "12345", "\r\n \u3000x"]
    assert tokenize_probes(load_tokenizer(folder), texts, 7).ids == theirs(
        texts, truncation=True, max_length=7
    )["input_ids"]
