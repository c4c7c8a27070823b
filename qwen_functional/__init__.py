"""A frozen Qwen2 as pure functions of (config, weights, tokens, lora), with gradients written by hand."""

from .checkpoint import load_pretrained
from .config import Qwen2Config
from .lora import Lora, LoraSpec
from .packing import PackedTokens, pack
from .weights import Qwen2Weights, init_weights

__all__ = [
    "Lora",
    "LoraSpec",
    "PackedTokens",
    "Qwen2Config",
    "Qwen2Weights",
    "init_weights",
    "load_pretrained",
    "pack",
]
