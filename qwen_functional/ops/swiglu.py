"""The MLP's gated activation (arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` with ``silu(z) = z σ(z)``; all (..., I). Differentiable."""
    return F.silu(gate) * up


def swiglu_engine(gate: Tensor, up: Tensor, *, keep_silu: bool = False) -> tuple[Tensor, Tensor]:
    """The same, and silu(gate) (..., I), which the vjp needs; with few passes over memory.

    Without ``keep_silu`` the product is written over silu(gate), and both are one tensor.
    """
    silu = torch.empty_like(gate)
    torch.ops.aten.silu.out(gate, out=silu)  # twice as fast as F.silu, whose output is fresh memory
    return (silu * up if keep_silu else silu.mul_(up)), silu


def swiglu_vjp_(dy: Tensor, gate: Tensor, up: Tensor, silu: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """``dy · up · σ(gate)(1 + gate (1 − σ(gate)))`` and ``dy · silu(gate)``, written over ``gate`` and ``up``.

    ``scratch`` (..., I) is overwritten; the product that :func:`swiglu_engine` returned will do.
    """
    torch.mul(dy, up, out=scratch)
    torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=gate)
    torch.mul(dy, silu, out=up)
    return gate, up
