"""Rotation of queries and keys, with what remains of the projections q, k and v: biases, adapters, norms of heads."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .norm import SMALL
from .tiles import add_dot, load_tile, padded, store_tile

BLOCK: int | None = None  # rows of a tile; None chooses by dtype and head_dim

# (first head, heads, B) of a part of y, and its place in u.
Part = tuple[int, int, Tensor | None, int]


def rotate_(
    y: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_rotated: int,
    parts: Sequence[Part] = (),
    u: Tensor | None = None,
    norms: Tensor | None = None,
    n_queries: int = 0,
    eps: float = 0.0,
) -> Tensor | None:
    """In place ``y = rope(norm(y + bias + u Bᵀ))``: the rest of the projections q, k, v, given ``y = x Wᵀ``.

    Args:
        y: (G, N, heads · D), any strides but the last, which is 1.
        bias: (heads · D,).
        cos, sin: (N, D/2) float32, a row for each row of y.
        n_rotated: how many heads, from the first on, are rotated: (x₁ cos − x₂ sin, x₂ cos + x₁ sin).
        parts: up to three of (first head, number of heads, B, index): to these heads ``u[:, index] Bᵀ`` is added,
            B (G, number of heads · D, r) contiguous or None for nothing.
        u: (G·N, number of inner products, RP) contiguous, in the dtype of y; r ≤ RP.
        norms: (2, D) contiguous, the weights of the norm of each of the first ``n_queries`` heads, and of each of the
            others that are rotated; None for no norm.

    Returns:
        What the norms read, (G, N, rotated heads · D), for :func:`norm_heads_vjp_`; None where there are none.
    """
    n_adapters, n_rows, width = y.shape
    half = cos.shape[-1]
    parts = [part for part in parts if part[2] is not None]
    flat: list[object] = []
    for part in [*parts, *[(0, 0, None, 0)] * (3 - len(parts))]:
        first, n_heads, B, index = part
        flat += [B, first, n_heads, index, 0 if B is None else B.shape[-1]]
    block, warps = (64, 4 if half <= 64 else 8) if y.element_size() == 2 else (16, 8)
    block = BLOCK or block
    grid = (triton.cdiv(n_rows, block), width // (2 * half), n_adapters)
    n_inner, rank_pad = (0, 16) if u is None else u.shape[1:]
    read = None if norms is None else y.new_empty(n_adapters, n_rows, n_rotated * 2 * half)
    _rotate[grid](
        y, bias, cos, sin, u, *flat, n_rows, n_rotated, n_inner, y.stride(0), y.stride(1), norms, read, n_queries, eps,
        H=half, HP=padded(half), RP=rank_pad, BM=block, num_warps=warps,
    )  # fmt: skip
    return read


def norm_heads_vjp_(dy: Tensor, read: Tensor, norms: Tensor, n_queries: int, eps: float) -> None:
    """The vjp of the norms of :func:`rotate_`, in place in dy (G, N, heads · D), whose other heads are unchanged."""
    n_adapters, n_rows, width = read.shape
    half = norms.shape[1] // 2
    block = BLOCK or (64 if dy.element_size() == 2 else 16)
    _norm_heads_vjp[triton.cdiv(n_rows, block), width // (2 * half), n_adapters](
        dy, read, norms, n_rows, n_queries, eps, dy.stride(0), dy.stride(1), H=half, HP=padded(half), BM=block,
        num_warps=4 if half <= 64 else 8,
    )  # fmt: skip


@triton.jit
def _expand_part(  # type: ignore[no-untyped-def]
    y1, y2, u, n_inner, n_rows, head, g, B, first, n_heads, index, rank,
    H: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds u[:, index] Bᵀ to the halves of a head if it is of this part."""
    if B is not None:  # noqa: SIM102  # decided when the kernel is compiled; the next, when it runs
        if (head >= first) & (head < first + n_heads):
            inner = load_tile(u + index * RP, n_inner * RP, n_rows, RP, BM, RP)
            B += (g * n_heads + head - first) * (2 * H) * rank
            y1 = add_dot(y1, inner, tl.trans(load_tile(B, rank, H, rank, HP, RP)))
            y2 = add_dot(y2, inner, tl.trans(load_tile(B + H * rank, rank, H, rank, HP, RP)))
    return y1, y2


