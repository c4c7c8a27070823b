"""The whole model: ``forward``, plain differentiable torch over padded rows, and ``forward_vjp``, the engine.

``forward`` is the formula, with the interface that users of transformers know; ``forward_vjp`` (in ``engine.py``) is
the same function of the same arguments on packed tokens, fast and with its gradient written by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .architecture import PROJECTIONS, STACKS, projection_shape
from .config import Qwen2Config
from .dtypes import accumulation_dtype
from .engine import Vjp, forward_vjp
from .finite import is_symbolic
from .lora import Lora
from .ops.rmsnorm import rmsnorm
from .ops.rope import rope, rope_tables
from .ops.swiglu import swiglu
from .parallel import TensorParallel
from .weights import BlockWeights, Qwen2Weights

__all__ = ["ForwardOutput", "Vjp", "forward", "forward_vjp"]


@dataclass(frozen=True)
class ForwardOutput:
    """What transformers' Qwen2ForCausalLM or Qwen3ForCausalLM returns under the same names, in the weights' dtype.

    Attributes:
        logits: (N, T, V).
        last_hidden_state: (N, T, H), after the final norm.
        hidden_states: the embeddings, then every block's output, (N, T, H) each, the last one after the final
            norm; None unless asked for.
    """

    logits: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None


def forward(
    config: Qwen2Config,
    weights: Qwen2Weights,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    lora: Lora | None = None,
    adapter_index: Tensor | None = None,
    output_hidden_states: bool = False,
) -> ForwardOutput:
    """Run the model on N rows of T tokens. Differentiable in the LoRA tensors, to any order.

    Args:
        input_ids: (N, T) integer.
        attention_mask: (N, T), nonzero where there is a token; padding may be on either side. A padding token's
            outputs are finite but meaningless. Or (N, 1, T, T), nonzero where a query (second-to-last dimension) sees
            a key; a token always sees itself.
        position_ids: (N, T) or (1, T), by default 0 to T − 1 regardless of padding, as in transformers. As there,
            without an attention mask a position that does not follow the previous one begins a new sequence.
        lora: adapters from :meth:`LoraSpec.bind`.
        adapter_index: (N,) integer, which adapter each row uses; may be left out when G is 1 or N.
        output_hidden_states: whether to return them.

    Raises:
        ValueError: an argument of another shape or dtype, a token outside the vocabulary, more tokens than the
            model has positions, a mask with an empty row, an adapter that does not exist.
    """
    _check_inputs(config, input_ids, attention_mask, position_ids)
    if weights.lm_head is None:
        raise ValueError("weights have no lm_head, which logits need; expected load_pretrained with lm_head=True")
    of_row = _adapter_of_row(lora, adapter_index, input_ids.shape[0])
    if weights.parallel is not None:
        config = weights.parallel.local_config(config)
    adapters = _Adapters(config, lora, of_row, weights.parallel)
    dtype, compute = accumulation_dtype(weights.compute_dtype), weights.compute_dtype
    n_tokens = input_ids.shape[1]
    positions = torch.arange(n_tokens, device=input_ids.device)[None] if position_ids is None else position_ids
    seen = _seen(n_tokens, attention_mask, position_ids, input_ids.device)
    cos, sin = rope_tables(config, positions[:, None, :], dtype, weights.device)  # (N or 1, 1, T, head_dim/2)

    x = weights.embed_tokens[input_ids].to(dtype)
    hidden_states = [x]
    for layer, stored in enumerate(weights.blocks):
        block, window = stored.to(compute), config.window(layer)
        mask = seen if window is None else seen & _within(window, n_tokens, input_ids.device)
        h = rmsnorm(x, block.input_layernorm, config.rms_norm_eps)[0].to(compute)
        x = x + _attention(config, block, h, mask, cos, sin, adapters, layer)
        h = rmsnorm(x, block.post_attention_layernorm, config.rms_norm_eps)[0].to(compute)
        gate, up = adapters.project(layer, "gate_up", h, block.gate_up_proj)
        x = x + adapters.project(layer, "down", swiglu(gate, up), block.down_proj)[0]
        hidden_states.append(x)
    hidden_states[-1] = rmsnorm(x, weights.norm, config.rms_norm_eps)[0]
    logits = F.linear(hidden_states[-1].to(compute), weights.lm_head.to(compute))
    outputs = tuple(h.to(weights.dtype) for h in hidden_states)
    return ForwardOutput(logits.to(weights.dtype), outputs[-1], outputs if output_hidden_states else None)


def _attention(
    config: Qwen2Config,
    block: BlockWeights,
    h: Tensor,
    seen: Tensor,
    cos: Tensor,
    sin: Tensor,
    adapters: _Adapters,
    layer: int,
) -> Tensor:
    """``o(softmax(q kᵀ / sqrt(head_dim)) v)``; h (N, T, H), seen (N or 1, 1, T, T)."""
    heads = [
        y.to(cos.dtype).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        for y in adapters.project(layer, "qkv", h, block.qkv_proj, block.qkv_bias)
    ]  # (N, heads, T, head_dim)
    group = config.num_attention_heads // config.num_key_value_heads
    for index, norm in enumerate((block.q_norm, block.k_norm)):
        if norm is not None:
            heads[index] = rmsnorm(heads[index], norm, config.rms_norm_eps)[0]
    q = rope(heads[0], cos, sin)
    k, v = (y.repeat_interleave(group, dim=1) for y in (rope(heads[1], cos, sin), heads[2]))
    scores = (q @ k.mT * config.head_dim**-0.5).masked_fill(~seen, float("-inf"))
    o = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return adapters.project(layer, "o", o.to(h.dtype), block.o_proj)[0]


@dataclass(frozen=True)
class _Adapters:
    """The adapters of N rows. ``of_row`` (N,) picks each row's; None where one serves all, or each row has its own."""

    config: Qwen2Config
    lora: Lora | None
    of_row: Tensor | None
    parallel: TensorParallel | None

    def project(
        self, layer: int, stack: str, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> list[Tensor]:
        """``x Wᵀ + b + scaling · (x Aᵀ) Bᵀ`` of each projection of a stack; x (N, T, in)."""
        names = STACKS[stack]
        sizes = [projection_shape(self.config, name)[0] for name in names]
        by_rows = PROJECTIONS[names[0]].split == 0
        if self.parallel is not None and by_rows:
            x = self.parallel.shared(x)
        outputs = list(F.linear(x, weight, bias).split(sizes, dim=-1))
        for index, name in enumerate(names):
            pair = self.lora.pairs.get((layer, name)) if self.lora is not None else None
            if pair is not None:
                A, B = (self._own(t, name, side).to(x.dtype) for side, t in (("A", pair.A), ("B", pair.B)))
                A, B = (t if self.of_row is None else t[self.of_row] for t in (A, B))
                outputs[index] = outputs[index] + pair.scaling * (x @ A.mT @ B.mT)
        if self.parallel is not None and not by_rows:
            outputs = [self.parallel.sum(output) for output in outputs]
        return outputs

    def _own(self, tensor: Tensor, projection: str, side: str) -> Tensor:
        """A LoRA tensor, or this rank's part of it."""
        if self.parallel is None:
            return tensor
        return self.parallel.shared(tensor)[self.parallel.of_lora(projection, side, tensor.shape)]


def _seen(n_tokens: int, attention_mask: Tensor | None, position_ids: Tensor | None, device: torch.device) -> Tensor:
    """(N or 1, 1, T, T) bool: which queries (second-to-last dimension) see which keys. A token always sees itself."""
    index = torch.arange(n_tokens, device=device)
    seen = (index[:, None] >= index[None, :])[None, None]
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask.bool() | (index[:, None] == index[None, :])
    if attention_mask is not None:
        return seen & (attention_mask.bool()[:, None, None, :] | (index[:, None] == index[None, :]))
    if position_ids is not None:
        sequence = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
        seen = seen & (sequence[:, None, :, None] == sequence[:, None, None, :])
    return seen


def _within(window: int, n_tokens: int, device: torch.device) -> Tensor:
    index = torch.arange(n_tokens, device=device)
    return index[:, None] - index[None, :] < window


def _check_inputs(
    config: Qwen2Config, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (N, T), neither zero")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids has dtype {input_ids.dtype}, expected torch.int64")
    rows, n_tokens = input_ids.shape
    if n_tokens > config.max_position_embeddings:
        raise ValueError(
            f"input_ids has {n_tokens} tokens a row, expected at most max_position_embeddings = "
            f"{config.max_position_embeddings}"
        )
    shapes = (rows, n_tokens), (rows, 1, n_tokens, n_tokens)
    if attention_mask is not None and tuple(attention_mask.shape) not in shapes:
        found = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {found}, expected {shapes[0]} like input_ids, or {shapes[1]}")
    if position_ids is not None and tuple(position_ids.shape) not in ((rows, n_tokens), (1, n_tokens)):
        shape = tuple(position_ids.shape)
        raise ValueError(f"position_ids has shape {shape}, expected {(rows, n_tokens)} or {(1, n_tokens)}")
    if is_symbolic(input_ids):
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"input_ids holds {bad}, outside the vocabulary; expected 0 to {config.vocab_size - 1}")
    if attention_mask is not None and attention_mask.dim() == 2:
        empty = (attention_mask != 0).any(1).logical_not().nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"attention_mask has no token in row {empty[0]}, expected at least one in every row")


def _adapter_of_row(lora: Lora | None, adapter_index: Tensor | None, n_rows: int) -> Tensor | None:
    if lora is None:
        if adapter_index is not None:
            raise ValueError("adapter_index is given without lora, expected both or neither")
        return None
    if adapter_index is None:
        if lora.n_adapters not in (1, n_rows):
            raise ValueError(
                f"{lora.n_adapters} adapters for {n_rows} rows without adapter_index, expected 1 or {n_rows} adapters"
            )
        return None
    if tuple(adapter_index.shape) != (n_rows,) or adapter_index.is_floating_point():
        raise ValueError(
            f"adapter_index has shape {tuple(adapter_index.shape)} and dtype {adapter_index.dtype}, "
            f"expected ({n_rows},) integers"
        )
    if not is_symbolic(adapter_index):
        low, high = int(adapter_index.min()), int(adapter_index.max())
        if low < 0 or high >= lora.n_adapters:
            bad = low if low < 0 else high
            raise ValueError(f"adapter_index holds {bad}, expected 0 to {lora.n_adapters - 1}")
    return adapter_index.long()
