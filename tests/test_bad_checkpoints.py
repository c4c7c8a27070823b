"""Every bad checkpoint is refused at the door: the error names the cause, before weights are allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INDEX, ONE, edit_json, edit_tensors, save_checkpoint
from safetensors.torch import save_file

from qwen_functional import checkpoint
from qwen_functional.checkpoint import load_pretrained
from qwen_functional.config import Qwen2Config
from qwen_functional.weights import Qwen2Weights, empty_weights

K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoint")


# Bad input. It must be found before anything is allocated, except where the check needs the values.


@pytest.fixture
def no_heavy_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may only be allocated on the meta device, for their shapes."""

    def shapes_only(
        config: Qwen2Config,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Qwen2Weights:
        assert str(device) == "meta", "weights were allocated before the checks were over"
        return empty_weights(config, dtype, device, **options)

    monkeypatch.setattr(checkpoint, "empty_weights", shapes_only)


@pytest.mark.usefixtures("no_heavy_work")
class TestBadCheckpoints:
    @pytest.mark.parametrize(
        "model", ["./absent", "/absent", "~/absent", "~no-such-user/a", "a/b/c", "a\\b", Path("absent")]
    )
    def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(self, model: str | Path) -> None:
        with pytest.raises(ValueError, match="a folder that does not exist"):
            load_pretrained(model)

    def test_a_file_is_no_checkpoint_folder(self, folder: Path) -> None:
        for model in (folder / ONE, ""):
            with pytest.raises(ValueError, match="which is not a folder; expected a checkpoint's folder"):
                load_pretrained(model)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2, "bfloat16"])
    def test_an_unsupported_dtype_is_refused(self, folder: Path, dtype: Any) -> None:
        with pytest.raises(ValueError, match=r"dtype is .*, expected None or one of"):
            load_pretrained(folder, dtype)

    @pytest.mark.parametrize("device", ["gpu", "cuda:99"])
    def test_a_device_that_is_not_there_is_refused(self, folder: Path, device: str) -> None:
        with pytest.raises(ValueError, match=f"device is '{device}', expected one"):
            load_pretrained(folder, device=device)

    def test_a_folder_without_a_config_is_refused(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(ValueError, match=r"config.json does not exist"):
            load_pretrained(folder)

    @pytest.mark.parametrize(
        "change",
        [
            {"model_type": "llama"},
            {"quantization_config": {"quant_method": "gptq"}},
            {"hidden_act": "gelu"},
        ],
    )
    def test_a_config_that_is_no_dense_qwen2_is_refused(self, folder: Path, change: dict[str, Any]) -> None:
        edit_json(folder / "config.json", **change)
        with pytest.raises(ValueError, match=rf"config.json: config field {next(iter(change))} is .*"):
            load_pretrained(folder)

    def test_a_folder_without_model_safetensors_is_refused(self, folder: Path) -> None:
        (folder / ONE).rename(folder / "weights.safetensors")
        with pytest.raises(ValueError, match=r"has weights.safetensors, expected model.safetensors or"):
            load_pretrained(folder)
        (folder / "weights.safetensors").unlink()
        (folder / ONE).symlink_to("../blobs/absent")
        with pytest.raises(ValueError, match=r"has no .safetensors file, expected model.safetensors or"):
            load_pretrained(folder)

    def test_a_folder_of_nothing_but_pickles_is_refused(self, folder: Path) -> None:
        (folder / ONE).unlink()
        torch.save({}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"only in pickles \(pytorch_model.bin\).*save_pretrained"):
            load_pretrained(folder)

    @pytest.mark.parametrize("size", [0, 4, 100, -1])
    def test_a_truncated_file_is_refused(self, folder: Path, size: int) -> None:
        data = (folder / ONE).read_bytes()
        (folder / ONE).write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"model.safetensors, of \d+ bytes, is truncated or corrupt"):
            load_pretrained(folder)

    def test_a_file_that_is_no_safetensors_is_refused(self, folder: Path) -> None:
        (folder / ONE).write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(ValueError, match=r"truncated or corrupt, expected a safetensors file"):
            load_pretrained(folder)

    def test_a_file_without_one_of_the_tensors_is_refused(self, folder: Path) -> None:
        edit_tensors(folder, lambda tensors: tensors.pop(K_PROJ))
        with pytest.raises(ValueError, match=rf"tensor {K_PROJ} is missing from .* with shape \(16, 24\)"):
            load_pretrained(folder)

    def test_a_file_without_a_separate_lm_head_is_refused(self, folder: Path) -> None:
        edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
        with pytest.raises(ValueError, match=r"tensor lm_head.weight is missing"):
            load_pretrained(folder)

    def test_sizes_that_the_file_does_not_have_are_refused(self, folder: Path) -> None:
        sizes = {"vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 1024}
        edit_json(folder / "config.json", **sizes, head_dim=1 << 16, layer_types=None)  # 70 petabytes
        with pytest.raises(ValueError, match=r"tensor \S+ in .* has shape .*, expected \(\d+"):
            load_pretrained(folder)

    @pytest.mark.parametrize("size", [1 << 63, 1 << 200, -1, 1.5, "24", True, None])
    def test_a_size_that_is_no_size_is_refused(self, folder: Path, size: Any) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value = json.loads((folder / "config.json").read_text())[name]
            edit_json(folder / "config.json", **{name: size})
            expected = "at most" if type(size) is int and size > 0 else "a positive integer"
            with pytest.raises(ValueError, match=rf"config field {name} is {size!r:.100}.*, expected {expected}"):
                load_pretrained(folder)
            edit_json(folder / "config.json", **{name: value})

    def test_a_header_of_gigabytes_is_refused(self, folder: Path) -> None:
        with (folder / ONE).open("r+b") as file:
            file.write((1 << 32).to_bytes(8, "little"))
            file.truncate(1 << 34)  # sparse
        with pytest.raises(ValueError, match=r"its header has 4,294,967,296 bytes, expected at most"):
            load_pretrained(folder)

    @pytest.mark.parametrize("name", ["score.weight", "model.layers.2.input_layernorm.weight", "norm.weight"])
    def test_an_unexpected_tensor_is_refused(self, folder: Path, name: str) -> None:
        edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(24)}))
        with pytest.raises(ValueError, match=rf"tensor {name} in .* fits nothing, expected only"):
            load_pretrained(folder)

    @pytest.mark.parametrize("shape", [(24, 16), (16, 23), (16, 24, 1), (384,), ()])
    def test_a_tensor_of_another_shape_is_refused(self, folder: Path, shape: tuple[int, ...]) -> None:
        edit_tensors(folder, lambda tensors: tensors.update({K_PROJ: torch.ones(shape)}))
        with pytest.raises(ValueError, match=rf"tensor {K_PROJ} in .* has shape .*, expected \(16, 24\)"):
            load_pretrained(folder)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
    def test_a_tensor_of_no_floating_point_dtype_is_refused(self, folder: Path, dtype: torch.dtype) -> None:
        edit_tensors(folder, lambda tensors: tensors.update({K_PROJ: torch.ones(16, 24).to(dtype)}))
        with pytest.raises(ValueError, match=rf"tensor {K_PROJ} in .* has dtype \w+, expected one of"):
            load_pretrained(folder)


