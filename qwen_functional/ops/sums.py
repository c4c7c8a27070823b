"""Sums of rows by an index, in an order that is always the same."""

from __future__ import annotations

import torch
from torch import Tensor


def index_sum(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``x.index_add(dim, index, source)``, on a GPU too with the same bits each time; differentiable.

    There index_add adds by atomic operations, in whatever order they come; index_put sorts first.
    """
    if x.device.type == "cpu":
        return x.index_add(dim, index, source)
    return torch.ops.aten.index_put(x, [None] * dim + [index], source, True)


def index_sum_(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """:func:`index_sum` in place."""
    if x.device.type == "cpu":
        return x.index_add_(dim, index, source)
    return torch.ops.aten.index_put_(x, [None] * dim + [index], source, True)
