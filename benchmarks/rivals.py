"""Usual ways to get a value and its gradients to all LoRA tensors out of transformers.

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


def projections(model: nn.Module) -> list[tuple[str, nn.Linear, str, str]]:
    """Every projection's name, itself, and the PEFT names of its A and B."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [(name, module, *(f"{PREFIX}{name}.lora_{side}.weight" for side in "AB")) for name, module in linears]


def hook_projections(model: nn.Module, make_hook: Callable[[str, str], Any]) -> None:
    """A forward hook on every projection; ``make_hook`` gets the PEFT names of its A and B."""
    for _, module, a, b in projections(model):
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


def _adapted(x: Tensor, output: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """A projection's output with all adapters' updates: A is (G, r, in), B (G, out, r)."""
    u = torch.bmm(x.reshape(A.shape[0], -1, A.shape[2]), A.mT) * scaling  # (G, P·T, r)
    return torch.baddbmm(output.reshape(B.shape[0], -1, B.shape[1]), u, B.mT).view_as(output)


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
        self._adapt()

    def _adapt(self) -> None:
        hook_projections(self.model, self._hook)

    def weights(self) -> Iterable[Tensor]:
        return self.model.parameters()

    def _hook(self, a: str, b: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return _adapted(inputs[0], output, self.leaves[a], self.leaves[b], self.scaling)

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


class NotCompiledError(RuntimeError):
    """``torch.compile`` could not make something of a way, or what it made does not run."""


class _AdaptedLinear(nn.Module):
    """What the hook does, as a module that holds its adapters: Dynamo traces it without a break."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.linear, self.A, self.B, self.scaling = linear, nn.Parameter(A), nn.Parameter(B), scaling

    def forward(self, x: Tensor) -> Tensor:
        return _adapted(x, self.linear(x), self.A, self.B, self.scaling)


class HooksBatchCompiled(HooksBatch):
    """The same under ``torch.compile``, which on a GPU makes CUDA graphs of the forward and of the backward.

    The adapters stay where they are, as no training could have it, so that no step copies them to the graphs.
    """

    def _adapt(self) -> None:
        for name, linear, a, b in projections(self.model):
            module = _AdaptedLinear(linear, self.lora[a], self.lora[b], self.scaling)
            self.model.set_submodule(name, module)
            self.leaves |= {a: module.A, b: module.B}
        count = len(self.cotangent)
        self.inputs = self.input_ids.repeat(count, 1), self.mask.repeat(count, 1)
        self.values = torch.compile(self._values, mode="reduce-overhead", dynamic=False)

    def _values(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        outputs = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return last_hidden(outputs.last_hidden_state, mask)

    def step(self, adapters: int) -> list[Pass]:
        if adapters != len(self.cotangent):
            raise ValueError(f"adapters is {adapters}, expected the {len(self.cotangent)} that were compiled for")
        try:
            torch.compiler.cudagraph_mark_step_begin()
            value = self.values(*self.inputs)
            gradients = torch.autograd.grad(value, list(self.leaves.values()), self.cotangent.flatten(0, 1))
            # Copies, all in a few launches: the next step writes to the graphs' own memory again.
            copies = torch._foreach_mul(gradients, 1.0)
            value = value.detach().clone().unflatten(0, (adapters, -1))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NotCompiledError(f"{type(error).__name__}: {error}".strip().splitlines()[0]) from error
        return [(value, dict(zip(self.leaves, copies, strict=True)))]
