"""Triton kernels of the vjp of :mod:`.attention`, which has the notation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import block_of_queries, blocks, chosen, positions_of, rank_of, sees
from .tiles import add_dot, dot, load_tile, padded, store_tile

# Fewer programs than this leave multiprocessors of an H100 (132) idle: the keys are then cut into smaller blocks.
FEW_PROGRAMS = 132


def attend_vjp(
    do: Tensor,
    t: Tensor | None,
    A: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    nodes: Tensor,
    end: Tensor,
    positions: Tensor,
    window: int | None,
    scale: float,
    rope_q: tuple[Tensor, Tensor],
    rope_k: tuple[Tensor, Tensor],
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    rank_pad: int = 16,
) -> None:
    """The vjp of :func:`attend` and of the rotations before it, into ``dq``, ``dk``, ``dv``.

    ``do += t A``, ``p = softmax(scale · q kᵀ)``, ``ds = p · (do vᵀ − rowsum(do · o))``; ``dq = scale · ds k``,
    ``dk = scale · dsᵀ q``, ``dv = pᵀ do``; then dq and dk are rotated back, (y₁ cos + y₂ sin, y₂ cos − y₁ sin).

    Args:
        do: (G, NQ, NH · D) contiguous, o's cotangent except for the expand ``t A``, which is added in place.
        t, A: (G·NQ, RP) and (G, r, NH · D), contiguous; or neither.
        q, k, v, nodes, end, positions, window, scale: as :func:`attend` took them. o, lse: as it returned them.
        rope_q, rope_k: cos and sin, (NQ, D/2) and (S, D/2) float32 contiguous, by query and by node.
        dq, dk, dv: shaped as q, k, v, any strides but the last, which is 1; overwritten, must not overlap q, k, v.
    """
    n_adapters, n_queries, width = q.shape
    half, n_nodes = rope_k[0].shape[-1], k.shape[1]
    heads, kv_heads = width // (2 * half), k.shape[-1] // (2 * half)
    delta = torch.empty_like(lse)
    block_q, block_k, warps = blocks(q.dtype, 2 * half)
    sizes = {"NH": heads, "GROUP": heads // kv_heads, "H": half, "HP": padded(half), "DP": padded(2 * half)}
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    rows = 64 if q.element_size() == 2 else 16
    _finish[triton.cdiv(n_queries, rows), heads, n_adapters](
        do, t, A, o, delta, n_queries, rank_of(A, 1),
        NH=heads, D=2 * half, DP=sizes["DP"], RP=rank_pad, BM=rows, num_warps=4,
    )  # fmt: skip
    block_k = min(block_k, 32)  # 64 would not fit into registers
    _vjp_q[triton.cdiv(n_queries, block_q), heads, n_adapters](
        do, q, k, v, lse, delta, nodes, end, positions, *rope_q, dq,
        n_queries, n_nodes, window or 0, scale, *strides, dq.stride(0), dq.stride(1),
        **sizes, BM=block_q, BN=block_k, WINDOWED=window is not None, num_warps=warps, num_stages=2,
    )  # fmt: skip
    block_q, block_k, warps = _blocks_of_keys(q.dtype, 2 * half, n_nodes, kv_heads * n_adapters)
    _vjp_kv[triton.cdiv(n_nodes, block_k), kv_heads, n_adapters](
        do, q, k, v, lse, delta, nodes, end, positions, *rope_k, dk, dv,
        n_queries, n_nodes, window or 0, scale,
        *strides, dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
        **sizes, BM=block_q, BN=block_k, WINDOWED=window is not None, ALL_NODES=n_queries == n_nodes,
        num_warps=warps, num_stages=2,
    )  # fmt: skip


def _blocks_of_keys(dtype: torch.dtype, head_dim: int, n_nodes: int, programs: int) -> tuple[int, int, int]:
    """:func:`blocks` of programs that hold keys and loop over the queries; ``programs``: how many per block of nodes.

    Besides the scores it holds dk and dv, where the other holds dq: with D = 128 larger blocks would spill registers.
    """
    if dtype.itemsize == 2:
        queries, keys, warps = (64, 64, 4) if head_dim <= 64 else (32, 32, 4) if head_dim <= 128 else (32, 32, 8)
        if triton.cdiv(n_nodes, keys) * programs < FEW_PROGRAMS:
            keys = 32
    else:
        return blocks(dtype, head_dim)
    return *chosen(queries, keys), warps


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    do, t, A, o, delta, n_queries, rank,
    NH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """do += t A in place, and delta = rowsum(do · o), for one head."""
    head = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    m0 = tl.program_id(0).to(tl.int64) * BM
    left = n_queries - m0
    row = g * n_queries + m0
    do += row * (NH * D) + head * D
    do_tile = load_tile(do, NH * D, left, D, BM, DP)
    dtype = do_tile.dtype
    if t is not None:
        A_tile = load_tile(A + g * rank * (NH * D) + head * D, NH * D, rank, D, RP, DP)
        do_tile = add_dot(do_tile.to(tl.float32), load_tile(t + row * RP, RP, left, RP, BM, RP), A_tile).to(dtype)
        store_tile(do, NH * D, left, D, do_tile)
    o_tile = load_tile(o + row * (NH * D) + head * D, NH * D, left, D, BM, DP)
    delta_m = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    m = m0 + tl.arange(0, BM)
    tl.store(delta + (g * NH + head) * n_queries + m, delta_m, m < n_queries)


@triton.jit
def _store_rotated_back(to, stride, left, d1, d2, cos, sin, scale, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores a tile's halves d1 and d2, rotated back and times scale."""
    cos_tile = load_tile(cos, H, left, H, d1.shape[0], d1.shape[1]) * scale
    sin_tile = load_tile(sin, H, left, H, d1.shape[0], d1.shape[1]) * scale
    store_tile(to, stride, left, H, (d1 * cos_tile + d2 * sin_tile).to(to.dtype.element_ty))
    store_tile(to + H, stride, left, H, (d2 * cos_tile - d1 * sin_tile).to(to.dtype.element_ty))


