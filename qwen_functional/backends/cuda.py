"""NVIDIA GPUs: base products by cuBLAS, all else fused in Triton kernels, whole steps in CUDA graphs.

No low-rank product makes a separate pass over a wide matrix. The kernel that computes x also computes ``u = x Aᵀ``, or
a part of it, and the kernel that next reads ``y = x Wᵀ`` adds ``u Bᵀ``; on the way back likewise ``t = dy B`` and
``t A``.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architecture import STACKS, projection_shape
from ..config import Qwen2Config
from ..lora import Lora, LoraPair
from ..ops.linear import Weight
from ..ops.lm_head import Part
from ..parallel import TensorParallel
from ..stacking import Adapted, Cotangent, GradientsOf, Input, Product, Stack
from ..weights import Qwen2Weights
from .plain import Plain

if TYPE_CHECKING:
    from ..block import Block
    from ..tables import Row
    from .kernels.outer import Job

MAX_RANK = 64  # the largest that the kernels can hold of a stack's adapters in registers
MAX_HEAD_DIM = 256
CAPABILITY = (8, 0)  # older GPUs have less than the 99 KiB of shared memory that the kernels may take


def can_fuse(config: Qwen2Config, weights: Qwen2Weights, lora: Lora) -> bool:
    """Whether the kernels here can compute it: not float64, split models, ranks above 64 or a head_dim above 256, and
    only on NVIDIA's GPUs since Ampere."""
    ranks = [pair.A.shape[1] for pair in lora.pairs.values()]
    fits = max(ranks, default=0) <= MAX_RANK and config.head_dim <= MAX_HEAD_DIM
    return fits and weights.compute_dtype != torch.float64 and weights.parallel is None and _run_on(weights.device)


@functools.cache
def _run_on(device: torch.device) -> bool:
    """Whether the kernels run on a GPU; warns once if they do not."""
    try:
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip or capability < CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise RuntimeError(f"{name} is of compute capability {capability}, expected NVIDIA's {CAPABILITY} or more")
        from .kernels.norm import add_norm

        with torch.cuda.device(device):
            x = torch.ones(1, 1, 16, device=device)
            add_norm(x, None, None, None, x[0, 0], 1e-6)
    except Exception as error:  # no Triton, no C compiler, an unsupported GPU: each has its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(f"no fused kernels here, so a step takes several times as long: {reason}", stacklevel=2)
        return False
    return True


@dataclass
class Attended:
    """What attention keeps for its vjp."""

    qkv: Tensor  # (G, S, Q + 2K), biased, adapted and rotated
    o: Tensor  # (G, S, Q)
    lse: Tensor
    read: Tensor | None  # (G, S, Q + K), what the norms of heads read, where there are any