@pytest.mark.parametrize("stream", [False, True, "host"])
def test_an_lm_head_that_nobody_reads_may_be_missing(folder: Path, stream: bool | str) -> None:
    config, expected = load_pretrained(folder)
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    weights = load_pretrained(folder, lm_head=False, stream=stream)[1]
    assert weights.lm_head is None
    for name, tensor in weights.named_tensors(config):
        assert torch.equal(tensor, expected.named_views(config)[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_names_the_tensor(folder: Path, bad: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[K_PROJ].__setitem__((15, 23), bad))
    with pytest.raises(ValueError, match=rf"tensor {K_PROJ} in .* is not finite, expected finite values"):
        load_pretrained(folder)


def test_a_value_that_overflows_in_the_dtype_asked_says_so(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[K_PROJ].__setitem__((3, 3), -7e4))
    with pytest.raises(ValueError, match=rf"tensor {K_PROJ} in .* overflows in torch.float16"):
        load_pretrained(folder, torch.float16)
    assert load_pretrained(folder, torch.bfloat16)[1].dtype == torch.bfloat16


@pytest.mark.usefixtures("no_heavy_work")
class TestBadIndex:
    @pytest.fixture
    def sharded(self, tmp_path: Path) -> Path:
        return save_checkpoint(tmp_path / "sharded", shards=True)

    def put(self, folder: Path, name: str, shard: Any) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map={**weight_map, name: shard})

    @pytest.mark.parametrize(
        "shard",
        [
            "{}/out.safetensors",
            "../out.safetensors",
            "a/../../out.safetensors",
            "..\\out.safetensors",
            "pytorch_model.bin",
            "9" * 5000 + ".safetensors",
            "a\nb.safetensors",
            "..",
            "",
            1,
            None,
        ],
    )
    def test_an_index_that_points_outside_its_folder_or_to_no_safetensors_is_refused(
        self, sharded: Path, shard: Any
    ) -> None:
        save_file({K_PROJ: torch.ones(16, 24)}, sharded.parent / "out.safetensors")
        shard = shard.format(sharded.parent) if isinstance(shard, str) else shard
        self.put(sharded, K_PROJ, shard)
        with pytest.raises(ValueError, match=rf"index.json puts {K_PROJ} into .*, expected a .safetensors"):
            load_pretrained(sharded)

    def test_an_index_that_names_a_missing_shard_is_refused(self, sharded: Path) -> None:
        name = sorted(path.name for path in sharded.glob("model-*.safetensors"))[1]
        (sharded / name).unlink()
        with pytest.raises(ValueError, match=rf"names \['{name}'\], which .* does not have"):
            load_pretrained(sharded)

    def test_a_shard_that_is_truncated_is_refused(self, sharded: Path) -> None:
        shard = min(sharded.glob("model-*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(ValueError, match=rf"{shard.name}, of \d+ bytes, is truncated or corrupt"):
            load_pretrained(sharded)

    def test_a_tensor_that_lies_in_another_shard_than_the_index_says_is_refused(self, sharded: Path) -> None:
        weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
        other = next(shard for shard in weight_map.values() if shard != weight_map[K_PROJ])
        self.put(sharded, K_PROJ, other)
        with pytest.raises(ValueError, match=rf"tensor {K_PROJ} is missing from .*{other}, expected it there"):
            load_pretrained(sharded)

    def test_a_tensor_that_the_index_does_not_list_is_refused(self, sharded: Path) -> None:
        weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
        del weight_map[K_PROJ]
        edit_json(sharded / INDEX, weight_map=weight_map)
        with pytest.raises(ValueError, match=rf"tensor {K_PROJ} in .* is unexpected there"):
            load_pretrained(sharded)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("{", "not valid JSON"),
            ("[]", "a list"),
            ("{}", "no weight_map"),
            ('{"weight_map": []}', "no weight_map"),
        ],
    )
    def test_a_malformed_index_is_refused(self, sharded: Path, text: str, problem: str) -> None:
        (sharded / INDEX).write_text(text)
        with pytest.raises(ValueError, match=rf"index.json .*{problem}"):
            load_pretrained(sharded)
