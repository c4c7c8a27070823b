"""A frozen Qwen2 or Qwen3 as pure functions of (config, weights, tokens, lora), with gradients written by hand."""

from .checkpoint import load_pretrained
from .config import Qwen2Config, Qwen3Config, read_config
from .lora import Lora, LoraSpec
from .packing import PackedTokens, pack, pack_each
from .plan import Plan
from .weights import Qwen2Weights, init_weights

__all__ = [
    "Lora",
    "LoraSpec",
    "PackedTokens",
    "Plan",
    "Qwen2Config",
    "Qwen2Weights",
    "Qwen3Config",
    "init_weights",
    "load_pretrained",
    "pack",
    "pack_each",
    "read_config",
]