class Cuda(Plain):
    """Fused kernels. Low-rank parts are as described in ``kernels``; ``Product`` leaves them to whatever reads it."""

    q_apart = False
    captures = True
    ranks_decide = True

    def __init__(self) -> None:
        self._tiles: dict[tuple, Any] = {}  # for launches that compute gradients

    def adapters(self, lora: Lora, compute: torch.dtype) -> Lora:
        """A copy in the compute dtype, A times its scaling."""
        made = buffers(lora, compute)
        load(made, lora)
        return made

    def widened(self, x: Tensor, y: Product | None, n_adapters: int) -> tuple[Tensor, Product | None]:
        return self.add(x, y).repeat(n_adapters, 1, 1), None

    def bases(self, matrix: Tensor, stack: str) -> list[tuple[tuple[str, ...], Weight]]:
        return [(STACKS[stack], matrix)]

    def stack(
        self,
        config: Qwen2Config,
        lora: Lora,
        layer: int,
        stack: str,
        bases: Any,
        **summed: TensorParallel | None,
    ) -> Stack:
        ((names, weight, bias),) = bases
        adapted, out = [], 0
        for name in names:
            rows, _ = projection_shape(config, name)
            pair = lora.pairs.get((layer, name))
            if pair is not None:
                outputs = slice(out, out + rows)
                adapted.append(Adapted((layer, name), pair.scaling, pair.B, 0, outputs, slice(0, 0), pair.A))
            out += rows
        return Stack(stack, (weight,), (bias,), tuple(adapted))

    def kept_numbers(self, config: Qwen2Config, tiles: Any, n_tokens: int) -> tuple[int, int]:
        heads = 2 * config.q_size + 2 * config.kv_size
        if config.family.head_norms:
            heads += config.q_size + config.kv_size
        return n_tokens * config.hidden_size, n_tokens * (2 * (config.hidden_size + config.intermediate_size) + heads)

    # The residual stream and its norms

    def add_norm(
        self, x: Tensor, y: Product | None, weight: Tensor, eps: float, reader: Stack, *, overwrite: bool = False
    ) -> tuple[Tensor, Input, Tensor]:
        from .kernels.norm import add_norm

        As = [part.A for part in reader.adapted if part.A is not None]
        z, h, rstd, u, y_u = add_norm(x, *_unfinished(y), weight, eps, As, _pad(reader), reader.dtype)
        _finish(y, y_u)
        assert h is not None
        assert rstd is not None
        return z, Input(h, u), rstd

    def add(self, x: Tensor, y: Product | None, *, overwrite: bool = False) -> Tensor:
        from .kernels.norm import add_norm

        if y is None:
            return x
        z, _, _, _, y_u = add_norm(x, *_unfinished(y), None, 0.0)
        _finish(y, y_u)
        return z

    def norm_vjp(
        self, dh: Product, x: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, giver: Stack | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Cotangent]:  # fmt: skip
        from .kernels.norm import norm_vjp

        assert dh.stack is not None
        As = [part.A for part in dh.stack.adapted if part.A is not None]
        if rows is not None:
            dx = torch.zeros_like(x).index_copy_(1, rows, dx)
        B = giver.adapted[0].B if giver is not None and giver.adapted else None
        pad = 16 if giver is None else _pad(giver)
        dx, dy, t_next = norm_vjp(dh.ys[0], dh.low.t, As, x, weight, rstd, dx, B, pad)
        return dx, Cotangent([dy], t_next)

    # Products with base weights

    def product(self, x: Input, stack: Stack) -> Product:
        """``x Wᵀ`` alone."""
        (weight,) = stack.weights
        assert isinstance(weight, Tensor)
        y = torch.mm(x.x.flatten(0, 1), weight.T).unflatten(0, x.x.shape[:2])
        if stack.name == "down":
            x.x = y.new_empty(0)  # its vjp recomputes it, where it reads gate and up anyway
        return Product([y], stack, x)

    def product_vjp(
        self, dy: Cotangent, stack: Stack, x: Input, gradients: GradientsOf, *, need_dx: bool
    ) -> Product | None:
        """``dy W`` alone, and t = dy B where it has not been computed yet.

        Gradients of A and B wait for the end of the block, where all are computed together.
        """
        from .kernels.low_rank import shrink

        (d,), (weight,) = dy.dys, stack.weights
        if stack.adapted and dy.t is None:
            Bs, columns = [part.B for part in stack.adapted], [part.outputs for part in stack.adapted]
            dy.t = shrink(d, Bs, columns, _pad(stack), transposed=False)
        if any(gradients.wants(part.key, side) for part in stack.adapted for side in "AB"):
            gradients.every.pending.append((stack, x, dy))
        if not need_dx and stack.name != "down":  # the gradient of its A is computed by the activation's vjp
            return None
        assert isinstance(weight, Tensor)
        dx = torch.mm(d.flatten(0, 1), weight).unflatten(0, d.shape[:2])
        return Product([dx], stack, dy)

    # The passes over logits; there is no part, as split models take another backend

    @staticmethod
    def softmax_(z: Tensor, scale: float = 1.0, keep: bool = True, part: Part | None = None) -> tuple[Tensor, Tensor]:
        from .kernels.lm_head import softmax_

        return softmax_(z, scale, keep)

    @staticmethod
    def divergence_(z: Tensor, t: Tensor, scale: float = 1.0, keep: bool = True, part: Part | None = None) -> Tensor:
        from .kernels.lm_head import divergence_

        return divergence_(z, t, scale, keep)

    # Attention

    def attend(self, h: Input, block: Block, row: Row, *, keep: bool) -> tuple[Input, Any]:
        from .kernels.attention import attend
        from .kernels.rotate import rotate_

        config, (qkv,) = block.config, self.product(h, block.qkv).ys
        cos, sin = row.k_rope
        read = rotate_(
            qkv, block.qkv.biases[0], cos, sin, _rotated_heads(config), _head_parts(config, block.qkv), h.u,
            _norms(block), config.num_attention_heads, config.rms_norm_eps,
        )  # fmt: skip
        q, k, v = qkv.split((config.q_size, config.kv_size, config.kv_size), -1)
        A = block.o.adapted[0].A if block.o.adapted else None
        scale = config.head_dim**-0.5
        o, lse, partials = attend(
            q, k, v, row.nodes, row.end, row.positions, row.window, scale, config.head_dim, A, _pad(block.o)
        )
        kept = Attended(qkv, o, lse, read)
        if row.rows is None:
            return Input(o, partials), kept
        if partials is not None:
            n, _, pad = partials.shape
            partials = partials.view(n, *o.shape[:2], pad)[:, :, row.rows].flatten(1, 2).contiguous()
        return Input(o.index_select(1, row.rows), partials), kept

    def attend_vjp(
        self, do: Product, h: Input, o: Input, kept: Any, block: Block, row: Row, gradients: GradientsOf,
        *, need_dx: bool,
    ) -> Product | None:  # fmt: skip
        from .kernels.attention_vjp import attend_vjp
        from .kernels.rotate import norm_heads_vjp_

        config, d, t = block.config, do.ys[0], do.low.t
        if row.rows is not None:
            few = d
            d = torch.zeros_like(kept.o).index_copy_(1, row.rows, few)
            if t is not None:
                t = t.view(*few.shape[:2], -1)
                t = t.new_zeros(*d.shape[:2], t.shape[2]).index_copy_(1, row.rows, t).flatten(0, 1)[:, None]
        sizes = config.q_size, config.kv_size, config.kv_size
        q, k, v = kept.qkv.split(sizes, -1)
        d_qkv = torch.empty_like(kept.qkv)
        dq, dk, dv = d_qkv.split(sizes, -1)
        A = block.o.adapted[0].A if block.o.adapted else None
        attend_vjp(
            d, None if A is None else t, A, q, k, v, kept.o, kept.lse, row.nodes, row.end, row.positions, row.window,
            config.head_dim**-0.5, row.k_rope, row.k_rope, dq, dk, dv, _pad(block.o),
        )  # fmt: skip
        norms = _norms(block)
        if norms is not None:
            norm_heads_vjp_(d_qkv, kept.read, norms, config.num_attention_heads, config.rms_norm_eps)
        dy = Cotangent([d_qkv])
        return self.product_vjp(dy, block.qkv, h, gradients, need_dx=need_dx)

    # The gated activation

    def gate(self, gate_up: Product, reader: Stack, *, keep: bool, again: bool = False) -> tuple[Input, Any]:
        from .kernels.gate import gate

        kept = gate_up.ys[0] if keep else None
        if again:
            return Input(gate_up.ys[0].new_empty(0)), kept
        assert gate_up.stack is not None
        A = reader.adapted[0].A if reader.adapted else None
        (B_gate, B_up), places = _gate_parts(gate_up.stack)
        a, partials = gate(gate_up.ys[0], gate_up.low.u, places, B_gate, B_up, A, _pad(gate_up.stack), _pad(reader))
        return Input(a, partials), kept

    def gate_vjp(
        self, da: Product, a: Input, h: Input, kept: Any, block: Block, gradients: GradientsOf
    ) -> Cotangent:
        from .kernels.gate import gate_vjp
        from .kernels.low_rank import total

        (B_gate, B_up), places = _gate_parts(block.gate_up)
        down = block.down.adapted[0] if block.down.adapted else None
        parts = [block.gate_up.part(name) for name in STACKS["gate_up"]]
        dB_gate, dB_up = (None if part is None else gradients.place(part.key, "B") for part in parts)
        out, partials = gate_vjp(
            da.ys[0], kept, h.u, da.low.t if down else None, places, B_gate, B_up, down.A if down else None,
            dB_gate, dB_up,
            gradients.place(down.key, "A") if down else None, down.scaling if down else 1.0,
            _pad(block.gate_up), _pad(block.down),
        )  # fmt: skip
        return Cotangent([out], total(partials, out.dtype) if partials else None)

    def finished(self, gradients: GradientsOf) -> None:
        from .kernels.outer import MAX_JOBS, Tiles, outer, signature

        jobs: dict[torch.dtype, list[Job]] = {}
        for stack, x, dy in gradients.every.pending:
            for job in _jobs(stack, x, dy, gradients):
                jobs.setdefault(job.out.dtype, []).append(job)
        gradients.every.pending.clear()
        for every in jobs.values():
            for start in range(0, len(every), MAX_JOBS):
                some = every[start : start + MAX_JOBS]
                key = signature(some)
                if key not in self._tiles:
                    self._tiles[key] = Tiles.of(some)
                outer(some, self._tiles[key])


