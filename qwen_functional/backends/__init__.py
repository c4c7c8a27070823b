"""How a chip runs a block: the operations of ``ops/``, in the forms that are fast on it; ``plain.py`` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cpu import Cpu
from .plain import Plain

if TYPE_CHECKING:
    from ..config import Qwen2Config
    from ..lora import Lora
    from ..weights import Qwen2Weights


def choose(config: Qwen2Config, weights: Qwen2Weights, lora: Lora) -> Plain:
    """The fastest backend for weights and adapters of these kinds, on their device."""
    if weights.device.type == "cpu":
        return Cpu()
    if weights.device.type == "cuda":
        from . import cuda

        if cuda.can_fuse(config, weights, lora):
            return cuda.Cuda()
    return Plain()
