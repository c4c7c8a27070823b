"""A frozen projection with low-rank adapters: one GEMM for all adapters, small batched ones for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LowRank:
    """The adapters of one stacked projection, such as q|k|v, in the compute dtype.

    Projections that read the same input are stacked: ``A`` has their rows one below the other, ``B`` is block
    diagonal, so that the stack is itself one adapter of rank R, the sum of the ranks. ``scaling`` is per column
    of ``x Aᵀ``.
    """

    A: Tensor  # (G, R, in)
    B: Tensor  # (G, out, R)
    scaling: Tensor  # (R,), in the accumulation dtype

    def __getitem__(self, adapters: slice) -> LowRank:
        return LowRank(self.A[adapters], self.B[adapters], self.scaling)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> tuple[Tensor, Tensor | None]:
    """``y = x Wᵀ + b + u Bᵀ`` with ``u = s · x Aᵀ``.

    Args:
        x: (G, S, in); or (1, S, in) where all adapters still have the same input, which is then multiplied once.
        weight: (out, in); bias: (out,).

    Returns:
        y (G, S, out) and u (G, S, R), which the vjp needs; u is None without adapters.
    """
    y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    if low_rank is None:
        return y, None
    u = linear_inner(x, low_rank)
    if y.shape[0] == u.shape[0]:
        return y.baddbmm_(u, low_rank.B.mT), u
    return torch.baddbmm(y, u, low_rank.B.mT), u


def linear_inner(x: Tensor, low_rank: LowRank) -> Tensor:
    """``u = s · x Aᵀ``; (G, S, R)."""
    return torch.bmm(x.expand(low_rank.A.shape[0], -1, -1), low_rank.A.mT).mul_(low_rank.scaling)


def linear_vjp_input(dy: Tensor, weight: Tensor, low_rank: LowRank | None, t: Tensor | None) -> Tensor:
    """``dx = dy W + t A``; dy (G, S, out), t of :func:`linear_vjp_inner`; returns (G, S, in)."""
    dx = torch.mm(dy.reshape(-1, dy.shape[-1]), weight).view(*dy.shape[:-1], -1)
    return dx if low_rank is None or t is None else dx.baddbmm_(t, low_rank.A)


def linear_vjp_inner(dy: Tensor, low_rank: LowRank) -> Tensor:
    """``t = s · dy B``, the cotangent of ``x Aᵀ``; (G, S, R)."""
    return torch.bmm(dy, low_rank.B).mul_(low_rank.scaling)


def linear_vjp_A(t: Tensor, x: Tensor) -> Tensor:
    """``dA = tᵀ x``; x (G, S, in) or (1, S, in); returns (G, R, in)."""
    return torch.bmm(t.mT, x.expand(t.shape[0], -1, -1))


def linear_vjp_B(dy: Tensor, u: Tensor) -> Tensor:
    """``dBᵀ = uᵀ dy``; returns (G, R, out). Of a stack only the diagonal blocks are gradients."""
    return torch.bmm(u.mT, dy)
