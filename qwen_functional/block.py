"""One decoder block: ``x_mid = x + o(attention(qkv(norm(x))))``, then ``x_mid + down(swiglu(gate_up(norm(x_mid))))``.

The residual stream is (G, S, H) in the accumulation dtype, of the adapters of one chunk. G is 1 below the first adapted
block, where all adapters still share one stream. Each half has its vjp right below it: the same lines, upside down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Qwen2Config
from .dtypes import accumulation_dtype
from .lora import Lora
from .ops.attention import attention, attention_vjp, kept_keys
from .ops.linear import PackedWeight
from .ops.rmsnorm import rmsnorm_engine, rmsnorm_vjp
from .ops.rope import rope_engine, rope_vjp
from .ops.swiglu import swiglu_engine_, swiglu_partials_, swiglu_vjp_
from .packing import AttentionTile
from .parallel import TensorParallel
from .stacking import DOWN, GATE, KV, QKV, UP, Gradients, O, Q, Stack, stack
from .weights import BlockWeights, PackedBlock


@dataclass(frozen=True)
class Row:
    """What a block needs to know of the packed row: rope tables, attention, and which rows to go on with.

    ``rows`` None is all S; else the (R,) nodes that are read out, and the block computes queries, o_proj and MLP
    for them alone. ``tiles`` are of those queries.
    """

    q_rope: tuple[Tensor, Tensor]  # cos, sin (S or R, 1, head_dim/2), times 1/sqrt(head_dim)
    k_rope: tuple[Tensor, Tensor]  # cos, sin (S, head_dim/2)
    tiles: Sequence[AttentionTile]
    dtype: torch.dtype  # of attention's forward
    rows: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """A block's weights and adapters, ready to multiply. ``q`` is None where it is stacked in ``qkv``."""

    config: Qwen2Config
    input_layernorm: Tensor
    post_attention_layernorm: Tensor
    qkv: Stack  # of k|v alone where q is apart
    q: Stack | None
    o: Stack
    gate_up: Stack
    down: Stack
    parallel: TensorParallel | None

    @property
    def adapted(self) -> bool:
        """Whether any of its projections has adapters."""
        stacks = (self.qkv, self.q, self.o, self.gate_up, self.down)
        return any(stack is not None and stack.A is not None for stack in stacks)

    @classmethod
    def bind(
        cls,
        config: Qwen2Config,
        weights: BlockWeights,
        packed: PackedBlock | None,
        lora: Lora,
        layer: int,
        compute: torch.dtype,
        parallel: TensorParallel | None = None,
        *,
        q_apart: bool,
    ) -> Block:
        """The block of a layer, in the dtype ``compute``; its packed matrices where there are any.

        ``q_apart``: for a block that is read out at a few rows, which needs k and v of all rows but not q.
        """
        b, n = weights.qkv_bias.to(compute), config.q_size

        def matrix(name: str) -> Tensor | PackedWeight:
            return getattr(weights, name).to(compute) if packed is None else getattr(packed, name)

        def stacked(*bases: tuple[tuple[str, ...], Tensor | PackedWeight, Tensor | None]) -> Stack:
            return stack(config, lora, layer, *bases)

        if q_apart:  # a packed matrix cannot be cut
            w = weights.qkv_proj.to(compute)
            qkv, q = stacked((KV, w[n:], b[n:])), stacked((Q, w[:n], b[:n]))
        else:
            qkv, q = stacked((QKV, matrix("qkv_proj"), b)), None
        return cls(
            config,
            weights.input_layernorm,
            weights.post_attention_layernorm,
            qkv,
            q,
            stacked((O, matrix("o_proj"), None)),
            stacked((GATE, matrix("gate_proj"), None), (UP, matrix("up_proj"), None)),
            stacked((DOWN, matrix("down_proj"), None)),
            parallel,
        )

    def summed(self, x: Tensor) -> Tensor:
        """What several ranks have computed in parts; one call a half, forwards and back."""
        return x if self.parallel is None else self.parallel.sum_(x)


@dataclass
class KeptMlp:
    h: Tensor  # (G, S, H), norm(x_mid), and its rstd
    rstd: Tensor
    a: Tensor  # (G, S, I), what down_proj reads
    by_gate: Tensor  # ∂a/∂gate
    by_up: Tensor
    u_gate_up: Tensor | None
    u_down: Tensor | None = None


