"""The devices at hand, and how near a GPU comes to a reference in float64."""

from __future__ import annotations

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def tolerance(device: str, on_cpu: float) -> float:
    """What a test allows on a device, of what it allows on the CPU: a GPU adds in another order than the reference."""
    return on_cpu if device == "cpu" else max(on_cpu, 1e-9)