def buffers(lora: Lora, compute: torch.dtype) -> Lora:
    """Room for adapters as the kernels take them: in the compute dtype, contiguous."""

    def room(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=compute, device=tensor.device)

    pairs = {key: LoraPair(room(pair.A), room(pair.B), pair.scaling) for key, pair in lora.pairs.items()}
    return Lora(pairs, lora.n_adapters, lora.batched)


def load(made: Lora, lora: Lora) -> None:
    """Copy the adapters into :func:`buffers`, A times its scaling, in a few launches."""
    own, given = list(made.pairs.values()), list(lora.pairs.values())
    if not own:
        return
    to = [side for pair in own for side in (pair.A, pair.B)]
    torch._foreach_copy_(to, [side for pair in given for side in (pair.A, pair.B)])
    torch._foreach_mul_([pair.A for pair in own], [pair.scaling for pair in own])


def _unfinished(y: Product | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A product, and the partials and B that it lacks."""
    if y is None:
        return None, None, None
    if y.stack is None or not y.stack.adapted:
        return y.ys[0], None, None
    return y.ys[0], y.low.u, y.stack.adapted[0].B


def _finish(y: Product | None, u: Tensor | None) -> None:
    if y is not None and u is not None:
        y.low.u = u  # summed


def _pad(stack: Stack) -> int:
    """The largest rank of a stack's adapters, padded to what a tensor core takes."""
    most = max((part.B.shape[2] for part in stack.adapted), default=16)
    return max(16, 1 << (most - 1).bit_length())


def _norms(block: Block) -> Tensor | None:
    """The weights (2, head_dim) of the norms of q's and of k's heads."""
    if block.q_norm is None or block.k_norm is None:
        return None
    return torch.stack((block.q_norm, block.k_norm))


def _rotated_heads(config: Qwen2Config) -> int:
    return config.num_attention_heads + config.num_key_value_heads


def _head_parts(config: Qwen2Config, stack: Stack) -> list[tuple[int, int, Tensor, int]]:
    """(first head, heads, B, place in u) of the adapted projections of q|k|v."""
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    parts, first = [], 0
    for name, count in zip(STACKS["qkv"], counts, strict=True):
        part = stack.part(name)
        if part is not None:
            parts.append((first, count, part.B, stack.adapted.index(part)))
        first += count
    return parts


def _gate_parts(stack: Stack) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, int]]:
    """B of gate and of up, and their places in u."""
    parts = [stack.part(name) for name in STACKS["gate_up"]]
    places = [0 if part is None else stack.adapted.index(part) for part in parts]
    B_gate, B_up = (None if part is None else part.B for part in parts)
    return (B_gate, B_up), (places[0], places[1])


def _jobs(stack: Stack, x: Input, dy: Cotangent, gradients: GradientsOf) -> list[Job]:
    """The gradients of a stack's A and B that are still to be computed."""
    from .kernels.outer import Job

    jobs, (d,) = [], dy.dys
    assert x.u is not None
    assert dy.t is not None
    for place, part in enumerate(stack.adapted):
        dA, dB = gradients.place(part.key, "A"), gradients.place(part.key, "B")
        if dA is not None and stack.name != "down":
            jobs.append(Job(x.x, 0, x.x.shape[2], dy.t, place, dA, True, part.scaling))
        if dB is not None and stack.name != "gate_up":
            jobs.append(Job(d, part.outputs.start, part.B.shape[1], x.u, place, dB, False))
    return jobs
