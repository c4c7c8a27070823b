"""Tiny checkpoints and tokenizers for the tests, as transformers writes them, and ways to corrupt them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"

TEXTS = [
    "a probe",
    "The river rises in the hills above the town, and reaches the sea.",
    "<|im_start|>user\nhi there<|im_end|>\n",
    "  leading, trailing \t and\n\nblank lines  ",
    "café, 日本語, 🙂, x = 3.14",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)


def save_checkpoint(
    folder: Path, dtype: torch.dtype = torch.float32, shards: bool = False, **changes: Any
) -> Path:
    """A tiny checkpoint of any ``model_type``, with random weights and biases, as transformers writes it."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(changes.pop("model_type", "qwen2"), **{**sizes, **heads, **changes})
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.Module.to(model, dtype)
    for tensor in model.state_dict().values():
        tensor.normal_()
    model.save_pretrained(folder, max_shard_size="12KB" if shards else "1GB")
    return folder


def make_checkpoint(folder: Path, **settings: Any) -> Path:
    """The folder of a Qwen2 model with a small byte-level BPE tokenizer, saved by transformers, without weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if settings.pop("adds_special_tokens", False):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<|im_start|>", "<|im_end|>")],
        )
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", **settings}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Apply ``change`` to the {name: tensor} of a checkpoint's only file, and write it back."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / ONE).items()}
    change(tensors)
    save_file(tensors, folder / ONE)
    return folder
