"""Tiles of matrices: read, written and multiplied, as the kernels of attention do it."""

from __future__ import annotations

import triton
import triton.language as tl


def padded(n: int) -> int:
    """The smallest power of two that holds n channels; tl.dot needs at least 16."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def load_tile(matrix, stride, n_rows, n_columns, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first M rows and N columns of a matrix."""
    row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    return tl.load(matrix + (row * stride + column), (row < n_rows) & (column < n_columns), other=0.0)


@triton.jit
def store_tile(matrix, stride, n_rows, n_columns, tile):  # type: ignore[no-untyped-def]
    row, column = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    tl.store(matrix + (row * stride + column), tile, (row < n_rows) & (column < n_columns))


@triton.jit
def dot(a, b):  # type: ignore[no-untyped-def]
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_dot(total, a, b):  # type: ignore[no-untyped-def]
    return tl.dot(a, b, total, input_precision="ieee")
