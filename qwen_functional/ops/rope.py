"""Rotary position embedding (arXiv 2104.09864), with linear and YaRN (arXiv 2309.00071) scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import Qwen2Config
from ..memory import to_device


def rope_frequencies(config: Qwen2Config) -> tuple[Tensor, float]:
    """Inverse frequencies (head_dim/2,) float32 on the CPU, and the factor by which cos and sin are multiplied.

    Source of the formulas: the two papers; of the fields and their defaults: transformers'
    ``modeling_rope_utils``.
    """
    rope = config.rope_parameters
    dim, theta = config.head_dim, float(rope["rope_theta"])
    wavelengths = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope["rope_type"] == "default":
        return 1.0 / wavelengths, 1.0
    factor = float(rope["factor"])
    if rope["rope_type"] == "linear":
        return 1.0 / wavelengths / factor, 1.0
    original = rope["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        """The (fractional) dimension pair that makes ``rotations`` turns over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(rope.get("beta_fast") or 32), dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if high == low else high  # the ramp needs a width
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = interpolated / (factor * wavelengths) + (1 - interpolated) / wavelengths
    return frequencies, _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: object, factor: float) -> float:
    get = rope.get  # type: ignore[attr-defined]
    if get("attention_factor") is not None:
        return float(get("attention_factor"))

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if get("mscale") and get("mscale_all_dim"):
        return mscale(get("mscale")) / mscale(get("mscale_all_dim"))
    return mscale(1.0)


def rope_tables(
    config: Qwen2Config, positions: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (*positions.shape, head_dim/2). Angles are taken in float32, as transformers does in any dtype."""
    frequencies, factor = rope_frequencies(config)
    angles = to_device(positions.to(torch.float32), device)[..., None] * to_device(frequencies, device)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[x₁ cos − x₂ sin, x₂ cos + x₁ sin]`` for the halves x₁, x₂ of each head. Differentiable.

    Args:
        x: (..., head_dim), any strides and dtype.
        cos, sin: broadcastable to (..., head_dim/2).
    """
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def rope_into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """The same, written to ``out`` (..., head_dim), of any strides; computed in the dtype of cos and sin."""
    x = x.to(cos.dtype)
    x1, x2 = x.chunk(2, -1)
    y = out if out.dtype == cos.dtype else torch.empty_like(x)
    y1, y2 = y.chunk(2, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return out if y is out else out.copy_(y)


def rope_vjp(dy: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """``[dy₁ cos + dy₂ sin, dy₂ cos − dy₁ sin]``: the rotation back; written to ``out`` (..., head_dim)."""
    return rope_into(dy, cos, -sin, out)