@dataclass
class Kept:
    """What the forward leaves for the vjp beside the block's input. All (G, S, …)."""

    x_mid: Tensor
    h: Tensor  # norm(x), and its rstd
    rstd: Tensor
    q: Tensor  # (G, K, S, group, head_dim), rotated and scaled; in attention's dtype, as k
    k: Tensor  # (G, K, S, head_dim), rotated
    v: Tensor
    probs: list[Tensor | None]  # of each tile, where they are kept
    o: Tensor
    u_qkv: Tensor | None
    u_q: Tensor | None
    u_o: Tensor | None
    mlp: KeptMlp | None = None  # None: to be computed again


def kept_bytes(
    config: Qwen2Config, n_adapters: int, n_tokens: int, tiles: Sequence[AttentionTile], compute: torch.dtype
) -> int:
    """Bytes of a block's :class:`Kept`, x_mid and the low-rank parts aside; ``tiles`` are of all tokens."""
    rotated = accumulation_dtype(compute).itemsize * (config.q_size + config.kv_size)
    others = 2 * config.hidden_size + config.q_size + config.kv_size + 3 * config.intermediate_size
    probs = kept_keys(tiles, n_tokens) * config.num_attention_heads
    return n_adapters * (n_tokens * (rotated + others * compute.itemsize) + probs * compute.itemsize)


def attention_half(
    block: Block, x: Tensor, row: Row, adapters: slice, x_mid: Tensor | None = None, *, keep: bool
) -> Kept:
    """``x_mid = x + o(attention(qkv(norm(x))))`` of the adapters in the slice, and all that the vjp needs of it.

    Without ``keep`` no vjp follows, and the probabilities are dropped. Where ``x_mid`` is known, o_proj is not
    multiplied again.
    """
    config, compute = block.config, block.o.dtype
    h, rstd = rmsnorm_engine(x, block.input_layernorm, config.rms_norm_eps, compute)
    (qkv,), u_qkv = block.qkv(h, adapters)
    if block.q is None:
        queries, kv, u_q = qkv[..., : config.q_size], qkv[..., config.q_size :], None
    else:
        (queries,), u_q = block.q(h[:, row.rows], adapters)
        kv = qkv
    keys, values = kv.chunk(2, -1)
    q = _rotated(_query_heads(queries, config), row.q_rope, row.dtype)
    k = _rotated(_heads(keys, config), row.k_rope, row.dtype)
    v = _heads(values, config).clone(memory_format=torch.contiguous_format)
    n_adapters = max(q.shape[0], k.shape[0])
    q, k, v = (t.expand(n_adapters, *t.shape[1:]) for t in (q, k, v))
    o, probs = attention(q, k, v, row.tiles, keep=keep)
    if x_mid is not None:
        return Kept(x_mid, h, rstd, q, k, v, probs, o, u_qkv, u_q, block.o.inner(o, adapters))
    (y,), u_o = block.o(o, adapters)
    return Kept(_rows(x, row) + block.summed(y), h, rstd, q, k, v, probs, o, u_qkv, u_q, u_o)


def attention_half_vjp(
    block: Block,
    x: Tensor,
    kept: Kept,
    dx_mid: Tensor,
    row: Row,
    adapters: slice,
    gradients: Gradients,
    layer: int,
    need_dx: bool,
) -> Tensor | None:
    """The cotangent of ``x`` from that of ``x_mid``, (G, S or R, H); None where nothing below needs it."""
    config, compute = block.config, block.o.dtype
    need_attention = need_dx or gradients.wants_any(layer, QKV)
    do = block.o.vjp([dx_mid.to(compute)], kept.o, kept.u_o, gradients, adapters, need_dx=need_attention)
    if do is None:
        return None
    dq, dk, dv = attention_vjp(do, kept.q, kept.k, kept.v, kept.probs, row.tiles)
    d_queries = do.new_empty(*do.shape[:-1], config.q_size)
    d_kv = do.new_empty(dk.shape[0], dk.shape[2], 2 * config.kv_size)
    if block.q is None:  # one buffer for q|k|v
        d_qkv = do.new_empty(*do.shape[:-1], config.q_size + 2 * config.kv_size)
        d_queries, d_kv = d_qkv[..., : config.q_size], d_qkv[..., config.q_size :]
    rope_vjp(dq, *row.q_rope, out=_query_heads(d_queries, config))
    d_keys, d_values = d_kv.chunk(2, -1)
    rope_vjp(dk, *row.k_rope, out=_heads(d_keys, config))
    _heads(d_values, config).copy_(dv)
    if block.q is None:
        dh = block.qkv.vjp([d_qkv], kept.h, kept.u_qkv, gradients, adapters, need_dx=need_dx)
    else:
        dh = block.qkv.vjp([d_kv], kept.h, kept.u_qkv, gradients, adapters, need_dx=need_dx)
        dh_rows = block.q.vjp([d_queries], kept.h[:, row.rows], kept.u_q, gradients, adapters, need_dx=need_dx)
        if dh is not None and dh_rows is not None and row.rows is not None:
            dh.index_add_(1, row.rows, dh_rows)
    if dh is None:
        return None
    dx = rmsnorm_vjp(block.summed(dh).to(x.dtype), x, block.input_layernorm, kept.rstd)
    return dx.add_(dx_mid) if row.rows is None else dx.index_add_(1, row.rows, dx_mid)


