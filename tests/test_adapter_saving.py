"""Adapter folders that we wrote, read by PEFT; and saves that fail or are killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_case import CONFIG, JSON, Q_A, QV, TENSORS, assert_same, base, by_peft, logits
from peft import PeftModel
from reference import SPECS, random_lora
from safetensors.torch import load_file

from lora_delta.peft.adapters import AdapterFiles, load_peft_adapter, save_peft_adapter
from qwen_functional import LoraSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PEFT's adapter of q and v in all layers, rank 4."""
    by_peft(tmp_path / "adapter", target_modules=QV)
    return tmp_path / "adapter"


def read_by_peft(folder: Path) -> PeftModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=False).eval()
    assert not [str(w.message) for w in caught if "adapter" in str(w.message)]  # keys missing or unexpected
    return model


@pytest.mark.parametrize("config", [None, CONFIG], ids=["base unknown", "base known"])
@pytest.mark.parametrize("name", SPECS)
def test_an_adapter_that_peft_reads_computes_the_same(tmp_path: Path, name: str, config: Any) -> None:
    spec, folder = SPECS[name], tmp_path / "to be" / "made"
    tensors = random_lora(CONFIG, spec)
    save_peft_adapter(folder, spec, dict(reversed(tensors.items())), config=config)
    assert sorted(path.name for path in folder.iterdir()) == [JSON, TENSORS]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert_same(spec, tensors, read_by_peft(folder))
    again, same = load_peft_adapter(folder, config=CONFIG)
    assert list(same) == list(tensors)
    assert all(torch.equal(same[name], tensors[name]) for name in tensors)
    assert again.shapes(CONFIG) == spec.shapes(CONFIG)
    assert torch.equal(logits(again, same), logits(spec, tensors))


def test_a_spec_comes_back(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"v_proj": 3, ".*_proj": 2}, "alpha_pattern": {"up_proj": 0.1}}
    for spec in (LoraSpec(), LoraSpec(4, 2.5, use_rslora=True, **patterns), LoraSpec(1, layers_to_transform=(0, 2))):
        save_peft_adapter(tmp_path, spec, random_lora(CONFIG, spec), config=CONFIG)
        assert load_peft_adapter(tmp_path, config=CONFIG)[0] == spec
        assert load_peft_adapter(tmp_path)[0] == spec
        save_peft_adapter(tmp_path, spec, random_lora(CONFIG, spec))
        assert load_peft_adapter(tmp_path, config=CONFIG)[0] == spec


LEFT_OUT: dict[str, Callable[[str], bool]] = {
    "a layer": lambda name: ".1." in name,
    "the last layer": lambda name: ".2." in name,
    "a projection": lambda name: "up_proj" in name,
    "a projection in a layer": lambda name: ".1.mlp.up_proj" in name,
    "many": lambda name: "0.mlp" in name or "q_proj" in name or ("2." in name and "k_proj" in name),
    "all but one": lambda name: ".1.mlp.up_proj" not in name,
}


@pytest.mark.parametrize("config", [None, CONFIG], ids=["base unknown", "base known"])
@pytest.mark.parametrize("case", LEFT_OUT)
def test_peft_adapts_only_modules_that_have_tensors(tmp_path: Path, case: str, config: Any) -> None:
    spec = LoraSpec(3, 5, rank_pattern={"k_proj": 2, "1.self_attn.q_proj": 4})
    tensors = {name: t for name, t in random_lora(CONFIG, spec).items() if not LEFT_OUT[case](name)}
    save_peft_adapter(tmp_path, spec, tensors, config=config)
    assert_same(spec, tensors, read_by_peft(tmp_path))
    for known in (None, CONFIG):
        again, same = load_peft_adapter(tmp_path, config=known)
        assert list(same) == list(tensors)
        assert torch.equal(logits(again, same), logits(spec, tensors))


