"""The language model's loss of each adapter's own examples: this engine, and what people do today.

The rivals take one padded row for each example, on transformers' model; logits are made at the positions that count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rivals import hook_projections, projections
from torch import Tensor, nn
from torch.nn import functional as F
from workload import Pass, Way, Workload

from lora_delta import DifferentiableLMLoss
from lora_delta.lm_loss import Examples
from lora_delta.probes.tokenization import load_tokenizer


@dataclass(frozen=True)
class TextWorkload(Workload):
    """A workload whose adapters have examples (prompt ids, completion ids) of their own instead of probes."""

    examples: Examples = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(prompt) + len(completion) for own in self.examples for prompt, completion in own)


def text_ids(folder: str) -> list[int]:
    """This repository's own text. Of random tokens bfloat16 gradients are mostly rounding."""
    root = Path(__file__).resolve().parents[1]
    files = [root / "README.md", *sorted((root / "lora_delta").rglob("*.py"))]
    return load_tokenizer(folder).encode("\n".join(file.read_text(encoding="utf-8") for file in files)).ids


def draw_examples(adapters: int, each: int, shortest: int, longest: int, ids: Sequence[int]) -> Examples:
    """Pieces of a text; lengths drawn evenly, a third of each example is its completion."""
    chance = random.Random(0)

    def example() -> tuple[list[int], list[int]]:
        length = chance.randint(shortest, longest)
        start = chance.randrange(len(ids) - length)
        piece = list(ids[start : start + length])
        return piece[: length - length // 3], piece[length - length // 3 :]

    return [[example() for _ in range(each)] for _ in range(adapters)]


class LMEngine:
    """``DifferentiableLMLoss`` as training calls it."""

    def __init__(self, workload: TextWorkload, checkpoint: str) -> None:
        self.config, base = workload.engine_weights()
        self.lora, self.examples = workload.lora(self.config), workload.examples
        prepack = checkpoint != "block" and base.can_prepack
        self.lm = DifferentiableLMLoss(self.config, base, workload.spec, checkpoint=checkpoint, prepack=prepack)

    def weights(self) -> Iterable[Tensor]:
        return self.lm.weights.named_views(self.config).values()

    def step(self, adapters: int) -> list[Pass]:
        leaves = {name: t[:adapters].detach().requires_grad_() for name, t in self.lora.items()}
        losses = self.lm(leaves, self.examples[:adapters])
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return [(losses.detach(), dict(zip(leaves, gradients, strict=True)))]


class _Padded:
    """One row for each example of some adapters, padded on the right to the longest."""

    def __init__(self, examples: Examples, device: str) -> None:
        rows = [(prompt, completion) for own in examples for prompt, completion in own]
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        self.input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
        self.mask, labels = torch.zeros_like(self.input_ids), torch.full_like(self.input_ids, -100)
        for row, (prompt, completion) in enumerate(rows):
            n = len(prompt) + len(completion)
            self.input_ids[row, :n] = torch.tensor([*prompt, *completion])
            self.mask[row, :n] = 1
            labels[row, len(prompt) : n] = torch.tensor(list(completion))
        self.input_ids, self.mask, labels = (t.to(device) for t in (self.input_ids, self.mask, labels))
        self.adapter = torch.arange(len(examples)).repeat_interleave(torch.tensor([len(own) for own in examples]))
        self.adapter = self.adapter.to(device)
        self.row, self.position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        self.targets = labels[:, 1:][self.row, self.position]

    def losses(self, hidden: Tensor, lm_head: Any, n_adapters: int) -> Tensor:
        """(G,), each the mean over its tokens."""
        each = F.cross_entropy(lm_head(hidden[self.row, self.position]).float(), self.targets, reduction="none")
        of = self.adapter[self.row]
        sums = torch.zeros(n_adapters, device=each.device).index_add(0, of, each)
        return sums / torch.bincount(of, minlength=n_adapters)


class LMHooks:
    """Hooks on the backbone, all examples of all adapters in one batch; an adapter's update of a row by ``bmm``."""

    def __init__(self, workload: TextWorkload, checkpoint: bool) -> None:
        self.lora = workload.lora(workload.config())
        self.examples, self.device = workload.examples, workload.device
        self.model = workload.hf_model(with_lm_head=True)
        self.scaling = workload.spec.alpha / workload.rank
        self.leaves: dict[str, Tensor] = {}
        if checkpoint:
            self.model.train()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        hook_projections(self.model.model, self._hook)
        self.batch: _Padded | None = None

    def weights(self) -> Iterable[Tensor]:
        return self.model.parameters()

    def _hook(self, a: str, b: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            assert self.batch is not None
            A, B = (self.leaves[name][self.batch.adapter] for name in (a, b))  # one of each row
            return torch.baddbmm(output, torch.bmm(inputs[0], A.mT) * self.scaling, B.mT)

        return hook

    def step(self, adapters: int) -> list[Pass]:
        self.leaves = {name: t[:adapters].detach().requires_grad_() for name, t in self.lora.items()}
        self.batch = batch = _Padded(self.examples[:adapters], self.device)
        states = self.model.model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
        losses = batch.losses(states.last_hidden_state, self.model.lm_head, adapters)
        gradients = torch.autograd.grad(losses.sum(), list(self.leaves.values()))
        return [(losses.detach(), dict(zip(self.leaves, gradients, strict=True)))]


class LMRepeated(LMHooks):
    """The same with A and B repeated for every token of a row, as Text-to-LoRA and Doc-to-LoRA lay them out."""

    def _hook(self, a: str, b: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            assert self.batch is not None
            x = inputs[0].flatten(0, 1)[:, None]  # (tokens, 1, in)
            rows = self.batch.adapter.repeat_interleave(inputs[0].shape[1])
            A, B = (self.leaves[name][rows] for name in (a, b))
            return output + (torch.bmm(torch.bmm(x, A.mT) * self.scaling, B.mT)).view_as(output)

        return hook


class LMPeft:
    """PEFT's model, one adapter at a time, its examples in one batch. Checkpointed blocks read PEFT's own parameters
    again on the way back, so that these are given each adapter's numbers.
    """

    def __init__(self, workload: TextWorkload, checkpoint: bool) -> None:
        from peft import LoraConfig, get_peft_model

        self.lora = workload.lora(workload.config())
        self.examples, self.device = workload.examples, workload.device
        model = workload.hf_model(with_lm_head=True)
        targets = sorted({name.rpartition(".")[2] for name, *_ in projections(model.model)})
        alpha: Any = workload.spec.alpha
        config = LoraConfig(r=workload.rank, lora_alpha=alpha, target_modules=targets)
        self.model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        named = dict(self.model.named_parameters())
        self.parameters = {name: named[name.replace(".weight", ".default.weight")] for name in self.lora}
        if checkpoint:
            self.model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def weights(self) -> Iterable[Tensor]:
        return self.model.parameters()

    def step(self, adapters: int) -> list[Pass]:
        return [self._one(adapter) for adapter in range(adapters)]

    def _one(self, adapter: int) -> Pass:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.lora[name][adapter])
        causal: Any = self.model.base_model.model
        batch = _Padded(self.examples[adapter : adapter + 1], self.device)
        states = causal.model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
        losses = batch.losses(states.last_hidden_state, causal.lm_head, 1)
        gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        return losses.detach(), {name: g[None] for name, g in zip(self.parameters, gradients, strict=True)}


LM_WAYS: dict[str, tuple[Callable[..., Way], Any, str]] = {
    "engine": (LMEngine, "auto", "DifferentiableLMLoss"),
    "engine-block": (LMEngine, "block", "the same, base weights as stored, every block checkpointed: the least memory"),
    "hooks": (LMHooks, False, "hooks, one bmm per row of a padded batch"),
    "hooks-checkpointed": (LMHooks, True, "the same with gradient checkpointing"),
    "repeated": (LMRepeated, False, "hooks, A and B repeated for every token"),
    "repeated-checkpointed": (LMRepeated, True, "the same with gradient checkpointing"),
    "peft": (LMPeft, False, "PEFT, one adapter at a time"),
    "peft-checkpointed": (LMPeft, True, "the same with gradient checkpointing"),
}


def make_lm_way(name: str, workload: TextWorkload) -> Way:
    """Load a way's weights and make it ready to step."""
    kind, option, _ = LM_WAYS[name]
    return kind(workload, option)
