"""Adapter folders that PEFT wrote, read by us, against PEFT."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_case import CONFIG, IDS, JSON, QV, TENSORS, assert_same, base, by_peft, edit
from checkpoints import edit_json
from peft import LoraConfig, PeftModel
from reference import hf_model, relative_error, tiny_config
from safetensors.torch import load_file, save_file

from lora_delta.peft import adapters
from lora_delta.peft.adapters import load_peft_adapter, save_peft_adapter
from qwen_functional import LoraSpec, init_weights
from qwen_functional.architecture import PROJECTIONS
from qwen_functional.forward import forward

# What PEFT is asked for, and the spec that should be read back when the base model is known.
CASES: dict[str, tuple[dict[str, Any], LoraSpec]] = {
    "plain": ({"target_modules": QV}, LoraSpec(4, 7, QV)),
    "PEFT's default modules": ({}, LoraSpec(4, 7, QV)),
    "rsLoRA": ({"target_modules": ["down_proj"], "use_rslora": True}, LoraSpec(4, 7, ["down_proj"], use_rslora=True)),
    "patterns": (
        {
            "target_modules": list(PROJECTIONS),
            "rank_pattern": {"k_proj": 5, r"layers\.1\.mlp\.up_proj": 2, "lm_head": 3, "^layers": 9},
            "alpha_pattern": {r"2\.self_attn\.\w+": -1.5, "o_proj|gate_proj": 0.5, "experts": 3},
        },
        LoraSpec(
            4,
            7,
            rank_pattern={"k_proj": 5, r"layers\.1\.mlp\.up_proj": 2},
            alpha_pattern={r"2\.self_attn\.\w+": -1.5, "o_proj|gate_proj": 0.5},
        ),
    ),
    "patterns and rsLoRA": (
        {"target_modules": QV, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
        LoraSpec(4, 7, QV, rank_pattern={"v_proj": 9}, alpha_pattern={"q_proj": 3}, use_rslora=True),
    ),
    "regular expression": (
        {"target_modules": r".*\.(self_attn\.k|mlp\.up)_proj"},
        LoraSpec(4, 7, ["k_proj", "up_proj"]),
    ),
    "regular expression for some layers": (
        {"target_modules": r"model\.layers\.(0|2)\.self_attn\.(q|o)_proj|.*\.2\.mlp\.down_proj"},
        LoraSpec(4, 7, ["q_proj", "o_proj", "down_proj"], layers_to_transform=(0, 2)),
    ),
    "ends of paths": (
        {"target_modules": ["mlp.up_proj", "1.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]},
        LoraSpec(4, 7, ["q_proj", "v_proj", "up_proj"]),
    ),
    "all-linear": ({"target_modules": "all-linear"}, LoraSpec(4, 7)),
    "one layer": ({"target_modules": QV, "layers_to_transform": 1}, LoraSpec(4, 7, QV, layers_to_transform=(1,))),
    "layers": (
        {"target_modules": QV, "layers_to_transform": [2, 0, 99]},
        LoraSpec(4, 7, QV, layers_to_transform=(0, 2)),
    ),
    "layers of a pattern": (
        {"target_modules": QV, "layers_to_transform": [1, 2], "layers_pattern": ["h", "layers"]},
        LoraSpec(4, 7, QV, layers_to_transform=(1, 2)),
    ),
    "a whole path in another layer": (
        {"target_modules": ["q_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": 0},
        LoraSpec(4, 7, ["q_proj", "up_proj"], layers_to_transform=(0, 2)),
    ),
    "no layers are all": ({"target_modules": QV, "layers_to_transform": []}, LoraSpec(4, 7, QV)),
    "excluded modules": (
        {"target_modules": list(PROJECTIONS), "exclude_modules": ["o_proj", "model.layers.1.mlp.up_proj"]},
        LoraSpec(4, 7, [name for name in PROJECTIONS if name != "o_proj"]),
    ),
    "excluded by a regular expression": (
        {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*|.*layers\.0.*"},
        LoraSpec(4, 7, ["q_proj", "k_proj", "v_proj", "o_proj"], layers_to_transform=(1, 2)),
    ),
    "dropout": ({"target_modules": QV, "lora_dropout": 0.5}, LoraSpec(4, 7, QV)),
    "gaussian": ({"target_modules": QV, "init_lora_weights": "gaussian"}, LoraSpec(4, 7, QV)),
    "orthogonal": ({"target_modules": QV, "init_lora_weights": "orthogonal"}, LoraSpec(4, 7, QV)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PEFT's adapter of q and v in all layers, rank 4."""
    by_peft(tmp_path / "adapter", target_modules=QV)
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore:.* matches no adapted module")
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_that_peft_saved_computes_the_same(tmp_path: Path, case: str) -> None:
    fields, expected = CASES[case]
    model = by_peft(tmp_path, **fields)
    spec, tensors = load_peft_adapter(tmp_path, config=CONFIG)
    assert spec == replace(expected, target_modules=tuple(expected.target_modules))
    assert_same(spec, tensors, model)
    blind, same = load_peft_adapter(str(tmp_path))
    assert replace(blind, layers_to_transform=spec.layers_to_transform) == spec
    assert_same(blind, same, model)


