"""The whole model on packed tokens, many adapters at once, with its gradient written by hand.

No autograd and no vocabulary logits. What the forward keeps, how much of it, and how many adapters go through a block
at a time is decided here; what a block computes is in ``block.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .block import Block, Kept, Row, attention_half, attention_half_vjp, kept_bytes, mlp_half, mlp_half_vjp
from .config import Qwen2Config
from .dtypes import accumulation_dtype, attention_dtype
from .lora import Lora
from .memory import free_bytes
from .ops.rmsnorm import rmsnorm, rmsnorm_vjp
from .ops.rope import rope_tables
from .packing import PackedTokens
from .stacking import QKV, Gradients, O
from .weights import Qwen2Weights

CHECKPOINTS = ("none", "block", "auto")

# The gate and up of the adapters that go through a block together, on a CPU: enough rows for a GEMM, and so few bytes
# that the C library hands their memory on, where larger pieces go back to the system and are faulted in again.
CHUNK_BYTES = 48 << 20


def forward_vjp(
    config: Qwen2Config,
    weights: Qwen2Weights,
    tokens: PackedTokens,
    lora: Lora | None = None,
    checkpoint: str = "auto",
    *,
    layer: int | Sequence[int] = -1,
    wrt: Collection[str] | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Vjp]:
    """Hidden states at each sequence's last token under G adapters, and their vector-Jacobian product.

    Args:
        tokens: P sequences, from :func:`pack`.
        lora: G adapters, from :meth:`LoraSpec.bind`; None for the bare model, with G = 1.
        checkpoint: ``"none"`` keeps all that the vjp needs; ``"block"`` keeps what enters a block's halves and
            computes the rest again; ``"auto"`` keeps as many blocks whole as ``memory_budget`` allows, the last ones
            first.
        layer: after which block to read out, from 0; −1 is after the last block and the final norm. A sequence
            reads out several. Blocks above the highest one are not computed.
        wrt: names of the LoRA tensors whose gradients are wanted; None for all. The others cost nothing.
        memory_budget: bytes that ``"auto"`` may spend on what it keeps; by default half of what is free.

    Returns:
        value: (G, P, H), or (G, len(layer), P, H) for a sequence of layers; float32 (float64 for float64 weights).
        vjp: see :class:`Vjp`.

    Raises:
        ValueError: token ids outside the vocabulary, a sequence longer than the model's positions, a layer that
            the model lacks, an unknown ``checkpoint``, a name in ``wrt`` that ``lora`` lacks, another device.
    """
    tokens.check_fits(config)
    layers = checked_layers(config, layer)
    check_checkpoint(checkpoint)
    lora = Lora({}, 1, batched=False) if lora is None else lora
    for name in wrt or ():
        if name not in lora.names():
            raise ValueError(f"wrt names {name!r}, expected names of the bound LoRA tensors")
    for name, tensor in lora.tensors().items():
        if tensor.device != weights.device:
            raise ValueError(f"LoRA tensor {name!r} is on {tensor.device}, expected {weights.device} as the weights")
    with _plain(weights):
        run = _Run(config, weights, tokens, lora, layers, Gradients(lora, wrt, weights.parallel))
        value = run.forward(run.n_blocks_to_keep(checkpoint, memory_budget))
    return (value[:, 0] if isinstance(layer, int) else value), Vjp(run, single_layer=isinstance(layer, int))


class Vjp:
    """The vector-Jacobian product of one :func:`forward_vjp`; may be called once, as it frees what was kept.

    Attributes:
        n_blocks: how many blocks the gradient passes through.
        n_kept: how many of them the forward kept whole; the others are computed again from their input.
    """

    def __init__(self, run: _Run, *, single_layer: bool) -> None:
        self._run: _Run | None = run
        self._single_layer = single_layer
        self._shape = run.value_shape if not single_layer else (run.value_shape[0], *run.value_shape[2:])
        self.n_blocks = len(run.saved)
        self.n_kept = sum(kept is not None for ((*_, kept), *_) in run.saved.values())

    @property
    def checkpoint(self) -> str:
        """What was chosen: ``"none"``, ``"block"``, or ``"k of n blocks kept"``."""
        if self.n_kept == self.n_blocks:
            return "none"
        return f"{self.n_kept} of {self.n_blocks} blocks kept" if self.n_kept else "block"

    def __call__(self, cotangent: Tensor) -> dict[str, Tensor]:
        """{PEFT name: gradient}, shaped, ordered and typed as the wanted tensors given to ``bind``.

        Args:
            cotangent: shaped as the value.

        Raises:
            ValueError: another shape, or a second call.
        """
        if self._run is None:
            raise ValueError("vjp was called already, expected one call for each forward_vjp")
        if tuple(cotangent.shape) != self._shape:
            raise ValueError(f"cotangent has shape {tuple(cotangent.shape)}, expected {self._shape} as the value")
        run, self._run = self._run, None
        with _plain(run.weights):
            return run.backward(cotangent[:, None] if self._single_layer else cotangent)


@dataclass(frozen=True)
class _Rows:
    """The packed row as the blocks see it: all of it by sliding window, and the read-out nodes alone."""

    config: Qwen2Config
    weights: Qwen2Weights
    tokens: PackedTokens
    nodes: tuple[int, ...]  # read out, ascending, each once

    def whole(self, layer: int) -> Row:
        tiles = self.tokens.tiles(self.config.window(layer))
        return self._row(self.tokens.positions, tiles, None)

    def read_out(self, layer: int) -> Row:
        tile = self.tokens.readout_tile(self.nodes, self.config.window(layer))
        index = torch.tensor(self.nodes)
        return self._row(self.tokens.positions[index], [tile], index.to(self.weights.device))

    def _row(self, positions: Tensor, tiles: list, rows: Tensor | None) -> Row:
        device, compute = self.weights.device, self.weights.compute_dtype
        dtype = accumulation_dtype(compute)
        cos, sin = rope_tables(self.config, positions[:, None], dtype, device)
        scale = self.config.head_dim**-0.5
        k_rope = rope_tables(self.config, self.tokens.positions, dtype, device)
        tiles = [tile.to(device) for tile in tiles]
        return Row((cos * scale, sin * scale), k_rope, tiles, attention_dtype(compute, device), rows)


class _Run:
    """One pass forwards and back, in each block one chunk of adapters after the other.

    The residual stream is a list of one tensor (g, S, H) a chunk, or of one alone (1, S, H) below the first adapted
    block. ``saved`` maps a layer to what enters its halves and, where kept, the rest, by chunk; ``bound`` maps one that
    is kept to its block, where the weights stay in memory.
    """

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        tokens: PackedTokens,
        lora: Lora,
        layers: tuple[int, ...],
        gradients: Gradients,
    ) -> None:
        parallel = weights.parallel
        if parallel is not None:  # the residual stream is whole on every rank, what lies within the halves is split
            config, lora = parallel.local_config(config), parallel.local_lora(lora)
        self.config, self.weights, self.tokens = config, weights, tokens
        self.lora, self.layers, self.gradients = lora, layers, gradients
        self.top = config.num_hidden_layers - 1 if -1 in layers else max(layers)
        self.lowest = self.top + 1 if gradients.lowest_layer is None else gradients.lowest_layer
        nodes = tuple(sorted(set(tokens.last)))
        self.rows = torch.tensor(nodes).to(weights.device)
        self.row_of = torch.tensor([nodes.index(node) for node in tokens.last]).to(weights.device)  # (P,)
        rows = _Rows(config, weights, tokens, nodes)
        layer_of = {config.window(i): i for i in range(self.top)}
        windows = {window: rows.whole(i) for window, i in layer_of.items()}
        self.row_at = [*(windows[config.window(i)] for i in range(self.top)), rows.read_out(self.top)]
        self.value_shape = (lora.n_adapters, len(layers), len(tokens.last), config.hidden_size)
        self.chunks = _chunks(config, weights, len(tokens), lora.n_adapters)
        self.saved: dict[int, list[tuple[Tensor, Tensor, Kept | None]]] = {}
        self.bound: dict[int, Block] = {}
        self.read: dict[int, Tensor] = {}

    def n_blocks_to_keep(self, checkpoint: str, memory_budget: int | None) -> int:
        n_blocks = max(0, self.top + 1 - self.lowest)
        if checkpoint != "auto":
            return n_blocks if checkpoint == "none" else 0
        budget = free_bytes(self.weights.device) // 2 if memory_budget is None else memory_budget
        n, compute = self.lora.n_adapters, self.weights.compute_dtype
        inputs = 2 * n_blocks * n * len(self.tokens) * self.config.hidden_size * accumulation_dtype(compute).itemsize
        return min(n_blocks, max(0, budget - inputs) // self._kept_bytes())

    def _kept_bytes(self) -> int:
        """Bytes of a block that is kept whole; the highest one, which keeps less, counts as the one below it."""
        tiles = self.row_at[max(0, self.top - 1)].tiles
        return kept_bytes(self.config, self.lora.n_adapters, len(self.tokens), tiles, self.weights.compute_dtype)

    def block(self, layer: int, then: int | None) -> Block:
        """A layer, ready to multiply; ``then`` is the next one that will be."""
        weights = self.weights
        packed = None if weights.packed is None else weights.packed[layer]
        return Block.bind(
            self.config,
            weights.block(layer, then),
            packed,
            self.lora,
            layer,
            weights.compute_dtype,
            weights.parallel,
            q_apart=layer == self.top,
        )

    def forward(self, n_keep: int) -> Tensor:
        dtype = accumulation_dtype(self.weights.compute_dtype)
        ids = self.tokens.input_ids.to(self.weights.device)
        xs = [self.weights.embed_tokens[ids].to(dtype)[None]]
        turn = self.top - 1 if self.lowest < self.top else 0  # the way back, or the next pass
        for layer in range(self.top + 1):
            block = self.block(layer, layer + 1 if layer < self.top else turn)
            if block.adapted and len(xs) < len(self.chunks):
                xs = xs * len(self.chunks)
            keep = layer > self.top - n_keep
            xs = [self._block(block, layer, x, chunk, keep) for x, chunk in zip(xs, self.chunks, strict=False)]
            if layer in self.layers or layer == self.top:
                read = xs if layer == self.top else [x[:, self.rows] for x in xs]
                self.read[layer] = torch.cat(read) if len(read) > 1 else read[0]
            if keep and not self.weights.streamed:
                self.bound[layer] = block
            del block  # streamed weights make room for the next ones
        values = [self._normed(self.read[self.top]) if layer == -1 else self.read[layer] for layer in self.layers]
        n = self.value_shape[0]
        return torch.stack([value[:, self.row_of].expand(n, -1, -1) for value in values], dim=1)

    def _block(self, block: Block, layer: int, x: Tensor, chunk: slice, keep: bool) -> Tensor:
        kept = attention_half(block, x, self.row_at[layer], chunk, keep=keep)
        x_out, kept.mlp = mlp_half(block, kept.x_mid, chunk, keep=keep, in_place=layer < self.lowest)
        if layer >= self.lowest:
            self.saved.setdefault(layer, []).append((x, kept.x_mid, kept if keep else None))
        return x_out

    def _normed(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weights.norm, self.config.rms_norm_eps)[0]

    def backward(self, cotangent: Tensor) -> dict[str, Tensor]:
        dtype = accumulation_dtype(self.weights.compute_dtype)
        # Sequences may end at the same node: sum what they send back. (G, layers, R, H)
        shape = (*cotangent.shape[:2], len(self.rows), cotangent.shape[3])
        d_read = torch.zeros(shape, dtype=dtype, device=self.weights.device)
        d_read.index_add_(2, self.row_of, cotangent.to(d_read))
        dx = torch.zeros_like(d_read[:, 0])
        for index, layer in enumerate(self.layers):
            if layer == -1:
                x = self.read[self.top]
                rstd = rmsnorm(x, self.weights.norm, self.config.rms_norm_eps)[1]
                dx += rmsnorm_vjp(d_read[:, index], x, self.weights.norm, rstd)
            elif layer == self.top:
                dx += d_read[:, index]
        self.read.clear()
        dxs: list[Tensor] = [dx[chunk] for chunk in self.chunks]
        for layer in range(self.top, self.lowest - 1, -1):
            if layer < self.top:
                for index in (i for i, read in enumerate(self.layers) if read == layer):
                    for dx, chunk in zip(dxs, self.chunks, strict=True):
                        dx.index_add_(1, self.rows, d_read[chunk, index])
            block = self.bound.pop(layer, None) or self.block(layer, layer - 1 if layer > self.lowest else 0)
            saved = self.saved.pop(layer)
            for index, chunk in enumerate(self.chunks):
                new_dx = self._block_vjp(block, layer, *saved.pop(0), dxs[index], chunk)
                if new_dx is not None:
                    dxs[index] = new_dx
            del block
        return self.gradients.collect()

    def _block_vjp(
        self, block: Block, layer: int, x: Tensor, x_mid: Tensor, kept: Kept | None, dx_out: Tensor, chunk: slice
    ) -> Tensor | None:
        """The cotangent of ``x``; None from the lowest block, whose input's nobody needs."""
        row, gradients = self.row_at[layer], self.gradients
        kept = attention_half(block, x, row, chunk, x_mid, keep=True) if kept is None else kept
        need_dx = layer > self.lowest
        need_mid = need_dx or gradients.wants_any(layer, QKV + O)
        dx_mid = mlp_half_vjp(block, x_mid, kept.mlp, dx_out, chunk, gradients, layer, need_mid)
        kept.mlp = None
        if dx_mid is None:
            return None
        return attention_half_vjp(block, x, kept, dx_mid, row, chunk, gradients, layer, need_dx)


