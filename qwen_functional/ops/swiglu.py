"""The MLP's gated activation (arXiv 2002.05202), on stacked gate|up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up`` with ``silu(z) = z σ(z)``. ``gate_up`` (..., 2I); returns (..., I). Differentiable."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_engine(gate_up: Tensor, *, keep_silu: bool = False) -> tuple[Tensor, Tensor]:
    """The same, and silu(gate) (..., I), which the vjp needs; with few passes over memory.

    Without ``keep_silu`` the product is written over silu(gate), and both are one tensor.
    """
    gate, up = gate_up.chunk(2, -1)
    silu = torch.empty_like(gate, memory_format=torch.contiguous_format)
    torch.ops.aten.silu.out(gate, out=silu)  # twice as fast as F.silu, whose output is fresh memory
    return (silu * up if keep_silu else silu.mul_(up)), silu


def swiglu_vjp_(dy: Tensor, gate_up: Tensor, silu: Tensor, scratch: Tensor) -> Tensor:
    """``[dy · up · σ(gate)(1 + gate (1 − σ(gate))), dy · silu(gate)]``, written over ``gate_up`` (..., 2I).

    ``scratch`` (..., I) is overwritten; the product that :func:`swiglu_engine` returned will do.
    """
    gate, up = gate_up.chunk(2, -1)
    torch.mul(dy, up, out=scratch)
    torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=gate)
    torch.mul(dy, silu, out=up)
    return gate_up
