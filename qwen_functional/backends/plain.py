"""A block's operations in plain torch, on any device: what every backend does, and the base class of the others.

A backend has these methods. It overrides those that are slow on its chip, with the same results up to rounding:

* ``add_norm``, ``product``, ``attend``, ``gate`` forward, and their vjps, which :mod:`..block` calls in this order;
* ``softmax_`` and ``divergence_``, which go over logits in :mod:`..ops.lm_head`;
* ``stack``, how weights and adapters are laid out; ``adapters``, what is done to LoRA tensors once a step;
* ``chunks``, how many adapters go through a block at once; ``kept_numbers``, what a block keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architecture import STACKS, projection_shape
from ..config import Qwen2Config
from ..dtypes import accumulation_dtype
from ..lora import Lora
from ..ops import linear as low_rank
from ..ops.attention import attention, attention_vjp, kept_keys
from ..ops.linear import Weight
from ..ops.lm_head import divergence_, softmax_
from ..ops.rmsnorm import rmsnorm_to, rmsnorm_vjp
from ..ops.rope import rope_into, rope_vjp
from ..ops.swiglu import swiglu_, swiglu_partials_, swiglu_vjp_
from ..parallel import TensorParallel
from ..stacking import Adapted, Cotangent, GradientsOf, Input, Product, Stack

if TYPE_CHECKING:
    from ..block import Block
    from ..tables import Row


@dataclass
class Normed:
    """What the norm of each head of q or k keeps for its vjp."""

    x: Tensor  # (G, K, S or R, …, head_dim), what it read, in the compute dtype
    rstd: Tensor
    weight: Tensor


@dataclass
class Attended:
    """What :meth:`Plain.attend` keeps for its vjp."""

    q: Tensor  # (G, K, S or R, group, head_dim), rotated and scaled; float32 or float64, as k
    k: Tensor  # (G, K, S, head_dim), rotated
    v: Tensor
    probs: list[Tensor | None]  # of each tile, where they are kept
    h_rows: Input | None  # what q read, where it is apart
    normed: list[Normed | None]  # of q and k


@dataclass
class Gated:
    """What :meth:`Plain.gate` keeps for its vjp."""

    by_gate: Tensor  # ∂a/∂gate (G, S, I)
    by_up: Tensor


class Plain:
    """torch's own operations."""

    q_apart = True  # the block that is read out at a few rows multiplies by q's weight for those only
    captures = False  # steps can be captured in a CUDA graph
    ranks_decide = False  # the order in which base products and norms sum depends on the adapters' ranks
    product_of_adapters: low_rank.Product = staticmethod(torch.bmm)

    # How weights, adapters and work are laid out

    def chunks(self, config: Qwen2Config, n_tokens: int, n_adapters: int, compute: torch.dtype) -> list[slice]:
        """Which adapters go through a block together."""
        return [slice(0, n_adapters)]

    def together(self, sizes: Sequence[int]) -> list[slice]:
        """Which adapters that have rows of their own go through a block together, each row padded to the longest."""
        return [slice(index, index + 1) for index in range(len(sizes))]

    def adapters(self, lora: Lora, compute: torch.dtype) -> Lora:
        """LoRA tensors as :meth:`stack` takes them; once a step."""
        return lora

    def widened(self, x: Tensor, y: Product | None, n_adapters: int) -> tuple[Tensor, Product | None]:
        """The residual stream as the first adapted block takes it; (1, S, H) serves all adapters here."""
        return x, y

    def stack(
        self,
        config: Qwen2Config,
        lora: Lora,
        layer: int,
        stack: str,
        bases: Sequence[tuple[tuple[str, ...], Weight, Tensor | None]],
        **summed: TensorParallel | None,
    ) -> Stack:
        """The projections of a layer that read one input; ``bases``: (names, weight, bias) of each base weight."""
        dtype = bases[0][1].dtype
        adapted, scaled, rank = [], [], 0
        for base, (names, _, _) in enumerate(bases):
            out = 0
            for name in names:
                rows, _ = projection_shape(config, name)
                pair = lora.pairs.get((layer, name))
                if pair is not None:
                    r = pair.A.shape[1]
                    where = slice(out, out + rows), slice(rank, rank + r)
                    adapted.append(Adapted((layer, name), pair.scaling, pair.B.to(dtype), base, *where))
                    own = pair.A.to(dtype)
                    scaled.append(own if pair.scaling == 1 else own * pair.scaling)
                    rank += r
                out += rows
        A = None if not scaled else scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)
        weights, biases = tuple(weight for _, weight, _ in bases), tuple(bias for _, _, bias in bases)
        return Stack(stack, weights, biases, tuple(adapted), A, **summed)

    def kept_numbers(self, config: Qwen2Config, tiles: Sequence[Any], n_tokens: int) -> tuple[int, int]:
        """How many numbers a kept block holds for each adapter, in the accumulation and in the compute dtype, without
        its input and the low-rank parts.
        """
        wide = config.hidden_size + config.q_size + config.kv_size  # what enters the MLP; q and k, rotated
        others = 2 * config.hidden_size + config.q_size + config.kv_size + 3 * config.intermediate_size
        if config.family.head_norms:  # what they read, in one buffer with v, and rstd
            others += config.q_size + 2 * config.kv_size
            wide += config.num_attention_heads + config.num_key_value_heads
        return n_tokens * wide, n_tokens * others + kept_keys(tiles, n_tokens) * config.num_attention_heads

    # The residual stream and its norms

    def add_norm(
        self, x: Tensor, y: Product | None, weight: Tensor, eps: float, reader: Stack, *, overwrite: bool = False
    ) -> tuple[Tensor, Input, Tensor]:
        """``z = x + y`` and ``norm(z)``, which ``reader`` reads; returns both, and the norm's rstd (G, S, 1).

        x: (G, S, H) in the accumulation dtype. With ``overwrite`` it may be overwritten.
        """
        x = self.add(x, y, overwrite=overwrite)
        h, rstd = rmsnorm_to(x, weight, eps, reader.dtype)
        return x, Input(h), rstd

    def add(self, x: Tensor, y: Product | None, *, overwrite: bool = False) -> Tensor:
        """``x + y`` alone."""
        if y is None:
            return x
        (y_,) = y.ys
        out = x if overwrite and x.shape == y_.shape else None
        return torch.add(x, y_, out=out)

    def norm_vjp(
        self, dh: Product, x: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, giver: Stack | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Cotangent]:  # fmt: skip
        """``dx + vjp of the norm``, in the accumulation dtype, and the same as the cotangent of what ``giver`` gave.

        ``dx`` (G, S or R, H) is overwritten; with ``rows`` it covers only the rows that were read out.
        """
        (dh_,) = dh.ys
        normed = rmsnorm_vjp(dh_.to(x.dtype), x, weight, rstd)
        dx = dx.add_(normed) if rows is None else normed.index_add_(1, rows, dx)
        return dx, self.cotangent(dx, dh_.dtype)

    def cotangent(self, dx: Tensor, dtype: torch.dtype) -> Cotangent:
        """The cotangent of the residual stream as that of what was added to it last."""
        return Cotangent([dx.to(dtype)])

    # Products with base weights and adapters

    def product(self, x: Input, stack: Stack) -> Product:
        """``y = x Wᵀ + b + u Bᵀ`` for each base weight of the stack."""
        if x.u is None and stack.A is not None:
            x.u = low_rank.linear_inner(x.x, stack.A, self.product_of_adapters)
        ys = []
        for base, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
            parts = [low_rank.Part(p.B, p.outputs, p.ranks) for p in stack.adapted if p.base == base]
            y = low_rank.linear(x.x, weight, bias, x.u, parts)
            ys.append(y if y.shape[0] >= stack.n_adapters else y.repeat(stack.n_adapters, 1, 1))
        if stack.summed is not None:
            ys = [stack.summed.sum_(y) for y in ys]
        return Product(ys)

    def product_vjp(
        self, dy: Cotangent, stack: Stack, x: Input, gradients: GradientsOf, *, need_dx: bool
    ) -> Product | None:
        """``dx = dy W + t A`` where it is needed; ``dA = tᵀ x`` and ``dB = dyᵀ u``, if wanted, go to their place."""
        product = self.product_of_adapters
        lora = [(part, dy.dys[part.base][..., part.outputs]) for part in stack.adapted]
        wanted_A = [part for part, _ in lora if gradients.wants(part.key, "A")]
        if x.u is None and any(gradients.wants(part.key, "B") for part, _ in lora):
            assert stack.A is not None
            x.u = low_rank.linear_inner(x.x, stack.A, product)
        t = None  # the cotangent of u
        if stack.A is not None and (need_dx or wanted_A):
            t = x.x.new_empty(stack.n_adapters, dy.dys[0].shape[1], stack.A.shape[1])
            for part, d in lora:
                if need_dx or gradients.wants(part.key, "A"):
                    low_rank.linear_vjp_inner(d, part.B, out=t[..., part.ranks], product=product)
            whole = low_rank.linear_vjp_A(t, x.x, product) if len(wanted_A) == len(lora) else None
            for part in wanted_A:
                dA = low_rank.linear_vjp_A(t[..., part.ranks], x.x, product) if whole is None else whole[:, part.ranks]
                gradients.put(part.key, "A", dA, part.scaling)
        for part, d in lora:
            if x.u is not None and gradients.wants(part.key, "B"):
                gradients.put(part.key, "B", low_rank.linear_vjp_B(d, x.u[..., part.ranks], product))
        if not need_dx:
            return None
        dx = None
        for d, weight in zip(dy.dys, stack.weights, strict=True):
            dx = low_rank.linear_vjp_input(d, weight, dx)
        assert dx is not None
        if t is not None and stack.A is not None:
            dx.baddbmm_(t, stack.A)
        return Product([dx if stack.summed_back is None else stack.summed_back.sum_(dx)])

    # The passes over logits

    softmax_ = staticmethod(softmax_)
    divergence_ = staticmethod(divergence_)

    # Attention

    def attend(self, h: Input, block: Block, row: Row, *, keep: bool) -> tuple[Input, Attended]:
        """``attention(rope(q), rope(k), v)`` of q|k|v = the product of h, with q and k normed by head where the family
        does so. Returns what o reads, and what the vjp needs.
        """
        config = block.config
        (kv,) = self.product(h, block.qkv).ys
        h_rows = None
        if block.q is None:
            queries, kv = kv[..., : config.q_size], kv[..., config.q_size :]
        else:
            h_rows = Input(h.x[:, row.rows])
            (queries,) = self.product(h_rows, block.q).ys
        keys, values = kv.chunk(2, -1)
        dtype = accumulation_dtype(values.dtype)
        eps = config.rms_norm_eps
        query_heads, normed_q = _normed(_query_heads(queries, config), block.q_norm, eps, dtype)
        key_heads, normed_k = _normed(_heads(keys, config), block.k_norm, eps, dtype)
        q = _rotated(query_heads, row.q_rope, dtype)
        k = _rotated(key_heads, row.k_rope, dtype)
        v = _heads(values, config).clone(memory_format=torch.contiguous_format)
        n_adapters = max(q.shape[0], k.shape[0])
        q, k, v = (t.expand(n_adapters, *t.shape[1:]) for t in (q, k, v))
        o, probs = attention(q, k, v, row.tiles, keep=keep)
        return Input(o), Attended(q, k, v, probs, h_rows, [normed_q, normed_k])

    def attend_vjp(
        self, do: Product, h: Input, o: Input, kept: Any, block: Block, row: Row, gradients: GradientsOf,
        *, need_dx: bool,
    ) -> Product | None:  # fmt: skip
        """``dh`` where it is needed; the gradients of q, k and v go to their place."""
        config, (do_,) = block.config, do.ys
        dq, dk, dv = attention_vjp(do_, kept.q, kept.k, kept.v, kept.probs, row.tiles)
        d_queries = do_.new_empty(*do_.shape[:-1], config.q_size)
        d_kv = do_.new_empty(dk.shape[0], dk.shape[2], 2 * config.kv_size)
        if block.q is None:  # one buffer for q|k|v
            d_qkv = do_.new_empty(*do_.shape[:-1], config.q_size + 2 * config.kv_size)
            d_queries, d_kv = d_qkv[..., : config.q_size], d_qkv[..., config.q_size :]
        d_keys, d_values = d_kv.chunk(2, -1)
        normed_q, normed_k = kept.normed
        _rotated_vjp(dq, row.q_rope, normed_q, out=_query_heads(d_queries, config))
        _rotated_vjp(dk, row.k_rope, normed_k, out=_heads(d_keys, config))
        _heads(d_values, config).copy_(dv)
        if block.q is None:
            return self.product_vjp(Cotangent([d_qkv]), block.qkv, h, gradients, need_dx=need_dx)
        q, kv = (replace(stack, summed_back=None) for stack in (block.q, block.qkv))  # ranks sum both at once
        dh = self.product_vjp(Cotangent([d_kv]), kv, h, gradients, need_dx=need_dx)
        assert kept.h_rows is not None
        dh_rows = self.product_vjp(Cotangent([d_queries]), q, kept.h_rows, gradients, need_dx=need_dx)
        if dh is None or dh_rows is None or row.rows is None:
            return None
        dx, summed = dh.ys[0].index_add_(1, row.rows, dh_rows.ys[0]), block.qkv.summed_back
        return Product([dx if summed is None else summed.sum_(dx)])

    # The gated activation

    def gate(self, gate_up: Product, reader: Stack, *, keep: bool, again: bool = False) -> tuple[Input, Gated | None]:
        """``a = silu(gate) · up``, which ``reader`` reads, and what the vjp needs. Overwrites the product."""
        gate, up = gate_up.ys if len(gate_up.ys) == 2 else gate_up.ys[0].chunk(2, -1)
        if not keep:
            return Input(swiglu_(gate, up)), None
        a, by_gate, by_up = swiglu_partials_(gate, up)
        return Input(a), Gated(by_gate, by_up)

    def gate_vjp(self, da: Product, a: Input, h: Input, kept: Any, block: Block, gradients: GradientsOf) -> Cotangent:
        """The cotangent of gate and up, written over what was kept."""
        return Cotangent(list(swiglu_vjp_(da.ys[0], kept.by_gate, kept.by_up)))

    def finished(self, gradients: GradientsOf) -> None:
        """Called after all vjps of a block."""

    def bases(self, matrix: Tensor, stack: str) -> list[tuple[tuple[str, ...], Weight]]:
        """A stack's matrix as it is multiplied by: gate and up separately, so that the activation reads them faster."""
        names = STACKS[stack]
        if stack != "gate_up":
            return [(names, matrix)]
        return [((name,), half) for name, half in zip(names, matrix.chunk(2), strict=True)]


