"""One decoder block: ``x_mid = x + o(attention(qkv(norm(x))))``, then ``x_mid + down(swiglu(gate_up(norm(x_mid))))``.

The residual stream is (G, S, H) in the accumulation dtype, for the adapters of one chunk; G is 1 below the first
adapted block, where all adapters still share one stream. A stream is a pair (x, y): y, what a block adds last, is added
to x only by the next norm. Each half has its vjp right below it: the same lines, in reverse. A backend does the
operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .architecture import PROJECTIONS, STACKS, projection_shape
from .backends.plain import Plain
from .config import Qwen2Config
from .lora import Lora
from .ops.linear import Weight
from .parallel import TensorParallel
from .stacking import Cotangent, GradientsOf, Input, Product, Stack
from .tables import Row
from .weights import BlockWeights


@dataclass(frozen=True)
class Block:
    """A block's weights and adapters, ready to multiply. ``q`` is None where it is stacked in ``qkv``."""

    config: Qwen2Config
    layer: int
    input_layernorm: Tensor
    post_attention_layernorm: Tensor
    qkv: Stack  # k|v alone where q is apart
    q: Stack | None
    o: Stack
    gate_up: Stack
    down: Stack
    q_norm: Tensor | None = None  # (head_dim,) where the family has one; likewise k_norm
    k_norm: Tensor | None = None

    @property
    def stacks(self) -> tuple[Stack, ...]:
        every = (self.qkv, self.q, self.o, self.gate_up, self.down)
        return tuple(stack for stack in every if stack is not None)

    @property
    def adapted(self) -> bool:
        """Whether any of its projections has adapters."""
        return any(stack.adapted for stack in self.stacks)

    @classmethod
    def bind(
        cls,
        backend: Plain,
        config: Qwen2Config,
        weights: BlockWeights,
        packed: Mapping[str, tuple[Weight, ...]] | None,
        lora: Lora,
        layer: int,
        compute: torch.dtype,
        parallel: TensorParallel | None = None,
        *,
        q_apart: bool,
    ) -> Block:
        """The block of a layer, in the dtype ``compute``; with its packed matrices where there are any.

        ``q_apart``: for a block that is read out at a few rows, which needs k and v of all rows but not q.
        """

        def stack(name: str) -> Stack:
            bias = weights.bias(name)
            bias = None if bias is None else bias.to(compute)
            bases = backend.bases(weights.stack(name).to(compute), name)
            if packed is not None:
                bases = [(names, own) for (names, _), own in zip(bases, packed[name], strict=True)]
            by_outputs = PROJECTIONS[STACKS[name][0]].split == 0
            summed = {"summed_back" if by_outputs else "summed": parallel}
            with_bias = [(names, weight, bias) for names, weight in bases]
            return backend.stack(config, lora, layer, name, with_bias, **summed)

        def half(names: tuple[str, ...], rows: slice) -> Stack:
            weight, bias = weights.stack("qkv").to(compute)[rows], weights.bias("qkv")
            bias = None if bias is None else bias.to(compute)[rows]
            return backend.stack(config, lora, layer, "qkv", [(names, weight, bias)], summed_back=parallel)

        q = None
        if q_apart:  # a packed matrix cannot be cut
            first, *others = STACKS["qkv"]
            n, _ = projection_shape(config, first)
            q, qkv = half((first,), slice(n)), half(tuple(others), slice(n, None))
        else:
            qkv = stack("qkv")
        norms = weights.input_layernorm, weights.post_attention_layernorm
        heads = weights.q_norm, weights.k_norm
        return cls(config, layer, *norms, qkv, q, stack("o"), stack("gate_up"), stack("down"), *heads)

    def __getitem__(self, adapters: slice) -> Block:
        """The block with a slice of the adapters."""
        if all(stack[adapters] is stack for stack in self.stacks):
            return self
        parts = {name: getattr(self, name)[adapters] for name in ("qkv", "o", "gate_up", "down")}
        return replace(self, **parts, q=None if self.q is None else self.q[adapters])


