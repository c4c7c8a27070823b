"""A frozen projection with low-rank adapters: one GEMM for all adapters, small batched ones for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dtypes import cpu_multiplies_bfloat16


class PackedWeight:
    """A frozen weight (out, in) in oneDNN's blocked layout, once as it is and once transposed; for a CPU.

    The products are those of the weight itself, up to rounding, and faster: the layout is not made again in every
    call. The price is two copies of the weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._transposed = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous())

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x Wᵀ + b``; x (n, in)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")

    def vjp_input(self, dy: Tensor, to: Tensor | None = None) -> Tensor:
        """``dy W``, or ``to + dy W``, which may be written over ``to``; dy (n, out), to (n, in)."""
        if to is None:
            return torch.ops.mkldnn._linear_pointwise(dy, self._transposed, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(dy, to, self._transposed, None, "add")


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch, on this processor, multiplies by a :class:`PackedWeight`."""
    if (
        device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_multiplies_bfloat16())


def packing_pays(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it does so faster than by the weight itself.

    Not without AVX-512: there torch's own GEMM (MKL) gives 171 to 186 GFLOP/s on 1240 rows of an 0.5B model's MLP,
    where this gives 137 to 160. On 155 rows it is the other way round, 120 to 148 against 148 to 152.
    """
    return can_pack(dtype, device) and torch.backends.cpu.get_cpu_capability() != "AVX2"


@dataclass(frozen=True)
class Part:
    """One projection of a stack: its B, and where it lies among the stack's outputs and ranks."""

    B: Tensor  # (G, out of the part, r)
    outputs: slice
    ranks: slice


@dataclass(frozen=True)
class LowRank:
    """The adapters of one stacked projection, such as q|k|v, in the compute dtype.

    Projections that read the same input are stacked: ``A`` has their rows one below the other, R in all.
    ``scaling`` is per column of ``x Aᵀ``.
    """

    A: Tensor  # (G, R, in)
    parts: tuple[Part, ...]
    scaling: Tensor  # (R,), in the accumulation dtype

    def __getitem__(self, adapters: slice) -> LowRank:
        parts = tuple(Part(part.B[adapters], part.outputs, part.ranks) for part in self.parts)
        return LowRank(self.A[adapters], parts, self.scaling)


def linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> tuple[Tensor, Tensor | None]:
    """``y = x Wᵀ + b``, and ``y += u Bᵀ`` with ``u = s · x Aᵀ`` for each part of the stack.

    Args:
        x: (G, S, in); or (1, S, in) where all adapters still have the same input, which is then multiplied once.
        weight: (out, in); bias: (out,).

    Returns:
        y (G, S, out) and u (G, S, R), which the vjp needs; u is None without adapters.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = weight.linear(rows, bias) if isinstance(weight, PackedWeight) else F.linear(rows, weight, bias)
    y = y.view(*x.shape[:-1], -1)
    if low_rank is None:
        return y, None
    u = linear_inner(x, low_rank)
    if y.shape[0] != u.shape[0]:
        y = y.repeat(u.shape[0], 1, 1)
    for part in low_rank.parts:
        y[..., part.outputs].baddbmm_(u[..., part.ranks], part.B.mT)
    return y, u


def linear_inner(x: Tensor, low_rank: LowRank) -> Tensor:
    """``u = s · x Aᵀ``; (G, S, R)."""
    return torch.bmm(x.expand(low_rank.A.shape[0], -1, -1), low_rank.A.mT).mul_(low_rank.scaling)


def linear_vjp_input(
    dy: Tensor, weight: Tensor | PackedWeight, low_rank: LowRank | None, t: Tensor | None, to: Tensor | None = None
) -> Tensor:
    """``dx = dy W + t A``; dy (G, S, out), t of :func:`linear_vjp_inner`; returns (G, S, in).

    ``to`` (G, S, in) is what another projection of the same input sent back; the sum may be written over it.
    """
    rows = dy.reshape(-1, dy.shape[-1])
    total = None if to is None else to.view(rows.shape[0], -1)
    if isinstance(weight, PackedWeight):
        dx = weight.vjp_input(rows, total)
    else:
        dx = torch.mm(rows, weight) if total is None else total.addmm_(rows, weight)
    dx = dx.view(*dy.shape[:-1], -1)
    return dx if low_rank is None or t is None else dx.baddbmm_(t, low_rank.A)


def linear_vjp_inner(dy: Tensor, low_rank: LowRank) -> Tensor:
    """``t = s · dy B``, the cotangent of ``x Aᵀ``; (G, S, R)."""
    t = dy.new_empty(*dy.shape[:-1], low_rank.A.shape[1])
    for part in low_rank.parts:
        torch.bmm(dy[..., part.outputs], part.B, out=t[..., part.ranks])
    return t.mul_(low_rank.scaling)


def linear_vjp_A(t: Tensor, x: Tensor) -> Tensor:
    """``dA = tᵀ x``; x (G, S, in) or (1, S, in); returns (G, R, in)."""
    return torch.bmm(t.mT, x.expand(t.shape[0], -1, -1))


def linear_vjp_B(dy: Tensor, u: Tensor) -> Tensor:
    """``dB = dyᵀ u`` of one part; dy (G, S, out of the part), u (G, S, r); returns (G, out, r)."""
    return torch.bmm(u.mT, dy).mT  # dyᵀ u itself is three times slower in bfloat16
