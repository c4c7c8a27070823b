"""The whole model on packed tokens, many adapters at once, with its gradient written by hand.

No autograd; only heads that need logits compute any. The plan says what the forward keeps and how many adapters go
through a block at a time, ``block.py`` what a block computes, and ``backends/`` how a chip does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .block import (
    Block,
    KeptAttention,
    KeptMlp,
    attention_half,
    attention_half_vjp,
    mlp_half,
    mlp_half_vjp,
)
from .compiled import opaque
from .config import Qwen2Config
from .dtypes import accumulation_dtype
from .finite import raise_found, require_no_transform
from .heads import Head
from .lora import Lora
from .plan import Plan, Tokens, bare
from .stacking import Cotangent, Gradients, GradientsOf, Input, Product, Stack
from .tables import Row
from .weights import Qwen2Weights


@opaque
def forward_vjp(
    config: Qwen2Config,
    weights: Qwen2Weights,
    tokens: Tokens,
    lora: Lora | None = None,
    checkpoint: str = "auto",
    *,
    layer: int | Sequence[int] = -1,
    read: str = "last",
    heads: Sequence[Head] | None = None,
    wrt: Collection[str] | None = None,
    memory_budget: int | None = None,
    graph: bool | str = "auto",
    plan: Plan | None = None,
) -> tuple[Any, Vjp]:
    """Hidden states at each sequence's last token under G adapters, and their vector-Jacobian product.

    Args:
        tokens: P sequences that all adapters read, from :func:`pack`; or those that each reads, from :func:`pack_each`.
        lora: G adapters, from :meth:`LoraSpec.bind`; None for the bare model, with G = 1, or once for each of G sets of
            texts.
        checkpoint: ``"none"`` keeps all that the vjp needs; ``"block"`` keeps the input of each block and recomputes
            the rest; ``"auto"`` keeps as many blocks whole as ``memory_budget`` allows, the last ones first.
        layer: after which block to read out, from 0; −1 is after the last block and the final norm. A sequence
            reads out after several. Blocks above the highest one are not computed.
        read: ``"last"`` reads each sequence's last token; ``"all"`` every token, one sequence after the other: P is
            then the sum of their lengths.
        heads: what to compute from hidden states instead, see ``heads.py``. The value is then a tuple, with one entry
            for each head, and so is the vjp's cotangent; ``layer`` and ``read`` are ignored.
        wrt: names of the LoRA tensors whose gradients are wanted; None for all. Only these are computed.
        memory_budget: bytes that ``"auto"`` may spend on what it keeps; by default half of what is free.
        graph: on a GPU, whether a plan that is used again is captured in CUDA graphs: ``"auto"`` and True where
            possible, False never.
        plan: made earlier for the same arguments, so that what does not depend on values is reused. The plan's own
            arguments then replace those after ``lora``. Its tables hold the tokens that it was made for, or that
            :meth:`Plan.fill` gave it last; the values of ``tokens`` are not read.

    Returns:
        value: (G, P, H), or (G, len(layer), P, H) for a sequence of layers; float32 (float64 for float64 weights).
            Where each adapter reads texts of its own, (ΣP, H) or (len(layer), ΣP, H), one adapter after the other.
        vjp: see :class:`Vjp`.

    Raises:
        ValueError: token ids outside the vocabulary, a sequence longer than max_position_embeddings, a layer that
            the model lacks, an unknown option, a name in ``wrt`` that ``lora`` lacks, tensors on another device or
            inside a transform of ``torch.func``, a plan that was made for other sizes, texts for fewer or more adapters
            than ``lora`` has, a head that lacks what it needs.
    """
    lora = bare(tokens) if lora is None else lora
    for name, tensor in lora.tensors().items() if plan is None else ():
        if tensor.device != weights.device:
            raise ValueError(f"LoRA tensor {name!r} is on {tensor.device}, expected {weights.device} like the weights")
    require_no_transform(lora.tensors())
    with _plain(weights):
        if plan is None:
            plan = Plan(
                config, weights, tokens, lora, layer=layer, read=read, heads=heads, wrt=wrt, checkpoint=checkpoint,
                memory_budget=memory_budget, graph=False,
            )  # fmt: skip
        elif not plan.fits(tokens, lora):
            raise ValueError("plan was made for other tokens or another LoRA, expected the same sizes and dtypes")
        values, way_back = run(plan, lora)
    return (values[0] if plan.single_head else values), Vjp(plan, way_back, [tuple(value.shape) for value in values])


class Vjp:
    """The vector-Jacobian product of one :func:`forward_vjp`; may be called once, as it frees what was kept.

    Attributes:
        n_blocks: how many blocks the gradient passes through.
        n_kept: how many of them the forward kept whole; the others are recomputed from their input.
    """

    def __init__(self, plan: Plan, way_back: WayBack, shapes: Sequence[tuple[int, ...]]) -> None:
        self._plan, self._fills, self._shapes = plan, plan.fills, shapes
        self._way_back: WayBack | None = way_back
        self.n_blocks, self.n_kept = plan.n_blocks, plan.n_keep

    @property
    def checkpoint(self) -> str:
        """What was chosen: ``"none"``, ``"block"``, or ``"k of n blocks kept"``."""
        if self.n_kept == self.n_blocks:
            return "none"
        return f"{self.n_kept} of {self.n_blocks} blocks kept" if self.n_kept else "block"

    @opaque
    def __call__(self, cotangent: Any) -> dict[str, Tensor]:
        """{PEFT name: gradient}, with the shapes, order and dtypes of the wanted tensors given to ``bind``.

        Args:
            cotangent: shaped like the value; a tuple where that is one.

        Raises:
            ValueError: another shape, a cotangent inside a transform of ``torch.func``, a second call, or a plan that
                was refilled meanwhile; LoRA tensors that a GPU has found not to be finite.
        """
        if self._way_back is None:
            raise ValueError("vjp was called already, expected one call for each forward_vjp")
        cotangents = (cotangent,) if self._plan.single_head else tuple(cotangent)
        for one, shape in zip(cotangents, self._shapes, strict=True):
            if tuple(one.shape) != shape:
                raise ValueError(f"cotangent has shape {tuple(one.shape)}, expected {shape} like the value")
        if self._plan.fills != self._fills:
            raise ValueError("plan was filled with other tokens since the forward, expected the vjp before that")
        require_no_transform(dict.fromkeys(["cotangent"], cotangents[0]), "tensor")
        raise_found()
        way_back, self._way_back = self._way_back, None
        with _plain(self._plan.weights):
            return way_back.backward(cotangents)


class WayBack(Protocol):
    """What turns a cotangent of each head's value into gradients: a :class:`Run`, or a captured one."""

    def backward(self, cotangents: Sequence[Tensor]) -> dict[str, Tensor]: ...