def test_an_adapter_of_a_qwen3_that_peft_saved_computes_the_same_and_is_none_of_a_qwen2(tmp_path: Path) -> None:
    config = tiny_config(model_type="qwen3", head_dim=8)
    weights = init_weights(config, dtype=torch.float64)
    hf_model(config, weights).save_pretrained(tmp_path / "base")
    theirs = hf_model(config, weights)
    theirs.name_or_path = str(tmp_path / "base")
    model = by_peft(tmp_path / "adapter", model=theirs, target_modules="all-linear")
    spec, tensors = load_peft_adapter(tmp_path / "adapter", config=config)
    with torch.no_grad():
        expected = model(IDS).logits
    assert relative_error(forward(config, weights, IDS, lora=spec.bind(config, tensors)).logits, expected) < 1e-9
    save_peft_adapter(tmp_path / "again", spec, tensors, base_model=str(tmp_path / "base"))
    with torch.no_grad():
        again = PeftModel.from_pretrained(hf_model(config, weights), tmp_path / "again")(IDS).logits
    assert torch.equal(again, expected)
    with pytest.raises(ValueError, match="a model of type 'qwen2', and not 'qwen3'"):
        load_peft_adapter(tmp_path / "adapter", config=CONFIG)


def test_a_pattern_that_fits_nothing_is_warned_of_where_peft_warns(tmp_path: Path) -> None:
    fields, _ = CASES["patterns"]
    by_peft(tmp_path, **fields)
    told = []
    for reader in (lambda: PeftModel.from_pretrained(base(), tmp_path), lambda: load_peft_adapter(tmp_path)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reader()
        text = " ".join(str(warning.message) for warning in caught if "_pattern" in str(warning.message))
        told.append({p for name in ("rank_pattern", "alpha_pattern") for p in fields[name] if repr(p) in text})
    assert told[0] == told[1] == {"lm_head", "^layers", "experts"}


def test_all_linear_as_it_was_given_means_what_peft_writes_out(tmp_path: Path) -> None:
    model = by_peft(tmp_path, target_modules="all-linear", exclude_modules=["lm_head"])
    assert "all-linear" not in (tmp_path / JSON).read_text()
    edit_json(tmp_path / JSON, target_modules="ALL-linear")
    assert load_peft_adapter(tmp_path)[0].layers_to_transform is None
    assert_same(*load_peft_adapter(tmp_path), model)


def test_layers_are_all_layers_where_the_base_model_has_no_others(folder: Path) -> None:
    assert load_peft_adapter(folder)[0].layers_to_transform is None
    for fields in ({"layers_to_transform": [0, 1, 2]}, {"target_modules": r".*layers\.[012]\..*\.(q|v)_proj"}):
        edit_json(folder / JSON, **{"layers_to_transform": None, **fields})
        assert load_peft_adapter(folder)[0].layers_to_transform == (0, 1, 2)
        assert load_peft_adapter(folder, config=CONFIG)[0].layers_to_transform is None
        assert load_peft_adapter(folder, config=CONFIG)[0] == LoraSpec(4, 7, ("q_proj", "v_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_tensors_keep_their_dtype_and_have_memory_of_their_own(folder: Path, dtype: torch.dtype) -> None:
    edit(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    expected = load_file(folder / TENSORS)
    _, tensors = load_peft_adapter(folder)
    assert all(torch.equal(tensors[name], t) and tensors[name].dtype == dtype for name, t in expected.items())
    size = (folder / TENSORS).stat().st_size
    with (folder / TENSORS).open("r+b") as file:
        file.write(bytes(size))
    assert all(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("spelling", [(".weight", ".default.weight"), ("base_model.model.model.", "model.")])
def test_another_spelling_of_the_names_is_read(folder: Path, spelling: tuple[str, str]) -> None:
    _, expected = load_peft_adapter(folder)
    save_file({name.replace(*spelling): tensor for name, tensor in expected.items()}, folder / TENSORS)
    _, tensors = load_peft_adapter(folder)
    assert list(tensors) == list(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_every_default_of_a_field_is_read(folder: Path) -> None:
    fields = {k: v for k, v in LoraConfig().to_dict().items() if k not in ("r", "lora_alpha", "target_modules")}
    later: dict[str, Any] = {
        "use_tomorrow": False,
        "tomorrow_config": None,
        "tomorrow_list": [],
        "runtime_config": {"x": True},
    }
    edit_json(folder / JSON, **{**fields, **later, "peft_type": "LORA", "peft_version": "99.0"})
    assert len(load_peft_adapter(folder)[1]) == 12
    few = json.loads((folder / JSON).read_text())
    needed = ("peft_type", "r", "lora_alpha")  # all that an early version of PEFT would have written
    (folder / JSON).write_text(json.dumps({name: few[name] for name in needed}))
    assert load_peft_adapter(folder)[0] == LoraSpec(4, 7, ("q_proj", "v_proj"))


def test_tensors_come_in_the_order_of_the_spec_whatever_that_of_the_file(folder: Path) -> None:
    expected = list(load_peft_adapter(folder)[1])
    content = (folder / TENSORS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    backwards = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode().ljust(length)
    (folder / TENSORS).write_bytes(content[:8] + backwards + content[8 + length :])
    assert list(load_peft_adapter(folder)[1]) == expected


def test_a_file_that_is_cut_while_it_is_read_is_what_was_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (folder / TENSORS).read_bytes()
    longer = os.stat_result((0o100644, 0, 0, 1, 0, 0, len(content) + 9, 0, 0, 0))  # the file's size before the cut
    monkeypatch.setattr("lora_delta.peft.adapters.os.fstat", lambda _: longer)
    assert bytes(adapters._content(folder / TENSORS, 1 << 30)) == content
