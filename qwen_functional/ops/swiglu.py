"""The MLP's gated activation (arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` with ``silu(z) = z σ(z)``; all (..., I). Differentiable."""
    return F.silu(gate) * up


def swiglu_(gate: Tensor, up: Tensor) -> Tensor:
    """The same, written over ``gate``."""
    return torch.ops.aten.silu.out(gate, out=gate).mul_(up)


def swiglu_partials_(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, written over ``up``, and all that the vjp needs: both partial derivatives.

    Returns:
        a (..., I), in the memory of ``up``; ``∂a/∂gate = up · σ(gate)(1 + gate (1 − σ(gate)))``, in that of ``gate``;
        and ``∂a/∂up = silu(gate)``.
    """
    silu = torch.empty_like(gate)
    torch.ops.aten.silu.out(gate, out=silu)  # twice as fast as F.silu, whose output is fresh memory
    torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=gate)
    return up.mul_(silu), gate, silu


def swiglu_vjp_(da: Tensor, by_gate: Tensor, by_up: Tensor) -> tuple[Tensor, Tensor]:
    """``da · ∂a/∂gate`` and ``da · ∂a/∂up``, written over the partial derivatives."""
    return by_gate.mul_(da), by_up.mul_(da)
