"""What tests of losses share: numbers, an adapter of two modules, and its explicit weight updates."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_functional.lora import peft_name

Q_A, Q_B = (peft_name(0, "q_proj", side) for side in "AB")
UP_A, UP_B = (peft_name(1, "up_proj", side) for side in "AB")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapter(*batch: int, seed: int = 0, ranks: tuple[int, int] = (3, 2)) -> dict[str, Tensor]:
    """q_proj (7, 5) and up_proj (9, 4), in float64."""
    r, s = ranks
    shapes = {Q_A: (r, 5), Q_B: (7, r), UP_A: (s, 4), UP_B: (9, s)}
    return {name: randn(*batch, *shape, seed=10 * seed + i) for i, (name, shape) in enumerate(shapes.items())}


def updates(tensors: dict[str, Tensor], scalings: tuple[float, float] = (1, 1)) -> Tensor:
    """The explicit weight updates of both modules, flattened: (elements,) or (G, elements)."""
    q, up = scalings[0] * tensors[Q_B] @ tensors[Q_A], scalings[1] * tensors[UP_B] @ tensors[UP_A]
    return torch.cat([q.flatten(-2), up.flatten(-2)], -1)


def relative(value: Tensor, expected: Tensor) -> float:
    return float(((value.double() - expected).abs() / expected.abs()).detach())
