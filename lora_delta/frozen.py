"""A module whose tensors keep their device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qwen_functional import Qwen2Config, Qwen2Weights, load_pretrained

from .distributed import default_device

Self = TypeVar("Self", bound="Frozen")


def load_frozen(
    model: str | Path,
    device: torch.device | str | None,
    compute_dtype: torch.dtype | None,
    **options: Any,
) -> tuple[Qwen2Config, Qwen2Weights]:
    """A base model, loaded as in ``from_pretrained`` of such modules.

    Args:
        device: by default a GPU where there is one, else the CPU.
        compute_dtype: see :meth:`qwen_functional.Qwen2Weights.compute_in`; None for that of the weights.
        options: of :func:`qwen_functional.load_pretrained`.
    """
    config, weights = load_pretrained(model, device=default_device() if device is None else device, **options)
    return config, weights if compute_dtype is None else weights.compute_in(compute_dtype)


class Frozen(nn.Module):
    """A module whose base model is not among its parameters: torch would silently not move it.

    Moving it to another device is an error, also as part of a larger module. Changing its dtype is an error, too; but
    when a larger module changes its dtype, this one stays as it is: the dtype of a frozen base need not be that of a
    network trained on it.
    """

    weights: Qwen2Weights

    @property
    def device(self) -> torch.device:
        """Where the LoRA tensors are expected, and where results are."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base model is stored in."""
        return self.weights.dtype

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """This module, if it has that device and dtype.

        Raises:
            ValueError: another device or dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, self.dtype):
            name = self._get_name()
            raise ValueError(f"{name} has dtype {self.dtype}, which is not changed to {dtype}; load it in {dtype}")
        return super().to(device=device)

    def half(self: Self) -> Self:
        return self.to(torch.float16)

    def bfloat16(self: Self) -> Self:
        return self.to(torch.bfloat16)

    def float(self: Self) -> Self:
        return self.to(torch.float32)

    def double(self: Self) -> Self:
        return self.to(torch.float64)

    def type(self: Self, dst_type: torch.dtype | str) -> Self:
        return self.to(torch.empty(0).type(dst_type))

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Called by torch for each move, of this module or of one that contains it."""
        to = fn(torch.empty(0, device=self.device)).device
        if to != self.device:
            raise ValueError(f"{self._get_name()} is on {self.device} and is not moved to {to}; load it on {to}")
        return super()._apply(fn, recurse)
