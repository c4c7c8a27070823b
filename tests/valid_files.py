"""Small valid files for every door: a base model, teachers, labels, a run, lists of texts."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from spoil import toml_text

from lora_delta import TopK, save_peft_adapter, save_top_k
from lora_delta.cli import main
from lora_delta.embedded import embedded_checkpoint
from qwen_functional import LoraSpec, Qwen2Config, init_weights

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPEC = LoraSpec(rank=2, alpha=4)
RUN: dict[str, Any] = {
    "base": "base", "dtype": "float32", "device": "cpu", "labels": "deltas", "prompts": "prompts.jsonl", "out": "run",
    "adapters_per_pass": 2, "tensor_parallel": 1, "stream": False, "condition_layer": -1, "max_length": 16,
    "format": {"rank": 2, "chunk_width": 16},
    "generator": {"width": 16, "depth": 1, "heads": 2, "components": 2},
    "training": {"steps": 2, "batch_size": 2, "prompts_per_condition": 1, "delta_batch_size": 1, "accumulate": 1,
                 "learning_rate": 0.001, "warmup_steps": 1, "checkpoint_every": 1, "clip": 1.0, "seed": 0},
    "losses": {"weights": 1.0, "delta": {"weight": 0.5, "kind": "linear", "warmup_steps": 2}},
}  # fmt: skip


TEXT_RUN: dict[str, Any] = {
    "base": "base", "dtype": "float32", "device": "cpu", "data": "texts.jsonl", "out": "textrun", "max_length": 64,
    "condition_cache": 10**6,
    "adapter": {"rank": 2, "alpha": 4.0, "use_rslora": True, "target_modules": ["q_proj", "down_proj"],
                "layers_to_transform": [1]},
    "generator": {"kind": "additive", "width": 16, "features": 4, "writes": "AB"},
    "texts": {"on_bad_line": "skip", "max_tokens": 400, "reduction": "example", "label_smoothing": 0.1,
              "chat_template_kwargs": {"enable_thinking": False}},
    "teacher": {"context": "{condition}: {prompt}", "temperature": 2.0},
    "training": {"steps": 2, "batch_size": 2, "texts_per_condition": 2, "accumulate": 1, "warmup_steps": 1,
                 "checkpoint_every": 1, "mean": "tokens"},
    "losses": {"lm": 1.0, "kl": {"weight": 0.5, "kind": "linear", "warmup_steps": 2}, "l1": 0.1, "product_l2": 0.1,
               "delta": {"weight": 0.2, "texts": "own", "target": "context", "layers": [0, -1], "pooling": "mean"}},
    "evaluation": {"data": "texts.jsonl", "every": 1, "conditions": 1, "texts": 2, "patience": 3},
    "log": {"tensorboard": False},
}  # fmt: skip
TEXTS: list[dict[str, Any]] = [
    {"condition": "backwards", "prompt": "cat=", "completion": "tac"},
    {"condition": "as it is", "prompt": "", "completion": "river"},
    {"condition": "backwards", "text": "the river and the hill", "id": 7},
    {"condition": "as it is", "messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "é"},
        {"role": "assistant", "content": "é"}, {"role": "user", "content": "b"},
        {"role": "assistant", "content": "b"}]},
]  # fmt: skip


def make_valid(folder: Path) -> None:
    """Valid files for every door: a base model whole and in shards, teachers, labels, a run, and lists of texts."""
    embedded, base = embedded_checkpoint(), folder / "base"
    fields = {**json.loads((embedded / "config.json").read_text()), **SIZES, "head_dim": 8, "num_key_value_heads": 2}
    fields["layer_types"] = ["full_attention"] * 2
    config = Qwen2Config.from_dict(fields)
    views = init_weights(config, seed=0, dtype=torch.float32).named_views(config)
    tensors = {name: view.contiguous() for name, view in views.items()}
    for place in (base, folder / "sharded"):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(fields))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(embedded / name, place)
    save_file(tensors, base / "model.safetensors")
    names = list(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / "sharded" / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in parts for name in parts[file]}}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    chance = torch.Generator().manual_seed(0)
    for name in "abc":
        lora = {n: 0.1 * torch.randn(shape, generator=chance) for n, shape in SPEC.shapes(config).items()}
        save_peft_adapter(folder / "teachers" / name, SPEC, lora, base_model="a/base", config=config)
    lines = [json.dumps({"adapter": f"teachers/{name}", "prompts": [f"task {name}", "é"]}) for name in "abc"]
    said = TopK(torch.randint(30, (7, 3), generator=chance), -torch.rand(7, 3, generator=chance), 2.0)
    (folder / "said").mkdir()
    save_top_k(folder / "said" / "said.safetensors", said.split([3, 4]), vocab_size=30)
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "new.jsonl").write_text('{"name": "one", "prompts": ["a", "b"]}\n{"name": "two", "prompts": ["c"]}\n')
    (folder / "list.txt").write_text("teachers/a\nteachers/b # the second\n\nteachers/*\n")
    (folder / "probes.txt").write_text("\n".join(["The river rises in the hills", "3 + 4 =", ""]))
    (folder / "classes.json").write_text(json.dumps({"teachers/a": "x", "teachers/b": "y", "teachers/c": "y"}))
    (folder / "run.toml").write_text(toml_text(RUN))
    (folder / "texts.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in TEXTS))
    (folder / "texts.toml").write_text(toml_text(TEXT_RUN))
    label = ["label", "--model", str(base), "--dtype", "float32", "--device", "cpu", "--quiet"]
    with contextlib.redirect_stdout(io.StringIO()):
        done = main([*label, "--out", str(folder / "deltas"), str(folder / "teachers")])
        for run in ("run.toml", "texts.toml"):
            done = done or main(["train", "--quiet", str(folder / run)])
        if done or main(["plot", str(folder / "deltas"), "--out", str(folder / "valid.png")]):  # fills its cache, too
            raise RuntimeError("the valid files are not")