def mlp_half(
    block: Block, x_mid: Tensor, adapters: slice, *, keep: bool, in_place: bool = False
) -> tuple[Tensor, KeptMlp | None]:
    """``x_out = x_mid + down(swiglu(gate_up(norm(x_mid))))``, and with ``keep`` what the vjp needs of it.

    With ``in_place`` ``x_mid`` is written over where it can be.
    """
    x_mid = x_mid.expand(_n_adapters(block, x_mid, adapters), -1, -1)
    h, rstd = _normed(block, x_mid)
    kept = _gated(block, h, rstd, adapters) if keep else None
    a = swiglu_engine_(*block.gate_up(h, adapters)[0]) if kept is None else kept.a
    (y,), u_down = block.down(a, adapters)
    if kept is not None:
        kept.u_down = u_down
    out = x_mid if in_place and x_mid.stride(0) != 0 else None
    return torch.add(x_mid, block.summed(y), out=out), kept


def mlp_half_vjp(
    block: Block,
    x_mid: Tensor,
    kept: KeptMlp | None,
    dx_out: Tensor,
    adapters: slice,
    gradients: Gradients,
    layer: int,
    need_dx: bool,
) -> Tensor | None:
    """The cotangent of ``x_mid`` (G, S, H), written over ``dx_out``; what was not kept is computed again."""
    compute = block.down.dtype
    need_gate_up = need_dx or gradients.wants_any(layer, GATE + UP)
    if not need_gate_up and not gradients.wants_any(layer, DOWN):
        return None
    x_mid = x_mid.expand(dx_out.shape)
    if kept is None:
        kept = _gated(block, *_normed(block, x_mid), adapters)
        kept.u_down = block.down.inner(kept.a, adapters)
    da = block.down.vjp([dx_out.to(compute)], kept.a, kept.u_down, gradients, adapters, need_dx=need_gate_up)
    if da is None:
        return None
    d_gate_up = swiglu_vjp_(da, kept.by_gate, kept.by_up)
    dh = block.gate_up.vjp(d_gate_up, kept.h, kept.u_gate_up, gradients, adapters, need_dx=need_dx)
    if dh is None:
        return None
    weight = block.post_attention_layernorm
    return dx_out.add_(rmsnorm_vjp(block.summed(dh).to(x_mid.dtype), x_mid, weight, kept.rstd))


def _gated(block: Block, h: Tensor, rstd: Tensor, adapters: slice) -> KeptMlp:
    (gate, up), u_gate_up = block.gate_up(h, adapters)
    return KeptMlp(h, rstd, *swiglu_partials_(gate, up), u_gate_up)


def _normed(block: Block, x_mid: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x_mid) in the compute dtype, and its rstd."""
    weight, eps = block.post_attention_layernorm, block.config.rms_norm_eps
    return rmsnorm_engine(x_mid, weight, eps, block.gate_up.dtype)


def _n_adapters(block: Block, x: Tensor, adapters: slice) -> int:
    stacks = (block.gate_up.A, block.down.A)
    return max([x.shape[0], *(A[adapters].shape[0] for A in stacks if A is not None)])


def _rows(x: Tensor, row: Row) -> Tensor:
    return x if row.rows is None else x[:, row.rows]


def _heads(x: Tensor, config: Qwen2Config) -> Tensor:
    """(G, S, K·head_dim) as (G, K, S, head_dim), a view."""
    return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)


def _query_heads(x: Tensor, config: Qwen2Config) -> Tensor:
    """(G, S, heads·head_dim) as (G, K, S, group, head_dim), a view."""
    return x.unflatten(-1, (config.num_key_value_heads, -1, config.head_dim)).transpose(1, 2)


def _rotated(heads: Tensor, tables: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    return rope_engine(heads, *tables, out=torch.empty(heads.shape, dtype=dtype, device=heads.device))
