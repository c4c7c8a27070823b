"""Label folders: what is read is what was written, a crash leaves them whole, and wrong ones are refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import random_lora, tiny_config
from safetensors.torch import load_file
from torch import Tensor

from lora_delta import label_table
from lora_delta.adapters import adapter_fingerprint, load_peft_adapter, save_peft_adapter
from lora_delta.label_table import DeltaLabels, Failure, Label, LabelWriter
from lora_delta.tokens import TokenFormat
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


def label(name: str, sha256: str = "") -> Label:
    return Label(name, f"/adapters/{name}", sha256 or f"sha of {name}", 1.0, {"rank": 2}, "0.1.0")


def deltas(n: int, width: int = 4) -> Tensor:
    return torch.arange(1.0, 1 + n * width).view(n, width)


def write(folder: Path, names: str = "abc") -> Path:
    writer = LabelWriter(folder, SETTINGS, (4,))
    for name, delta in zip(names, deltas(len(names)), strict=True):
        writer.add(label(name), delta)
    writer.save()
    return folder


def test_what_is_read_is_not_what_was_written(tmp_path: Path) -> None:
    labels = DeltaLabels(write(tmp_path / "labels", "bca"))
    assert (len(labels), labels.names, list(labels), labels.settings) == (3, ["a", "b", "c"], ["a", "b", "c"], SETTINGS)
    for name, delta in zip("bca", deltas(3), strict=True):
        assert torch.equal(labels[name], delta)
        assert labels.tensor[labels.entry(name)["row"]].equal(delta)
    assert dict(labels).keys() == {"a", "b", "c"}
    assert "d" not in labels
    with pytest.raises(KeyError, match=r"no label of 'd', expected one of its 3 names: a, b, c"):
        labels["d"]


def test_the_files_depend_on_the_order_or_on_how_often_they_were_saved(tmp_path: Path) -> None:
    at_once, one_by_one = write(tmp_path / "1", "abc"), LabelWriter(tmp_path / "2", SETTINGS, (4,))
    for name, delta in reversed(list(zip("abc", deltas(3), strict=True))):
        one_by_one.add(label(name), delta)
        one_by_one.save()
        one_by_one = LabelWriter(tmp_path / "2", SETTINGS, (4,))
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in "12")
    assert first == second
    (table,) = (file for file in at_once.iterdir() if file.suffix == ".safetensors")
    assert torch.equal(load_file(table)["deltas"], deltas(3))
    assert table.stat().st_mode & 0o777 == (at_once / "manifest.json").stat().st_mode & 0o777
    manifest = (at_once / "manifest.json").read_text()
    lines = [json.loads(line.strip(" ,")) for line in manifest.splitlines() if '"row"' in line]
    assert [entry["name"] for entry in lines] == ["a", "b", "c"]


@pytest.mark.parametrize("moment", ["before the table", "between the two", "before the old table is removed"])
def test_a_crash_while_saving_leaves_a_manifest_without_its_table(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path)
    writer, rename, remove = LabelWriter(folder, SETTINGS, (4,)), Path.replace, Path.unlink
    writer.add(label("d"), torch.ones(4))

    def crash(path: Path, target: Path) -> Path:
        if ("manifest" in path.name) == (moment == "between the two"):
            raise RuntimeError("power cut")
        return rename(path, target)

    def crash_later(path: Path) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        if moment == "before the old table is removed":
            patch.setattr(Path, "unlink", crash_later)
        else:
            patch.setattr(Path, "replace", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            writer.save()
    assert Path.replace is rename
    assert Path.unlink is remove
    labels = DeltaLabels(folder)
    expected = torch.cat([deltas(3), torch.ones(1, 4)]) if moment == "before the old table is removed" else deltas(3)
    assert torch.equal(labels.tensor, expected)
    (folder / "deltas-of-someone-else.safetensors").write_bytes(b"")
    writer = LabelWriter(folder, SETTINGS, (4,))
    writer.add(label("e"), torch.zeros(4))
    writer.save()
    assert len(list(folder.iterdir())) == 3, "a table of before is left"
    assert torch.equal(DeltaLabels(folder).tensor, torch.cat([expected, torch.zeros(1, 4)]))


def test_what_a_killed_process_left_half_written_stays(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for name in ("manifest.json.7.unfinished", "deltas-0123456789abcdef.safetensors.7.unfinished"):
        (folder / name).write_text("{")
    writer = LabelWriter(folder, SETTINGS, (4,))
    writer.add(label("d"), torch.ones(4))
    writer.save()
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".safetensors"]
    assert len(DeltaLabels(folder)) == 4


def test_nothing_new_is_written_again(tmp_path: Path) -> None:
    folder = write(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    writer = LabelWriter(folder, SETTINGS, (4,))
    writer.add(label("a"), deltas(1)[0])
    writer.save()
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    LabelWriter(tmp_path / "never", SETTINGS, (4,)).save()
    assert not (tmp_path / "never").exists()


def test_a_failure_leaves_a_stale_label_or_takes_a_good_one(tmp_path: Path) -> None:
    writer = LabelWriter(write(tmp_path), SETTINGS, (4,))
    writer.fail(Failure("a", "/adapters/a", "it cannot be reached"), None)
    writer.fail(Failure("b", "/adapters/b", "it has changed, and is bad now"), "another sha")
    writer.save()
    labels = DeltaLabels(tmp_path)
    assert labels.names == ["a", "c"]
    assert [failure["name"] for failure in labels.manifest["failed"]] == ["a", "b"]
    writer = LabelWriter(tmp_path, SETTINGS, (4,))
    writer.add(label("a"), deltas(1)[0])
    writer.add(label("b", "sha of b, mended"), torch.ones(4))
    writer.save()
    assert DeltaLabels(tmp_path).names == ["a", "b", "c"]
    assert DeltaLabels(tmp_path).manifest["failed"] == []


def test_a_table_without_rows_cannot_be_read(tmp_path: Path) -> None:
    writer = LabelWriter(tmp_path, SETTINGS, (2, 4))
    writer.fail(Failure("a", "/adapters/a", "bad"), None)
    writer.save()
    labels = DeltaLabels(tmp_path)
    assert len(labels) == 0
    assert labels.tensor.shape == (0, 2, 4)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "model_sha256": ({"model_sha256": "ef", "model": "another"}, r"model_sha256 is 'ab' there and 'ef' here; model is"),
    "dtype": ({"dtype": "bfloat16", "model_sha256": "ef"}, r"settings: dtype is 'float32' there and 'bfloat16' here\."),
    "layer": ({"layer": [3, -1]}, r"layer is -1 there and \[3, -1\] here"),
    "pooling": ({"pooling": "none"}, r"pooling is 'mean' there and 'none' here"),
    "probes": ({"probes_sha256": "ef", "chat": True}, r"probes_sha256 is 'cd' .*; chat is False there and True here"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_labels_of_other_settings_are_mixed_in(name: str, tmp_path: Path) -> None:
    changes, message = CHANGES[name]
    folder = write(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        LabelWriter(folder, {**SETTINGS, **changes}, (4,))
    assert "take another folder (--out)" in str(error.value)
    LabelWriter(folder, {**SETTINGS, "model": "its name alone", "max_length": 99, "probes": [[1]]}, (4,))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "is not a folder"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "is not valid JSON, expected a man"),
    "another manifest": (lambda folder: _edit(folder / "manifest.json", kind="luggage"), "not a manifest of delta"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "holds a list, expected a man"),
    "another format": (lambda folder: _edit(folder / "manifest.json", format=7), "is of format 7, expected 1"),
    "half a manifest": (lambda folder: _edit(folder / "manifest.json", settings=None), "has no 'settings'"),
    "another number of rows": (lambda folder: _edit(folder / "manifest.json", adapters=[]), "0 adapters and has 3"),
    "no table": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "cannot be read, expected the table"),
    "a cut table": (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"123"), "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_holds_no_labels_is_read(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "labels")
    spoil, message = BROKEN[name]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        DeltaLabels(folder)


def test_ten_thousand_labels_take_a_second_to_open(tmp_path: Path) -> None:
    writer, rows = LabelWriter(tmp_path, SETTINGS, (896,)), torch.randn(10_000, 896)
    spec = {"rank": 16, "alpha": 32, "target_modules": ["q_proj"] * 7, "rank_pattern": {}, "alpha_pattern": {}}
    for index, row in enumerate(rows):
        writer.add(replace(label(f"teachers/task-{index:05d}", "ab" * 32), spec=spec), row)
    writer.save()
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        start = time.perf_counter()
        labels = DeltaLabels(tmp_path)
        one = labels["teachers/task-09999"].clone()
        seconds.append(time.perf_counter() - start)
    assert torch.equal(one, rows[-1])
    assert len(labels) == 10_000
    assert min(seconds) < 1, seconds


# --- Training data ----------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Two adapters under ``teachers``, and their labels, made up, beside them."""
    writer = LabelWriter(tmp_path / "deltas", SETTINGS, (4,))
    for seed, name in enumerate(("a", "b")):
        folder = tmp_path / "teachers" / name
        save_peft_adapter(folder, SPEC, random_lora(CONFIG, SPEC, seed=seed, dtype=torch.float32), base_model="x/y")
        writer.add(
            replace(label(f"teachers/{name}", adapter_fingerprint(folder)), source=str(folder)), deltas(2)[seed]
        )
    writer.save()
    return tmp_path


