"""A small training: base model, five teachers, a generator; for the tests of the loop and of the files it leaves."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import tiny_config
from torch import Tensor

from lora_delta import DifferentiableDeltaCompute
from lora_delta.generate.checkpoints import Metrics
from lora_delta.generate.generator import LoRAGenerator
from lora_delta.generate.options import TrainingOptions
from lora_delta.generate.schedules import Schedule
from lora_delta.generate.tokens import TokenFormat
from lora_delta.generate.training import train
from qwen_functional import LoraSpec, init_weights

RANK, N_TEACHERS, CONDITION_SIZE = 2, 5, 6
WEIGHTS, DELTA = {"weights": Schedule(1.0)}, {"delta": Schedule(1.0)}
BOTH = WEIGHTS | DELTA
Item = tuple[list[Tensor], Tensor, Tensor]


class Teachers(list[Item]):
    names = ("ann", "bob", "cid", "dan", "eve")


@dataclass(frozen=True)
class Case:
    delta: DifferentiableDeltaCompute
    format: TokenFormat
    teachers: Sequence[Item]
    device: str

    def generator(self, kind: type[LoRAGenerator] = LoRAGenerator) -> LoRAGenerator:
        """The same generator in every call."""
        torch.manual_seed(3)
        made = kind(self.format, CONDITION_SIZE, width=64, depth=1, heads=2).to(self.device)
        made.fit(torch.stack([tokens for _, tokens, _ in self.teachers]))
        return made

    def train(
        self,
        generator: torch.nn.Module,
        options: TrainingOptions,
        out: Path | None = None,
        teachers: Sequence[Item] | None = None,
    ) -> list[Metrics]:
        teachers = self.teachers if teachers is None else teachers
        return train(generator, teachers, options, format=self.format, delta=self.delta, out=out, progress=False)


@functools.cache
def training_case(device: str) -> Case:
    config = tiny_config(num_hidden_layers=2, hidden_size=16, intermediate_size=32, head_dim=8)
    spec = LoraSpec(rank=RANK, alpha=4)
    delta = DifferentiableDeltaCompute(config, init_weights(config, device=device), [[1, 2, 3], [4, 5]], spec)
    format = TokenFormat.for_config(config, RANK, 8)
    chance = torch.Generator().manual_seed(0)
    shapes = spec.shapes(config).items()
    tensors = {name: 0.3 * torch.randn(N_TEACHERS, *shape, generator=chance) for name, shape in shapes}
    tokens = format.tokenize(tensors)
    targets = delta({name: tensor.to(device) for name, tensor in tensors.items()}).cpu()
    conditions = [
        [torch.randn(3 + i, CONDITION_SIZE, generator=chance) for i in range(2)] for _ in range(N_TEACHERS)
    ]
    # On the CPU, like those of a label folder.
    teachers = Teachers((conditions[i], tokens[i], targets[i]) for i in range(N_TEACHERS))
    return Case(delta, format, teachers, device)


def adam_step(adam: torch.optim.Optimizer, asked: TrainingOptions, step: int, skip: bool = False) -> dict[str, float]:
    """A step with the clipping and learning rate of the options' docstring, in plain torch; the norm and the rate."""
    gradients = [p.grad for group in adam.param_groups for p in group["params"] if p.grad is not None]
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    for gradient in gradients:
        gradient *= min(1.0, asked.clip / norm)
    if step < asked.warmup_steps:
        factor = (step + 1) / asked.warmup_steps
    else:
        part = (step - asked.warmup_steps) / (asked.steps - asked.warmup_steps)
        factor = 0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2
    adam.param_groups[0]["lr"] = rate = asked.learning_rate * factor
    if not skip:
        adam.step()
    return {"gradient_norm": norm, "learning_rate": rate}


def options(losses: Mapping[str, Schedule] = BOTH, **changes: Any) -> TrainingOptions:
    given: dict[str, Any] = {"steps": 6, "batch_size": 4, "delta_batch_size": 2, "warmup_steps": 2, "losses": losses}
    return TrainingOptions(**{**given, **changes})
