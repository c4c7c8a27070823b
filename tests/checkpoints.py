"""Tiny checkpoints for the tests, as transformers writes them, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config as HFConfig
from transformers import Qwen2ForCausalLM

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save_checkpoint(
    folder: Path, dtype: torch.dtype = torch.float32, shards: bool = False, **changes: Any
) -> Path:
    """A tiny checkpoint with random weights, biases included, as transformers writes it."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(HFConfig(**{**sizes, **heads, **changes}))
    torch.nn.Module.to(model, dtype)
    for tensor in model.state_dict().values():
        tensor.normal_()
    model.save_pretrained(folder, max_shard_size="12KB" if shards else "1GB")
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Rewrite a checkpoint's one file after a change to its {name: tensor}."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / ONE).items()}
    change(tensors)
    save_file(tensors, folder / ONE)
    return folder
