"""A small Qwen2 checkpoint inside the package: what runs where no model is named and no network is at hand.

It is trained on the small text tasks of ``tasks.py``, with a token per byte. ``python -m lora_delta.embedded.build``
makes it again.
"""

from pathlib import Path


def embedded_checkpoint() -> Path:
    """The folder of the embedded checkpoint: 4 layers, hidden size 128, 259 tokens, bfloat16."""
    return Path(__file__).parent
