"""LoRA tensors as the engine multiplies them: projections that read the same input stacked into one adapter.

And back: the gradients of a stack, taken apart into one tensor per LoRA tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Qwen2Config
from .dtypes import accumulation_dtype
from .lora import Lora, parse_name, peft_name, projection_shape
from .ops.linear import LowRank, linear, linear_inner, linear_vjp_A, linear_vjp_B, linear_vjp_inner, linear_vjp_input

QKV, KV, Q, O = ("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj"), ("q_proj",), ("o_proj",)
GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True)
class Part:
    """Where one projection lies in a stack."""

    key: tuple[int, str]  # (layer, projection)
    ranks: slice  # of R
    outputs: slice  # of the stacked output features


@dataclass(frozen=True)
class Projection:
    """A base weight (out, in), perhaps stacked, with its bias and its adapters; ``low_rank`` None: it has none."""

    weight: Tensor
    bias: Tensor | None
    low_rank: LowRank | None
    parts: tuple[Part, ...]

    def __call__(self, x: Tensor, adapters: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """y and u of :func:`ops.linear.linear`, for x of the adapters in the slice."""
        return linear(x, self.weight, self.bias, self.low_rank[adapters] if self.low_rank else None)

    def inner(self, x: Tensor, adapters: slice = slice(None)) -> Tensor | None:
        """u alone."""
        return linear_inner(x, self.low_rank[adapters]) if self.low_rank else None

    def vjp(
        self,
        dy: Tensor,
        x: Tensor,
        u: Tensor | None,
        gradients: Gradients,
        *,
        need_dx: bool = True,
        adapters: slice = slice(None),
    ) -> Tensor | None:
        """Puts the gradients of the adapters in the slice in their place; returns dx where it is needed.

        dy (G, S, out), x (G, S, in) or (1, S, in), u (G, S, R) as :meth:`__call__` returned it.
        """
        low_rank = self.low_rank[adapters] if self.low_rank else None
        t = None
        if low_rank is not None and u is not None:
            wanted_A = [part for part in self.parts if gradients.wants(part.key, "A")]
            wanted_B = [part for part in self.parts if gradients.wants(part.key, "B")]
            if need_dx or wanted_A:
                t = linear_vjp_inner(dy, low_rank)
            if t is not None and len(wanted_A) == len(self.parts):
                dA = linear_vjp_A(t, x)
                for part in wanted_A:
                    gradients.put(part.key, "A", adapters, dA[:, part.ranks])
            elif t is not None:
                for part in wanted_A:
                    gradients.put(part.key, "A", adapters, linear_vjp_A(t[..., part.ranks], x))
            if len(wanted_B) == len(self.parts):
                dB = linear_vjp_B(dy, u)
                for part in wanted_B:
                    gradients.put(part.key, "B", adapters, dB[:, part.ranks, part.outputs].mT)
            else:
                for part in wanted_B:
                    dB = linear_vjp_B(dy[..., part.outputs], u[..., part.ranks])
                    gradients.put(part.key, "B", adapters, dB.mT)
        return linear_vjp_input(dy, self.weight, low_rank, t) if need_dx else None


def project(
    config: Qwen2Config, lora: Lora, layer: int, names: tuple[str, ...], weight: Tensor, bias: Tensor | None = None
) -> Projection:
    """The stacked projection of ``names`` in a layer; ``weight`` and ``bias`` are stacked already."""
    dtype = weight.dtype
    parts = []
    rank = out = 0
    for name in names:
        rows, _ = projection_shape(config, name)
        pair = lora.pairs.get((layer, name))
        if pair is not None:
            r = pair.A.shape[1]
            parts.append(Part((layer, name), slice(rank, rank + r), slice(out, out + rows)))
            rank += r
        out += rows
    if not parts:
        return Projection(weight, bias, None, ())
    pairs = [lora.pairs[part.key] for part in parts]
    by_column = [pair.scaling for pair in pairs for _ in range(pair.A.shape[1])]
    scaling = torch.tensor(by_column, dtype=accumulation_dtype(dtype), device=weight.device)
    if len(names) == 1:
        low_rank = LowRank(pairs[0].A.to(dtype), pairs[0].B.to(dtype), scaling)
    else:
        first = pairs[0].A
        A = first.new_empty(first.shape[0], rank, first.shape[2], dtype=dtype)
        B = first.new_zeros(first.shape[0], out, rank, dtype=dtype)
        for part, pair in zip(parts, pairs, strict=True):
            A[:, part.ranks] = pair.A
            B[:, part.outputs, part.ranks] = pair.B
        low_rank = LowRank(A, B, scaling)
    return Projection(weight, bias, low_rank, tuple(parts))


class Gradients:
    """The gradients of the wanted LoRA tensors, filled in layer by layer, each in its tensor's own dtype."""

    def __init__(self, lora: Lora, wanted: Collection[str] | None = None) -> None:
        self._lora = lora
        self._wanted = set(lora.names()) if wanted is None else set(wanted)
        self._filled: dict[str, Tensor] = {}
        layers = [parsed[0] for parsed in map(parse_name, self._wanted) if parsed]
        self.lowest_layer = min(layers, default=None)

    def wants(self, key: tuple[int, str], side: str) -> bool:
        return peft_name(*key, side) in self._wanted

    def wants_any(self, layer: int, names: tuple[str, ...]) -> bool:
        return any(self.wants((layer, name), side) for name in names for side in "AB")

    def put(self, key: tuple[int, str], side: str, adapters: slice, gradient: Tensor) -> None:
        """``gradient`` (g, rows, cols) of the adapters in the slice."""
        name = peft_name(*key, side)
        if name not in self._filled:
            tensor = getattr(self._lora.pairs[key], side)
            self._filled[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self._filled[name][adapters] = gradient

    def collect(self) -> dict[str, Tensor]:
        """{PEFT name: gradient, shaped as given to ``bind``}, in order. Zero for a tensor that nothing depends on."""
        gradients = {}
        for (layer, projection), pair in self._lora.pairs.items():
            for side, tensor in (("A", pair.A), ("B", pair.B)):
                name = peft_name(layer, projection, side)
                if name in self._wanted:
                    gradient = self._filled.get(name)
                    if gradient is None:
                        gradient = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                    gradients[name] = gradient if self._lora.batched else gradient[0]
        return gradients
