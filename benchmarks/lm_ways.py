"""The language model's loss of each adapter's own examples: this engine, and what people do today.

The rivals take one padded row for each example, on transformers' model; logits are made at the positions that count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import Contender, Pass, hook_projections, projections
from torch import Tensor, nn
from torch.nn import functional as F
from workload import Workload, has_tokenizer

from lora_delta import DifferentiableLMLoss
from lora_delta.lm_loss import Examples
from lora_delta.probes.tokenization import load_tokenizer
from lora_delta.teachers import TopK
from qwen_functional import read_config


def text_ids(folder: str) -> list[int]:
    """This repository's own text; of random tokens, which stand in without a tokenizer, bfloat16 gradients are mostly
    rounding."""
    if not has_tokenizer(folder):
        return list(range(read_config(folder).vocab_size))
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


def draw_teacher(workload: Workload) -> list[list[TopK]] | None:
    """For each example a teacher's random likeliest tokens, 0.9 of its mass; None for a workload without."""
    chance, k, vocabulary = torch.Generator().manual_seed(3), workload.top_k, workload.config().vocab_size
    if k is None:
        return None

    def told(n: int) -> TopK:
        indices = torch.randint(vocabulary, (n, 1), generator=chance) + torch.arange(k) * (vocabulary // k)
        return TopK(indices % vocabulary, torch.randn(n, k, generator=chance).log_softmax(1) + math.log(0.9))

    return [[told(len(completion)) for _, completion in own] for own in workload.examples]


class LMEngine:
    """``DifferentiableLMLoss`` as training calls it."""

    warm_up = 4

    def __init__(self, workload: Workload, checkpoint: str = "auto") -> None:
        self.config, base = workload.engine_weights()
        self.lora, self.examples, self.teacher = workload.lora(self.config), workload.examples, draw_teacher(workload)
        prepack = checkpoint != "block" and base.can_prepack
        self.lm = DifferentiableLMLoss(self.config, base, workload.spec, checkpoint=checkpoint, prepack=prepack)

    def weights(self) -> Iterable[Tensor]:
        return self.lm.weights.named_views(self.config).values()

    def step(self, adapters: int) -> list[Pass]:
        leaves = {name: t[:adapters].detach().requires_grad_() for name, t in self.lora.items()}
        losses = self.lm(leaves, self.examples[:adapters], self.teacher and self.teacher[:adapters])
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return [(losses.detach(), dict(zip(leaves, gradients, strict=True)))]


class _Padded:
    """One row for each example of some adapters, padded on the right to the longest."""

    def __init__(self, examples: Examples, device: str, teacher: list[list[TopK]] | None) -> None:
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
        told = [(each.indices, each.log_probs) for own in teacher or [] for each in own]
        self.top_k = [torch.cat(each).to(device) for each in zip(*told, strict=True)]

    def losses(self, hidden: Tensor, lm_head: Any, n_adapters: int) -> Tensor:
        """(G,), each the mean over its tokens."""
        logits = lm_head(hidden[self.row, self.position]).float()
        if self.top_k:
            indices, log_probs = self.top_k
            each = (log_probs.exp() * (log_probs - logits.log_softmax(-1).gather(1, indices))).sum(1)
        else:
            each = F.cross_entropy(logits, self.targets, reduction="none")
        of = self.adapter[self.row]
        sums = torch.zeros(n_adapters, device=each.device).index_add(0, of, each)
        return sums / torch.bincount(of, minlength=n_adapters)


class LMHooks:
    """Hooks on the backbone, all examples of all adapters in one batch; an adapter's update of a row by ``bmm``."""

    def __init__(self, workload: Workload, checkpoint: bool = False) -> None:
        self.lora = workload.lora(workload.config())
        self.examples, self.device, self.teacher = workload.examples, workload.device, draw_teacher(workload)
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
        self.batch = batch = _Padded(self.examples[:adapters], self.device, self.teacher and self.teacher[:adapters])
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
            # By index, a token's own, gradients would be summed over tokens in the dtype of A and B.
            rows, length = self.batch.adapter, inputs[0].shape[1]
            A, B = (self.leaves[name][rows].repeat_interleave(length, 0) for name in (a, b))
            return output + (torch.bmm(torch.bmm(x, A.mT) * self.scaling, B.mT)).view_as(output)

        return hook


class LMPeft:
    """PEFT's model, one adapter at a time, its examples in one batch. Checkpointed blocks read PEFT's own parameters
    again on the way back, so that these are given each adapter's numbers.
    """

    def __init__(self, workload: Workload, checkpoint: bool = False) -> None:
        from peft import LoraConfig, get_peft_model

        self.lora = workload.lora(workload.config())
        self.examples, self.device, self.teacher = workload.examples, workload.device, draw_teacher(workload)
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
        one = slice(adapter, adapter + 1)
        batch = _Padded(self.examples[one], self.device, self.teacher and self.teacher[one])
        states = causal.model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
        losses = batch.losses(states.last_hidden_state, causal.lm_head, 1)
        gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        return losses.detach(), {name: g[None] for name, g in zip(self.parameters, gradients, strict=True)}


LM: dict[str, Callable[[Workload], Contender]] = {
    "engine": LMEngine,
    "engine-block": partial(LMEngine, checkpoint="block"),
    "hooks": LMHooks,
    "hooks-checkpointed": partial(LMHooks, checkpoint=True),
    "repeated": LMRepeated,
    "repeated-checkpointed": partial(LMRepeated, checkpoint=True),
    "peft": LMPeft,
    "peft-checkpointed": partial(LMPeft, checkpoint=True),
}
