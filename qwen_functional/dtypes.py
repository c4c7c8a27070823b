"""Which dtype each part of the computation runs in, from the dtype of the matrix multiplications."""

from __future__ import annotations

import torch

# Dtypes of base weights, by their names in checkpoints, files and command lines.
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


def default_compute_dtype(storage: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix multiplications by weights stored in ``storage``: the same where it is fast, else float32.

    On a CPU float16 never is (30 GFLOP/s forward and 1 to 2 backward, against 200 for float32), and bfloat16 only
    where the processor has instructions for it (20 against 180 GFLOP/s on one with AVX2 alone).
    """
    if device.type == "cpu" and (
        storage == torch.float16 or (storage == torch.bfloat16 and not cpu_multiplies_bfloat16())
    ):
        return torch.float32
    return storage


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 instructions that oneDNN uses."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and supported()


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream, norms and softmax: float64 for float64, else float32.

    Qwen2's residual stream has entries thousands of times larger than typical ones: a bfloat16 sum over 28 blocks
    would lose the small ones, and a float16 one would overflow.
    """
    return torch.float64 if compute == torch.float64 else torch.float32
