"""Which dtype each part of the computation runs in, from the dtype of the matrix multiplications."""

from __future__ import annotations

import torch


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """The residual stream, norms and softmax: float64 for float64, else float32.

    Qwen2's residual stream has entries thousands of times the typical one: a bfloat16 sum over 28 blocks would
    lose the small ones, and a float16 one would overflow.
    """
    return torch.float64 if compute == torch.float64 else torch.float32


def attention_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Queries, keys, values and probabilities.

    float32 (or float64), since Qwen2's scores overflow float16 and are too large for bfloat16's eight bits; the
    work is a few percent of the whole. On a GPU, where float32 is over ten times slower, bfloat16 stays.
    """
    if compute == torch.bfloat16 and device.type == "cuda":
        return compute
    return accumulation_dtype(compute)
