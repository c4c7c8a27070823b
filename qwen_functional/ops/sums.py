"""Sums of rows by an index, in an order that is always the same."""

from __future__ import annotations

import torch
from torch import Tensor


def index_sum_(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``x.index_add_(dim, index, source)`` for indices of x, on a GPU too with the same bits each time; differentiable.

    There index_add_ adds by atomic operations, in whatever order they come. index_put_ sorts first, but reads the
    indices back to check them, or asserts on the device, which this form of it, that of its own vjp, does not.
    """
    if x.device.type == "cpu":
        return x.index_add_(dim, index, source)
    return torch.ops.aten._index_put_impl_(x, [None] * dim + [index], source, True, True)
