"""Thousands of training steps through the delta: memory, file descriptors and threads do not grow.

    python tests/soak.py --steps 2000 [--device cuda]

Prints a line for each way to compute; exits with status 1 if something grows.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import torch

from lora_delta import DifferentiableDeltaCompute
from lora_delta.embedded import embedded_checkpoint
from qwen_functional import LoraSpec

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"checkpoint": "none"},
    "block checkpointing": {"checkpoint": "block"},
    "mean_loss": {"checkpoint": "none"},
    "two passes a step": {"adapters_per_pass": 2},
    "streamed": {"stream": "disk"},
    "new probes now and then": {"checkpoint": "none"},
}
PROBES = ["cat=", "3 + 4 = 7", "cats"]
LOOKS = 10
BYTES_PER_STEP = 512  # that a step may leave; allocator noise over 2,000 steps is less, a leak is more


def look(device: torch.device) -> dict[str, int]:
    """What the process holds: resident and GPU bytes, file descriptors, threads."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    held = {"resident": process.memory_info().rss, "files": process.num_fds(), "threads": process.num_threads()}
    if device.type == "cuda":
        held["on the GPU"] = torch.cuda.memory_reserved(device)
    return held


def soak(way: str, steps: int, device: torch.device) -> list[dict[str, int]]:
    """Train a linear generator; returns what is held after each tenth of the steps except the first."""
    options, spec = dict(WAYS[way]), LoraSpec(rank=4, alpha=8)
    stream = options.pop("stream", False)

    def make(probes: list[str]) -> DifferentiableDeltaCompute:
        return DifferentiableDeltaCompute.from_pretrained(
            embedded_checkpoint(), probes, spec, dtype=torch.float32, device=device, stream=stream, **options
        )

    torch.manual_seed(0)
    delta = make(PROBES)
    sizes = {name: rows * columns for name, (rows, columns) in delta.lora_shapes.items()}
    generator, conditions = torch.nn.Linear(8, sum(sizes.values()), device=device), torch.randn(4, 8, device=device)
    teachers = torch.randn(4, *delta.base_activation.shape, device=device)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-4)
    looks = []
    for step in range(steps):
        if way.startswith("new probes") and step % 20 == 0:
            delta = make([*PROBES, "x" * (1 + step // 20 % 7)])
        parts = generator(conditions).split(list(sizes.values()), dim=1)
        tensors = {n: part.view(4, *delta.lora_shapes[n]) for n, part in zip(sizes, parts, strict=True)}
        if way == "mean_loss":
            loss = delta.mean_loss(tensors, lambda deltas, own: (deltas - teachers[own]).square().mean())
        else:
            loss = (delta(tensors) - teachers).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % (steps // LOOKS) == 0:
            looks.append(look(device))
    return looks[1:]


def grown(looks: Sequence[dict[str, int]], steps: int) -> dict[str, int]:
    """What grew by more than it may from the first half of the looks to the second, comparing the maxima."""
    half = len(looks) // 2
    grew = {name: max(l[name] for l in looks[-half:]) - max(l[name] for l in looks[:-half]) for name in looks[0]}
    return {name: by for name, by in grew.items() if by > (BYTES_PER_STEP * steps // 2 if name == "resident" else 0)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit status 1 if something grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    print(f"{'':<26}{'resident MB: first':>20}{'middle':>9}{'last':>9}{'files':>10}{'threads':>10}  grows")
    failed = False
    for way in options.ways:
        looks = soak(way, options.steps, device)
        grows = grown(looks, options.steps)
        megabytes = [looks[i]["resident"] / 1e6 for i in (0, len(looks) // 2, -1)]
        ends = [f"{looks[0][name]}–{looks[-1][name]}" for name in ("files", "threads")]
        numbers = f"{megabytes[0]:>20.1f}{megabytes[1]:>9.1f}{megabytes[2]:>9.1f}{ends[0]:>10}{ends[1]:>10}"
        gpu = "".join(f", GPU MB {looks[i]['on the GPU'] / 1e6:.0f}" for i in (0, -1) if device.type == "cuda")
        print(f"{way:<26}{numbers}  {grows or 'nothing'}{gpu}", flush=True)
        failed = failed or bool(grows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
