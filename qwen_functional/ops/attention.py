"""Grouped-query attention (arXiv 2305.13245) over a packed row, tile by tile.

Heads that share a key/value head are folded into the rows of one matrix, query by query: a tile of n queries
is an (n·group, head_dim) matrix per key/value head, and no key or value is repeated. The scale 1/sqrt(head_dim)
is in ``q`` already. The forward runs in the dtype of q and k, the vjp's products in that of v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import AttentionTile

# A tile's probabilities are kept for the vjp if it has at most this many keys: in a prefix tree it usually does, and
# they are then few compared with the MLP's activations. In one long sequence they would outgrow those.
MAX_KEPT_KEYS = 256


def attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[AttentionTile], *, keep: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """``o = p v`` with ``p = softmax(q kᵀ)``.

    Args:
        q: (G, K, S, group, head_dim), K key/value heads. k, v: (G, K, S', head_dim).
        tiles: which queries see which keys; together they cover all queries.
        keep: whether a vjp will follow.

    Returns:
        o (G, S, K · group · head_dim), heads side by side, as o_proj reads them, and p of each tile
        (G·K, n·group, n_keys), both in the dtype of v; None for a p of more than ``MAX_KEPT_KEYS`` keys, and for all
        without ``keep``.
    """
    n_adapters, kv_heads, n_queries, group, head_dim = q.shape
    out = v.new_empty(n_adapters, n_queries, kv_heads, group, head_dim)
    kept: list[Tensor | None] = []
    for tile in tiles:
        probs = _probabilities(_rows(q, tile), _keys(k, tile), tile)
        o = torch.bmm(probs, _keys(v, tile).to(probs.dtype)).view(n_adapters, kv_heads, -1, group, head_dim)
        out[:, tile.queries] = o.permute(0, 2, 1, 3, 4)
        kept.append(probs.to(v.dtype) if keep and probs.shape[-1] <= MAX_KEPT_KEYS else None)
    return out.flatten(2), kept


def attention_vjp(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, probs: Sequence[Tensor | None], tiles: Sequence[AttentionTile]
) -> tuple[Tensor, Tensor, Tensor]:
    """``dv = pᵀ do``, ``ds = p · (do vᵀ − rowsum(p · do vᵀ))``, ``dq = ds k``, ``dk = dsᵀ q``.

    Args:
        do: (G, S, K · group · head_dim), in the dtype of v.
        probs: p of each tile, as :func:`attention` returned it; None is recomputed.

    Returns:
        dq, dk, dv, shaped as q, k, v: dq in the dtype of v, dk and dv, which are sums over the tiles, in that of k.
    """
    n_adapters, kv_heads, n_queries, group, head_dim = q.shape
    do = do.view(n_adapters, n_queries, kv_heads, group, head_dim).permute(0, 2, 1, 3, 4)
    dq, dk, dv = torch.empty_like(q, dtype=v.dtype), torch.zeros_like(k), torch.zeros_like(v, dtype=k.dtype)
    for tile, p in zip(tiles, probs, strict=True):
        q_tile, k_tile, v_tile, do_tile = _rows(q, tile), _keys(k, tile), _keys(v, tile), _rows(do, tile)
        if p is None:
            p = _probabilities(q_tile, k_tile, tile).to(v.dtype)
        _add_to_keys(dv, torch.bmm(p.mT, do_tile), tile)
        ds = torch.ops.aten._softmax_backward_data(torch.bmm(do_tile, v_tile.mT), p, -1, p.dtype)
        dq[:, :, tile.queries] = torch.bmm(ds, k_tile.to(v.dtype)).view(n_adapters, kv_heads, -1, group, head_dim)
        _add_to_keys(dk, torch.bmm(ds.mT, q_tile.to(v.dtype)), tile)
    return dq, dk, dv


def kept_keys(tiles: Sequence[AttentionTile], n_tokens: int) -> int:
    """For how many pairs of query and key of each head the probabilities are kept; with S = ``n_tokens`` queries."""
    total = 0
    for tile in tiles:
        n_queries = len(range(n_tokens)[tile.queries])
        n_keys = len(range(n_tokens)[tile.keys]) if isinstance(tile.keys, slice) else tile.keys.numel()
        total += n_queries * n_keys * (n_keys <= MAX_KEPT_KEYS)
    return total


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
        total.index_add_(2, tile.keys, part.to(total.dtype))


def _probabilities(q: Tensor, k: Tensor, tile: AttentionTile) -> Tensor:
    """softmax(q kᵀ), zero where blocked; (G·K, n·group, n_keys)."""
    scores = torch.bmm(q, k.mT)
    if tile.blocked is not None:
        bias = torch.zeros_like(tile.blocked, dtype=q.dtype).masked_fill_(tile.blocked, float("-inf"))
        bias = bias if bias.dim() == 3 else bias[None]
        by_query = scores.view(len(bias), -1, bias.shape[1], scores.shape[1] // bias.shape[1], scores.shape[2])
        # Adding takes half the time of filling in, and changes no finite score.
        by_query[..., tile.free :].add_(bias[:, None, :, None])
    return scores.softmax(-1)
