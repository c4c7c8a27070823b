"""Label folders: they are read back as written, damage is noticed, and nothing is written twice."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import random_lora, tiny_config
from torch import Tensor

from lora_delta.generate.tokens import TokenFormat
from lora_delta.labelling.log import Entry, Failure, Log, check_of, open_log, read_manifest
from lora_delta.labelling.table import DeltaLabels
from lora_delta.peft.adapters import AdapterFiles, save_peft_adapter
from qwen_functional import LoraSpec

SETTINGS = {
    "model": "a model",
    "model_sha256": "ab",
    "dtype": "float32",
    "layer": -1,
    "pooling": "mean",
    "chat": False,
    "max_length": 256,
    "probes_sha256": "cd",
    "probes": ["a probe"],
}
CONFIG = tiny_config(hidden_size=16, intermediate_size=32)
SPEC = LoraSpec(rank=2)
FILES = ("manifest.json", "deltas.f32", "labels.jsonl")


def entry(name: str, delta: Tensor, sha256: str = "", source: str = "") -> tuple[Entry, Tensor]:
    facts = {"name": name, "source": source or f"/adapters/{name}", "sha256": sha256 or f"sha of {name}"}
    return {**facts, "spec": {"rank": 2}, "version": "0.1.0", "norm": 1.0, "check": check_of(delta)}, delta


def deltas(n: int, width: int = 4) -> Tensor:
    return torch.arange(1.0, 1 + n * width).view(n, width)


def failure(name: str, reason: str, sha256: str | None = None) -> dict[str, Any]:
    return asdict(Failure(name, f"/adapters/{name}", reason, sha256))


def opened(folder: Path, settings: Mapping[str, Any] = SETTINGS, shape: tuple[int, ...] = (4,)) -> Log:
    folder.mkdir(exist_ok=True)
    return open_log(folder, settings, shape)


def write(folder: Path, names: str = "abc") -> Path:
    """Write a line and a delta for each name."""
    log = opened(folder)
    for unit, (name, delta) in enumerate(zip(names, deltas(len(names)), strict=True)):
        log.append([(unit, [entry(name, delta)], [])])
    return folder


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    labels = DeltaLabels(write(tmp_path / "labels", "bca"))
    assert (len(labels), labels.names, list(labels), labels.settings) == (3, ["b", "c", "a"], ["b", "c", "a"], SETTINGS)
    for name, delta in zip("bca", deltas(3), strict=True):
        assert torch.equal(labels[name], delta)
        assert labels.tensor[labels.entry(name)["row"]].equal(delta)
        assert labels.entry(name)["spec"] == {"rank": 2}
    assert dict(labels).keys() == {"a", "b", "c"}
    assert "d" not in labels
    with pytest.raises(KeyError, match=r"no label for 'd', expected one of its 3 names: b, c, a"):
        labels["d"]


def test_the_files_are_read_without_this_library(tmp_path: Path) -> None:
    write(tmp_path, "bca")
    table = np.fromfile(tmp_path / "deltas.f32", "<f4").reshape(-1, 4)
    found = {one["name"]: table[one["row"]] for text in (tmp_path / "labels.jsonl").read_text().splitlines()
             for one in json.loads(text)["labels"]}  # fmt: skip
    assert {name: delta.tolist() for name, delta in found.items()} == dict(zip("bca", deltas(3).tolist(), strict=True))


def test_more_labels_leave_what_is_there_as_it_is(tmp_path: Path) -> None:
    write(tmp_path)
    before = {name: ((tmp_path / name).read_bytes(), (tmp_path / name).stat().st_ino) for name in FILES}
    kept = DeltaLabels(tmp_path)
    mapped = kept.tensor
    opened(tmp_path).append([(0, [entry("a", torch.ones(4)), entry("d", torch.ones(4))], [])])
    for name, (content, inode) in before.items():
        assert (tmp_path / name).read_bytes()[: len(content)] == content
        assert (tmp_path / name).stat().st_ino == inode
    assert (tmp_path / "manifest.json").read_bytes() == before["manifest.json"][0]
    assert torch.equal(mapped, deltas(3))
    labels = DeltaLabels(tmp_path)
    assert labels.names == ["b", "c", "a", "d"]
    assert torch.equal(labels.tensor, torch.cat([deltas(3)[1:], torch.ones(2, 4)]))


def test_a_folder_that_is_opened_is_not_written_to(tmp_path: Path) -> None:
    write(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    opened(tmp_path)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_a_failure_takes_a_stale_label_away_and_leaves_a_good_one(tmp_path: Path) -> None:
    log = opened(write(tmp_path))
    failures = [failure("a", "it cannot be reached"), failure("b", "it has changed, and is bad now", "another sha")]
    log.append([(0, [], failures)])
    labels = DeltaLabels(tmp_path)
    assert labels.names == ["a", "c"]
    assert torch.equal(labels.tensor, deltas(3)[::2])
    assert [vars(one) for one in labels.failures.values()] == failures
    log.append([(0, [entry("a", deltas(1)[0]), entry("b", torch.ones(4), "sha of b, mended")], [])])
    assert (DeltaLabels(tmp_path).names, DeltaLabels(tmp_path).failures) == (["c", "a", "b"], {})


def test_a_folder_without_a_label_can_be_read(tmp_path: Path) -> None:
    opened(tmp_path, shape=(2, 4)).append([(0, [], [failure("a", "bad")])])
    assert len(DeltaLabels(tmp_path)) == 0
    assert DeltaLabels(tmp_path).tensor.shape == (0, 2, 4)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "model_sha256": ({"model_sha256": "ef", "model": "b/c"}, r"model_sha256 is 'ab' there and 'ef' here \(.*'b/c'"),
    "dtype": ({"dtype": "bfloat16"}, r"dtype is 'float32' there and 'bfloat16' here"),
    "layer": ({"layer": [3, -1]}, r"layer is -1 there and \[3, -1\] here"),
    "pooling": ({"pooling": "none"}, r"pooling is 'mean' there and 'none' here"),
    "probes": ({"probes_sha256": "ef", "chat": True}, r"probes_sha256 is 'cd' there and 'ef' here \(chat is True here"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_labels_of_other_settings_are_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    changes, message = CHANGES[name]
    before = {file: file.read_bytes() for file in write(tmp_path).iterdir()}
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path, {**SETTINGS, **changes})
    assert "use another folder (--out)" in str(error.value)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    opened(tmp_path, {**SETTINGS, "model": "its name alone", "max_length": 99, "probes": [[1]]})


# --- Damage -----------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replaced(name: str, old: bytes, new: bytes) -> Callable[[Path], Any]:
    def replace(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert content.count(old) == 1
        (folder / name).write_bytes(content.replace(old, new))

    return replace


def lines_of(folder: Path, order: slice) -> None:
    lines = (folder / "labels.jsonl").read_bytes().splitlines(True)
    (folder / "labels.jsonl").write_bytes(b"".join(lines[order]))


def another_layer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(folder / "manifest.json", settings={**manifest["settings"], "layer": 3})


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def put(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return put


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "is not a folder"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "is not valid JSON, expected a man"),
    "another manifest": (lambda folder: edit(folder / "manifest.json", kind="luggage"), "not a manifest of delta"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "holds a list, expected a man"),
    "the format before": (lambda folder: edit(folder / "manifest.json", format=1), "format 1, expected 2: another ver"),
    "no settings": (lambda folder: edit(folder / "manifest.json", settings=None), "lacks 'shape' or 'settings'"),
    "a shape of no end": (lambda folder: edit(folder / "manifest.json", shape=[1 << 40]), "lacks 'shape' or"),
    "other settings": (another_layer, r"labels.jsonl, line 1, is not what was written there: restore"),
    "another shape": (lambda folder: edit(folder / "manifest.json", shape=[2, 2]), "line 1, is not what was written"),
    "no log": (lambda folder: (folder / "labels.jsonl").unlink(), r"has no labels\.jsonl"),
    "a folder for a log": (instead("labels.jsonl", Path.mkdir), "labels.jsonl is not a regular file"),
    "a pipe for a log": (instead("labels.jsonl", os.mkfifo), "labels.jsonl is not a regular file"),
    "a table elsewhere": (instead("deltas.f32", lambda path: path.symlink_to("x")), "deltas.f32 is not a regular"),
    "another name": (replaced("labels.jsonl", b'{"name": "b"', b'{"name": "z"'), "line 2, is not what was written"),
    "another name at the end": (replaced("labels.jsonl", b'{"name": "c"', b'{"name": "z"'), "line 3, is not what was"),
    "lines exchanged": (lambda folder: lines_of(folder, slice(None, None, -1)), "line 1, is not what was"),
    "a line less": (lambda folder: lines_of(folder, slice(1, None)), "line 1, is not what was written there"),
}


@pytest.mark.filterwarnings("ignore:.*is missing, and deltas.f32 has its rows")
@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_what_was_written_is_refused(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "labels")
    spoil, message = BROKEN[name]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        DeltaLabels(folder)


def bit_flipped(table: np.ndarray) -> None:
    table.view("u4")[1, 2] ^= 1


def nan(table: np.ndarray) -> None:
    table[1] = np.nan


def rows_exchanged(table: np.ndarray) -> None:
    table[:2] = table[1::-1].copy()


@pytest.mark.parametrize("spoil", [bit_flipped, nan, rows_exchanged], ids=lambda spoil: spoil.__name__)
def test_a_delta_that_is_not_what_was_written_is_refused_when_it_is_read(
    spoil: Callable[[np.ndarray], None], tmp_path: Path
) -> None:
    write(tmp_path)
    spoil(np.memmap(tmp_path / "deltas.f32", "<f4", "r+", shape=(3, 4)))
    labels = DeltaLabels(tmp_path)
    with pytest.raises(ValueError, match=r"deltas.f32, row 1, is not the delta of 'b' .*: lora-delta label computes"):
        labels["b"]
    with pytest.raises(ValueError, match=r"deltas.f32, row [01], is not the delta of"):
        labels.tensor  # noqa: B018  (a property that reads)
    assert torch.equal(labels["c"], deltas(3)[2])


def test_the_end_of_a_file_that_was_not_written_is_said_and_cut_off(tmp_path: Path) -> None:
    """What a power cut may leave: files that end too early, or too late."""
    write(tmp_path / "whole")
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in FILES}
    lines = whole["labels.jsonl"].splitlines(True)
    pictures = {
        "half a line": ({"labels.jsonl": whole["labels.jsonl"][:-9]}, 2),
        "zeros in a line": ({"labels.jsonl": whole["labels.jsonl"][:-99] + bytes(99)}, 2),
        "zeros and its end": ({"labels.jsonl": whole["labels.jsonl"][:-99] + bytes(98) + b"\n"}, 2),
        "a row without a line": ({"labels.jsonl": b"".join(lines[:2])}, 2),
        "half a row without a line": ({"deltas.f32": whole["deltas.f32"] + bytes(5)}, 3),
        "half a row for a line": ({"deltas.f32": whole["deltas.f32"][:-3]}, 2),
        "rows lost": ({"deltas.f32": whole["deltas.f32"][:17]}, 1),
        "an empty table": ({"deltas.f32": b""}, 0),
        "an empty log": ({"labels.jsonl": b""}, 0),
    }
    for name, (files, left) in pictures.items():
        folder = write(tmp_path / name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        with pytest.warns(UserWarning, match=rf"line {left + 1}, .*: it was not finished, and is ignored"):
            labels = DeltaLabels(folder)
        assert {key: delta.tolist() for key, delta in labels.items()} == dict(
            zip("abc"[:left], deltas(left).tolist(), strict=True)
        ), name
        with pytest.warns(UserWarning, match=r"it was not finished, and is ignored"):
            log = opened(folder)
        for file in FILES:
            assert whole[file].startswith((folder / file).read_bytes()), name
        for unit in range(left, 3):
            log.append([(unit, [entry("abc"[unit], deltas(3)[unit])], [])])
        assert {file: (folder / file).read_bytes() for file in FILES} == whole, name


def test_labels_that_a_rank_has_left_behind_are_taken_in_once(tmp_path: Path) -> None:
    write(tmp_path, "a")
    part = Log(tmp_path, read_manifest(tmp_path), "-3")
    part.append([(1, [entry("b", deltas(2)[1])], []), (2, [], [failure("c", "bad", "a sha")])])
    left = {name: (tmp_path / name).read_bytes() for name in ("deltas-3.f32", "labels-3.jsonl")}
    opened(tmp_path)
    for name, content in left.items():  # as if killed before their removal
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_bytes(content)
    opened(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(FILES)
    labels = DeltaLabels(tmp_path)
    assert (labels.names, list(labels.failures)) == (["a", "b"], ["c"])
    assert torch.equal(labels.tensor, deltas(2))
    assert len((tmp_path / "deltas.f32").read_bytes()) == 2 * 16


def test_a_hundred_thousand_labels_are_opened_without_reading_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = torch.ones(2)
    one, _ = entry("", row, "ab" * 32)
    names = [f"teachers/task-{index:06d}" for index in range(100_000)]
    log = opened(tmp_path, shape=(2,))
    log.append((unit, [({**one, "name": name}, row) for name in names[unit : unit + 100]], []) for unit in
               range(0, len(names), 100))  # fmt: skip
    checked: list[str] = []
    check = check_of

    def counted(delta: Tensor) -> str:
        checked.append(check(delta))
        return checked[-1]

    monkeypatch.setattr("lora_delta.labelling.log.check_of", counted)
    labels = DeltaLabels(tmp_path)
    assert (len(labels), labels.names[-1], checked) == (100_000, names[-1], [])
    assert torch.equal(labels[names[-1]], row)
    assert len(checked) == 1
    assert re.search(rf"{re.escape(str(tmp_path))}/deltas.f32", Path("/proc/self/maps").read_text())


# --- Training data ----------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Two adapters under ``teachers``, and made-up labels for them next to it."""
    log = opened(tmp_path / "deltas")
    for seed, name in enumerate(("a", "b")):
        folder = tmp_path / "teachers" / name
        save_peft_adapter(folder, SPEC, random_lora(CONFIG, SPEC, seed=seed, dtype=torch.float32), base_model="x/y")
        made_up = entry(f"teachers/{name}", deltas(2)[seed], AdapterFiles.read(folder).sha256, str(folder))
        log.append([(seed, [made_up], [])])
    return tmp_path


