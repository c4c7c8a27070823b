"""What oneDNN multiplies faster on a CPU than torch's own GEMM, and on which processors."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..dtypes import cpu_multiplies_bfloat16


class PackedWeight:
    """A frozen weight (out, in) in oneDNN's blocked layout, once as it is and once transposed; for a CPU.

    The products are those of the weight itself, up to rounding, and faster: the layout is not rebuilt in every
    call. The price is two copies of the weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._transposed = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous())

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x Wᵀ + b``; x (n, in)."""
        return _multiply(x, self._weight, bias)

    def vjp_input(self, dy: Tensor, to: Tensor | None = None) -> Tensor:
        """``dy W``, or ``to + dy W``, which may overwrite ``to``; dy (n, out), to (n, in)."""
        if to is None:
            return _multiply(dy, self._transposed)
        return torch.ops.mkldnn._linear_pointwise.binary(dy, to, self._transposed, None, "add")


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` by oneDNN; W packed, or of any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


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
    """Whether this processor multiplies faster by a :class:`PackedWeight` than by the weight itself.

    Not without AVX-512: there torch's own GEMM (MKL) gives 171 to 186 GFLOP/s on 1240 rows of a 0.5B model's MLP,
    where this gives 137 to 160. On 155 rows it is the other way round, 120 to 148 against 148 to 152.

    Nor in float32 on Intel's processors, where MKL is as fast: a step of a 0.5B model takes 1.03 times as long packed
    as unpacked for eight adapters, and 0.97 times for one, in 8.6 GB instead of 5.8. On AMD's it takes half as long.
    """
    if not can_pack(dtype, device) or torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    return dtype != torch.float32 or not (torch.backends.mkl.is_available() and _made_by_intel())


def _made_by_intel() -> bool:
    tell = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch lack it
    return tell is not None and str(tell().get("cpu_name")).startswith("Intel")


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left right`` of each adapter, with any strides; (G, n, k) and (G, k, m)."""
    if not _one_by_one(left, right):
        return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)
    out = left.new_empty(left.shape[0], left.shape[1], right.shape[2]) if out is None else out
    for index in range(left.shape[0]):
        out[index] = _multiply(left[index], right[index].T)
    return out


ONE_BY_ONE = 1 << 18  # elements of an adapter's two matrices


def _one_by_one(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies one adapter after the other faster than ``bmm`` multiplies them all.

    In float32 ``bmm`` is MKL's, which takes twice as long for 155 rows of 4864 columns by rank 16. For 896 columns it
    is faster, and oneDNN first copies slices of wider rows, element by element.
    """
    if left.dtype != torch.float32 or left.device.type != "cpu":
        return False
    elements = left.shape[2] * (left.shape[1] + right.shape[2])
    if elements < ONE_BY_ONE or not _packing_pays_in_float32():
        return False
    return right[0].is_contiguous() or right[0].T.is_contiguous()


@functools.cache
def _packing_pays_in_float32() -> bool:
    return packing_pays(torch.float32, torch.device("cpu"))