@dataclass
class KeptAttention:
    """What the first half keeps for the vjp."""

    x: Tensor  # (G, S, H), the block's input
    h: Input  # norm(x), and its rstd
    rstd: Tensor
    attended: Any  # in a backend's own form
    o: Input


@dataclass
class KeptMlp:
    """What the second half keeps for the vjp."""

    x_mid: Tensor  # (G, S or R, H), its input
    h: Input  # norm(x_mid), and its rstd
    rstd: Tensor
    gated: Any  # in a backend's own form
    a: Input


def attention_half(
    backend: Plain, block: Block, x: Tensor, y: Product | None, row: Row, *, keep: bool, overwrite: bool = False
) -> KeptAttention:
    """From ``x + y`` to what o_proj reads. With ``overwrite``, x may be overwritten."""
    norm, eps = block.input_layernorm, block.config.rms_norm_eps
    x, h, rstd = backend.add_norm(x, y, norm, eps, block.qkv, overwrite=overwrite)
    o, attended = backend.attend(h, block, row, keep=keep)
    return KeptAttention(x, h, rstd, attended, o)


def attention_half_vjp(
    backend: Plain,
    block: Block,
    kept: KeptAttention,
    dx_mid: Tensor,
    dy: Cotangent,
    row: Row,
    gradients: GradientsOf,
    below: Stack | None,
    *,
    need_dx: bool,
) -> tuple[Tensor, Cotangent] | None:
    """The cotangent of ``x``, and the same as the cotangent of the output of ``below``; None where not needed.

    ``dx_mid`` (G, S or R, H) is the cotangent of ``x_mid``, and is overwritten; ``dy`` is the same for o_proj's output.
    """
    need_attention = need_dx or gradients.every.wants_any(block.layer, "qkv")
    do = backend.product_vjp(dy, block.o, kept.o, gradients, need_dx=need_attention)
    if do is None:
        return None
    dh = backend.attend_vjp(do, kept.h, kept.o, kept.attended, block, row, gradients, need_dx=need_dx)
    if dh is None:
        return None
    return backend.norm_vjp(dh, kept.x, block.input_layernorm, kept.rstd, dx_mid, below, row.rows)


def mlp_half(
    backend: Plain, block: Block, x: Tensor, o: Input, *, keep: bool, again: bool = False
) -> KeptMlp:
    """From ``x + o_proj(o)`` to what down_proj reads.

    ``again``: down_proj has run already, so only what the vjp needs is computed.
    """
    norm, eps = block.post_attention_layernorm, block.config.rms_norm_eps
    x_mid, h, rstd = backend.add_norm(x, backend.product(o, block.o), norm, eps, block.gate_up)
    a, gated = backend.gate(backend.product(h, block.gate_up), block.down, keep=keep, again=again)
    return KeptMlp(x_mid, h, rstd, gated, a)


def mlp_half_vjp(
    backend: Plain,
    block: Block,
    kept: KeptMlp,
    dx: Tensor,
    dy: Cotangent,
    gradients: GradientsOf,
    *,
    need_dx: bool,
) -> tuple[Tensor, Cotangent] | None:
    """The cotangent of ``x_mid``, and the same as the cotangent of o_proj's output; None where not needed.

    ``dx`` (G, S or R, H) is the cotangent of the block's output, and is overwritten; ``dy`` is the same for down_proj's
    output.
    """
    need_gate_up = need_dx or gradients.every.wants_any(block.layer, "gate_up")
    da = backend.product_vjp(dy, block.down, kept.a, gradients, need_dx=need_gate_up)
    if da is None:
        return None
    d_gate_up = backend.gate_vjp(da, kept.a, kept.h, kept.gated, block, gradients)
    dh = backend.product_vjp(d_gate_up, block.gate_up, kept.h, gradients, need_dx=need_dx)
    if dh is None:
        return None
    return backend.norm_vjp(dh, kept.x_mid, block.post_attention_layernorm, kept.rstd, dx, block.o)
