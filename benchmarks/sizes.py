"""Named model sizes, for runs without a checkpoint."""

from __future__ import annotations

from qwen_functional import Qwen2Config


def named_config(size: str) -> Qwen2Config:
    """The config of a named size: ``0.5b`` and ``1.5b`` as published for Qwen2.5, ``tiny`` for tests."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


# hidden, intermediate, layers, attention heads, key-value heads, vocabulary
SIZES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "tiny": (64, 192, 3, 4, 2, 1000),
}
