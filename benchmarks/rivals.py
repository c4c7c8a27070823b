"""Three usual ways to get a value and its gradients to all LoRA tensors out of transformers.

Only LoRA tensors require gradients, so autograd computes no more than each way needs. The two that go adapter
by adapter go backwards after each, so that they hold one adapter's tape at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from probe_sets import MAX_LENGTH
from torch import Tensor, nn
from workload import Pass, Workload

PREFIX = "base_model.model.model."


def padded(probes: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (P, length), padded on the right."""
    ids = torch.zeros(len(probes), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, probe in enumerate(probes):
        ids[row, : len(probe)] = torch.tensor(probe)
        mask[row, : len(probe)] = 1
    return ids, mask


def last_hidden(hidden: Tensor, mask: Tensor) -> Tensor:
    """(N, H) float32: the hidden state of each row's last real token."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), mask.sum(dim=1) - 1].float()


class _OneByOne(ABC):
    """Adapter by adapter: forward, backward, next; all probes at once, or ``probes_per_pass`` of them."""

    def __init__(self, workload: Workload, length: int, probes_per_pass: int | None = None) -> None:
        config = workload.config()
        self.lora = workload.lora(config)
        self.cotangent = workload.cotangent(config)
        self.input_ids, self.mask = (t.to(workload.device) for t in padded(workload.probes, length))
        count = len(workload.probes)
        starts = range(0, count, probes_per_pass or count)
        self.passes = [slice(start, start + starts.step) for start in starts]
        self.model: Any = None

    def weights(self) -> Iterable[Tensor]:
        return self.model.parameters()

    def step(self, adapters: int) -> list[Pass]:
        return [self._one(adapter) for adapter in range(adapters)]

    def _one(self, adapter: int) -> Pass:
        leaves = {name: tensor[adapter].detach().requires_grad_() for name, tensor in self.lora.items()}
        values = []
        for rows in self.passes:
            value = self.hidden(leaves, self.input_ids[rows], self.mask[rows])
            value.backward(self.cotangent[adapter, rows])  # adds up over the passes
            values.append(value.detach())
        gradients = {name: leaf.grad[None] for name, leaf in leaves.items() if leaf.grad is not None}
        return torch.cat(values)[None], gradients

    @abstractmethod
    def hidden(self, lora: dict[str, Tensor], input_ids: Tensor, mask: Tensor) -> Tensor:
        """(N, H) float32: each row's last hidden state under one adapter."""


class Seed(_OneByOne):
    """PEFT and ``torch.func.functional_call``: padded to 256, all hidden states, logits that nobody reads."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, MAX_LENGTH, workload.seed_probes)
        import peft

        spec = workload.spec
        lora_config = peft.LoraConfig(
            r=spec.rank,
            lora_alpha=int(spec.alpha),
            target_modules=list(spec.target_modules),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(workload.hf_model(with_lm_head=True), lora_config).eval()
        self.model.requires_grad_(False)

    def hidden(self, lora: dict[str, Tensor], input_ids: Tensor, mask: Tensor) -> Tensor:
        parameters = dict(self.model.named_parameters())
        for name, tensor in lora.items():
            parameters[name.replace(".weight", ".default.weight")] = tensor
        outputs = torch.func.functional_call(
            self.model,
            parameters,
            kwargs={"input_ids": input_ids, "attention_mask": mask, "output_hidden_states": True},
        )
        return last_hidden(outputs.hidden_states[-1], mask)


def hook_projections(model: nn.Module, make_hook: Callable[[str, str], Any]) -> None:
    """A forward hook on every projection; ``make_hook`` gets the PEFT names of its A and B."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            a, b = (f"{PREFIX}{name}.lora_{side}.weight" for side in "AB")
            module.register_forward_hook(make_hook(a, b))


class HooksOne(_OneByOne):
    """Forward hooks on the backbone, without logits, padded to the longest probe."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, max(map(len, workload.probes)))
        self.model = workload.hf_model(with_lm_head=False)
        self.leaves: dict[str, Tensor] = {}
        self.scaling = workload.spec.alpha / workload.rank
        hook_projections(self.model, self._hook)

    def _hook(self, a: str, b: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            # The scale goes to the narrow product, which is cheaper than to the wide one.
            u = F.linear(inputs[0], self.leaves[a]) * self.scaling
            return output + F.linear(u, self.leaves[b])

        return hook

    def hidden(self, lora: dict[str, Tensor], input_ids: Tensor, mask: Tensor) -> Tensor:
        self.leaves = lora
        outputs = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return last_hidden(outputs.last_hidden_state, mask)


class HooksBatch:
    """Hooks, all adapters in one batch of G·P rows: the strongest rival.

    The rows of an adapter lie together, so that its low-rank update is one matrix product of a ``bmm``, and
    ``baddbmm`` adds it to the base product.
    """

    def __init__(self, workload: Workload) -> None:
        config = workload.config()
        self.lora = workload.lora(config)
        self.cotangent = workload.cotangent(config)
        longest = max(map(len, workload.probes))
        self.input_ids, self.mask = (t.to(workload.device) for t in padded(workload.probes, longest))
        self.model = workload.hf_model(with_lm_head=False)
        self.leaves: dict[str, Tensor] = {}
        self.scaling = workload.spec.alpha / workload.rank
        hook_projections(self.model, self._hook)

    def weights(self) -> Iterable[Tensor]:
        return self.model.parameters()

    def _hook(self, a: str, b: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            A, B = self.leaves[a], self.leaves[b]  # (G, r, in), (G, out, r)
            x = inputs[0].reshape(A.shape[0], -1, A.shape[2])  # (G, P·T, in)
            u = torch.bmm(x, A.mT) * self.scaling
            return torch.baddbmm(output.reshape(B.shape[0], -1, B.shape[1]), u, B.mT).view_as(output)

        return hook

    def step(self, adapters: int) -> list[Pass]:
        self.leaves = {name: t[:adapters].detach().requires_grad_() for name, t in self.lora.items()}
        mask = self.mask.repeat(adapters, 1)
        outputs = self.model(
            input_ids=self.input_ids.repeat(adapters, 1), attention_mask=mask, use_cache=False
        )
        value = last_hidden(outputs.last_hidden_state, mask).unflatten(0, (adapters, -1))  # (G, P, H)
        gradients = torch.autograd.grad(value, list(self.leaves.values()), self.cotangent[:adapters])
        return [(value.detach(), dict(zip(self.leaves, gradients, strict=True)))]
