"""Losses on deltas, and what every loss checks of its arguments.

Pure functions, differentiable to any order in both arguments. Half precision is computed in float32; a loss is a
float32 scalar, or float64 if an input is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.ops.sums import index_sum_


def delta_mse(delta: Tensor, target: Tensor, *, normalize: bool = False) -> Tensor:
    """Mean square of ``delta − target`` over all elements, and so over adapters.

    Args:
        delta, target: (H,), (G, H) or (G, …, H), as :class:`DifferentiableDeltaCompute` returns them.
        normalize: the mean over vectors of ``‖delta − target‖² / ‖target‖²`` instead: a target counts the same whatever
            its norm, and a delta of zero costs 1. For a target of zero the divisor is H, which gives the plain mean
            square.

    Raises:
        ValueError: different shapes or devices, no elements, or a tensor that is not floating point.
    """
    delta, target = checked_pair("delta", delta, target)
    if not normalize:
        return (delta - target).square().mean()
    error, scale = (delta - target).square().sum(-1), target.square().sum(-1)
    return (error / nonzero_or(scale, delta.shape[-1])).mean()


def delta_cosine(delta: Tensor, target: Tensor) -> Tensor:
    """1 − cosine similarity along the last dimension, mean over all vectors: from 0 (same direction) to 2 (opposite).

    Where either vector is zero there is no angle: the loss is 1 there, as with ``F.cosine_similarity``, and the
    gradient is zero. On its own it therefore cannot move a generator away from a LoRA of zeros.

    Args:
        delta, target: (H,), (G, H) or (G, …, H).

    Raises:
        ValueError: as :func:`delta_mse`.
    """
    return cosine_distances(*checked_pair("delta", delta, target)).mean()


def cosine_distances(delta: Tensor, target: Tensor) -> Tensor:
    """1 − cosine similarity of each pair of vectors, 1 where one of them is zero."""
    tiny = torch.finfo(delta.dtype).tiny
    # NaN counts as having an angle, or a loss of 1 would hide it.
    has_angle = ~((delta.square().sum(-1) <= tiny) | (target.square().sum(-1) <= tiny))[..., None]
    # Squares of a long vector overflow: it is first scaled so that its largest entry is 1. where() comes before the
    # norm: after it, the gradient of 0/0 would pass through where() as 0 · NaN.
    largest = [torch.where(has_angle, v.detach().abs().amax(-1, keepdim=True), 1.0) for v in (delta, target)]
    units = [torch.where(has_angle, v / scale, 1.0) for v, scale in zip((delta, target), largest, strict=True)]
    units = [v / torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in units]
    # Half the squared distance of unit vectors is 1 − cos, without the cancellation near 0.
    distance = (units[0] - units[1]).square().sum(-1) / 2
    return torch.where(has_angle[..., 0], distance, 1.0)


def delta_loss(
    delta: Tensor, target: Tensor, *, mse_weight: float = 1.0, cosine_weight: float = 1.0, normalize: bool = False
) -> Tensor:
    """``mse_weight · delta_mse + cosine_weight · delta_cosine``; a part with weight 0 is not computed.

    Args:
        delta, target, normalize: see :func:`delta_mse`.

    Raises:
        ValueError: a weight that is negative or not finite, both weights 0, or as :func:`delta_mse`.
    """
    _check_weights(mse_weight, cosine_weight)
    parts = []
    if mse_weight:
        parts.append(mse_weight * delta_mse(delta, target, normalize=normalize))
    if cosine_weight:
        parts.append(cosine_weight * delta_cosine(delta, target))
    return torch.stack(parts).sum()


def _check_weights(mse_weight: float, cosine_weight: float) -> None:
    for name, weight in (("mse_weight", mse_weight), ("cosine_weight", cosine_weight)):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{name} is {weight!r}, expected a finite number of 0 or more")
    if not mse_weight and not cosine_weight:
        raise ValueError("mse_weight and cosine_weight are both 0, expected one above 0")


def adapters_delta_loss(
    deltas: Tensor,
    targets: Tensor,
    adapters: Tensor,
    n_adapters: int,
    *,
    mse_weight: float = 1.0,
    cosine_weight: float = 1.0,
) -> Tensor:
    """The loss (G,) of adapters that each have their own vectors, not all equally many.

    For each adapter ``mse_weight · Σ‖delta − target‖² / Σ‖target‖²``, summed over its vectors, plus ``cosine_weight``
    times their mean of one minus the cosine; then the mean over layers. The overall size of an adapter's targets thus
    does not matter, but within an adapter a vector that hardly moves counts less than one that does. If all targets of
    an adapter are zero, the divisor is their number of elements.

    Args:
        deltas, targets: (layers, V, H).
        adapters: (V,) integer, the adapter that each vector belongs to.

    Raises:
        ValueError: as :func:`delta_loss`, or other shapes.
    """
    _check_weights(mse_weight, cosine_weight)
    deltas, targets = checked_pair("deltas", deltas, targets)
    if deltas.dim() != 3 or tuple(adapters.shape) != (deltas.shape[1],):
        found = f"deltas have shape {tuple(deltas.shape)} and adapters {tuple(adapters.shape)}"
        raise ValueError(f"{found}, expected (layers, V, H) and (V,)")

    def sums(each: Tensor) -> Tensor:  # (layers, V) to (layers, G)
        return index_sum_(each.new_zeros(len(each), n_adapters), 1, adapters, each)

    counts = sums(torch.ones_like(deltas[..., 0]))
    total = deltas.new_zeros(n_adapters)
    if mse_weight:
        error, scale = sums((deltas - targets).square().sum(-1)), sums(targets.square().sum(-1))
        ratio = error / torch.where(scale == 0, counts * deltas.shape[-1], scale)
        total = total + mse_weight * ratio.mean(0)
    if cosine_weight:
        total = total + cosine_weight * (sums(cosine_distances(deltas, targets)) / counts).mean(0)
    return total


def nonzero_or(scale: Tensor, instead: int) -> Tensor:
    """A divisor that is never zero: the scale, or ``instead`` where the scale is zero."""
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, float(instead))


def check_float(name: str, tensor: object) -> None:
    """Raises ``ValueError`` unless ``tensor`` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected a floating-point dtype")


def checked_pair(name: str, ours: Tensor, theirs: Tensor, same_shape: bool = True) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the loss.

    Raises:
        ValueError: different shapes or devices, no elements, or a tensor that is not floating point.
    """
    for which, tensor in ((name, ours), (f"the target of {name}", theirs)):
        check_float(which, tensor)
        if not tensor.numel() or not tensor.dim():
            raise ValueError(f"{which} has shape {tuple(tensor.shape)}, expected one dimension or more, none empty")
    if same_shape and ours.shape != theirs.shape:
        raise ValueError(f"{name} has shape {tuple(ours.shape)}, its target {tuple(theirs.shape)}: expected the same")
    if ours.device != theirs.device:
        raise ValueError(f"{name} is on {ours.device}, its target on {theirs.device}: expected the same")
    dtype = accumulation_dtype(torch.promote_types(ours.dtype, theirs.dtype))
    return ours.to(dtype), theirs.to(dtype)
