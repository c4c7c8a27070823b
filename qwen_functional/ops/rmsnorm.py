"""Root-mean-square layer norm (arXiv 1910.07467), of any finite input.

A row whose squares would overflow is first scaled to near one by a power of two, and eps with it: no bit of another row
changes. Otherwise its norm would be infinite, and its output zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 2.0**30  # of an entry: its cube, which autograd of rstd computes, is far from overflow, in float32 too


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``y = x · rstd · w`` with ``rstd = 1 / sqrt(mean(x²) + eps)``, in the dtype of ``x``. Differentiable.

    Args:
        x: (..., H), the residual stream; float32 or float64.
        weight: (H,).

    Returns:
        y (..., H) in the dtype of ``x``, and rstd (..., 1), which the vjp needs.
    """
    scale = _row_scale(x)
    x = x * scale
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps * scale.square())
    return x * rstd * weight.to(x.dtype), rstd * scale


def rmsnorm_to(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same with y in ``dtype``, in three passes over memory."""
    rstd, scale = _rstd(x, eps), None
    if x.is_cuda or not bool(rstd.all()):  # zero where squares overflowed; on a GPU, asking would mean waiting
        scale = _row_scale(x)
        x = x * scale
        rstd = _rstd(x, eps * scale.square())
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.mul(x * rstd, weight.to(x.dtype), out=y)
    return y, rstd if scale is None else rstd * scale


def rmsnorm_vjp(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """``dx = rstd · (g − x · rstd² · mean(g x))`` with ``g = dy · w``; (..., H) in the dtype of ``x``."""
    g = dy * weight.to(x.dtype)
    own, far = rstd, rstd < _LARGE**-2
    if x.is_cuda or bool(far.any()):  # g x could overflow, and rstd² underflow
        x, own = x * torch.where(far, rstd, 1.0), torch.where(far, 1.0, rstd)
    mean = (g * x).mean(-1, keepdim=True)
    return g.addcmul_(x, own.square().mul_(mean).neg_()).mul_(rstd)


def _rstd(x: Tensor, eps: float | Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _row_scale(x: Tensor) -> Tensor:
    """(..., 1): the power of two that brings a row with large entries near one; 1 for the others."""
    most = x.detach().abs().amax(-1, keepdim=True)
    near_one = torch.ldexp(torch.ones_like(most), -torch.frexp(most).exponent).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.where(most > _LARGE, near_one, 1.0)