def run(plan: Plan, lora: Lora) -> tuple[tuple[Tensor, ...], WayBack]:
    """Each head's value, and the way back; by CUDA graphs where the plan is captured, or can be captured now."""
    if plan.backend.captures and plan.graph is not False:
        from .backends.graph import replayed

        done = replayed(plan, lora)
        if done is not None:
            return done
    steps = Run(plan, lora)
    return steps.forward(), steps


@dataclass
class _Saved:
    """What a block's vjp needs, for one chunk of adapters."""

    x: Tensor
    a: Input | None  # what down_proj read, where a backend keeps its u
    halves: tuple[KeptAttention, KeptMlp] | None  # None: to be recomputed


class Run:
    """One pass forward and backward, in each block one group of adapters after the other.

    The residual stream is a list of pairs (x, y), one for each group; below the first adapted block, where all adapters
    read the same tokens, it is a single pair, (1, S, H). ``saved`` maps a layer to what is kept of each group;
    ``bound`` maps a layer to its block, where that is kept as well.

    Args:
        lora: the adapters; ``prepared``: the same as :meth:`Plain.adapters` returned them.
    """

    def __init__(self, plan: Plan, lora: Lora, prepared: Lora | None = None) -> None:
        self.plan, self.backend = plan, plan.backend
        own = lora if plan.parallel is None else plan.parallel.local_lora(lora)
        self.gradients = Gradients(lora, plan.wanted, plan.parallel)
        self.lora = self.backend.adapters(own, plan.weights.compute_dtype) if prepared is None else prepared
        self.saved: dict[int, list[_Saved]] = {}
        self.bound: dict[int, Block] = {}

    def block(self, layer: int, then: int | None) -> Block:
        """A layer, ready to multiply; ``then`` is the layer needed next."""
        plan, weights = self.plan, self.plan.weights
        return Block.bind(
            self.backend,
            plan.config,
            weights.block(layer, then),
            None if weights.packed is None else weights.packed[layer],
            self.lora,
            layer,
            weights.compute_dtype,
            plan.parallel,
            q_apart=self.backend.q_apart and layer == plan.top and plan.apart,
        )

    def forward(self) -> tuple[Tensor, ...]:
        """Each head's value."""
        plan, weights, backend = self.plan, self.plan.weights, self.backend
        dtype, shared = accumulation_dtype(weights.compute_dtype), not plan.own_texts
        streams: list[tuple[Tensor, Product | None]] = [
            (weights.embed_tokens[tables.ids].to(dtype).view(-1, *tables.ids.shape[-1:], plan.config.hidden_size), None)
            for tables in plan.tables
        ]
        read: dict[int, Tensor] = {}
        turn = plan.top - 1 if plan.lowest < plan.top else 0  # after the top: on the way back, or in the next pass
        for layer in range(plan.top + 1):
            block = self.block(layer, layer + 1 if layer < plan.top else turn)
            first = shared and block.adapted
            if first:
                streams, shared = [backend.widened(*streams[0], plan.n_adapters)] * len(plan.groups), False
            inputs = []
            for index, group in enumerate(plan.groups[: len(streams)]):
                overwrite = 0 < layer <= plan.lowest and not first  # the block below has saved nothing
                row = group.tables.row_at[layer]
                x, streams[index] = self._block(block[group.adapters], *streams[index], row, overwrite=overwrite)
                inputs.append(group.tables.of(x) if layer - 1 in plan.layers else x)
            if layer - 1 in plan.layers:
                read[layer - 1] = self._joined(inputs)
            if not weights.streamed and (layer > plan.top - plan.n_keep or backend.captures):
                self.bound[layer] = block
            del block, inputs  # streamed weights make room for the next ones
        sums = [backend.add(x, y) for x, y in streams]
        if plan.joint:
            sums = [group.tables.of(x) for group, x in zip(plan.groups, sums, strict=True)]
        read[plan.top] = self._joined(sums)
        values, self.kept = zip(*(head(read, bool(plan.wanted)) for head in plan.bound), strict=True)
        return values

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Those of all groups: adapter by adapter, or row by row."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1 if self.plan.own_texts else 0)

    def _block(
        self, block: Block, x: Tensor, y: Product | None, row: Row, *, overwrite: bool
    ) -> tuple[Tensor, tuple[Tensor, Product | None]]:
        """The block's input x + y, and the stream (x, y) above it."""
        plan, backend, layer = self.plan, self.backend, block.layer
        keep = layer > plan.top - plan.n_keep
        first = attention_half(backend, block, x, y, row, keep=keep, overwrite=overwrite)
        second = mlp_half(backend, block, _rows(first.x, row.rows), first.o, keep=keep)
        y = backend.product(second.a, block.down)
        if layer >= plan.lowest:
            a = second.a if backend.captures else None
            saved = _Saved(first.x, a, (first, second) if keep else None)
            self.saved.setdefault(layer, []).append(saved)
        return first.x, (second.x_mid, y)

    def backward(self, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        plan, backend, weights = self.plan, self.backend, self.plan.weights
        compute = weights.compute_dtype
        if not plan.wanted:
            return {}
        below: dict[int, Tensor] = {}
        for head, cotangent, kept in zip(plan.bound, cotangents, self.kept, strict=True):
            for layer, d in head.vjp(cotangent, kept).items():
                below[layer] = below[layer] + d if layer in below else d
        del self.kept, kept, d
        dx = below.pop(plan.top)
        streams: list[tuple[Tensor, Cotangent] | None] = []
        for group in plan.groups:
            own = group.tables.spread(dx[group.at]) if plan.joint else dx[group.at]
            streams.append((own, backend.cotangent(own, compute)))
        del dx, own
        for layer in range(plan.top, plan.lowest - 1, -1):
            block = self.bound.pop(layer, None) or self.block(layer, layer - 1 if layer > plan.lowest else 0)
            lower = self.bound.get(layer - 1)
            saved = self.saved.pop(layer)
            for index, group in enumerate(plan.groups):
                stream, streams[index] = streams[index], None
                if layer in below and stream is not None:
                    dx = group.tables.add_(stream[0], below[layer][group.at])
                    stream = dx, backend.cotangent(dx, compute)
                gradients, row = self.gradients.of(group.adapters), group.tables.row_at[layer]
                under = None if lower is None else lower[group.adapters].down
                streams[index] = self._block_vjp(block[group.adapters], saved.pop(0), stream, row, gradients, under)
            del block
        return self.gradients.collect()

    def _block_vjp(
        self,
        block: Block,
        saved: _Saved,
        stream: tuple[Tensor, Cotangent] | None,
        row: Row,
        gradients: GradientsOf,
        under: Stack | None,
    ) -> tuple[Tensor, Cotangent] | None:
        """The cotangent of the block's input; None for the lowest block, where it is not needed."""
        plan, backend, layer = self.plan, self.backend, block.layer
        need_dx = layer > plan.lowest
        need_mid = need_dx or gradients.every.wants_any(layer, "qkv", "o")
        if not need_mid and not gradients.every.wants_any(layer, "gate_up", "down"):
            return None
        first, second = saved.halves or self._again(block, saved, row)
        del saved
        assert stream is not None
        stream = mlp_half_vjp(backend, block, second, *stream, gradients, need_dx=need_mid)
        del second
        if stream is not None:
            stream = attention_half_vjp(backend, block, first, *stream, row, gradients, under, need_dx=need_dx)
        backend.finished(gradients)
        return stream

    def _again(self, block: Block, saved: _Saved, row: Row) -> tuple[KeptAttention, KeptMlp]:
        """Both halves, recomputed from the block's input, without what only the forward needs."""
        first = attention_half(self.backend, block, saved.x, None, row, keep=True)
        second = mlp_half(self.backend, block, _rows(first.x, row.rows), first.o, keep=True, again=True)
        if saved.a is not None:
            second.a = saved.a
        return first, second


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(1, rows)


@contextlib.contextmanager
def _plain(weights: Qwen2Weights) -> Iterator[None]:
    """No tape, and no autocast: the engine chooses its own dtypes. The current GPU is that of the weights."""
    device = torch.cuda.device(weights.device) if weights.device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(weights.device.type, enabled=False), device:
        yield