def _heads(x: Tensor, config: Qwen2Config) -> Tensor:
    """(G, S, K·head_dim) as (G, K, S, head_dim), a view."""
    return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)


def _query_heads(x: Tensor, config: Qwen2Config) -> Tensor:
    """(G, S, heads·head_dim) as (G, K, S, group, head_dim), a view."""
    return x.unflatten(-1, (config.num_key_value_heads, -1, config.head_dim)).transpose(1, 2)


def _normed(heads: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Normed | None]:
    """Each head normed, in the accumulation dtype; unchanged without a weight."""
    if weight is None:
        return heads, None
    y, rstd = rmsnorm_to(heads.to(dtype), weight, eps, dtype)
    return y, Normed(heads, rstd, weight)


def _rotated_vjp(dy: Tensor, tables: tuple[Tensor, Tensor], kept: Normed | None, out: Tensor) -> None:
    """The vjp of rotation and norm, written to ``out``."""
    if kept is None:
        rope_vjp(dy, *tables, out=out)
        return
    d = rope_vjp(dy, *tables, out=torch.empty(dy.shape, dtype=tables[0].dtype, device=dy.device))
    out.copy_(rmsnorm_vjp(d, kept.x.to(d.dtype), kept.weight, kept.rstd))


def _rotated(heads: Tensor, tables: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    return rope_into(heads, *tables, out=torch.empty(heads.shape, dtype=dtype, device=heads.device))
