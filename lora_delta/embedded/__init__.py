"""A small Qwen2 checkpoint inside the package: what runs where no model is named and no network is at hand.

Its weights are random; its tokenizer has a token per byte. ``python -m lora_delta.embedded.build`` makes it again.
"""

from pathlib import Path


def embedded_checkpoint() -> Path:
    """The folder of the embedded checkpoint: 4 layers, hidden size 64, 259 tokens, float32."""
    return Path(__file__).parent
