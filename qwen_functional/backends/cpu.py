"""CPUs: weights in oneDNN's layout, and a few adapters at a time through each block."""

from __future__ import annotations

import torch

from ..config import Qwen2Config
from . import onednn
from .plain import Plain

# The gate and up of the adapters that go through a block together: enough rows for a GEMM, and so few bytes that the
# C library hands their memory on, where larger pieces go back to the system and are faulted in again.
CHUNK_BYTES = 48 << 20


class Cpu(Plain):
    """torch's operations, in the order and size that caches and the C library like."""

    product_of_adapters = staticmethod(onednn.product)

    def chunks(self, config: Qwen2Config, n_tokens: int, n_adapters: int, compute: torch.dtype) -> list[slice]:
        gate_up = 2 * n_tokens * config.intermediate_size * compute.itemsize
        most = max(1, CHUNK_BYTES // gate_up)
        each = -(-n_adapters // -(-n_adapters // most))  # as even as can be: all of them are of few sizes
        return [slice(start, min(start + each, n_adapters)) for start in range(0, n_adapters, each)]
