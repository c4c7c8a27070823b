"""Tokens against transformers, with small tokenizers trained here and with real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from checkpoints import TEXTS, edit_json, make_checkpoint
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lora_delta.probes.tokenization import MOST_CHARACTERS, Probes, load_tokenizer, tokenize_probes
from lora_delta.probes.tokenizer_files import TokenizerConfig
from qwen_functional.hub import resolve_checkpoint


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer adds no special tokens, like Qwen2's."""
    return make_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def framed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer adds a special token before a text and one after it."""
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
def test_token_ids_equal_transformers(which: str, max_length: int, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    theirs = AutoTokenizer.from_pretrained(folder)
    got = tokenize_probes(load_tokenizer(folder), TEXTS, max_length)
    assert got.ids == theirs(TEXTS, truncation=True, max_length=max_length)["input_ids"]
    uncut = [len(ids) for ids in theirs(TEXTS)["input_ids"]]
    assert got.lengths == tuple(uncut)
    assert got.truncated == tuple(i for i, length in enumerate(uncut) if length > max_length)
    assert (got.texts, got.chat, got.max_length) == (tuple(TEXTS), False, max_length)


def test_probes_given_as_ids_are_as_long_as_these() -> None:
    assert Probes([[1, 2], [3]]) == Probes([[1, 2], [3]], texts=None, truncated=(), lengths=(2, 1), max_length=None)


def test_chat_texts_get_no_special_tokens_besides_their_own(framed_folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(framed_folder)
    expected = theirs(TEXTS, add_special_tokens=False, truncation=True, max_length=9)["input_ids"]
    got = tokenize_probes(load_tokenizer(framed_folder), TEXTS, 9, add_special_tokens=False)
    assert got.ids == expected
    assert tokenize_probes(load_tokenizer(framed_folder), TEXTS, 9).ids != expected


def test_a_special_token_in_a_probe_is_one_token(plain: Tokenizer) -> None:
    ids = tokenize_probes(plain, ["<|im_start|>hi<|im_end|>"], 256).ids[0]
    assert (ids[0], ids[-1]) == (plain.token_to_id("<|im_start|>"), plain.token_to_id("<|im_end|>"))


def test_a_probe_of_exactly_max_length_is_not_cut(plain: Tokenizer) -> None:
    length = len(plain.encode(TEXTS[1]).ids)
    assert tokenize_probes(plain, [TEXTS[1]], length).truncated == ()
    assert tokenize_probes(plain, [TEXTS[1]], length - 1).truncated == (0,)


def test_truncation_and_padding_saved_in_tokenizer_json_are_switched_off(folder: Path) -> None:
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


def test_the_tokenizer_is_as_it_was_after_its_use(plain: Tokenizer) -> None:
    before = plain.to_str()
    tokenize_probes(plain, TEXTS, 5)
    assert plain.to_str() == before


# --- Every layout of the files, against AutoTokenizer --------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "Qwen2.5's": {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "split_special_tokens": False},
    "of transformers 4": {"tokenizer_class": "Qwen2TokenizerFast"},
    "DeepSeek-R1-Distill's": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False},
    "of another class": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "of no class": {},
    "code of its own that nobody trusts": {"auto_map": {"AutoTokenizer": ["a--b.C", None]}},
    "add_prefix_space": {"add_prefix_space": True},
    "split_special_tokens": {"split_special_tokens": True},
    "a new special token": {"eos_token": "<end>", "pad_token": None},
    "special tokens of the model's own": {"image_token": "<image>", "extra_special_tokens": {"video_token": "river"}},
    "additional_special_tokens": {"additional_special_tokens": ["<more>", "probe"]},
    "added_tokens_decoder": {
        "added_tokens_decoder": {
            "305": {"content": "river", "lstrip": True, "rstrip": True, "special": False, "normalized": True},
            "300": {"content": "<image>", "single_word": True, "special": True},
            "2": {"content": "<|im_end|>", "rstrip": True, "special": True},
        },
        "eos_token": "<|im_end|>",
    },
}
ODD_TEXTS = [*TEXTS, "cafe\u0301", "caf\u00e9", "<image>the river  <|im_end|>\n<end><more>x", "it's 123\r\n\n \u3000x"]
NORMALIZERS: list[Any] = [None, {"type": "NFC"}, {"type": "Lowercase"}]


def assert_equal_to_transformers(folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for special in (True, False):
        expected = theirs(ODD_TEXTS, add_special_tokens=special)["input_ids"]
        assert tokenize_probes(ours, ODD_TEXTS, 256, add_special_tokens=special).ids == expected
    assert TokenizerConfig.read(folder).named == theirs.special_tokens_map


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_ids_equal_transformers_for_each_layout(layout: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(LAYOUTS[layout]))
    for normalizer in NORMALIZERS if layout == "DeepSeek-R1-Distill's" else NORMALIZERS[:1]:
        edit_json(folder / "tokenizer.json", normalizer=normalizer)
        assert_equal_to_transformers(folder)


def test_accents_are_composed_whatever_the_files_say(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(LAYOUTS["DeepSeek-R1-Distill's"]))
    edit_json(folder / "tokenizer.json", normalizer=None)
    composed, decomposed = tokenize_probes(load_tokenizer(folder), ["caf\u00e9", "cafe\u0301"], 256).ids
    assert composed == decomposed


@pytest.mark.parametrize("file", ["special_tokens_map.json", "added_tokens.json", "no tokenizer_config.json"])
def test_token_ids_equal_transformers_with_the_older_files(file: str, folder: Path) -> None:
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "image_token": "<image>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if file == "special_tokens_map.json":
        tokens = {"eos_token": {"content": "<end>", "lstrip": True}, "additional_special_tokens": ["<more>", "river"]}
        (folder / file).write_text(json.dumps(tokens))
    elif file == "added_tokens.json":
        (folder / file).write_text(json.dumps({"river": 301, "<more>": 300, "<|im_end|>": 2}))
    else:
        (folder / "tokenizer_config.json").unlink()
    assert_equal_to_transformers(folder)


def test_a_token_with_further_fields_equals_transformers_and_nothing_is_printed(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    token = {"__type": "AddedToken", "content": "<end>", "lstrip": True, "odd": 1}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")
    assert_equal_to_transformers(folder)


@pytest.mark.parametrize("seed", range(25))
def test_token_ids_equal_transformers_for_drawn_layouts(
    seed: int, plain_folder: Path, framed_folder: Path, tmp_path: Path
) -> None:
    chance = Random(seed)
    folder = Path(shutil.copytree(chance.choice([plain_folder, framed_folder]), tmp_path / "checkpoint"))
    contents = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end>", "<more>", "river", "caf\u00e9"]

    def token(typed: bool = False) -> dict[str, Any]:
        flags = {name: chance.random() < 0.4 for name in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        return {"content": chance.choice(contents), **flags, **({"__type": "AddedToken"} if typed else {})}

    config: dict[str, Any] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "image_token"):
        if chance.random() < 0.5:
            config[name] = chance.choice([chance.choice(contents), None, token(typed=True)])
    if chance.random() < 0.4:
        config["added_tokens_decoder"] = {str(index): token() for index in chance.sample(range(290, 310), 4)}
    if chance.random() < 0.5:
        name = chance.choice(["extra_special_tokens", "additional_special_tokens"])
        config[name] = chance.choice([chance.sample(contents, 2), {"video_token": chance.choice(contents)}])
    for name in ("add_prefix_space", "split_special_tokens", "add_bos_token", "add_eos_token"):
        if chance.random() < 0.3:
            config[name] = chance.random() < 0.5
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if chance.random() < 0.4:
        older: dict[str, Any] = {"bos_token": token(), "pad_token": chance.choice(contents), "image_token": token()}
        (folder / "special_tokens_map.json").write_text(json.dumps(older))
    assert_equal_to_transformers(folder)


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "llama"}, "model_type in the config.json of .* is 'llama': expected 'qwen2'"),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "tokenizer_class": "QWenTokenizer"},
            "auto_map and tokenizer_class in .* name a custom tokenizer, 'QWenTokenizer'",
        ),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.json"]}, "fast_tokenizer_files in the"),
        ("tokenizer_config.json", {"init_inputs": ["x"]}, r"init_inputs in the .* is \['x'\]: expected none"),
        ("tokenizer_config.json", {"add_prefix_space": "yes"}, "add_prefix_space in the .* is 'yes': expected true or"),
        ("tokenizer_config.json", {"split_special_tokens": 1}, "split_special_tokens in the .* is 1: expected true or"),
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token in the .* is 3: expected a str or an AddedToken"),
        ("tokenizer_config.json", {"eos_token": "\ud800"}, r"eos_token in the .* is '\\ud800': expected a str or an"),
        ("tokenizer_config.json", {"extra_special_tokens": "x"}, "extra_special_tokens in the .* is 'x': expected a"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, r"added_tokens_decoder .* expected \{id: token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": 3}}}, "added_tokens_decoder in the"),
        ("added_tokens.json", {"x": "y"}, r"added_tokens\.json has 'y' for 'x': expected an id"),
        ("tokenizer.json", {"added_tokens": [{"content": "x"}]}, r"added_tokens in .*tokenizer\.json holds"),
        ("tokenizer.json", {"added_tokens": {}}, r"added_tokens in .*tokenizer\.json is a dict: expected a list"),
        ("tokenizer.json", {"added_tokens": [{"id": 0, "content": "x" * 2**20 + "y"}]}, "are longer than 1,048,576"),
        ("tokenizer.json", {"model": {"type": "Unigram"}}, r"model in .* is .*'Unigram'.*: expected one of type 'BPE'"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "is not a tokenizer that"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "is not a tokenizer that can"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}}}, "is not a tokenizer that can be read: Key"),
        ("tokenizer.json", {"post_processor": {"type": "Odd"}}, "post_processor in .* expected one that adds special"),
        ("tokenizer.json", {"post_processor": {"type": "TemplateProcessing", "single": "x"}}, "expected one that adds"),
    ],
)
def test_a_layout_of_which_the_ids_are_not_known_is_refused_by_its_field(
    file: str, changes: dict[str, Any], message: str, folder: Path
) -> None:
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    edit_json(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("layout", ["Qwen2.5's", "of transformers 4", "of no class", "added_tokens_decoder"])
def test_token_ids_of_a_qwen3_equal_transformers(layout: str, folder: Path) -> None:
    edit_json(folder / "config.json", model_type="qwen3")
    (folder / "tokenizer_config.json").write_text(json.dumps(LAYOUTS[layout]))
    assert_equal_to_transformers(folder)


@pytest.mark.parametrize("layout", ["DeepSeek-R1-Distill's", "of another class"])
def test_a_qwen3_with_a_tokenizer_of_another_class_is_refused(layout: str, folder: Path) -> None:
    edit_json(folder / "config.json", model_type="qwen3")
    (folder / "tokenizer_config.json").write_text(json.dumps(LAYOUTS[layout]))
    with pytest.raises(ValueError, match=r"tokenizer_class in .* is .*Fast', which decides for a qwen3"):
        load_tokenizer(folder)


def test_without_a_model_type_the_class_must_be_qwen2s(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="model_type in the config"):
        load_tokenizer(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    assert_equal_to_transformers(folder)


def test_what_would_blow_up_a_text_is_not_used(folder: Path) -> None:
    before = tokenize_probes(load_tokenizer(folder), TEXTS, 256)
    grow = {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 10_000}
    edit_json(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [grow] * 9})
    edit_json(folder / "tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a|a)*b"}})
    assert tokenize_probes(load_tokenizer(folder), TEXTS, 256) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_far_beyond_any_tokenizers_are_refused(name: str, folder: Path) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b" " * (1 << 25))
    with pytest.raises(ValueError, match=rf"{name} has 33,.* bytes, expected"):
        load_tokenizer(folder)


def test_a_post_processor_that_repeats_the_text_is_refused(folder: Path) -> None:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    twice = {"type": "TemplateProcessing", "single": [text, text], "pair": [], "special_tokens": {}}
    edit_json(folder / "tokenizer.json", post_processor={"type": "Sequence", "processors": [twice] * 50})
    with pytest.raises(ValueError, match=r"post_processor in .*tokenizer\.json holds the text 2 times: expected once"):
        load_tokenizer(folder)


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
        (["fine", "x" * (MOST_CHARACTERS + 1)], "probe 1 has 524,289 characters: expected at most 524,288"),
    ],
)
def test_bad_probes_are_refused(plain: Tokenizer, probes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_probes(plain, probes, 256)


def test_a_probe_without_tokens_is_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": []})
    with pytest.raises(ValueError, match="probe 1, '  ', has no tokens: expected at least one"):
        tokenize_probes(load_tokenizer(folder), ["a", "  "], 256)


@pytest.mark.parametrize("max_length", [0, -1, 2.0, "8", True, None])
def test_a_bad_max_length_is_refused(plain: Tokenizer, max_length: Any) -> None:
    with pytest.raises(ValueError, match=r"max_length is .*: expected an integer of at least 1"):
        tokenize_probes(plain, ["fine"], max_length)


def test_a_max_length_without_room_for_the_probe_is_refused(framed_folder: Path) -> None:
    with pytest.raises(ValueError, match="adds 2 special tokens to every probe: expected at least 3"):
        tokenize_probes(load_tokenizer(framed_folder), ["fine"], 2)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer in .*: expected the file tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is not a folder: expected the folder of a checkpoint"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON, expected a tokenizer"),
        (b"{", "is not valid JSON, expected a tokenizer"),
        (b"[" * 100_000, "is nested too deeply, expected a tokenizer"),
        (b"\xff", "is not UTF-8 text, expected a tokenizer"),
        (b'{"model": {}}', r"model in .* is \{\}: expected one of type 'BPE'"),
    ],
)
def test_a_broken_tokenizer_file_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(folder)
    assert "tokenizer.json" in str(caught.value)


def test_a_tokenizer_file_that_is_too_large_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match=r"tokenizer\.json has 1,099,511,627,776 bytes, expected a tokenizer of at"):
        load_tokenizer(folder)


@pytest.mark.real_checkpoint
def test_real_token_ids_of_odd_texts_equal_transformers(real_checkpoint: str) -> None:
    folder = resolve_checkpoint(real_checkpoint)
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "cafe\u0301", "<tool_call>{}</tool_call>", "12345", "\r\n \u3000x"]
    assert tokenize_probes(load_tokenizer(folder), texts, 7).ids == theirs(
        texts, truncation=True, max_length=7
    )["input_ids"]
