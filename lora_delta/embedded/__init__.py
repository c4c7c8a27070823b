"""A small Qwen2 checkpoint inside the package, for use when no model is named or no network is available.

It is trained on the small text tasks of ``tasks.py``, with one token per byte. ``python -m lora_delta.embedded.build``
rebuilds it.
"""

from pathlib import Path


def embedded_checkpoint() -> Path:
    """The folder of the embedded checkpoint: 4 layers, hidden size 128, 259 tokens, bfloat16."""
    return Path(__file__).parent
