"""A module whose tensors stay where they are, as they are."""

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
    """A base model as the ``from_pretrained`` of such modules load it.

    Args:
        device: by default a GPU where there is one, else the CPU.
        compute_dtype: see :meth:`qwen_functional.Qwen2Weights.compute_in`; None for that of the weights.
        options: of :func:`qwen_functional.load_pretrained`.
    """
    config, weights = load_pretrained(model, device=default_device() if device is None else device, **options)
    return config, weights if compute_dtype is None else weights.compute_in(compute_dtype)


class Frozen(nn.Module):
    """A module with a base model that is not its parameters: torch would move nothing, and not say so.

    To another device it cannot be moved, nor within a module that is. To another dtype it cannot either; but within a
    module that is it stays as it is, as a frozen base should where a network beside it trains in another dtype.
    """

    weights: Qwen2Weights

    @property
    def device(self) -> torch.device:
        """Where the LoRA tensors are expected, and what is made of them comes out."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base model is stored in."""
        return self.weights.dtype

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Itself, where that is the device and dtype it has.

        Raises:
            ValueError: another device or dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, self.dtype):
            name = self._get_name()
            raise ValueError(f"{name} is of {self.dtype}, which is not changed to {dtype}; load it in {dtype}")
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
        """What torch calls here, and in whatever module holds this one, for each move."""
        to = fn(torch.empty(0, device=self.device)).device
        if to != self.device:
            raise ValueError(f"{self._get_name()} is on {self.device} and is not moved to {to}; load it on {to}")
        return super()._apply(fn, recurse)
