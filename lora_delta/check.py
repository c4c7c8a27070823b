"""The sanity check: do gradients flow, does the delta respond, does memory stay flat, does half precision agree."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen_functional import LoraSpec
from qwen_functional.architecture import PROJECTIONS
from qwen_functional.lora import parse_name
from qwen_functional.memory import give_back_freed_memory

from .delta import DifferentiableDeltaCompute
from .embedded import embedded_checkpoint

# A half-precision delta is a small difference of rounded numbers; a mistake gives cosines far below these.
HALF_DELTA_COSINE, HALF_GRADIENT_COSINE = 0.98, 0.95
_FIRST_STEPS = 3  # may allocate what later ones reuse, such as plans and a GPU's workspaces


@dataclass(frozen=True)
class CheckResult:
    """One line of the report. ``detail`` holds the measured figures."""

    name: str
    passed: bool
    detail: str
    seconds: float


def random_lora(
    shapes: Mapping[str, tuple[int, int]], seed: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """One float32 adapter, nonzero throughout, fixed by the seed: A normal with std ``1/sqrt(in)``, B with 0.02."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.02 if ".lora_B." in name else 1 / math.sqrt(shape[1])
        tensors[name] = (torch.randn(shape, generator=generator) * scale).to(device)
    return tensors


class SmallGenerator(nn.Module):
    """A stand-in for a generator: a condition (32,) through an MLP to one head per projection and side.

    A layer's embedding is added to the condition, so that all layers share the heads.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], width: int = 32) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.places = {name: parsed for name in shapes if (parsed := parse_name(name)) is not None}
        self.layers = nn.Embedding(1 + max(layer for layer, _, _ in self.places.values()), width)
        self.trunk = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.heads = nn.ModuleDict(
            {self._head(name): nn.Linear(width, rows * cols) for name, (rows, cols) in shapes.items()}
        )

    def _head(self, name: str) -> str:
        _, projection, side = self.places[name]
        rows, cols = self.shapes[name]
        return f"{projection}_{side}_{rows}x{cols}"  # ranks may differ from layer to layer

    def forward(self, condition: Tensor) -> dict[str, Tensor]:
        used = {layer for layer, _, _ in self.places.values()}
        states = {layer: self.trunk(condition + self.layers.weight[layer]) for layer in used}
        return {
            name: 0.1 * self.heads[self._head(name)](states[self.places[name][0]]).view(shape)
            for name, shape in self.shapes.items()
        }


def run_check(
    model: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    rank: int = 16,
    device: torch.device | str | None = None,
    steps: int = 20,
    against_peft: bool = False,
) -> Iterator[CheckResult]:
    """Run the checks one by one on a base model, by default the embedded one, yielding each result as it comes.

    Args:
        model: hub id or folder.
        dtype: of the base weights. rank: of the LoRA on all seven projections, alpha twice the rank.
        steps: how many forward and backward steps the memory check repeats.
        against_peft: compare value and gradients with PEFT + ``functional_call`` as well; needs both packages.

    Raises:
        ValueError: the model cannot be loaded, or ``rank`` is not positive.
    """
    model = embedded_checkpoint() if model is None else model
    if steps < 4:
        raise ValueError(f"steps is {steps}, expected 4 or more")
    spec = LoraSpec(rank=rank, alpha=2 * rank)

    def load(base_dtype: torch.dtype) -> DifferentiableDeltaCompute:
        return DifferentiableDeltaCompute.from_pretrained(model, spec=spec, dtype=base_dtype, device=device)

    delta = load(dtype)
    checks: dict[str, Callable[[], tuple[bool, str]]] = {
        "gradient flow to the LoRA tensors": partial(_gradient_flow, delta),
        "gradient flow through a generator": partial(_generator_flow, delta),
        "delta sensitivity": partial(_sensitivity, delta),
        "repeated steps, flat memory": partial(_flat_memory, delta, steps),
        "autocast changes nothing": partial(_autocast, delta),
    }
    if against_peft:
        from .peft.against_peft import compare_with_peft

        # Rounding errors are random: in half precision one adapter alone says little about who errs more.
        seeds = range(1 if dtype in (torch.float32, torch.float64) else 8)
        adapters = [random_lora(delta.lora_shapes, seed, delta.weights.device) for seed in seeds]
        checks["against PEFT + functional_call"] = partial(
            compare_with_peft, delta, model, adapters, _cotangent(delta)
        )
    for name, check in checks.items():
        yield _timed(name, check)
    exact = _value_and_gradient(delta)
    del delta, checks, check  # one set of base weights at a time
    for half in (torch.bfloat16, torch.float16):
        if half != dtype:
            name = f"mixed precision, {str(half).removeprefix('torch.')} base"
            yield _timed(name, partial(_agreement, exact, load, half))


def _timed(name: str, check: Callable[[], tuple[bool, str]]) -> CheckResult:
    start = time.perf_counter()
    passed, detail = check()
    return CheckResult(name, passed, detail, time.perf_counter() - start)


def _cotangent(delta: DifferentiableDeltaCompute) -> Tensor:
    base = delta.base_activation
    return torch.randn(base.shape, generator=torch.Generator().manual_seed(1)).to(base)


def _leaves(delta: DifferentiableDeltaCompute) -> dict[str, Tensor]:
    tensors = random_lora(delta.lora_shapes, 0, delta.weights.device)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def _value_and_gradient(delta: DifferentiableDeltaCompute) -> tuple[Tensor, Tensor]:
    """The delta of a fixed adapter (H,), and all gradients of its product with a fixed cotangent, end to end."""
    tensors = _leaves(delta)
    value = delta(tensors)
    gradients = torch.autograd.grad(value, list(tensors.values()), _cotangent(delta), materialize_grads=True)
    return value.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _gradient_flow(delta: DifferentiableDeltaCompute) -> tuple[bool, str]:
    tensors = _leaves(delta)
    F.mse_loss(delta(tensors), _cotangent(delta)).backward()
    norms = {name: 0.0 if t.grad is None else float(t.grad.norm()) for name, t in tensors.items()}
    reached = [name for name, norm in norms.items() if math.isfinite(norm) and norm > 0]
    parts = [f"{len(reached)} of {len(norms)} tensors"]
    for projection in PROJECTIONS:
        ours = [norm for name, norm in norms.items() if f".{projection}." in name]
        parts.append(f"{projection} {min(ours):.0e} to {max(ours):.0e}")
    return len(reached) == len(norms), "; ".join(parts)


def _generator_flow(delta: DifferentiableDeltaCompute) -> tuple[bool, str]:
    torch.manual_seed(0)
    generator = SmallGenerator(delta.lora_shapes).to(delta.weights.device)
    condition = torch.randn(32).to(delta.weights.device)  # drawn on the CPU: the same on all devices
    F.mse_loss(delta(generator(condition)), _cotangent(delta)).backward()
    norms = [0.0 if p.grad is None else float(p.grad.norm()) for p in generator.parameters()]
    reached = [norm for norm in norms if math.isfinite(norm) and norm > 0]
    span = f", norms {min(reached):.1e} to {max(reached):.1e}" if reached else ""
    return len(reached) == len(norms), f"{len(reached)} of {len(norms)} parameters{span}"


def _sensitivity(delta: DifferentiableDeltaCompute) -> tuple[bool, str]:
    tensors = random_lora(delta.lora_shapes, 0, delta.weights.device)
    with torch.no_grad():
        zero = delta({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
        once = delta(tensors)
        twice = delta({name: 2 * tensor for name, tensor in tensors.items()})
    base, difference = float(delta.base_activation.norm()), float((twice - once).norm())
    detail = (
        f"norm of zero {float(zero.norm()):g}, random {float(once.norm()):.3g}, doubled {float(twice.norm()):.3g} "
        f"({difference:.3g} apart), bare model {base:.3g}"
    )
    moved = min(float(once.norm()), difference) > 1e-3 * base
    return bool(torch.equal(zero, torch.zeros_like(zero))) and moved, detail


def _flat_memory(delta: DifferentiableDeltaCompute, steps: int) -> tuple[bool, str]:
    quarter, resident = steps // 4, []
    for _ in range(max(0, _FIRST_STEPS - quarter)):
        _value_and_gradient(delta)
    for _ in range(steps):
        _value_and_gradient(delta)
        resident.append(_memory(delta.weights.device))
    # What is allocated once is allocated in the first steps; then the last quarter's mean is compared to the second's.
    early, late = sum(resident[quarter : 2 * quarter]) / quarter, sum(resident[-quarter:]) / quarter
    growth = late / early - 1
    detail = f"{steps} steps: {early / 2**20:.0f} MiB early, {late / 2**20:.0f} MiB late ({growth:+.2%})"
    return growth < 0.02, detail


def _memory(device: torch.device) -> int:
    """Bytes in use: allocated on a GPU, resident on a CPU, without what the allocator keeps for reuse."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    give_back_freed_memory()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the peak, where the current value cannot be obtained


def _autocast(delta: DifferentiableDeltaCompute) -> tuple[bool, str]:
    value, gradient = _value_and_gradient(delta)
    with torch.autocast(delta.weights.device.type, dtype=torch.bfloat16):
        other_value, other_gradient = _value_and_gradient(delta)
    same = torch.equal(value, other_value) and torch.equal(gradient, other_gradient)
    return same, "same bits" if same else "differs"


def _agreement(
    exact: tuple[Tensor, Tensor], load: Callable[[torch.dtype], DifferentiableDeltaCompute], half: torch.dtype
) -> tuple[bool, str]:
    pairs = zip(exact, _value_and_gradient(load(half)), strict=True)
    value, gradient = (float(F.cosine_similarity(a.double(), b.double(), dim=0)) for a, b in pairs)
    passed = value >= HALF_DELTA_COSINE and gradient >= HALF_GRADIENT_COSINE
    return passed, f"cosine of the delta {value:.5f}, of all gradients {gradient:.5f}"
