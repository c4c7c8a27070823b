"""A frozen projection with low-rank adapters: one GEMM for all adapters, small batched ones for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Callable[..., Tensor]  # torch.bmm, or a backend's own with the same arguments


class OwnLayout(Protocol):
    """A weight (out, in) in a backend's own layout, which comes with its own products."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x Wᵀ + b``; x (n, in)."""

    def vjp_input(self, dy: Tensor, to: Tensor | None = None) -> Tensor:
        """``dy W``, or ``to + dy W``, which may overwrite ``to``; dy (n, out), to (n, in)."""


Weight = Tensor | OwnLayout


@dataclass(frozen=True)
class Part:
    """The adapters of one projection: its B, its place among the outputs of its base weight, and which of the R ranks
    are its own.
    """

    B: Tensor  # (G, out of the part, r)
    outputs: slice
    ranks: slice

    def __getitem__(self, adapters: slice) -> Part:
        return Part(self.B[adapters], self.outputs, self.ranks)


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    u: Tensor | None = None,
    parts: Sequence[Part] = (),
) -> Tensor:
    """``y = x Wᵀ + b``, and ``y += u Bᵀ`` in the outputs of each part; (G, S, out).

    Args:
        x: (G, S, in); or (1, S, in) where all adapters still have the same input, which is then multiplied once.
        weight: (out, in); bias: (out,).
        u: (G, S, R) from :func:`linear_inner`; needed where there are parts.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias) if isinstance(weight, Tensor) else weight.linear(rows, bias)
    y = y.view(*x.shape[:-1], -1)
    if u is None or not parts:
        return y
    if y.shape[0] != u.shape[0]:
        y = y.repeat(u.shape[0], 1, 1)
    for part in parts:
        y[..., part.outputs].baddbmm_(u[..., part.ranks], part.B.mT)
    return y


def linear_inner(x: Tensor, A: Tensor, product: Product = torch.bmm) -> Tensor:
    """``u = x Aᵀ`` (G, S, R); x (G, S, in) or (1, S, in), A (G, R, in)."""
    return product(x.expand(A.shape[0], -1, -1), A.mT)


def linear_vjp_input(dy: Tensor, weight: Weight, to: Tensor | None = None) -> Tensor:
    """``dx = dy W`` (G, S, in), of the base weight alone; dy (G, S, out).

    ``to`` (G, S, in) is the dx from another projection of the same input; the sum may overwrite it.
    """
    rows = dy.reshape(-1, dy.shape[-1])
    total = None if to is None else to.view(rows.shape[0], -1)
    if not isinstance(weight, Tensor):
        dx = weight.vjp_input(rows, total)
    else:
        dx = torch.mm(rows, weight) if total is None else total.addmm_(rows, weight)
    return dx.view(*dy.shape[:-1], -1)


def linear_vjp_inner(dy: Tensor, B: Tensor, out: Tensor, product: Product = torch.bmm) -> Tensor:
    """``t = dy B`` of one part, the cotangent of ``x Aᵀ``, written to ``out`` (G, S, r); dy (G, S, out of the part)."""
    return product(dy, B, out=out)


def linear_vjp_A(t: Tensor, x: Tensor, product: Product = torch.bmm) -> Tensor:
    """``dA = tᵀ x``; t (G, S, r), x (G, S, in) or (1, S, in); returns (G, r, in)."""
    return product(t.mT, x.expand(t.shape[0], -1, -1))


def linear_vjp_B(dy: Tensor, u: Tensor, product: Product = torch.bmm) -> Tensor:
    """``dB = dyᵀ u`` of one part; dy (G, S, out of the part), u (G, S, r); returns (G, out, r)."""
    return product(u.mT, dy).mT  # dyᵀ u itself is three times slower in bfloat16
