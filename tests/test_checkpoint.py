"""Loading from a folder and from the hub's cache: what transformers saves is read back bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import INDEX, ONE, edit_json, edit_tensors, save_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from qwen_functional import checkpoint
from qwen_functional.checkpoint import load_pretrained
from qwen_functional.config import Qwen2Config
from qwen_functional.hub import resolve_checkpoint
from qwen_functional.weights import Qwen2Weights, init_weights


def assert_loaded(config: Qwen2Config, weights: Qwen2Weights, expected: dict[str, Tensor]) -> None:
    views = weights.named_views(config)
    if config.tie_word_embeddings:
        assert weights.lm_head is weights.embed_tokens
        expected = {name: tensor for name, tensor in expected.items() if name != "lm_head.weight"}
    assert views.keys() == expected.keys()
    for name, tensor in expected.items():
        assert views[name].dtype == tensor.dtype
        assert torch.equal(views[name], tensor), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("tied", [False, True], ids=["separate lm_head", "tied"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [None, *checkpoint.STORAGE_DTYPES], ids=str)
def test_weights_are_bit_for_bit_those_that_transformers_loads(
    tmp_path: Path, dtype: torch.dtype | None, shards: bool, kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1000)  # several pieces per tensor, of a few rows each
    save_checkpoint(tmp_path, torch.bfloat16, shards, tie_word_embeddings=tied, model_type=kind)
    assert (tmp_path / INDEX).exists() == shards
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto").state_dict()
    assert_loaded(*load_pretrained(tmp_path, dtype), theirs)


@pytest.mark.parametrize("asked", checkpoint.STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("on_disk", checkpoint.DISK_DTYPES.values(), ids=str)
def test_any_dtype_on_disk_becomes_any_dtype_asked(
    folder: Path, on_disk: torch.dtype, asked: torch.dtype
) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({k: t.to(on_disk) for k, t in tensors.items()}))
    expected = {name: tensor.to(asked) for name, tensor in load_file(folder / ONE).items()}
    assert_loaded(*load_pretrained(folder, asked), expected)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", None])
def test_without_a_dtype_the_config_decides_and_else_the_embedding(folder: Path, field: str | None) -> None:
    edit_json(folder / "config.json", **{"dtype": None, **({field: "float16"} if field else {})})
    embed = "model.embed_tokens.weight"
    edit_tensors(folder, lambda tensors: tensors.update({embed: tensors[embed].double()}))
    assert load_pretrained(folder)[1].dtype == (torch.float16 if field else torch.float64)


def test_a_dtype_on_disk_that_weights_cannot_be_kept_in_must_be_overridden(folder: Path) -> None:
    edit_json(folder / "config.json", dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match=r"stored in torch.float8_e4m3fn, expected a dtype argument"):
        load_pretrained(folder)
    assert load_pretrained(folder, torch.bfloat16)[1].dtype == torch.bfloat16


def test_a_str_a_path_and_a_folder_with_a_tilde_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for model in (folder, str(folder), "~/checkpoint", "./checkpoint", "checkpoint"):
        assert resolve_checkpoint(model).resolve() == folder


def test_a_copy_of_the_embedding_as_tied_lm_head_is_accepted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_loaded(*load_pretrained(tmp_path), load_file(tmp_path / ONE))


def test_a_tied_lm_head_with_values_of_its_own_is_an_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight in .* differs from the embedding.*tie_word_emb"):
        load_pretrained(tmp_path)


def test_a_headless_model_saved_alone_loads_where_the_head_is_tied(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    whole = Qwen2ForCausalLM.from_pretrained(tmp_path)
    whole.model.save_pretrained(tmp_path / "headless")
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "headless" / ONE)
    assert_loaded(*load_pretrained(tmp_path / "headless"), whole.state_dict())


def test_saved_rope_buffers_are_no_unexpected_tensors(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert name not in load_pretrained(folder)[1].named_views(load_pretrained(folder)[0])


def test_weights_loaded_in_inference_mode_can_be_used_by_autograd_later(folder: Path) -> None:
    with torch.inference_mode():
        _, weights = load_pretrained(folder)
    x = torch.ones(32, requires_grad=True)
    (weights.blocks[0].o_proj @ x).sum().backward()
    assert x.grad is not None


# The hub, without a network: a cache in the layout of huggingface_hub, with snapshots that link to blobs.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached repository org/name, whose main is a sharded snapshot; the network is off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "cache" / "models--org--name", "0123456789abcdef0123456789abcdef01234567"
    source = save_checkpoint(tmp_path / "source", shards=True)
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / part).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted(source.iterdir())):
        file.rename(repo / "blobs" / str(i))
        (repo / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / str(i))
    return repo


def test_a_cached_hub_id_loads_offline_through_its_links(hub: Path) -> None:
    commit = (hub / "refs" / "main").read_text()
    theirs = Qwen2ForCausalLM.from_pretrained(hub / "snapshots" / commit).state_dict()
    assert_loaded(*load_pretrained("org/name"), theirs)
    assert_loaded(*load_pretrained("org/name", revision=commit, local_files_only=True), theirs)
    assert resolve_checkpoint("org/name") == hub / "snapshots" / commit


def test_a_folder_wins_over_a_hub_id_of_the_same_name(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub.parent)
    shutil.copytree(hub / "snapshots" / (hub / "refs" / "main").read_text(), "org/name")
    assert resolve_checkpoint("org/name") == Path("org/name")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("model", "revision"), [("org/absent", None), ("org/name", "v2"), ("absent", None), ("not an id!", None)]
)
def test_a_hub_id_that_is_not_cached_offline_is_an_error_with_id_revision_and_reason(
    model: str, revision: str | None
) -> None:
    named = rf"model '{model}' at revision '{revision or 'main'}' .*: \w+"
    with pytest.raises(ValueError, match=named) as caught:
        load_pretrained(model, revision=revision)
    assert caught.value.__cause__ is not None


def test_a_shard_that_the_cache_lacks_is_an_error(hub: Path) -> None:
    next(iter((hub / "snapshots").glob("*/model-00002*"))).resolve().unlink()
    with pytest.raises(ValueError, match=r"names \['model-00002.*'\], which .* does not have"):
        load_pretrained("org/name")


def test_only_data_files_at_the_top_are_fetched_and_the_config_before_all_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_pretrained("org/name", revision="v2", local_files_only=True)
    assert [name for name, _ in calls] == ["org/name"] * 2
    assert [options["revision"] for _, options in calls] == ["v2"] * 2
    assert all(options["local_files_only"] for _, options in calls)
    data = ["config.json", ONE, "chat_template.jinja"]
    repo = [*data, "pytorch_model.bin", "modeling.py", "onnx/model.safetensors"]
    wanted = [
        list(
            huggingface_hub.utils.filter_repo_objects(
                repo, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
            )
        )
        for _, options in calls
    ]
    assert wanted == [["config.json"], data]

    edit_json(folder / "config.json", model_type="llama")
    calls.clear()
    with pytest.raises(ValueError, match="model_type"):
        load_pretrained("org/name")
    assert len(calls) == 1


PEAK = """
import sys, torch
from qwen_functional.checkpoint import load_pretrained

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

torch.zeros(8).to(torch.bfloat16).float()
before = memory("VmRSS")
_, weights = load_pretrained(sys.argv[1], getattr(torch, sys.argv[2]))
print((memory("VmHWM") - before) / weights.nbytes())
"""


@pytest.mark.real_checkpoint
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_while_loading_stays_within_a_third_more_than_the_weights(
    real_checkpoint: str, dtype: str
) -> None:
    root = Path(checkpoint.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", PEAK, real_checkpoint, dtype],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.9 < float(run.stdout) <= 1.3  # the lower bound shows that the weights were measured


def test_weights_are_drawn_in_the_sizes_that_are_said() -> None:
    config = Qwen2Config(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.03,
    )  # fmt: skip
    for name, tensor in init_weights(config).named_views(config).items():
        center, spread = (1, 0.1) if name.endswith("norm.weight") else (0, 0.1 if name.endswith(".bias") else 0.03)
        assert abs(float(tensor.mean()) - center) < 0.4 * spread, name
        assert 0.8 < float(tensor.std()) / spread < 1.2, name
