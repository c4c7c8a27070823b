"""The available devices, and how close a GPU comes to a reference in float64."""

from __future__ import annotations

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def tolerance(device: str, on_cpu: float) -> float:
    """A test's tolerance on a device, given that on the CPU: a GPU adds in a different order than the reference."""
    return on_cpu if device == "cpu" else max(on_cpu, 1e-9)
