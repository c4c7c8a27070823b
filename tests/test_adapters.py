"""Adapter folders, read and written, against PEFT; and what must be refused rather than misread."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from reference import SPECS, hf_model, random_lora, relative_error, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_delta.peft import adapters
from lora_delta.peft.adapters import AdapterFiles, load_peft_adapter, save_peft_adapter
from qwen_functional import LoraSpec, init_weights
from qwen_functional.architecture import PROJECTIONS
from qwen_functional.forward import forward
from qwen_functional.lora import peft_name

CONFIG = tiny_config(head_dim=8)  # hidden 24, q 32, kv 16, intermediate 40: no two the same
WEIGHTS = init_weights(CONFIG, dtype=torch.float64)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [53, 58, 9, 7, 9, 3, 2, 38]])
JSON, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Q_A = peft_name(0, "q_proj", "A")
QV = ["q_proj", "v_proj"]

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


def base() -> Any:
    return hf_model(CONFIG, WEIGHTS)


def by_peft(folder: Path, model: Any = None, **fields: Any) -> PeftModel:
    """PEFT's model with random A and B, which PEFT saves to ``folder``."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", **fields})
    model = get_peft_model(model or base(), config, autocast_adapter_dtype=False).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def logits(spec: LoraSpec, tensors: dict[str, Tensor]) -> Tensor:
    return forward(CONFIG, WEIGHTS, IDS, lora=spec.bind(CONFIG, tensors)).logits


def assert_same(spec: LoraSpec, tensors: dict[str, Tensor], model: PeftModel) -> None:
    """Logits, scales, tensors and their order are PEFT's, and the adapter has an effect."""
    with torch.no_grad():
        theirs = model(IDS).logits
        with model.disable_adapter():
            assert relative_error(model(IDS).logits, theirs) > 1e-3
    assert relative_error(logits(spec, tensors), theirs) < 1e-9
    saved = get_peft_model_state_dict(model)
    assert list(tensors) == [name for name in spec.shapes(CONFIG) if name in saved]
    assert len(tensors) == len(saved)
    for name, tensor in tensors.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name
    scales = [m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)]
    assert [pair.scaling for pair in spec.bind(CONFIG, tensors).pairs.values()] == scales


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PEFT's adapter of q and v in all layers, rank 4."""
    by_peft(tmp_path / "adapter", target_modules=QV)
    return tmp_path / "adapter"


# --- Reading what PEFT wrote --------------------------------------------------------------------------------


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


# --- Writing for PEFT ---------------------------------------------------------------------------------------


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