def test_training_data_pairs_conditions_with_their_adapters(labelled: Path) -> None:
    labels = DeltaLabels(labelled / "deltas")
    conditions = {"teachers/b": "prompt of b", "teachers/a": "prompt of a"}
    assert [(c, d.tolist()) for c, d in labels.dataset(conditions)] == [  # type: ignore[attr-defined]
        ("prompt of b", deltas(2)[1].tolist()),
        ("prompt of a", deltas(2)[0].tolist()),
    ]
    format = TokenFormat.for_config(CONFIG, rank=2, chunk_width=8)
    with_tensors, with_tokens = labels.dataset(conditions, "tensors"), labels.dataset(conditions, "tokens", format)
    assert len(with_tensors) == len(with_tokens) == 2
    for index, (name, seed) in enumerate((("b", 1), ("a", 0))):
        expected = random_lora(CONFIG, SPEC, seed=seed, dtype=torch.float32)
        condition, tensors, delta = with_tensors[index]
        assert condition == f"prompt of {name}"
        assert torch.equal(delta, deltas(2)[seed])
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
        assert torch.equal(with_tokens[index][1], format.tokenize(expected))


def test_labels_move_with_their_adapters(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = labelled.rename(labelled.with_name("moved"))
    labels = DeltaLabels(moved / "deltas")
    assert labels.dataset({"teachers/a": None}, "tensors")[0][1]
    monkeypatch.chdir(moved)
    for name in ("teachers/a", str(moved / "teachers" / "a"), str(moved / "deltas" / ".." / "teachers" / "a")):
        assert torch.equal(labels[name], deltas(2)[0])


def test_training_data_refuses_an_adapter_that_is_not_the_labelled_one(labelled: Path) -> None:
    dataset = DeltaLabels(labelled / "deltas").dataset({"teachers/a": None}, "tensors", keep_bytes=0)
    assert dataset[0]
    tensors = random_lora(CONFIG, SPEC, seed=7, dtype=torch.float32)
    save_peft_adapter(labelled / "teachers" / "a", SPEC, tensors, base_model="x/y")
    with pytest.raises(ValueError, match="teachers/a has changed since it was labelled"):
        dataset[0]


@pytest.mark.parametrize(("targets", "room", "reads"), [("tokens", 1, 2), ("tensors", 1, 2), ("tokens", 0, 4)])
def test_teachers_are_read_once_where_there_is_room(
    targets: str, room: int, reads: int, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    read = AdapterFiles.read

    def watched(source: str, **options: Any) -> Any:
        seen.append(source)
        return read(source, **options)

    monkeypatch.setattr(AdapterFiles, "read", watched)
    format = TokenFormat.for_config(CONFIG, rank=2, chunk_width=8) if targets == "tokens" else None
    conditions = {"teachers/a": None, "teachers/b": None}
    dataset = DeltaLabels(labelled / "deltas").dataset(conditions, targets, format, keep_bytes=room << 30)
    first = [dataset[index][1] for index in range(2)]
    if targets == "tensors":
        dataset[0][1].clear()  # the caller owns it
    again = [dataset[index][1] for index in range(2)]
    assert len(seen) == reads
    for one, other in zip(first, again, strict=True):
        if targets == "tokens":
            assert torch.equal(one, other)
        else:
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_arguments_make_no_training_data(labelled: Path) -> None:
    labels = DeltaLabels(labelled / "deltas")
    with pytest.raises(ValueError, match="targets is 'weights', expected None or one of"):
        labels.dataset({}, "weights")
    with pytest.raises(ValueError, match="targets is 'tokens' and format is None"):
        labels.dataset({}, "tokens")
    for name in ("teachers/z", "teachers/a\0"):
        with pytest.raises(ValueError, match=rf"conditions: .* has no label for {re.escape(repr(name))}, expected one"):
            labels.dataset({name: "prompt"})


def test_a_label_is_found_by_a_path_from_home(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = DeltaLabels(labelled / "deltas")
    monkeypatch.setenv("HOME", str(labelled.parent))
    for name in read.names:
        path = Path(read.source(name))
        assert read.entry(f"~/{path.relative_to(labelled.parent)}") is read.entry(name)
