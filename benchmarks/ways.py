"""The ways of doing it by name: this engine, its rivals, and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from rivals import HooksBatch, HooksOne, Seed
from torch import Tensor
from workload import Pass, Way, Workload

import qwen_functional.forward
from qwen_functional import pack


class Engine:
    """``qwen_functional.forward.forward_vjp``; LoRA tensors are bound anew in every step, as in training."""

    def __init__(self, workload: Workload, checkpoint: str, *, prepack: bool, stream: bool = False) -> None:
        self.config, self.base = workload.engine_weights(stream)
        if workload.compute is not None:
            self.base = self.base.compute_in(workload.compute)
        if prepack and self.base.can_prepack:
            self.base = self.base.prepack()
        self.spec = workload.spec
        self.lora = workload.lora(self.config)
        self.cotangent = workload.cotangent(self.config)
        self.tokens = pack(workload.probes)
        self.adapters_per_pass = workload.adapters_per_pass
        self.checkpoint = checkpoint
        self.chosen = checkpoint

    def weights(self) -> Iterable[Tensor]:
        return [self.base.norm] if self.base.streamed else self.base.named_views(self.config).values()

    def step(self, adapters: int) -> list[Pass]:
        at_once = self.adapters_per_pass or adapters
        with torch.inference_mode():
            return [
                self._pass(slice(start, min(start + at_once, adapters))) for start in range(0, adapters, at_once)
            ]

    def _pass(self, rows: slice) -> Pass:
        lora = self.spec.bind(self.config, {name: t[rows] for name, t in self.lora.items()})
        value, vjp = qwen_functional.forward.forward_vjp(
            self.config, self.base, self.tokens, lora, checkpoint=self.checkpoint
        )
        self.chosen = vjp.checkpoint
        return value, vjp(self.cotangent[rows])

    def facts(self) -> dict[str, Any]:
        compute = str(self.base.compute_dtype).removeprefix("torch.")
        return {"checkpoint": self.chosen, "prepacked": self.base.packed is not None, "compute": compute}


WAYS = {
    "engine": "this engine, base weights packed for the processor",
    "engine-plain": "this engine, base weights as torch stores them",
    "engine-block": "this engine, base weights as torch stores them, every block checkpointed: the least memory",
    "engine-stream": "this engine, base weights on disk, read block by block: only where --ways names it",
    "seed": "PEFT + functional_call, padded to 256, logits, one adapter at a time",
    "hooks-one": "hooks on the backbone, one adapter at a time",
    "hooks-batch": "hooks on the backbone, all adapters in one batch",
}
DEFAULT_WAYS = ("engine", "engine-block", "seed", "hooks-one", "hooks-batch")
# Not ways, but what is timed beside them: base products alone, and the adapters' products alone.
FLOOR, ADAPTERS = FLOORS = "floor", "adapters"


def make_way(name: str, workload: Workload) -> Way:
    """Load a way's weights and make it ready to step."""
    if name.startswith("engine"):
        checkpoint = "block" if name == "engine-block" else "auto"
        return Engine(workload, checkpoint, prepack=name == "engine", stream=name == "engine-stream")
    rivals: dict[str, Callable[[Workload], Way]] = {
        "seed": Seed,
        "hooks-one": HooksOne,
        "hooks-batch": HooksBatch,
    }
    return rivals[name](workload)
