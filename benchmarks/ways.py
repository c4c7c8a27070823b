"""The ways of doing it by name: this engine, its rivals, and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lm_ways import TextWorkload, make_lm_way
from rivals import HooksBatch, HooksBatchCompiled, HooksOne, Seed
from torch import Tensor
from workload import Pass, Way, Workload

import qwen_functional.forward
from lora_delta import DifferentiableDeltaCompute


class Engine:
    """``DifferentiableDeltaCompute`` as training calls it: new leaves in every step, their gradients by autograd.

    With ``adapters_per_pass`` each pass goes forwards and back before the next one, as ``mean_loss`` does it.
    """

    def __init__(self, workload: Workload, checkpoint: str, *, prepack: bool, stream: bool = False) -> None:
        self.config, base = workload.engine_weights(stream)
        if workload.compute is not None:
            base = base.compute_in(workload.compute)
        self.spec = workload.spec
        self.lora = workload.lora(self.config)
        self.cotangent = workload.cotangent(self.config)
        self.adapters_per_pass = workload.adapters_per_pass
        self.checkpoint = checkpoint
        self.delta = DifferentiableDeltaCompute(
            self.config,
            base,
            workload.probes,
            self.spec,
            pooling="none",
            checkpoint=checkpoint,
            prepack=prepack and base.can_prepack,
        )
        self.base = self.delta.weights
        self.bases: dict[int, Tensor] = {}
        for rows in self._passes(workload.adapters):
            self._bare(rows)  # or the first step would be of two

    def weights(self) -> Iterable[Tensor]:
        return [self.base.norm] if self.base.streamed else self.base.named_views(self.config).values()

    def step(self, adapters: int) -> list[Pass]:
        return [self._pass(rows) for rows in self._passes(adapters)]

    def _passes(self, adapters: int) -> list[slice]:
        at_once = self.adapters_per_pass or adapters
        return [slice(start, min(start + at_once, adapters)) for start in range(0, adapters, at_once)]

    def _bare(self, rows: slice) -> Tensor:
        """What the delta takes off the values (n, P, H) of so many adapters: constants, computed once."""
        n = rows.stop - rows.start
        if n not in self.bases:
            lora = self.spec.bind(self.config, {name: t[rows] for name, t in self.lora.items()})
            self.bases[n] = self.delta._passes.base(lora)[:, 0]
        return self.bases[n]

    def _pass(self, rows: slice) -> Pass:
        leaves = {name: t[rows].detach().requires_grad_() for name, t in self.lora.items()}
        delta = self.delta(leaves)
        gradients = torch.autograd.grad(delta, list(leaves.values()), self.cotangent[rows])
        return delta.detach() + self._bare(rows), dict(zip(leaves, gradients, strict=True))

    def facts(self) -> dict[str, Any]:
        compute = str(self.base.compute_dtype).removeprefix("torch.")
        return {"checkpoint": self._chosen(), "prepacked": self.base.packed is not None, "compute": compute}

    def _chosen(self) -> str:
        return self.delta.checkpoint_used or self.checkpoint


class EngineVjp(Engine):
    """``qwen_functional.forward.forward_vjp`` itself, without autograd."""

    chosen: str | None = None

    def _pass(self, rows: slice) -> Pass:
        with torch.inference_mode():
            lora = self.spec.bind(self.config, {name: t[rows] for name, t in self.lora.items()})
            value, vjp = qwen_functional.forward.forward_vjp(
                self.config, self.base, self.delta.tokens, lora, checkpoint=self.checkpoint
            )
            self.chosen = vjp.checkpoint
            return value, vjp(self.cotangent[rows])

    def _chosen(self) -> str:
        return self.chosen or self.checkpoint


WAYS = {
    "engine": "this engine, base weights packed for the processor",
    "engine-plain": "this engine, base weights as torch stores them",
    "engine-block": "this engine, base weights as torch stores them, every block checkpointed: the least memory",
    "engine-vjp": "forward_vjp alone, without autograd: only where --ways names it",
    "engine-stream": "this engine, base weights on disk, read block by block: only where --ways names it",
    "seed": "PEFT + functional_call, padded to 256, logits, one adapter at a time",
    "hooks-one": "hooks on the backbone, one adapter at a time",
    "hooks-batch": "hooks on the backbone, all adapters in one batch",
    "hooks-batch-compiled": "the same under torch.compile, with CUDA graphs: only where --ways names it",
}
DEFAULT_WAYS = ("engine", "engine-block", "seed", "hooks-one", "hooks-batch")
# Not ways, but what is timed beside them: base products alone, and the adapters' products alone.
FLOOR, ADAPTERS = FLOORS = "floor", "adapters"
COMPILED = "hooks-batch-compiled"


def make_way(name: str, workload: Workload) -> Way:
    """Load a way's weights and make it ready to step."""
    if isinstance(workload, TextWorkload):
        return make_lm_way(name, workload)
    if name.startswith("engine"):
        checkpoint = "block" if name == "engine-block" else "auto"
        kind = EngineVjp if name == "engine-vjp" else Engine
        return kind(workload, checkpoint, prepack=name in ("engine", "engine-vjp"), stream=name == "engine-stream")
    rivals: dict[str, Callable[[Workload], Way]] = {
        "seed": Seed,
        "hooks-one": HooksOne,
        "hooks-batch": HooksBatch,
        "hooks-batch-compiled": HooksBatchCompiled,
    }
    return rivals[name](workload)
