"""What a run's TOML file and files of prompts may say, and how their errors are reported."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from lora_delta.generate.options import DeltaOptions, TrainingOptions
from lora_delta.generate.prompts import FolderNames, read_prompts
from lora_delta.generate.run_config import RunConfig
from lora_delta.generate.schedules import Schedule

SMALL = """
base = "embedded"
labels = "deltas"
prompts = "prompts.jsonl"
out = "run"
[format]
rank = 4
chunk_width = 64
"""
OWN = 'base = "embedded"\ndata = "data"\nout = "run"\n[losses]\n'
CONTEXT = 'delta = {weight = 1, texts = "own", target = "context"}\n'


def read(folder: Path, text: str | bytes) -> RunConfig:
    path = folder / "run.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return RunConfig.from_toml(path)


def with_line(line: str, table: str = "") -> str:
    """The small file with a line added to or replaced in a table."""
    key = line.split("=")[0].strip()
    kept = "\n".join(old for old in SMALL.splitlines() if old.split("=")[0].strip() != key or "=" not in line)
    if table in ("", "[format]"):
        return kept.replace("[format]", f"{line}\n[format]" if not table else f"[format]\n{line}")
    return f"{kept}\n{table}\n{line}\n"


def test_a_run_may_have_a_billion_steps(tmp_path: Path) -> None:
    assert read(tmp_path, with_line("steps = 1_000_000_000", "[training]")).training.steps == 10**9


def test_defaults_are_those_of_the_options(tmp_path: Path) -> None:
    config = read(tmp_path, SMALL)
    assert config.training == TrainingOptions()
    assert (config.dtype, config.device, config.stream, config.condition_layer) == ("bfloat16", None, False, -1)
    assert config.format == {"rank": 4, "chunk_width": 64}


def test_what_a_file_says_is_taken(tmp_path: Path) -> None:
    text = SMALL.replace("[format]", 'dtype = "float32"\ndevice = "cpu"\nstream = true\nmax_length = 9\n[format]')
    text += "[generator]\nwidth = 8\n[training]\nsteps = 3\nlearning_rate = 1\nbf16 = true\n"
    text += '[losses]\nweights = 2\ndelta = {weight = 1.0, kind = "linear", warmup_steps = 5}\n'
    config = read(tmp_path, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())  # as Windows editors write it
    losses = {"weights": Schedule(2.0), "delta": Schedule(1.0, "linear", 5)}
    assert config.training == TrainingOptions(steps=3, learning_rate=1.0, bf16=True, losses=losses)
    assert (config.dtype, config.device, config.stream, config.max_length) == ("float32", "cpu", True, 9)
    assert config.generator == {"width": 8}


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = read(tmp_path, SMALL.replace('"embedded"', '"model"').replace('"run"', '"/run"'))
    assert config.labels == tmp_path.resolve() / "deltas"
    assert config.base == str(tmp_path.resolve() / "model")
    assert config.out == Path("/run")


OFF = [
    (SMALL.replace('base = "embedded"', ""), "the file has no 'base'"),
    (SMALL.replace("[format]", "[other]"), "the file has 'other', expected some of"),
    (SMALL.replace("rank = 4", ""), "format has no 'rank'"),
    (SMALL.replace("[format]", "[format"), "cannot be read as TOML"),
    ("a = " + "[" * 5000, "cannot be read as TOML"),
    ("a = 1\na = 2", "cannot be read as TOML"),
    (b"a = '\xff'", "is not UTF-8"),
    (with_line("base = 1"), "base is 1, expected a string"),
    (with_line("labels = []"), r"labels is \[\], expected a string"),
    (with_line('labels = "a\\u0000"'), r"labels is 'a\\x00', expected a path"),
    (with_line("out = 2020-01-01"), "out is datetime.date"),
    (with_line("dtype = []"), r"dtype is \[\], expected one of \('float32'"),
    (with_line('dtype = "int8"'), "dtype is 'int8', expected one of"),
    (with_line("device = 5"), "device is 5, expected a string"),
    (with_line('device = "gpu"'), "device is 'gpu', expected one such as 'cpu', 'cuda' or 'cuda:1'"),
    (with_line('device = "cuda:99"'), r"device is 'cuda:99', and there (are|is) \d GPU"),
    (with_line('stream = "no"'), "stream is 'no', expected true or false"),
    (with_line("stream = 1"), "stream is 1, expected true or false"),
    (with_line("tensor_parallel = 0"), "tensor_parallel is 0, expected an integer of at least 1"),
    (with_line("tensor_parallel = true"), "tensor_parallel is True, expected an integer"),
    (with_line("adapters_per_pass = 0"), "adapters_per_pass is 0, expected an integer"),
    (with_line("condition_layer = -2"), "condition_layer is -2"),
    (with_line("max_length = 1e3"), "max_length is 1000.0, expected an integer"),
    (with_line("training = 1"), "training is 1, expected a table"),
    (with_line("losses = 1.0"), "losses is 1.0, expected a table"),
    (with_line("format = 1").replace("[format]\nrank = 4\nchunk_width = 64", ""), "format is 1, expected a table"),
    (with_line("rank = 4.0", "[format]"), r"format\.rank is 4\.0, expected an integer of at least 1"),
    (with_line("rank = 9223372036854775807", "[format]"), r"format\.rank is 9223372036854775807, .* at most 65536"),
    (with_line("rnak = 4", "[format]"), "format has 'rnak', expected some of"),
    (with_line("width = -8", "[generator]"), r"generator\.width is -8, expected an integer of at least 1"),
    (with_line("width = [8]", "[generator]"), r"generator\.width is \[8\]"),
    (with_line("hidden = 8", "[generator]"), "generator has 'hidden'"),
    (with_line("step = 4", "[training]"), "training has 'step', expected some of"),
    (with_line("losses = 4", "[training]"), "training has 'losses', expected some of"),
    (with_line("steps = 0", "[training]"), "steps is 0, expected an integer of at least 1"),
    (with_line("steps = 1e9", "[training]"), "steps is 1000000000.0, expected an integer"),
    (with_line("steps = 1000000001", "[training]"), "steps is 1000000001, expected an integer of at least 1"),
    (with_line("accumulate = 0", "[training]"), "accumulate is 0, expected an integer of at least 1"),
    (with_line('learning_rate = "fast"', "[training]"), "learning_rate is 'fast', expected a finite number"),
    (with_line("learning_rate = nan", "[training]"), "learning_rate is nan, expected a finite number"),
    (with_line("learning_rate = -inf", "[training]"), "learning_rate is -inf, expected a finite number"),
    (with_line("checkpoint_every = nan", "[training]"), "checkpoint_every is nan, expected an integer"),
    (with_line("bf16 = 'yes'", "[training]"), "bf16 is 'yes', expected true or false"),
    (with_line("logits = 1.0", "[losses]"), "losses has 'logits', expected some of"),
    (with_line("weights = 'much'", "[losses]"), r"losses\.weights: weight is 'much', expected a finite number"),
    (with_line("weights = {}", "[losses]"), r"losses\.weights has no 'weight'"),
    (with_line("weights = {weight = 1, kind = 'step'}", "[losses]"), r"losses\.weights: kind is 'step'"),
    (with_line("weights = {weight = 1, warm = 3}", "[losses]"), r"losses\.weights has 'warm'"),
    (with_line("weights = true", "[losses]"), r"losses\.weights: weight is True, expected a finite number"),
    (with_line("weights = 0", "[losses]"), "losses all have weight 0"),
    (with_line('kind = "sum"', "[generator]"), r"generator\.kind is 'sum', expected one of"),
    (with_line('kind = "additive"', "[generator]"), "generator is additive and there is a format"),
    (with_line('writes = "B"', "[generator]"), "generator has 'writes', expected some of"),
    (OWN.replace("out =", "delta = 1\nout ="), "the file has 'delta'"),
    (OWN + 'delta = {weight = 1, texts = "mine"}', r"losses\.delta: texts is 'mine', expected one of"),
    (OWN + 'delta = {weight = 1, texts = "own", target = "base"}', r"losses\.delta: target is 'base', expected one of"),
    (OWN + 'delta = {weight = 1, texts = "own", layers = []}', r"losses\.delta: layers is \[\], expected some"),
    (OWN + 'delta = {weight = 1, texts = "own", layers = [1, 1]}', r"losses\.delta: layers is \[1, 1\], expected"),
    (OWN + 'delta = {weight = 1, texts = "own", layers = [-2]}', r"losses\.delta: layers is -2, expected an integer"),
    (OWN + 'delta = {weight = 1, texts = "own", layers = "all"}', r"losses\.delta: layers is 'all'"),
    (OWN + 'delta = {weight = 1, positions = "all"}', r"losses\.delta: .*expected texts = 'own' as well"),
    (OWN + 'delta = {weight = 1, texts = "own", place = 1}', r"losses\.delta has 'place', expected some of"),
    (OWN + 'delta = {texts = "own"}', r"losses\.delta has no 'weight'"),
    (OWN + 'delta = {weight = 1, texts = "own"}', "labels is missing, which the loss 'delta' needs"),
    (OWN.replace('data = "data"', "") + CONTEXT, "data is missing, which the loss 'delta' needs"),
    (OWN + CONTEXT + '[generator]\nkind = "additive"\ndepth = 2', "generator has 'depth', expected some of"),
    (OWN + CONTEXT + '[generator]\nkind = "additive"\nwrites = "A"', r"generator\.writes is 'A', expected one of"),
    (OWN + CONTEXT + '[generator]\nkind = "additive"\nfeatures = 0', r"generator\.features is 0, expected an integer"),
    (OWN + CONTEXT + '[generator]\nkind = "additive"\nfrom_teachers = 1', r"generator\.from_teachers is 1, expected"),
    (OWN + CONTEXT + '[generator]\nkind = "additive"\nfrom_teachers = true', "from_teachers without labels"),
]


def test_deltas_of_own_texts_are_a_loss_with_options(tmp_path: Path) -> None:
    text = 'delta = {weight = 0.5, kind = "linear", warmup_steps = 9, texts = "own", target = "context", '
    text += "layers = [0, -1]}"
    asked = read(tmp_path, f"{OWN}{text}").training
    assert asked.losses == {"delta": Schedule(0.5, "linear", 9)}
    assert asked.delta == DeltaOptions("own", "context", "completion", [0, -1])
    assert (asked.text_terms, asked.teacher_terms, asked.delta_from_context) == (("delta",), (), True)
    asked = read(tmp_path, SMALL).training
    assert (asked.text_terms, asked.teacher_terms) == ((), ("weights", "delta"))
    assert not asked.delta_from_context


def test_what_is_stored_is_not_asked_for_in_steps(tmp_path: Path) -> None:
    losses = OWN + CONTEXT + "kl = 1\n"
    assert read(tmp_path, losses).asks_base_for == ("kl", "delta")
    assert read(tmp_path, losses + '[teacher]\nstored = "said"').asks_base_for == ("delta",)
    found = read(tmp_path, losses + '[teacher]\nstored = "said"\nstored_deltas = "deltas"')
    assert (found.asks_base_for, found.teacher.stored_deltas) == ((), str(tmp_path / "deltas"))
    of_teacher = losses.replace('"context"', '"teacher"') + '[teacher]\nstored_deltas = "deltas"'
    assert read(tmp_path, of_teacher).asks_teachers_for == ()
    assert read(tmp_path, with_line('stored_deltas = "deltas"', "[teacher]")).asks_teachers_for == ("weights", "delta")


@pytest.mark.parametrize(("text", "message"), OFF, ids=[message for _, message in OFF])
def test_a_file_that_is_off_is_refused_in_a_line_that_names_it_and_the_key(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "run.toml"))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml does not exist, expected a run in TOML"):
        RunConfig.from_toml(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="is not a file"):
        RunConfig.from_toml(tmp_path)


# Prompts


def test_prompts_are_read_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [{"adapter": "teachers/a", "prompts": ["x", "y\u2028z"]}, {"adapter": "teachers/é", "prompts": ["\f"]}]
    path.write_text("\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert read_prompts(path) == {"teachers/a": ["x", "y\u2028z"], "teachers/é": ["\f"]}
    path.write_text("\ufeffone\n\n two \r\nthree\x85four\n", encoding="utf-8")
    assert read_prompts(path) == {"prompt-0000": ["one"], "prompt-0001": [" two "], "prompt-0002": ["three\x85four"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ("\n \n", "holds no prompts"),
        ('{"adapter": "a"}', r"line 1 of .*p\.jsonl is .*, expected \{\"adapter\": a name"),
        ('{"adapter": "a", "prompts": []}', "line 1 of"),
        ('{"adapter": 1, "prompts": ["x"]}', "line 1 of"),
        ('{"adapter": "a", "prompts": "x"}', "line 1 of"),
        ('{"adapter": "a", "prompts": ["x"]}\n\n{', "line 3 of .* is not valid JSON"),
        ("{}", "line 1 of"),
        ('{"adapter": "a", "prompts": ["x"]}\n[]', "line 2 of"),
        ('{"adapter": "a", "prompts": ["x"]}\n{"adapter": "a", "prompts": ["y"]}', "line 2 of .* names 'a' again"),
        ('{"adapter": "a", "prompts": ["x", 1]}', "line 1 of .*: prompt 1 is a int"),
        ('{"adapter": "a", "prompts": [""]}', "line 1 of .*: prompt 0 is empty"),
        ('{"adapter": "a", "prompts": ["\\ud800"]}', "line 1 of .*: prompt 0, .*, is not valid Unicode"),
        ('{"adapter": ' + "[" * 100_000, "line 1 of .* is nested too deeply"),
    ],
)
def test_a_line_of_prompts_that_is_off_is_refused_by_its_number(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.jsonl")


LONG = "a" * 201
NOT_NAMES = ["", ".", "..", "/", "/etc/x", "a/b", "a\\b", "..\\x", "C:x", "a\0b", "a\nb", "a ", " a", "a.", ".lock"]
NOT_NAMES += ["x.unfinished", "CON", "nul", "Com1.txt", "LPT¹", 'a"b', "a<b", "a|b", "a?", "*", LONG, "é" * 101]
NOT_NAMES += ["\ud800"]


@pytest.mark.parametrize("name", NOT_NAMES, ids=ascii)
def test_a_name_that_is_no_folders_on_some_system_is_refused_by_its_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines: list[dict[str, Any]] = [{"name": "fine", "prompts": ["x"]}, {"name": name, "prompts": ["x"]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"^line 2 of .*p\.jsonl: .* names a folder, expected a name") as raised:
        read_prompts(path, "name", FolderNames())
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", "A"), ("straße", "STRASSE"), ("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9"))],
)
def test_names_that_are_one_folder_on_some_system_are_refused(one: str, other: str) -> None:
    take = FolderNames()
    take(one)
    with pytest.raises(ValueError, match="are one folder on some systems"):
        take(other)


@pytest.mark.parametrize("name", ["a", "prompt-0000", "a b", "a.b", "日本語", "console", "com10", "-x", "a" * 200])
def test_a_name_that_is_a_folders_on_all_systems_is_taken(name: str, tmp_path: Path) -> None:
    FolderNames()(name)
    (tmp_path / name).mkdir()