def test_what_peft_saved_is_saved_alike(folder: Path, tmp_path: Path) -> None:
    spec, tensors = load_peft_adapter(folder, config=CONFIG)
    save_peft_adapter(tmp_path / "copy", spec, tensors, base_model=Path("owner/base"), config=CONFIG)
    ours, theirs = (json.loads((path / JSON).read_text()) for path in (tmp_path / "copy", folder))
    assert ours.items() <= {**theirs, "base_model_name_or_path": "owner/base", "target_modules": QV}.items()
    assert load_file(tmp_path / "copy" / TENSORS).keys() == load_file(folder / TENSORS).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_views_leaves_and_other_spellings_are_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    spec = LoraSpec(2, target_modules=("q_proj",), layers_to_transform=0)
    rows, cols = spec.shapes(CONFIG)[Q_A]
    A = torch.randn(2, cols, rows, dtype=dtype, requires_grad=True)  # two adapters, transposed
    B = A.new_ones(1, rows).expand(32, rows)
    given = {"model.layers.0.self_attn.q_proj.lora_B.default.weight": B, Q_A: A[1].T}
    save_peft_adapter(tmp_path, spec, given)
    _, tensors = load_peft_adapter(tmp_path, config=CONFIG)
    assert list(tensors) == [Q_A, Q_A.replace("_A", "_B")]
    assert torch.equal(tensors[Q_A], A[1].T.detach())
    assert all(tensor.dtype == dtype for tensor in tensors.values())


def test_a_failed_save_leaves_what_is_there_or_no_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, (spec, tensors) = AdapterFiles.read(folder).sha256, load_peft_adapter(folder)

    def fail(file: Path, *given: Any, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    def fail_for_config(file: Path, target: Path) -> None:
        fail(file) if target.name == JSON else file.rename(target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="no space"):
            save_peft_adapter(folder, spec, tensors)
    assert AdapterFiles.read(folder).sha256 == before
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", fail_for_config)
        with pytest.raises(OSError, match="no space"):
            save_peft_adapter(folder, spec, tensors)
    assert {path.name for path in folder.iterdir()} == {TENSORS, "README.md"}  # no adapter rather than a mixture of two
    save_peft_adapter(folder, spec, tensors)
    assert load_peft_adapter(folder, config=CONFIG)[0] == spec


SAVES = """
import os, shutil, signal, sys
from pathlib import Path
from lora_delta import load_peft_adapter, save_peft_adapter

folder, snapshots = Path(sys.argv[1]), Path(sys.argv[2])

def counted(name, left):
    inner = getattr(os if name == "fsync" else Path, name)
    def call(*given, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*given, **options)
    return call

for step in range(100):
    child = os.fork()
    if child == 0:
        spec, tensors = load_peft_adapter(folder)
        save_peft_adapter(folder, spec, tensors)
        left = [step]  # calls until it is killed
        os.fsync = counted("fsync", left)
        for name in ("write_bytes", "write_text", "unlink", "replace"):
            setattr(Path, name, counted(name, left))
        save_peft_adapter(folder, spec, {name: -tensor for name, tensor in tensors.items()})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    shutil.copytree(folder, snapshots / f"{step:02}")
    if status == 0:
        break
    assert status == signal.SIGKILL
    shutil.copytree(sys.argv[3], folder, dirs_exist_ok=True)
"""


def test_a_save_that_is_killed_leaves_the_old_adapter_or_none_and_the_next_clears_up(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "original")
    _, tensors = load_peft_adapter(folder)
    places = [str(tmp_path / name) for name in ("adapter", "snapshots", "original")]
    subprocess.run([sys.executable, "-c", SAVES, *places], check=True, timeout=120)
    outcomes = []
    for snapshot in sorted((tmp_path / "snapshots").iterdir()):
        outcomes.append(0)
        if (snapshot / JSON).exists():
            _, found = load_peft_adapter(snapshot)
            outcomes[-1] = next(s for s in (1, -1) if all(torch.equal(found[n], s * tensors[n]) for n in tensors))
    assert outcomes == sorted(outcomes, key=(1, 0, -1).index)  # the old adapter, then none, then the new one
    assert set(outcomes) == {1, 0, -1}
    assert sorted(path.name for path in snapshot.iterdir()) == ["README.md", JSON, TENSORS]
