"""The residual sum with its norm, forward and backward, with the adapters of the product that is added or comes back.

Forward, a program has 16 whole rows, the fewest that a tensor core multiplies, and goes through them a tile of columns
at a time. A tile is (W, rows, columns): each of the W warps has columns of its own, and none waits for another within
it; a product that sums over columns is W sums, added up at the end. Backward, where more is read, a program has a tile
of 16 rows and 256 columns, and sums over whole rows go through memory in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .low_rank import columns_each, shrink, summed

ROWS, COLUMNS, WARPS, STAGES = 16, 256, 4, 2
SMALL = tl.constexpr(2.0**-80)  # the factor for a row whose squares overflow
FAR = tl.constexpr(2.0**-60)  # the norm's rstd below which g x could overflow, and rstd² underflow

# A tile's first element is at a 64-bit scalar offset, the others at 32-bit offsets from there: 64-bit addresses for
# each element would take more registers than the numbers themselves.


@triton.jit
def _columns(start, H, W: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The columns (W, 1, BC) of a tile."""
    return start + tl.arange(0, W)[:, None, None] * BC + tl.arange(0, BC)[None, None, :]


@triton.jit
def _add_expand_transposed(  # type: ignore[no-untyped-def]
    y, u, B, r, H, cols, W: tl.constexpr, BM: tl.constexpr, RP: tl.constexpr
):
    """``y + u Bᵀ`` for a tile of columns; B (H, r)."""
    rank = tl.arange(0, RP)[None, None, :]
    rows = tl.permute(cols, (0, 2, 1))
    tile = tl.load(B + rows * r + rank, mask=(rank < r) & (rows < H), other=0.0)
    u = tl.broadcast_to(u[None, :, :], (W, BM, RP))
    return tl.dot(u, tl.permute(tile, (0, 2, 1)), y, input_precision="ieee")


@triton.jit
def _add_shrink(inner, x, A, r, H, cols, RP: tl.constexpr):  # type: ignore[no-untyped-def]
    """``inner + x Aᵀ`` of each warp's columns, (W, BM, RP); A (r, H)."""
    rank = tl.arange(0, RP)[None, :, None]
    tile = tl.load(A + rank * H + cols, mask=(rank < r) & (cols < H), other=0.0)
    return tl.dot(x, tl.permute(tile, (0, 2, 1)), inner, input_precision="ieee")


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x, y, y_parts, B, weight, A0, A1, A2, x_out, h, rstd_out, y_u, u,
    S, H, eps, n_sums, rank_y, r0, r1, r2,
    HAS_Y: tl.constexpr, HAS_U: tl.constexpr, WRITE_X: tl.constexpr, NORM: tl.constexpr, READERS: tl.constexpr,
    RPY: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    local = tl.arange(0, BM)
    seen = tl.program_id(0) * BM + local < S
    row = (g * S + tl.program_id(0) * BM).to(tl.int64)
    dtype = weight.dtype.element_ty
    if HAS_U:
        u_y = summed(y_parts, n_sums, tl.num_programs(1) * S, row, seen, RPY, BM).to(dtype)
        tl.store(y_u + row * RPY + local[:, None] * RPY + tl.arange(0, RPY)[None, :], u_y, mask=seen[:, None])
        B += g.to(tl.int64) * rank_y * H
    squares = tl.zeros((W, BM), tl.float32)
    small = tl.zeros((W, BM), tl.float32)
    x, y, x_out, h = x + row * H, y + row * H, x_out + row * H, h + row * H
    rows = local[None, :, None] * H
    for start in tl.range(0, H, W * BC, num_stages=STAGES):
        cols = _columns(start, H, W, BC)
        there = seen[None, :, None] & (cols < H)
        z = tl.load(x + (rows + cols), mask=there, other=0.0)
        if HAS_Y:
            z += tl.load(y + (rows + cols), mask=there, other=0.0).to(tl.float32)
        if HAS_U:
            z = _add_expand_transposed(z, u_y, B, rank_y, H, cols, W, BM, RPY)
        if WRITE_X:
            tl.store(x_out + (rows + cols), z, mask=there)
        squares += tl.sum(z * z, axis=2)
        small += tl.sum((z * SMALL) * (z * SMALL), axis=2)
    if NORM:
        total = tl.sum(squares, axis=0)
        # A row whose squares overflow is multiplied by SMALL first; eps is then negligible.
        fits = total < float("inf")
        scale = tl.where(fits, 1.0, SMALL)
        rstd = tl.rsqrt(tl.where(fits, total / H + eps, tl.sum(small, axis=0) / H))
        tl.store(rstd_out + row + local, rstd * scale, mask=seen)
        tl.debug_barrier()  # what this program wrote is read again
        A0, A1, A2 = A0 + g.to(tl.int64) * r0 * H, A1 + g.to(tl.int64) * r1 * H, A2 + g.to(tl.int64) * r2 * H
        u0 = tl.zeros((W, BM, RP), tl.float32)
        u1 = tl.zeros((W, BM, RP), tl.float32)
        u2 = tl.zeros((W, BM, RP), tl.float32)
        for start in tl.range(0, H, W * BC, num_stages=STAGES):
            cols = _columns(start, H, W, BC)
            there = seen[None, :, None] & (cols < H)
            if WRITE_X:
                z = tl.load(x_out + (rows + cols), mask=there, other=0.0)
            else:
                z = tl.load(x + (rows + cols), mask=there, other=0.0)
            w = tl.load(weight + cols, mask=cols < H, other=0.0).to(tl.float32)
            n = (z * scale[None, :, None] * rstd[None, :, None] * w).to(dtype)
            tl.store(h + (rows + cols), n, mask=there)
            if READERS > 0:
                u0 = _add_shrink(u0, n, A0, r0, H, cols, RP)
            if READERS > 1:
                u1 = _add_shrink(u1, n, A1, r1, H, cols, RP)
            if READERS > 2:
                u2 = _add_shrink(u2, n, A2, r2, H, cols, RP)
        place = u + row * (READERS * RP) + local[:, None] * (READERS * RP) + tl.arange(0, RP)[None, :]
        if READERS > 0:
            tl.store(place, tl.sum(u0, axis=0).to(dtype), mask=seen[:, None])
        if READERS > 1:
            tl.store(place + RP, tl.sum(u1, axis=0).to(dtype), mask=seen[:, None])
        if READERS > 2:
            tl.store(place + 2 * RP, tl.sum(u2, axis=0).to(dtype), mask=seen[:, None])


