"""Named model sizes, for runs without a checkpoint."""

from __future__ import annotations

from qwen_functional import Qwen2Config


def named_config(size: str) -> Qwen2Config:
    """The config of a named size: those published for Qwen2.5, and ``tiny`` for tests."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=size in TIED,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


# hidden, intermediate, layers, attention heads, key-value heads, vocabulary
SIZES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "3b": (2048, 11008, 36, 16, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "14b": (5120, 13824, 48, 40, 8, 152064),
    "32b": (5120, 27648, 64, 40, 8, 152064),
    "72b": (8192, 29568, 80, 64, 8, 152064),
    "tiny": (64, 192, 3, 4, 2, 1000),
}
TIED = ("0.5b", "1.5b", "3b", "tiny")
