"""Grouped-query attention (arXiv 2305.13245) over a packed row, tile by tile.

Heads that share a key/value head are folded into the rows of one matrix, query by query: a tile of n queries
is an (n·group, head_dim) matrix per key/value head, and no key or value is repeated. The scale 1/sqrt(head_dim)
is in ``q`` already. All of it runs in the dtype of q, k, v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import AttentionTile


def attention(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[AttentionTile]) -> Tensor:
    """``o = softmax(q kᵀ) v``.

    Args:
        q: (G, K, S, group, head_dim), K key/value heads. k, v: (G, K, S', head_dim).
        tiles: which queries see which keys; together they cover all queries.

    Returns:
        (G, S, K · group · head_dim): heads side by side, as o_proj reads them.
    """
    n_adapters, kv_heads, n_queries, group, head_dim = q.shape
    out = q.new_empty(n_adapters, n_queries, kv_heads, group, head_dim)
    for tile in tiles:
        probs = _probabilities(_rows(q, tile), _keys(k, tile), tile.blocked)
        o = torch.bmm(probs, _keys(v, tile)).view(n_adapters, kv_heads, -1, group, head_dim)
        out[:, tile.queries] = o.permute(0, 2, 1, 3, 4)
    return out.flatten(2)


def attention_vjp(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[AttentionTile]
) -> tuple[Tensor, Tensor, Tensor]:
    """``dv = pᵀ do``, ``ds = p · (do vᵀ − rowsum(p · do vᵀ))``, ``dq = ds k``, ``dk = dsᵀ q``.

    Args:
        do: (G, S, K · group · head_dim), in any dtype.

    Returns:
        dq, dk, dv, shaped as q, k, v. The probabilities p are computed again rather than kept.
    """
    n_adapters, kv_heads, n_queries, group, head_dim = q.shape
    do = do.view(n_adapters, n_queries, kv_heads, group, head_dim).permute(0, 2, 1, 3, 4)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in tiles:
        q_tile, k_tile, v_tile = _rows(q, tile), _keys(k, tile), _keys(v, tile)
        do_tile = _rows(do, tile).to(q.dtype)
        probs = _probabilities(q_tile, k_tile, tile.blocked)
        _add_to_keys(dv, torch.bmm(probs.mT, do_tile), tile)
        ds = torch.ops.aten._softmax_backward_data(torch.bmm(do_tile, v_tile.mT), probs, -1, q.dtype)
        dq[:, :, tile.queries] = torch.bmm(ds, k_tile).view(n_adapters, kv_heads, -1, group, head_dim)
        _add_to_keys(dk, torch.bmm(ds.mT, q_tile), tile)
    return dq, dk, dv


def _rows(q: Tensor, tile: AttentionTile) -> Tensor:
    """A tile's queries as (G·K, n·group, head_dim)."""
    q = q[:, :, tile.queries]
    return q.reshape(q.shape[0] * q.shape[1], -1, q.shape[-1])


def _keys(k: Tensor, tile: AttentionTile) -> Tensor:
    """A tile's keys or values as (G·K, n_keys, head_dim)."""
    k = k[:, :, tile.keys] if isinstance(tile.keys, slice) else k.index_select(2, tile.keys)
    return k.flatten(0, 1)


def _add_to_keys(total: Tensor, part: Tensor, tile: AttentionTile) -> None:
    part = part.view(*total.shape[:2], -1, total.shape[-1])
    if isinstance(tile.keys, slice):
        total[:, :, tile.keys] += part
    else:
        total.index_add_(2, tile.keys, part)


def _probabilities(q: Tensor, k: Tensor, blocked: Tensor | None) -> Tensor:
    """softmax(q kᵀ), zero where blocked; (G·K, n·group, n_keys)."""
    scores = torch.bmm(q, k.mT)
    if blocked is not None:
        n_queries, n_keys = blocked.shape
        bias = torch.zeros_like(blocked, dtype=q.dtype).masked_fill_(blocked, float("-inf"))
        # Added, which takes half the time that filling in does: no finite score is changed.
        scores.view(scores.shape[0], n_queries, -1, n_keys).add_(bias[:, None, :])
    return scores.softmax(-1)
