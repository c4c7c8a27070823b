"""The MLP's gated activation (arXiv 2002.05202), on stacked gate|up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up`` with ``silu(z) = z σ(z)``. ``gate_up`` (..., 2I); returns (..., I)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_vjp_(dy: Tensor, gate_up: Tensor) -> Tensor:
    """``[dy · up · σ(gate)(1 + gate (1 − σ(gate))), dy · silu(gate)]``, written over ``gate_up`` (..., 2I)."""
    gate, up = gate_up.chunk(2, -1)
    d_up = F.silu(gate).mul_(dy)
    torch.ops.aten.silu_backward.grad_input(up * dy, gate, grad_input=gate)
    up.copy_(d_up)
    return gate_up
