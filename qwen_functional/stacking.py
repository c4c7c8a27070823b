"""LoRA tensors as the engine multiplies them: the A of all projections that read the same input as one matrix.

And back: the gradients of a stack, taken apart into one tensor per LoRA tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Qwen2Config
from .dtypes import accumulation_dtype
from .lora import Lora, parse_name, peft_name, projection_shape
from .ops.linear import (
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
class Target:
    """One LoRA of a stack: whose gradients are put where, and ``scaling``, by which A was multiplied."""

    key: tuple[int, str]  # (layer, projection)
    scaling: float
    part: Part


@dataclass(frozen=True)
class Base:
    """A base weight (out, in), perhaps of several projections stacked, with its bias and its adapters."""

    weight: Tensor | PackedWeight
    bias: Tensor | None
    targets: tuple[Target, ...]

    def parts(self, adapters: slice) -> list[Part]:
        return [target.part[adapters] for target in self.targets]


@dataclass(frozen=True)
class Stack:
    """The projections that read one input, by one base weight or several.

    ``A`` (G, R, in), in the compute dtype, has the A of all their adapters one below the other, each times its
    scaling; None: they have none.
    """

    bases: tuple[Base, ...]
    A: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.bases[0].weight.dtype

    def __call__(self, x: Tensor, adapters: slice) -> tuple[list[Tensor], Tensor | None]:
        """y (G, S, out) by each base weight, and u (G, S, R) for the vjp, for x of the adapters in the slice."""
        u = self.inner(x, adapters)
        return [linear(x, base.weight, base.bias, u, base.parts(adapters)) for base in self.bases], u

    def inner(self, x: Tensor, adapters: slice) -> Tensor | None:
        """u alone."""
        return None if self.A is None else linear_inner(x, self.A[adapters])

    def vjp(
        self,
        dys: Sequence[Tensor],
        x: Tensor,
        u: Tensor | None,
        gradients: Gradients,
        adapters: slice,
        *,
        need_dx: bool,
    ) -> Tensor | None:
        """Puts the gradients of the adapters in the slice in their place; returns dx where it is needed.

        dys: (G, S, out) of each base weight; x (G, S, in) or (1, S, in), u (G, S, R) as :meth:`__call__` returned it.
        """
        lora = [
            (target, dy[..., target.part.outputs])
            for dy, base in zip(dys, self.bases, strict=True)
            for target in base.targets
        ]
        wanted_A = [target for target, _ in lora if gradients.wants(target.key, "A")]
        t = None  # the cotangent of u
        if u is not None and (need_dx or wanted_A):
            t = torch.empty_like(u)
            for target, dy in lora:
                if need_dx or gradients.wants(target.key, "A"):
                    linear_vjp_inner(dy, target.part.B[adapters], out=t[..., target.part.ranks])
            whole = linear_vjp_A(t, x) if len(wanted_A) == len(lora) else None
            for target in wanted_A:
                ranks = target.part.ranks
                dA = linear_vjp_A(t[..., ranks], x) if whole is None else whole[:, ranks]
                gradients.put(target.key, "A", adapters, dA, target.scaling)
        for target, dy in lora:
            if u is not None and gradients.wants(target.key, "B"):
                gradients.put(target.key, "B", adapters, linear_vjp_B(dy, u[..., target.part.ranks]))
        if not need_dx:
            return None
        dx = None
        for dy, base in zip(dys, self.bases, strict=True):
            dx = linear_vjp_input(dy, base.weight, dx)
        if dx is not None and t is not None and self.A is not None:
            dx.baddbmm_(t, self.A[adapters])
        return dx


def stack(
    config: Qwen2Config,
    lora: Lora,
    layer: int,
    *bases: tuple[tuple[str, ...], Tensor | PackedWeight, Tensor | None],
) -> Stack:
    """The projections of a layer that read one input: of each base weight their names, itself, and its bias."""
    dtype = bases[0][1].dtype
    found, scaled = [], []
    rank = 0
    for names, weight, bias in bases:
        targets, out = [], 0
        for name in names:
            rows, _ = projection_shape(config, name)
            pair = lora.pairs.get((layer, name))
            if pair is not None:
                r = pair.A.shape[1]
                part = Part(pair.B.to(dtype), slice(out, out + rows), slice(rank, rank + r))
                targets.append(Target((layer, name), pair.scaling, part))
                own = pair.A.to(dtype)
                scaled.append(own if pair.scaling == 1 else own * pair.scaling)
                rank += r
            out += rows
        found.append(Base(weight, bias, tuple(targets)))
    A = None if not scaled else scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)
    return Stack(tuple(found), A)


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

    def put(self, key: tuple[int, str], side: str, adapters: slice, gradient: Tensor, scaling: float = 1.0) -> None:
        """``scaling`` times ``gradient`` (g, rows, cols) of the adapters in the slice."""
        name = peft_name(*key, side)
        if self._parallel is not None:
            whole = self._sum_later(name, key, side)
        else:
            if name not in self._filled:
                tensor = getattr(self._lora.pairs[key], side)
                self._filled[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            whole = self._filled[name]
        if scaling == 1:
            whole[adapters] = gradient
        else:
            torch.mul(gradient, scaling, out=whole[adapters])

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
