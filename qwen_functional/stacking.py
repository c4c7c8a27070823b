"""LoRA tensors as the engine multiplies them: projections that read the same input stacked into one adapter.

And back: the gradients of a stack, taken apart into one tensor per LoRA tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Qwen2Config
from .dtypes import accumulation_dtype
from .lora import Lora, parse_name, peft_name, projection_shape
from .ops.linear import (
    LowRank,
    PackedWeight,
    Part,
    linear,
    linear_inner,
    linear_vjp_A,
    linear_vjp_B,
    linear_vjp_inner,
    linear_vjp_input,
)
from .parallel import TensorParallel

QKV, KV, Q, O = ("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj"), ("q_proj",), ("o_proj",)
GATE, UP, DOWN = ("gate_proj",), ("up_proj",), ("down_proj",)


@dataclass(frozen=True)
class Projection:
    """A base weight (out, in), perhaps stacked, with its bias and its adapters; ``low_rank`` None: it has none."""

    weight: Tensor | PackedWeight
    bias: Tensor | None
    low_rank: LowRank | None
    keys: tuple[tuple[int, str], ...]  # (layer, projection) of each part of low_rank

    def __call__(self, x: Tensor, adapters: slice) -> tuple[Tensor, Tensor | None]:
        """y and u of :func:`ops.linear.linear`, for x of the adapters in the slice."""
        return linear(x, self.weight, self.bias, self.low_rank[adapters] if self.low_rank else None)

    def inner(self, x: Tensor, adapters: slice) -> Tensor | None:
        """u alone."""
        return linear_inner(x, self.low_rank[adapters]) if self.low_rank else None

    def vjp(
        self,
        dy: Tensor,
        x: Tensor,
        u: Tensor | None,
        gradients: Gradients,
        adapters: slice,
        *,
        need_dx: bool,
        to: Tensor | None = None,
    ) -> Tensor | None:
        """Puts the gradients of the adapters in the slice in their place; returns dx where it is needed.

        dy (G, S, out), x (G, S, in) or (1, S, in), u (G, S, R) as :meth:`__call__` returned it. Returns
        ``to + dx`` where ``to`` (G, S, in) is given, which may be written over.
        """
        low_rank = self.low_rank[adapters] if self.low_rank else None
        t = None
        if low_rank is not None and u is not None:
            parts = list(zip(self.keys, low_rank.parts, strict=True))
            wanted_A = [(key, part.ranks) for key, part in parts if gradients.wants(key, "A")]
            if need_dx or wanted_A:
                t = linear_vjp_inner(dy, low_rank)
            if t is not None and len(wanted_A) == len(parts):
                dA = linear_vjp_A(t, x)
                for key, ranks in wanted_A:
                    gradients.put(key, "A", adapters, dA[:, ranks])
            elif t is not None:
                for key, ranks in wanted_A:
                    gradients.put(key, "A", adapters, linear_vjp_A(t[..., ranks], x))
            for key, part in parts:
                if gradients.wants(key, "B"):
                    dB = linear_vjp_B(dy[..., part.outputs], u[..., part.ranks])
                    gradients.put(key, "B", adapters, dB)
        return linear_vjp_input(dy, self.weight, low_rank, t, to) if need_dx else None


def project(
    config: Qwen2Config,
    lora: Lora,
    layer: int,
    names: tuple[str, ...],
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
) -> Projection:
    """The stacked projection of ``names`` in a layer; ``weight`` and ``bias`` are stacked already."""
    dtype = weight.dtype
    keys, pairs, parts = [], [], []
    rank = out = 0
    for name in names:
        rows, _ = projection_shape(config, name)
        pair = lora.pairs.get((layer, name))
        if pair is not None:
            r = pair.A.shape[1]
            keys.append((layer, name))
            pairs.append(pair)
            parts.append(Part(pair.B.to(dtype), slice(out, out + rows), slice(rank, rank + r)))
            rank += r
        out += rows
    if not parts:
        return Projection(weight, bias, None, ())
    by_column = [pair.scaling for pair in pairs for _ in range(pair.A.shape[1])]
    scaling = torch.tensor(by_column, dtype=accumulation_dtype(dtype), device=weight.device)
    A = pairs[0].A.to(dtype) if len(pairs) == 1 else torch.cat([pair.A.to(dtype) for pair in pairs], 1)
    return Projection(weight, bias, LowRank(A, tuple(parts), scaling), tuple(keys))


class Gradients:
    """The gradients of the wanted LoRA tensors, filled in layer by layer, each in its tensor's own dtype."""

    def __init__(
        self, lora: Lora, wanted: Collection[str] | None = None, parallel: TensorParallel | None = None
    ) -> None:
        self._lora, self._parallel = lora, parallel
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
        if self._parallel is not None:
            self._sum_later(name, key, side)[adapters] = gradient
            return
        if name not in self._filled:
            tensor = getattr(self._lora.pairs[key], side)
            self._filled[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self._filled[name][adapters] = gradient

    def _sum_later(self, name: str, key: tuple[int, str], side: str) -> Tensor:
        """This rank's part of a gradient that is whole after one sum over all ranks and all tensors.

        Zeros fill the rest of a half that is split; of a half that is not, every rank has a partial sum.
        """
        if not self._filled:
            wanted = {n: t for n, t in self._sides() if n in self._wanted}
            wide = max((accumulation_dtype(t.dtype) for t in wanted.values()), key=lambda dtype: dtype.itemsize)
            sizes = [tensor.numel() for tensor in wanted.values()]
            self._flat = torch.zeros(sum(sizes), dtype=wide, device=next(iter(wanted.values())).device)
            parts = self._flat.split(sizes)
            self._filled = {n: part.view(t.shape) for (n, t), part in zip(wanted.items(), parts, strict=True)}
        whole = self._filled[name]
        assert self._parallel is not None
        return whole[self._parallel.of_lora(key[1], side, whole.shape)]

    def _sides(self) -> Iterator[tuple[str, Tensor]]:
        for key, pair in self._lora.pairs.items():
            yield from ((peft_name(*key, side), tensor) for side, tensor in (("A", pair.A), ("B", pair.B)))

    def collect(self) -> dict[str, Tensor]:
        """{PEFT name: gradient, shaped as given to ``bind``}, in order. Zero for a tensor that nothing depends on."""
        if self._parallel is not None and self._filled:
            self._parallel.sum_(self._flat)
        gradients = {}
        for name, tensor in self._sides():
            if name in self._wanted:
                gradient = self._filled.get(name)
                if gradient is None:
                    gradient = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                gradient = gradient.to(tensor.dtype)
                gradients[name] = gradient if self._lora.batched else gradient[0]
        return gradients
