"""Root-mean-square layer norm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``y = x · rstd · w`` with ``rstd = 1 / sqrt(mean(x²) + eps)``, in the dtype of ``x``.

    Args:
        x: (..., H), the residual stream.
        weight: (H,).

    Returns:
        y (..., H) in the dtype of ``x``, and rstd (..., 1), which the vjp needs.
    """
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd * weight.to(x.dtype), rstd


def rmsnorm_engine(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same with y in ``dtype``, in three passes over memory instead of six."""
    rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.mul(x * rstd, weight.to(x.dtype), out=y), rstd


def rmsnorm_vjp(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """``dx = rstd · (g − x · rstd² · mean(g x))`` with ``g = dy · w``; (..., H) in the dtype of ``x``."""
    g = dy * weight.to(x.dtype)
    mean = (g * x).mean(-1, keepdim=True)
    return g.addcmul_(x, rstd.square().mul_(mean).neg_()).mul_(rstd)