@triton.jit
def _vjp_q(  # type: ignore[no-untyped-def]
    do, q, k, v, lse, delta, nodes, end, positions, cos, sin, dq,
    n_queries, n_nodes, window, scale, q_g, q_m, k_g, k_j, v_g, v_j, dq_g, dq_m,
    NH: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Writes dq, for one block of queries of one head."""
    D: tl.constexpr = 2 * H
    head = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    m0, left, m, valid, i, first_i, last_i, pos_i = block_of_queries(nodes, positions, n_queries, BM, WINDOWED)
    do_tile = load_tile(do + (g * n_queries + m0) * (NH * D) + head * D, NH * D, left, D, BM, DP)
    dtype = do_tile.dtype
    by_head = (g * NH + head) * n_queries
    delta_m = tl.load(delta + by_head + m, valid, other=0.0)
    lse_m = tl.load(lse + by_head + m, valid, other=0.0)

    q += g * q_g + m0 * q_m + head * D
    q1 = load_tile(q, q_m, left, H, BM, HP)
    q2 = load_tile(q + H, q_m, left, H, BM, HP)
    k += g * k_g + head // GROUP * D
    v += g * v_g + head // GROUP * D
    dq1 = tl.zeros([BM, HP], tl.float32)
    dq2 = tl.zeros([BM, HP], tl.float32)
    for j0 in range(0, last_i + 1, BN):
        j = j0 + tl.arange(0, BN)
        end_j = tl.load(end + j, j < n_nodes, other=0)
        if tl.max(end_j) > first_i:
            row_j = tl.cast(j0, tl.int64)
            pos_j = positions_of(positions, j, j < n_nodes, WINDOWED)
            seen = sees(i[:, None], j[None, :], end_j[None, :], pos_i[:, None], pos_j[None, :], window, WINDOWED)
            k1 = load_tile(k + row_j * k_j, k_j, n_nodes - j0, H, BN, HP)
            k2 = load_tile(k + row_j * k_j + H, k_j, n_nodes - j0, H, BN, HP)
            v_tile = load_tile(v + row_j * v_j, v_j, n_nodes - j0, D, BN, DP)
            scores = add_dot(dot(q1, tl.trans(k1)), q2, tl.trans(k2)) * (scale * 1.4426950408889634)
            p = tl.where(seen, tl.exp2(scores - lse_m[:, None]), 0.0)
            dp = dot(do_tile, tl.trans(v_tile))
            ds = (p * (dp - delta_m[:, None])).to(dtype)
            dq1 = add_dot(dq1, ds, k1)
            dq2 = add_dot(dq2, ds, k2)

    dq += g * dq_g + m0 * dq_m + head * D
    _store_rotated_back(dq, dq_m, left, dq1, dq2, cos + m0 * H, sin + m0 * H, scale, H)


@triton.jit
def _vjp_kv(  # type: ignore[no-untyped-def]
    do, q, k, v, lse, delta, nodes, end, positions, cos, sin, dk, dv,
    n_queries, n_nodes, window, scale, q_g, q_m, k_g, k_j, v_g, v_j, dk_g, dk_j, dv_g, dv_j,
    NH: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WINDOWED: tl.constexpr, ALL_NODES: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv, for one block of keys of one key/value head: summed over the group's heads. The scores are
    k qᵀ here, keys first: p and ds are then the left factors of dv and dk without a transpose."""
    D: tl.constexpr = 2 * H
    kv_head = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    j0 = tl.program_id(0) * BN
    j = j0 + tl.arange(0, BN)
    end_j = tl.load(end + j, j < n_nodes, other=0)
    pos_j = positions_of(positions, j, j < n_nodes, WINDOWED)
    left = n_nodes - j0
    row_j = j0.to(tl.int64)
    k += g * k_g + row_j * k_j + kv_head * D
    k1 = load_tile(k, k_j, left, H, BN, HP)
    k2 = load_tile(k + H, k_j, left, H, BN, HP)
    v_tile = load_tile(v + g * v_g + row_j * v_j + kv_head * D, v_j, left, D, BN, DP)
    dtype = v_tile.dtype

    # The queries at nodes from j0 up to the last end: no others see a key of this block.
    first_m = j0
    stop_m = tl.max(end_j)
    if not ALL_NODES:
        first_m, stop_m = _count_below(nodes, n_queries, first_m, stop_m)

    dk1 = tl.zeros([BN, HP], tl.float32)
    dk2 = tl.zeros([BN, HP], tl.float32)
    dv_tile = tl.zeros([BN, DP], tl.float32)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        by_head = (g * NH + head) * n_queries
        for m0 in range(first_m, stop_m, BM):
            m = m0 + tl.arange(0, BM)
            i = tl.load(nodes + m, m < stop_m, other=-1)
            pos_i = positions_of(positions, i, m < stop_m, WINDOWED)
            seen = sees(i[None, :], j[:, None], end_j[:, None], pos_i[None, :], pos_j[:, None], window, WINDOWED)
            row_m = tl.cast(m0, tl.int64)
            q_m0 = q + g * q_g + row_m * q_m + head * D
            q1 = load_tile(q_m0, q_m, stop_m - m0, H, BM, HP)
            q2 = load_tile(q_m0 + H, q_m, stop_m - m0, H, BM, HP)
            do_m0 = do + (g * n_queries + row_m) * (NH * D) + head * D
            do_tile = load_tile(do_m0, NH * D, stop_m - m0, D, BM, DP)
            lse_m = tl.load(lse + by_head + m, m < stop_m, other=0.0)
            delta_m = tl.load(delta + by_head + m, m < stop_m, other=0.0)
            scores = add_dot(dot(k1, tl.trans(q1)), k2, tl.trans(q2)) * (scale * 1.4426950408889634)
            p = tl.where(seen, tl.exp2(scores - lse_m[None, :]), 0.0)
            dv_tile = add_dot(dv_tile, p.to(dtype), do_tile)
            dp = dot(v_tile, tl.trans(do_tile))
            ds = (p * (dp - delta_m[None, :])).to(dtype)
            dk1 = add_dot(dk1, ds, q1)
            dk2 = add_dot(dk2, ds, q2)

    dk += g * dk_g + row_j * dk_j + kv_head * D
    _store_rotated_back(dk, dk_j, left, dk1, dk2, cos + row_j * H, sin + row_j * H, scale, H)
    store_tile(dv + g * dv_g + row_j * dv_j + kv_head * D, dv_j, left, D, dv_tile.to(dtype))


@triton.jit
def _count_below(nodes, n, low, high):  # type: ignore[no-untyped-def]
    """How many of n nodes are below low, and how many below high."""
    below_low = tl.zeros([128], tl.int32)
    below_high = tl.zeros([128], tl.int32)
    for m0 in range(0, n, 128):
        m = m0 + tl.arange(0, 128)
        node = tl.load(nodes + m, m < n, other=2147483647)
        below_low += (node < low).to(tl.int32)
        below_high += (node < high).to(tl.int32)
    return tl.sum(below_low), tl.sum(below_high)