def add_norm(
    x: Tensor,
    y: Tensor | None,
    partials: Tensor | None,
    B: Tensor | None,
    weight: Tensor | None,
    eps: float,
    As: Sequence[Tensor] = (),
    rank_pad: int = 16,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``z = x + y + u Bᵀ``; with a weight, ``h = norm(z)`` and ``u' = h Aᵀ`` for each A that reads it.

    Args:
        x: (G, S, H) float32, the residual stream. y: (G, S, H) a base product to be added to it, or None.
        partials: (n, G·S, RP) of y's u, with B (G, H, r); or None for a y without adapters.
        weight: (H,) of the norm, or None for the sum alone. As: up to three (G, r, H).

    Returns:
        z (x itself where there is no y), h (G, S, H) in the weight's dtype, rstd (G, S, 1) float32, u' (G·S, n, RP),
        and y's u (G·S, 1, RP), summed; None for what does not exist.
    """
    n, rows, width = x.shape
    like = y if y is not None else x
    dtype = dtype or (weight.dtype if weight is not None else like.dtype)
    z = torch.empty_like(x) if y is not None else x
    norm = weight is not None
    h = torch.empty(x.shape, dtype=dtype, device=x.device) if norm else x
    rstd = x.new_empty(n, rows, 1) if norm else x
    u = torch.empty(n * rows, len(As), rank_pad, dtype=dtype, device=x.device) if As else h
    y_u, pad_y = h, 16
    if partials is not None:
        pad_y = partials.shape[-1]
        y_u = torch.empty(n * rows, 1, pad_y, dtype=dtype, device=x.device)
    held = [*As, *[h] * (3 - len(As))]
    ranks = [A.shape[1] for A in As] + [0] * (3 - len(As))
    w = weight if weight is not None else torch.empty(0, dtype=dtype, device=x.device)
    _add_norm[(triton.cdiv(rows, ROWS), n)](
        x, y if y is not None else x, partials if partials is not None else x, B if B is not None else h,
        w, *held, z, h, rstd, y_u, u,
        rows, width, eps, 0 if partials is None else partials.shape[0], 0 if B is None else B.shape[2], *ranks,
        HAS_Y=y is not None, HAS_U=partials is not None, WRITE_X=y is not None, NORM=norm, READERS=len(As),
        RPY=pad_y, RP=rank_pad, BM=ROWS,
        BC=columns_each(max(rank_pad, pad_y), dtype), W=WARPS, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return (
        z,
        h if norm else None,
        rstd if norm else None,
        u if As else None,
        y_u if partials is not None else None,
    )


@triton.jit
def _row_sums(sums, row, local, seen, n_blocks, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.arange(0, BLOCKS)
    where = (row + local)[:, None] * n_blocks + block[None, :]
    return tl.sum(tl.load(sums + where, mask=seen[:, None] & (block < n_blocks)[None, :], other=0.0), axis=1)


@triton.jit
def _finished(  # type: ignore[no-untyped-def]
    dh, t, A0, A1, A2, r0, r1, r2, g, row, H, local, seen, cols, there,
    READERS: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """A tile of ``dh + t A``."""
    d = tl.load(dh + row * H + local[:, None] * H + cols[None, :], mask=there, other=0.0).to(tl.float32)
    rank = tl.arange(0, RP)
    t += row * (READERS * RP) + local[:, None] * (READERS * RP) + rank[None, :]
    at, inside = rank[:, None] * H + cols[None, :], (cols < H)[None, :]
    if READERS > 0:
        own = tl.load(A0 + g.to(tl.int64) * r0 * H + at, mask=(rank < r0)[:, None] & inside, other=0.0)
        d = tl.dot(tl.load(t, mask=seen[:, None], other=0.0), own, d, input_precision="ieee")
    if READERS > 1:
        own = tl.load(A1 + g.to(tl.int64) * r1 * H + at, mask=(rank < r1)[:, None] & inside, other=0.0)
        d = tl.dot(tl.load(t + RP, mask=seen[:, None], other=0.0), own, d, input_precision="ieee")
    if READERS > 2:
        own = tl.load(A2 + g.to(tl.int64) * r2 * H + at, mask=(rank < r2)[:, None] & inside, other=0.0)
        d = tl.dot(tl.load(t + 2 * RP, mask=seen[:, None], other=0.0), own, d, input_precision="ieee")
    return d


@triton.jit
def _norm_vjp(  # type: ignore[no-untyped-def]
    dh, t, A0, A1, A2, x, weight, rstd_in, dres, sums, dx, dy, S, H, r0, r1, r2,
    FIRST: tl.constexpr, READERS: tl.constexpr, RP: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """For a tile, first the sums of ``g x`` by row; then, with those of all tiles, dx."""
    block, g = tl.program_id(1), tl.program_id(2)
    local = tl.arange(0, BM)
    seen = tl.program_id(0) * BM + local < S
    row = (g * S + tl.program_id(0) * BM).to(tl.int64)
    cols = block * BC + tl.arange(0, BC)
    there = seen[:, None] & (cols < H)[None, :]
    where = local[:, None] * H + cols[None, :]
    z = tl.load(x + row * H + where, mask=there, other=0.0)
    d = _finished(dh, t, A0, A1, A2, r0, r1, r2, g, row, H, local, seen, cols, there, READERS, RP)
    d *= tl.load(weight + cols, mask=cols < H, other=0.0).to(tl.float32)[None, :]
    rstd = tl.load(rstd_in + row + local, mask=seen, other=0.0)
    own = tl.where(rstd < FAR, 1.0, rstd)  # what is still to multiply z, which is already normed where it is far
    z *= tl.where(rstd < FAR, rstd, 1.0)[:, None]
    if FIRST:
        tl.store(sums + (row + local) * tl.num_programs(1) + block, tl.sum(d * z, axis=1), mask=seen)
    else:
        factor = own * own * _row_sums(sums, row, local, seen, tl.num_programs(1), BLOCKS) / H
        out = tl.load(dres + row * H + where, mask=there, other=0.0)
        out += rstd[:, None] * (d - z * factor[:, None])
        tl.store(dx + row * H + where, out, mask=there)
        tl.store(dy + row * H + where, out.to(dy.dtype.element_ty), mask=there)


def norm_vjp(
    dh: Tensor,
    t: Tensor | None,
    As: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dres: Tensor,
    B: Tensor | None,
    next_pad: int = 16,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dx = dres + rstd · (g − x · rstd² · mean(g x))`` with ``g = (dh + t A) · w``; then ``t' = dx B``.

    Args:
        dh: (G, S, H), a base product alone; t (G·S, n, RP) and As, up to three (G, r, H).
        x, rstd, weight: of the norm. dres: (G, S, H) float32, the cotangent of the residual stream.
        B: (G, H, r) of the projection that dx goes back through next, or None.

    Returns:
        dx (G, S, H) float32, the same in the dtype of dh, and t' (G·S, 1, RP).
    """
    n, rows, width = x.shape
    dx, dy = torch.empty_like(x), torch.empty_like(dh)
    columns = _tile_columns(width, 16 if t is None else t.shape[2], dh.dtype)
    blocks, blank = triton.cdiv(width, columns), 3 - len(As)
    sums = x.new_empty(n * rows, blocks)
    for first in (True, False):
        _norm_vjp[(triton.cdiv(rows, ROWS), blocks, n)](
            dh, dh if t is None else t, *As, *[dh] * blank, x, weight, rstd, dres, sums, dx, dy,
            rows, width, *[A.shape[1] for A in As], *[0] * blank,
            FIRST=first, READERS=len(As), RP=16 if t is None else t.shape[2], BLOCKS=triton.next_power_of_2(blocks),
            BM=ROWS, BC=columns, num_warps=WARPS,
        )  # fmt: skip
    return dx, dy, None if B is None else shrink(dy, [B], None, next_pad, transposed=False)


def _tile_columns(width: int, rank_pad: int, dtype: torch.dtype) -> int:
    """Columns of a tile; fewer where the adapters' part of it is large."""
    most = max(16, COLUMNS * 64 // max(64, rank_pad * dtype.itemsize))
    return min(most, max(16, triton.next_power_of_2(width)))