def test_training_data_pairs_the_wrong_things(labelled: Path) -> None:
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


def test_labels_are_lost_when_they_move_with_their_adapters(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = labelled.rename(labelled.with_name("moved"))
    labels = DeltaLabels(moved / "deltas")
    assert labels.dataset({"teachers/a": None}, "tensors")[0][1]
    monkeypatch.chdir(moved)
    for name in ("teachers/a", str(moved / "teachers" / "a"), str(moved / "deltas" / ".." / "teachers" / "a")):
        assert torch.equal(labels[name], deltas(2)[0])


def test_training_data_holds_an_adapter_that_is_not_the_labelled_one(labelled: Path) -> None:
    dataset = DeltaLabels(labelled / "deltas").dataset({"teachers/a": None}, "tensors")
    tensors = random_lora(CONFIG, SPEC, seed=7, dtype=torch.float32)
    save_peft_adapter(labelled / "teachers" / "a", SPEC, tensors, base_model="x/y")
    with pytest.raises(ValueError, match="teachers/a has changed since it was labelled"):
        dataset[0]


@pytest.mark.parametrize(("targets", "room", "reads"), [("tokens", 1, 2), ("tensors", 1, 2), ("tokens", 0, 4)])
def test_teachers_are_read_at_every_step_or_kept_without_room(
    targets: str, room: int, reads: int, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def watched(source: str, **options: Any) -> Any:
        read.append(source)
        return load_peft_adapter(source, **options)

    monkeypatch.setattr(label_table, "load_peft_adapter", watched)
    format = TokenFormat.for_config(CONFIG, rank=2, chunk_width=8) if targets == "tokens" else None
    conditions = {"teachers/a": None, "teachers/b": None}
    dataset = DeltaLabels(labelled / "deltas").dataset(conditions, targets, format, keep_bytes=room << 30)
    first = [dataset[index][1] for index in range(2)]
    if targets == "tensors":
        dataset[0][1].clear()  # the caller's own
    again = [dataset[index][1] for index in range(2)]
    assert len(read) == reads
    for one, other in zip(first, again, strict=True):
        if targets == "tokens":
            assert torch.equal(one, other)
        else:
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_arguments_make_training_data(labelled: Path) -> None:
    labels = DeltaLabels(labelled / "deltas")
    with pytest.raises(ValueError, match="targets is 'weights', expected None or one of"):
        labels.dataset({}, "weights")
    with pytest.raises(ValueError, match="targets is 'tokens' and format is None"):
        labels.dataset({}, "tokens")
    with pytest.raises(ValueError, match=r"conditions: .* has no label of 'teachers/z', expected one of its 2 names"):
        labels.dataset({"teachers/z": "prompt"})