@triton.jit
def _normed(y1, y2, eps, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """The halves of a head divided by its root mean square, and the factor by which they were multiplied for that."""
    total = tl.sum(y1 * y1, axis=1) + tl.sum(y2 * y2, axis=1)
    # A row whose squares overflow is multiplied by SMALL first; eps is then negligible.
    fits = total < float("inf")
    scale = tl.where(fits, 1.0, SMALL)
    small = tl.sum((y1 * SMALL) * (y1 * SMALL), axis=1) + tl.sum((y2 * SMALL) * (y2 * SMALL), axis=1)
    rstd = tl.rsqrt(tl.where(fits, total / (2 * H) + eps, small / (2 * H)))[:, None]
    scale = scale[:, None]
    return y1 * scale * rstd, y2 * scale * rstd, scale * rstd


@triton.jit
def _weights(norms, head, n_queries, H: tl.constexpr, HP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The halves of the weight of a head's norm."""
    c = tl.arange(0, HP)
    norms += tl.where(head < n_queries, 0, 2 * H)
    w1 = tl.load(norms + c, c < H, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(norms + H + c, c < H, other=0.0).to(tl.float32)[None, :]
    return w1, w2


@triton.jit
def _norm_heads_vjp(  # type: ignore[no-untyped-def]
    dy, read, norms, n_rows, n_queries, eps, dy_g, dy_m, H: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    m0 = tl.program_id(0).to(tl.int64) * BM
    left = n_rows - m0
    width = tl.num_programs(1) * (2 * H)
    dy += g * dy_g + m0 * dy_m + head * (2 * H)
    read += (g * n_rows + m0) * width + head * (2 * H)
    x1 = load_tile(read, width, left, H, BM, HP).to(tl.float32)
    x2 = load_tile(read + H, width, left, H, BM, HP).to(tl.float32)
    w1, w2 = _weights(norms, head, n_queries, H, HP)
    n1, n2, rstd = _normed(x1, x2, eps, H)
    g1 = load_tile(dy, dy_m, left, H, BM, HP).to(tl.float32) * w1
    g2 = load_tile(dy + H, dy_m, left, H, BM, HP).to(tl.float32) * w2
    mean = ((tl.sum(g1 * n1, axis=1) + tl.sum(g2 * n2, axis=1)) / (2 * H))[:, None]
    store_tile(dy, dy_m, left, H, rstd * (g1 - n1 * mean))
    store_tile(dy + H, dy_m, left, H, rstd * (g2 - n2 * mean))


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    y, bias, cos, sin, u,
    B_0, first_0, n_heads_0, index_0, rank_0,
    B_1, first_1, n_heads_1, index_1, rank_1,
    B_2, first_2, n_heads_2, index_2, rank_2,
    n_rows, n_rotated, n_inner, y_g, y_m, norms, read, n_queries, eps,
    H: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    m0 = tl.program_id(0).to(tl.int64) * BM
    left = n_rows - m0
    y += g * y_g + m0 * y_m + head * (2 * H)
    y1 = load_tile(y, y_m, left, H, BM, HP).to(tl.float32)
    y2 = load_tile(y + H, y_m, left, H, BM, HP).to(tl.float32)
    if bias is not None:
        c = tl.arange(0, HP)
        bias += head * (2 * H)
        y1 += tl.load(bias + c, c < H, other=0.0).to(tl.float32)[None, :]
        y2 += tl.load(bias + H + c, c < H, other=0.0).to(tl.float32)[None, :]
    if u is not None:
        u += (g * n_rows + m0) * n_inner * RP
        y1, y2 = _expand_part(
            y1, y2, u, n_inner, left, head, g, B_0, first_0, n_heads_0, index_0, rank_0, H, HP, RP, BM
        )
        y1, y2 = _expand_part(
            y1, y2, u, n_inner, left, head, g, B_1, first_1, n_heads_1, index_1, rank_1, H, HP, RP, BM
        )
        y1, y2 = _expand_part(
            y1, y2, u, n_inner, left, head, g, B_2, first_2, n_heads_2, index_2, rank_2, H, HP, RP, BM
        )
    if head < n_rotated:
        if norms is not None:
            read += (g * n_rows + m0) * (n_rotated * 2 * H) + head * (2 * H)
            y1 = y1.to(read.dtype.element_ty)
            y2 = y2.to(read.dtype.element_ty)
            store_tile(read, n_rotated * 2 * H, left, H, y1)
            store_tile(read + H, n_rotated * 2 * H, left, H, y2)
            w1, w2 = _weights(norms, head, n_queries, H, HP)
            y1, y2, _ = _normed(y1.to(tl.float32), y2.to(tl.float32), eps, H)
            y1 *= w1
            y2 *= w2
        cos_m = load_tile(cos + m0 * H, H, left, H, BM, HP)
        sin_m = load_tile(sin + m0 * H, H, left, H, BM, HP)
        z1 = y1 * cos_m - y2 * sin_m
        y2 = y2 * cos_m + y1 * sin_m
        y1 = z1
    store_tile(y, y_m, left, H, y1)
    store_tile(y + H, y_m, left, H, y2)
