"""LoRA tensors as the engine multiplies by them: with the base weights of all projections that read the same input.

On the way back, a stack's gradients are split into one tensor per LoRA tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .architecture import STACKS
from .dtypes import accumulation_dtype
from .lora import Lora, peft_name
from .ops.linear import Weight
from .parallel import TensorParallel

Key = tuple[int, str]  # (layer, projection)
Side = tuple[Key, str]  # a LoRA's "A" or "B"


@dataclass(frozen=True)
class Adapted:
    """The adapters of one projection of a stack, in the compute dtype.

    Attributes:
        A: (G, r, in), times ``scaling``; or None where the stack holds the A of all its projections in one matrix.
        B: (G, out, r).
        base: which of the stack's base weights gives its outputs; ``outputs``: their place among that weight's.
        ranks: its place among the R ranks of the stack.
    """

    key: Key
    scaling: float
    B: Tensor
    base: int
    outputs: slice
    ranks: slice
    A: Tensor | None = None


@dataclass(frozen=True)
class Stack:
    """The projections that read one input, in one base weight or several.

    Attributes:
        weights: (out, in) each; biases: (out,) or None.
        adapted: those that have adapters.
        A: (G, R, in), all A stacked row-wise, each times its scaling; None where there are none, and on a backend
            that keeps them separate.
        summed: the processes over which the stack's output is a partial sum; None if it is whole. ``summed_back``: the
            same for dx.
    """

    name: str  # in architecture.STACKS
    weights: tuple[Weight, ...]
    biases: tuple[Tensor | None, ...]
    adapted: tuple[Adapted, ...]
    A: Tensor | None = None
    summed: TensorParallel | None = None
    summed_back: TensorParallel | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return self.weights[0].dtype

    @property
    def n_adapters(self) -> int:
        return self.adapted[0].B.shape[0] if self.adapted else 1

    def part(self, projection: str) -> Adapted | None:
        """The adapters of one projection."""
        return next((part for part in self.adapted if part.key[1] == projection), None)

    def __getitem__(self, adapters: slice) -> Stack:
        """The stack with a slice of the adapters."""
        if not self.adapted or len(range(self.n_adapters)[adapters]) == self.n_adapters:
            return self
        parts = tuple(
            replace(part, B=part.B[adapters], A=None if part.A is None else part.A[adapters]) for part in self.adapted
        )
        return replace(self, adapted=parts, A=None if self.A is None else self.A[adapters])


@dataclass
class Input:
    """What a stack reads.

    Attributes:
        x: (G, S, in); empty where it was freed, to be recomputed by the vjp.
        u: x Aᵀ of the stack's adapters, in the backend's own form; None until it is computed.
    """

    x: Tensor
    u: Tensor | None = None


@dataclass
class Cotangent:
    """The cotangent of a stack's outputs.

    Attributes:
        dys: (G, S, out), one for each base weight, in the compute dtype.
        t: dy B of the stack's adapters, in the backend's own form; None until it is computed.
    """

    dys: list[Tensor]
    t: Tensor | None = None


@dataclass
class Product:
    """What a stack gives: ys (G, S, out), one for each base weight, or on the way back dx (G, S, in).

    If ``stack`` is set, these are the base weights' products alone, and whatever reads them adds the adapters':
    ``u Bᵀ`` from ``low.u``, or ``t A`` from ``low.t``.
    """

    ys: list[Tensor]
    stack: Stack | None = None
    low: Any = None  # an Input, or a Cotangent


class Gradients:
    """The gradients of the wanted LoRA tensors, filled in layer by layer, each in its tensor's own dtype."""

    def __init__(self, lora: Lora, wanted: frozenset[Side], parallel: TensorParallel | None = None) -> None:
        self._lora, self._wanted, self._parallel = lora, wanted, parallel
        self._filled: dict[Side, Tensor] = {}
        self.pending: list[tuple[Stack, Input, Cotangent]] = []  # for a backend that computes several together

    def wants(self, key: Key, side: str) -> bool:
        return (key, side) in self._wanted

    def wants_any(self, layer: int, *stacks: str) -> bool:
        return any(((layer, name), side) in self._wanted for stack in stacks for name in STACKS[stack] for side in "AB")

    def of(self, adapters: slice) -> GradientsOf:
        """Those of a slice of the adapters."""
        return GradientsOf(self, adapters)

    def whole(self, key: Key, side: str) -> Tensor:
        """The gradient of a wanted tensor, (G, …), to be filled in."""
        if self._parallel is not None:
            return self._sum_later(key, side)
        if (key, side) not in self._filled:
            tensor = getattr(self._lora.pairs[key], side)
            self._filled[key, side] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return self._filled[key, side]

    def _sum_later(self, key: Key, side: str) -> Tensor:
        """This rank's part of a gradient that becomes whole in one sum over all ranks, of all tensors at once.

        Where a tensor is split, the rest of it is zero; where it is not, every rank has a partial sum.
        """
        if not self._filled:
            wanted = dict(self._tensors())
            wide = max((accumulation_dtype(t.dtype) for t in wanted.values()), key=lambda dtype: dtype.itemsize)
            sizes = [tensor.numel() for tensor in wanted.values()]
            self._flat = torch.zeros(sum(sizes), dtype=wide, device=next(iter(wanted.values())).device)
            parts = self._flat.split(sizes)
            self._filled = {n: part.view(t.shape) for (n, t), part in zip(wanted.items(), parts, strict=True)}
        whole = self._filled[key, side]
        assert self._parallel is not None
        return whole[self._parallel.of_lora(key[1], side, whole.shape)]

    def _tensors(self) -> Iterator[tuple[Side, Tensor]]:
        """The wanted LoRA tensors."""
        for key, pair in self._lora.pairs.items():
            for side, tensor in (("A", pair.A), ("B", pair.B)):
                if (key, side) in self._wanted:
                    yield (key, side), tensor

    def collect(self) -> dict[str, Tensor]:
        """{PEFT name: gradient, shaped as given to ``bind``}, in order. Zero for a tensor that nothing depends on."""
        if self._parallel is not None and self._filled:
            self._parallel.sum_(self._flat)
        gradients = {}
        for (key, side), tensor in self._tensors():
            gradient = self._filled.get((key, side))
            if gradient is None:
                gradient = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            gradient = gradient.to(tensor.dtype)
            gradients[peft_name(*key, side)] = gradient if self._lora.batched else gradient[0]
        return gradients


@dataclass(frozen=True)
class GradientsOf:
    """Gradients of a slice of the adapters."""

    every: Gradients
    adapters: slice

    def wants(self, key: Key, side: str) -> bool:
        return self.every.wants(key, side)

    def place(self, key: Key, side: str) -> Tensor | None:
        """Where a gradient goes, (g, …); None where it is not wanted."""
        return self.every.whole(key, side)[self.adapters] if self.every.wants(key, side) else None

    def put(self, key: Key, side: str, gradient: Tensor, scaling: float = 1.0) -> None:
        """Store ``scaling`` times ``gradient`` (g, rows, cols)."""
        place = self.every.whole(key, side)[self.adapters]
        if scaling == 1:
            place.copy_(gradient)
        else:
            torch.mul(gradient, scaling, out=place)


