"""Triton kernels of attention over packed prefix trees, with the LoRA pieces that touch a head's tile.

Shapes: G adapters; S nodes of a packed prefix tree each, depth first; NQ queries, which are some of the nodes in
ascending order; NH query heads, KV key/value heads, head h reads key/value head h // (NH/KV); D channels per head.
Activations are bfloat16, float16 or float32; sums, softmax and rotations are taken in float32.

LoRA: of a product y + (x Aᵀ) Bᵀ, the kernels here add the second half to a tile of y that they hold anyway ("expand"),
or compute the first half from a tile of x that they hold anyway ("shrink"). A shrink sums over all heads, but a
program holds only one: it writes a *partial*, float32 (n, rows, RP), to be summed over n by its reader. RP is the
rank padded to a power of two of at least 16; beyond the real rank all inner products are zero.

Where a tile is rotated, it is kept as two halves of D/2 channels, because the rotation pairs channel c with
c + D/2. No atomics: the order of every sum is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import add_dot, dot, load_tile, padded, store_tile

# Rows of a tile; None chooses by dtype and head_dim. Tests set them small, to have several blocks.
BLOCK_Q: int | None = None
BLOCK_K: int | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    nodes: Tensor,
    end: Tensor,
    positions: Tensor,
    window: int | None,
    scale: float,
    head_dim: int,
    A: Tensor | None = None,
    rank_pad: int = 16,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``o = softmax(scale · q kᵀ) v`` over the keys that a query sees, and the shrink of o_proj, ``o Aᵀ``.

    The query at node i sees key j if ``j ≤ i < end[j]`` and, with a window, ``positions[i] − positions[j] < window``.

    Args:
        q: (G, NQ, NH · D). k, v: (G, S, KV · D). Any strides but the last, which is 1.
        nodes: (NQ,) int32, ascending, the node of each query. end, positions: (S,) int32.
        head_dim: D.
        A: (G, r, NH · D) contiguous, or None.
        rank_pad: RP, at least r.

    Returns:
        o (G, NQ, NH · D); log2 of the softmax's denominators (G, NH, NQ) float32, for :mod:`.attention_vjp`; and the
        partials (NH, G·NQ, RP) float32 of ``o Aᵀ``, None without A.
    """
    n_adapters, n_queries, width = q.shape
    heads, kv_heads, n_nodes = width // head_dim, k.shape[-1] // head_dim, k.shape[1]
    o = q.new_empty(n_adapters, n_queries, width)
    lse = q.new_empty(n_adapters, heads, n_queries, dtype=torch.float32)
    partials = _partials(A, heads, n_adapters * n_queries, rank_pad, q)
    block_q, block_k, warps = blocks(q.dtype, head_dim)
    _attend[triton.cdiv(n_queries, block_q), heads, n_adapters](
        q, k, v, nodes, end, positions, A, o, lse, partials, n_queries, n_nodes, rank_of(A, 1), window or 0, scale,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        NH=heads, GROUP=heads // kv_heads, D=head_dim, DP=padded(head_dim), RP=rank_pad, BM=block_q, BN=block_k,
        WINDOWED=window is not None, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return o, lse, partials


def blocks(dtype: torch.dtype, head_dim: int) -> tuple[int, int, int]:
    """Queries and keys of a block, and warps, for a program that holds queries and loops over the keys."""
    if dtype.itemsize == 2:
        queries, keys, warps = (64, 64, 4) if head_dim <= 128 else (64, 32, 8)
    else:
        queries, keys, warps = (32, 32, 8) if head_dim <= 128 else (16, 16, 8)
    return *chosen(queries, keys), warps


def chosen(queries: int, keys: int) -> tuple[int, int]:
    """Rows of a tile, unless a test has set them."""
    return BLOCK_Q or queries, BLOCK_K or keys


def rank_of(factor: Tensor | None, dim: int) -> int:
    return 0 if factor is None else factor.shape[dim]


def _partials(factor: Tensor | None, n: int, rows: int, rank_pad: int, like: Tensor) -> Tensor | None:
    return None if factor is None else like.new_empty(n, rows, rank_pad, dtype=torch.float32)


# In the kernels m counts queries, i and j are nodes (of a query and of a key), c channels, r ranks; a tile begins at
# query m0 or node j0. Its first row times the stride may exceed 2³¹ and is int64; offsets within it are int32.
# Rows and columns beyond the last read as zero and are not written.


@triton.jit
def positions_of(positions, node, valid, WINDOWED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Positions of nodes; only a window needs them."""
    if WINDOWED:
        return tl.load(positions + node, valid, other=0)
    else:
        return node


@triton.jit
def block_of_queries(nodes, positions, n_queries, BM: tl.constexpr, WINDOWED: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's first query, how many are left from there on, which they are, whether each exists, their nodes,
    the first and the last of these, and their positions."""
    m0 = tl.program_id(0).to(tl.int64) * BM
    left = n_queries - m0
    m = m0 + tl.arange(0, BM)
    valid = m < n_queries
    i = tl.load(nodes + m, valid, other=-1)
    first_i = tl.load(nodes + m0)
    last_i = tl.load(nodes + m0 + tl.minimum(left, BM) - 1)
    pos_i = positions_of(positions, i, valid, WINDOWED)
    return m0, left, m, valid, i, first_i, last_i, pos_i


@triton.jit
def sees(i, j, end_j, pos_i, pos_j, window, WINDOWED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether query i sees key j, of any two shapes that broadcast. A padding query is −1, a padding key ends at 0."""
    seen = (j <= i) & (i < end_j)
    if WINDOWED:
        seen = seen & (pos_i - pos_j < window)
    return seen


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, nodes, end, positions, A, o, lse, partials, n_queries, n_nodes, rank, window, scale,
    q_g, q_m, k_g, k_j, v_g, v_j,
    NH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    m0, left, m, valid, i, first_i, last_i, pos_i = block_of_queries(nodes, positions, n_queries, BM, WINDOWED)
    q_tile = load_tile(q + g * q_g + m0 * q_m + head * D, q_m, left, D, BM, DP)
    dtype = q_tile.dtype
    k += g * k_g + head // GROUP * D
    v += g * v_g + head // GROUP * D

    total = tl.zeros([BM, DP], tl.float32)
    denominator = tl.zeros([BM], tl.float32)
    # Finite, so that a row that sees nothing of a block subtracts no infinities; only overflowed scores are lower.
    highest = tl.full([BM], -3e38, tl.float32)
    for j0 in range(0, last_i + 1, BN):
        j = j0 + tl.arange(0, BN)
        end_j = tl.load(end + j, j < n_nodes, other=0)
        if tl.max(end_j) > first_i:
            row_j = tl.cast(j0, tl.int64)
            pos_j = positions_of(positions, j, j < n_nodes, WINDOWED)
            seen = sees(i[:, None], j[None, :], end_j[None, :], pos_i[:, None], pos_j[None, :], window, WINDOWED)
            # Both loads before the first product, so that they wait together: Triton prefetches nothing under an if.
            k_tile = load_tile(k + row_j * k_j, k_j, n_nodes - j0, D, BN, DP)
            v_tile = load_tile(v + row_j * v_j, v_j, n_nodes - j0, D, BN, DP)
            scores = dot(q_tile, tl.trans(k_tile))
            scores = tl.where(seen, scores * (scale * 1.4426950408889634), float("-inf"))  # log2(e), for exp2
            higher = tl.maximum(highest, tl.max(scores, 1))
            shrunk = tl.exp2(highest - higher)
            p = tl.exp2(scores - higher[:, None])
            denominator = denominator * shrunk + tl.sum(p, 1)
            total = add_dot(total * shrunk[:, None], p.to(dtype), v_tile)
            highest = higher

    denominator = tl.where(valid, denominator, 1.0)
    o_tile = (total / denominator[:, None]).to(dtype)
    row = g * n_queries + m0
    store_tile(o + row * (NH * D) + head * D, NH * D, left, D, o_tile)
    tl.store(lse + (g * NH + head) * n_queries + m, highest + tl.log2(denominator), valid)
    if A is not None:
        A_tile = load_tile(A + g * rank * (NH * D) + head * D, NH * D, rank, D, RP, DP)
        partials += (head.to(tl.int64) * tl.num_programs(2) * n_queries + row) * RP
        store_tile(partials, RP, left, RP, dot(o_tile, tl.trans(A_tile)))
