"""Lists of adapters, their fingerprints, and adapters in the hub's cache."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from adapter_case import JSON, Q_A, QV, TENSORS, by_peft, edit
from checkpoints import edit_json

from lora_delta.peft.adapters import AdapterFiles, find_adapters, load_peft_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PEFT's adapter of q and v in all layers, rank 4."""
    by_peft(tmp_path / "adapter", target_modules=QV)
    return tmp_path / "adapter"


def test_a_hash_is_equal_for_a_copy_and_other_for_any_change(folder: Path, tmp_path: Path) -> None:
    before = AdapterFiles.read(folder).sha256
    assert before == AdapterFiles.read(str(shutil.copytree(folder, tmp_path / "copy"))).sha256
    assert re.fullmatch("[0-9a-f]{64}", before)
    edit_json(folder / JSON, lora_alpha=8)
    changed = AdapterFiles.read(folder).sha256
    edit(folder, lambda tensors: tensors[Q_A][0, :1].mul_(1.001))
    assert len({before, changed, AdapterFiles.read(folder).sha256}) == 3


def test_hash_and_tensors_are_of_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    files, (spec, expected) = AdapterFiles.read(folder), load_peft_adapter(folder)
    for _ in range(2):  # before the first hash, and after it
        by_peft(folder, target_modules=["o_proj"])
        found, tensors = files.load()
        assert found == spec
        assert list(tensors) == list(expected)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert files.sha256 != AdapterFiles.read(folder).sha256


def test_a_pipe_or_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    for name in (JSON, TENSORS):
        content = (folder / name).read_bytes()
        with (folder / name).open("r+b") as file:
            file.truncate(1 << 34)  # sparse
        with pytest.raises(ValueError, match=rf"{name} has 17,179,869,184 bytes, expected .* of at most"):
            AdapterFiles.read(folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=f"has no {name}"):
            AdapterFiles.read(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with adapters runs/b, runs/a, runs/deep/c and "x [1]" among other things."""
    for name in ("runs/b", "runs/a", "runs/deep/c", "x [1]"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / JSON).touch()
    (tmp_path / "runs" / "log").mkdir()
    (tmp_path / "runs" / "notes.md").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/a", ["runs/a"]),
        (Path("runs"), ["runs/a", "runs/b"]),
        (["runs/b", "runs"], ["runs/b", "runs/a"]),
        ("runs/*", ["runs/a", "runs/b", "runs/deep/c"]),
        ("**/[cb]", ["runs/b", "runs/deep/c"]),
        (["./runs/a", "runs/../runs/a", "runs/a/"], ["runs/a"]),
        ("x [1]", ["x [1]"]),
        (["owner/name", "runs/a", "owner/name", "o-1/n_2.b"], ["owner/name", "runs/a", "o-1/n_2.b"]),
    ],
)
def test_every_adapter_is_found_once_in_order(tree: Path, given: Any, expected: list[str]) -> None:
    found = find_adapters(given)
    assert [str(source) for source in found] == expected
    assert all(isinstance(source, Path) == Path(source).exists() for source in found)


def test_a_list_holds_comments_globs_folders_and_hub_ids(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["\ufeff# all", "", " b  # the second", "*", "owner/name\t# hub", "../x [1]", str(tree / "runs" / "a")]
    (tree / "runs" / "list.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tree.parent)
    found = find_adapters([tree / "runs" / "list.txt"])
    assert [Path(s).name for s in found] == ["b", "a", "c", "name", "x [1]"]
    assert found[3] == "owner/name"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no adapter is given"),
        ("", "path is empty"),
        ("runs/log", "runs/log holds no adapter_config.json, and none of its folders does"),
        ("runs/notes.md", "runs/notes.md is not a folder, expected an adapter's folder"),
        ("runs/z*", "runs/z* matches no adapter"),
        ("*/" * 1000, "has too many parts"),
        ("absent", "absent does not exist, expected"),
        (Path("owner/name"), "owner/name does not exist, expected"),
        ("a/b/c", "a/b/c does not exist"),
        ("./a/b", "a/b does not exist"),
        ("no space/b", "does not exist"),
        ("lists/absent.txt", "lists/absent.txt does not exist"),
        ("empty.txt", "empty.txt lists no adapter"),
        ("wrong.txt", "wrong.txt, line 2: absent does not exist"),
        ("nested.txt", "nested.txt, line 1: empty.txt is not a folder"),
    ],
)
def test_a_source_that_leads_nowhere_is_an_error(tree: Path, given: Any, message: str) -> None:
    (tree / "empty.txt").write_text("# none\n")
    (tree / "wrong.txt").write_text("runs/a\nabsent\n")
    (tree / "nested.txt").write_text("empty.txt\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        find_adapters(given)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached repository org/name as the hub's client lays it out; the network is off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "cache" / "models--org--name", "0123456789abcdef0123456789abcdef01234567"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / part).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for i, name in enumerate((JSON, TENSORS)):
        (repo / "blobs" / str(i)).write_bytes((folder / name).read_bytes())
        (repo / "snapshots" / commit / name).symlink_to(Path("../../blobs") / str(i))
    return repo


def test_a_cached_hub_id_is_read_as_its_folder(hub: Path, folder: Path) -> None:
    expected = load_peft_adapter(folder)
    for revision in (None, "main", (hub / "refs" / "main").read_text()):
        spec, tensors = load_peft_adapter("org/name", revision=revision, local_files_only=True)
        assert spec == expected[0]
        assert all(torch.equal(tensors[name], expected[1][name]) for name in tensors)
        assert AdapterFiles.read("org/name", revision=revision).sha256 == AdapterFiles.read(folder).sha256
    assert find_adapters("org/name") == ["org/name"]


def test_a_base_model_of_another_type_in_the_cache_is_noticed(hub: Path, folder: Path) -> None:
    snapshot = next((hub / "snapshots").iterdir())
    edit_json(folder / JSON, base_model_name_or_path="org/name")
    for model_type, refused in (("qwen2", False), ("qwen3", False), ("llama", True)):
        (snapshot / "config.json").write_text(json.dumps({"model_type": model_type}))
        if refused:
            with pytest.raises(ValueError, match=r"base_model_name_or_path is 'org/name', .* and not 'llama'"):
                load_peft_adapter(folder)
        else:
            assert load_peft_adapter(folder)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("source", "revision"), [("org/absent", None), ("org/name", "v2"), ("not an id!", None)])
def test_a_hub_id_that_is_not_cached_is_an_error_that_names_it(source: str, revision: str | None) -> None:
    named = rf"adapter '{source}': model '{source}' at revision '{revision or 'main'}' .*: \w+"
    with pytest.raises(ValueError, match=named) as caught:
        load_peft_adapter(source, revision=revision)
    assert caught.value.__cause__ is not None


def test_only_two_files_are_fetched_and_the_config_is_checked_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_peft_adapter("org/name", revision="v2", local_files_only=True)
    assert [call["allow_patterns"] for call in calls] == [[JSON], [TENSORS]]
    assert all(call["revision"] == "v2" and call["local_files_only"] for call in calls)
    edit_json(folder / JSON, use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        load_peft_adapter("org/name")
    assert len(calls) == 3
