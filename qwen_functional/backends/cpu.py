"""CPUs: weights in oneDNN's layout, and a few adapters at a time through each block."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import Qwen2Config
from . import onednn
from .plain import Plain

# Of gate and up of the adapters that go through a block together: enough rows for a GEMM, and few enough bytes that the
# C library reuses their memory; larger pieces go back to the system and are faulted in again.
CHUNK_BYTES = 48 << 20
# Rows of at most FEW_TOKENS tokens go through a block several at once, up to MOST_TOKENS tokens: alone, each would take
# more time in torch's calls than in arithmetic.
FEW_TOKENS, MOST_TOKENS = 256, 2048


class Cpu(Plain):
    """torch's operations, in the order and size that suit caches and the C library."""

    product_of_adapters = staticmethod(onednn.product)

    def chunks(self, config: Qwen2Config, n_tokens: int, n_adapters: int, compute: torch.dtype) -> list[slice]:
        gate_up = 2 * n_tokens * config.intermediate_size * compute.itemsize
        most = max(1, CHUNK_BYTES // gate_up)
        each = -(-n_adapters // -(-n_adapters // most))  # as even as possible: there are few different sizes
        return [slice(start, min(start + each, n_adapters)) for start in range(0, n_adapters, each)]

    def together(self, sizes: Sequence[int]) -> list[slice]:
        found, start = list[slice](), 0
        while start < len(sizes):
            stop, longest = start + 1, sizes[start]
            while stop < len(sizes) and max(longest, sizes[stop]) <= FEW_TOKENS:
                longest_ = max(longest, sizes[stop])
                if longest_ * (stop + 1 - start) > MOST_TOKENS:
                    break
                stop, longest = stop + 1, longest_
            found.append(slice(start, stop))
            start = stop
        return found