def _chunks(config: Qwen2Config, weights: Qwen2Weights, n_tokens: int, n_adapters: int) -> list[slice]:
    """How many adapters go through a block at a time; all on a GPU, and where ranks wait for a sum."""
    step = n_adapters
    if weights.device.type == "cpu" and weights.parallel is None:
        bytes_each = 2 * n_tokens * config.intermediate_size * weights.compute_dtype.itemsize
        step = max(1, CHUNK_BYTES // bytes_each)
        step = -(-n_adapters // -(-n_adapters // step))  # as even as can be
    return [slice(start, min(start + step, n_adapters)) for start in range(0, n_adapters, step)]


@contextlib.contextmanager
def _plain(weights: Qwen2Weights) -> Iterator[None]:
    """No tape, and no autocast: the engine chooses its own dtypes."""
    with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
        yield


def checked_layers(config: Qwen2Config, layer: int | Sequence[int]) -> tuple[int, ...]:
    """``layer`` of :func:`forward_vjp` as a tuple, or a ``ValueError`` for one that the model lacks."""
    highest = config.num_hidden_layers - 1
    if not isinstance(layer, (int, Sequence)):
        raise ValueError(f"layer is {layer!r}, expected -1, 0 to {highest}, or several of these")
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    if not layers:
        raise ValueError("layer is empty, expected at least one layer")
    for one in layers:
        if not isinstance(one, int) or not -1 <= one <= highest:
            raise ValueError(f"layer is {one!r}, expected -1 or 0 to {highest}")
    return layers


def check_checkpoint(checkpoint: str) -> None:
    """Raises ``ValueError`` unless ``checkpoint`` is one that :func:`forward_vjp` knows."""
    if checkpoint not in CHECKPOINTS:
        raise ValueError(f"checkpoint is {checkpoint!r}, expected one of {CHECKPOINTS}")
