"""Makes the embedded checkpoint: ``python -m lora_delta.embedded.build [FOLDER]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lora_delta.embedded import embedded_checkpoint
from qwen_functional import Qwen2Config, init_weights

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# ChatML, as the instruct models of the Qwen2 family use it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def build(folder: Path) -> None:
    """Write config, weights and tokenizer to ``folder``, each to a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    views = init_weights(config, seed=0).named_views(config)
    texts = {
        "config.json": json.dumps({**config.to_dict(), "dtype": "float32"}, indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.tmp").write_text(text, encoding="utf-8")
    tensors = {name: view.contiguous().clone() for name, view in views.items()}
    save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    for name in (*texts, "model.safetensors"):
        (folder / f"{name}.tmp").replace(folder / name)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else embedded_checkpoint())
