"""Products with narrow, low-rank matrices: ``x Aᵀ`` and ``x B``, and sums of partials."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS, STAGES = 16, 64, 4, 3  # of a tile; the columns are those of each warp


@triton.jit
def _shrink(  # type: ignore[no-untyped-def]
    x, F0, F1, F2, out, S, c0, c1, c2, w0, w1, w2, r0, r1, r2, x_g, x_m,
    TRANSPOSED: tl.constexpr, PARTS: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program has some rows and one part. Each of its W warps sums over its own columns, added up at the end."""
    part, g = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, width, r, factor = c0, w0, r0, F0
    if part == 1:
        first, width, r, factor = c1, w1, r1, F1
    if part == 2:
        first, width, r, factor = c2, w2, r2, F2
    m0 = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)
    seen = m0 + local < S
    x += g * x_g + m0 * x_m + first
    factor += g * width * r
    rank = tl.arange(0, RP)[None, None, :]
    total = tl.zeros((W, BM, RP), tl.float32)
    for start in tl.range(0, width, W * BC, num_stages=STAGES):
        cols = start + tl.arange(0, W)[:, None, None] * BC + tl.arange(0, BC)[None, None, :]
        tile = tl.load(x + (local[None, :, None] * x_m + cols), mask=seen[None, :, None] & (cols < width), other=0.0)
        if TRANSPOSED:  # A (r, width)
            row = tl.arange(0, RP)[None, :, None]
            of = tl.load(factor + (row * width + cols), mask=(row < r) & (cols < width), other=0.0)
            of = tl.permute(of, (0, 2, 1))
        else:  # B (width, r)
            cols = tl.permute(cols, (0, 2, 1))
            of = tl.load(factor + (cols * r + rank), mask=(rank < r) & (cols < width), other=0.0)
        total = tl.dot(tile, of, total, input_precision="ieee")
    place = out + (g * S + m0) * (PARTS * RP) + part * RP
    where = local[:, None] * (PARTS * RP) + tl.arange(0, RP)[None, :]
    tl.store(place + where, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=seen[:, None])


def shrink(
    x: Tensor, factors: Sequence[Tensor], columns: Sequence[slice] | None, rank_pad: int, *, transposed: bool
) -> Tensor:
    """Up to three inner products of the same rows, ``x Aᵀ`` (transposed) or ``x B``, as (G·S, n, RP).

    Args:
        x: (G, S, width), its last stride 1.
        factors: A (G, r, columns) or B (G, columns, r).
        columns: which columns of x each reads; None for all.
    """
    n, rows, width = x.shape
    at = [slice(0, width)] * len(factors) if columns is None else list(columns)
    firsts, widths = [c.start for c in at], [c.stop - c.start for c in at]
    ranks = [factor.shape[1 if transposed else 2] for factor in factors]
    blank = 3 - len(factors)
    out = torch.empty(n * rows, len(factors), rank_pad, dtype=x.dtype, device=x.device)
    _shrink[(triton.cdiv(rows, ROWS), len(factors), n)](
        x, *factors, *[x] * blank, out, rows, *firsts, *[0] * blank, *widths, *[0] * blank, *ranks, *[0] * blank,
        x.stride(0), x.stride(1),
        TRANSPOSED=transposed, PARTS=len(factors), RP=rank_pad, BM=ROWS, BC=columns_each(rank_pad, x.dtype), W=WARPS,
        STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out


def columns_each(rank_pad: int, dtype: torch.dtype) -> int:
    """Columns of a tile for each warp; fewer for larger ranks or wider dtypes, as all share the same memory."""
    return max(16, COLUMNS * 32 // (rank_pad * dtype.itemsize))


@triton.jit
def summed(parts, n_sums, rows_all, row, seen, RP: tl.constexpr, BM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of partials (n_sums, rows_all, RP), at BM rows from ``row`` on; in order, sixteen at a time."""
    local, rank, each = tl.arange(0, BM), tl.arange(0, RP), tl.arange(0, 16)
    total = tl.zeros((BM, RP), tl.float32)
    parts += row * RP
    for first in tl.range(0, n_sums, 16, num_stages=2):
        where = (each[:, None, None] * rows_all + local[None, :, None]) * RP + rank[None, None, :]
        there = (first + each < n_sums)[:, None, None] & seen[None, :, None]
        total += tl.sum(tl.load(parts + where, mask=there, other=0.0).to(tl.float32), axis=0)
        parts += 16 * rows_all.to(tl.int64) * RP
    return total


@triton.jit
def _total(  # type: ignore[no-untyped-def]
    p0, p1, p2, out, n0, n1, n2, rows_all,
    PARTS: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    parts, n_sums = p0, n0
    if part == 1:
        parts, n_sums = p1, n1
    if part == 2:
        parts, n_sums = p2, n2
    row = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)
    seen = row + local < rows_all
    total = summed(parts, n_sums, rows_all, row, seen, RP, BM)
    where = (row + local)[:, None] * (PARTS * RP) + part * RP + tl.arange(0, RP)[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=seen[:, None])


def total(partials: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Up to three partials (n_sums, rows, RP), each summed over the first dimension: (rows, n, RP)."""
    _, rows, pad = partials[0].shape
    blank = 3 - len(partials)
    out = torch.empty(rows, len(partials), pad, dtype=dtype, device=partials[0].device)
    _total[(triton.cdiv(rows, 8), len(partials))](
        *partials, *[partials[0]] * blank, out, *[p.shape[0] for p in partials], *[0] * blank, rows,
        PARTS=len(partials), RP=pad, BM=8, num_warps=4,
    )  # fmt: skip
    return out
