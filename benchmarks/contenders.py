"""Who computes it: this engine, what people write around transformers and PEFT, and adapters' labels from both.

Only LoRA tensors require gradients, so autograd computes no more than each way needs. The ways that go adapter by
adapter go backwards after each one, so that they hold one adapter's tape at a time.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload import MAX_LENGTH, Workload

from lora_delta import DifferentiableDeltaCompute
from lora_delta.labelling.labels import compute_labels
from lora_delta.labelling.settings import model_fingerprint
from lora_delta.labelling.table import DeltaLabels

PREFIX = "base_model.model.model."

# One pass over n adapters: the value, (n, P, H) or (n,), and {PEFT name: gradient (n, …)}.
Pass = tuple[Tensor, dict[str, Tensor]]


class Contender(Protocol):
    """One way of computing a workload; made from it, with the weights loaded. It may have ``facts()`` about itself, and
    a ``warm_up``: how many steps on a GPU come before the first that counts."""

    def weights(self) -> Iterable[Tensor]:
        """All base weights."""

    def step(self, adapters: int) -> list[Pass] | None:
        """The first ``adapters`` adapters, in one pass or in several; None where there is nothing to compare."""


class Engine:
    """``DifferentiableDeltaCompute`` as training calls it: new leaves in every step, their gradients by autograd.

    With ``adapters_per_pass`` each pass goes forwards and back before the next one, as ``mean_loss`` does it.
    """

    warm_up = 4  # the second makes a CUDA graph

    def __init__(self, workload: Workload, checkpoint: str = "auto", prepack: bool = False, stream: bool = False):
        self.config, base = workload.engine_weights(stream)
        if workload.compute is not None:
            base = base.compute_in(workload.compute)
        self.spec, self.adapters_per_pass = workload.spec, workload.adapters_per_pass
        self.lora, self.cotangent = workload.lora(self.config), workload.cotangent(self.config)
        self.delta = DifferentiableDeltaCompute(
            self.config, base, workload.probes, self.spec, pooling="none", checkpoint=checkpoint,
            prepack=prepack and base.can_prepack,
        )  # fmt: skip
        self.base, self.checkpoint = self.delta.weights, checkpoint
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
        """The bare model's values (n, P, H), which a delta subtracts: constants, computed once."""
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
        return {
            "checkpoint": self.delta.checkpoint_used or self.checkpoint,
            "prepacked": self.base.packed is not None,
            "compute": str(self.base.compute_dtype).removeprefix("torch."),
        }


def padded(probes: list[list[int]], length: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (P, length), padded on the right."""
    ids = torch.zeros(len(probes), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, probe in enumerate(probes):
        ids[row, : len(probe)] = torch.tensor(probe)
        mask[row, : len(probe)] = 1
    return ids.to(device), mask.to(device)


def last_hidden(hidden: Tensor, mask: Tensor) -> Tensor:
    """(N, H) float32: the hidden state of each row's last real token."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), mask.sum(dim=1) - 1].float()


class _Rival(ABC):
    """A model of transformers, and the probes padded to ``length``."""

    warm_up = 1

    def __init__(self, workload: Workload, length: int, model: Any) -> None:
        config = workload.config()
        self.lora, self.cotangent = workload.lora(config), workload.cotangent(config)
        self.input_ids, self.mask = padded(workload.probes, length, workload.device)
        self.model, self.scaling = model, workload.spec.alpha / workload.rank
        self.leaves: dict[str, Tensor] = {}

    def weights(self) -> Iterable[Tensor]:
        return self.model.parameters()

    def last_hidden(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(N, H) float32, of the backbone without logits."""
        outputs = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return last_hidden(outputs.last_hidden_state, mask)

    @abstractmethod
    def step(self, adapters: int) -> list[Pass]: ...


class _OneByOne(_Rival):
    """Adapter by adapter: forward, backward, next; all probes at once, or ``probes_per_pass`` of them."""

    probes_per_pass: int | None = None

    def step(self, adapters: int) -> list[Pass]:
        return [self._one(adapter) for adapter in range(adapters)]

    def _one(self, adapter: int) -> Pass:
        self.leaves = {name: tensor[adapter].detach().requires_grad_() for name, tensor in self.lora.items()}
        values, at_once = [], self.probes_per_pass or len(self.mask)
        parts = (t.split(at_once) for t in (self.input_ids, self.mask, self.cotangent[adapter]))
        for ids, mask, cotangent in zip(*parts, strict=True):
            value = self.last_hidden(ids, mask)
            value.backward(cotangent)  # adds up over the passes
            values.append(value.detach())
        gradients = {name: leaf.grad[None] for name, leaf in self.leaves.items() if leaf.grad is not None}
        return torch.cat(values)[None], gradients


class Seed(_OneByOne):
    """PEFT and ``torch.func.functional_call``: padded to 256, all hidden states, logits that nobody reads."""

    def __init__(self, workload: Workload) -> None:
        import peft

        spec, alpha = workload.spec, int(workload.spec.alpha)
        targets = list(spec.target_modules)
        lora_config = peft.LoraConfig(r=spec.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(workload.hf_model(with_lm_head=True), lora_config).eval()
        super().__init__(workload, MAX_LENGTH, model.requires_grad_(False))
        self.probes_per_pass = workload.seed_probes

    def last_hidden(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        parameters = dict(self.model.named_parameters())
        parameters |= {name.replace(".weight", ".default.weight"): leaf for name, leaf in self.leaves.items()}
        given = {"input_ids": input_ids, "attention_mask": mask, "output_hidden_states": True}
        outputs = torch.func.functional_call(self.model, parameters, kwargs=given)
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
        super().__init__(workload, max(map(len, workload.probes)), workload.hf_model(with_lm_head=False))
        hook_projections(self.model, self._hook)

    def _hook(self, a: str, b: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            # The narrow product is scaled, which is cheaper than to scale the wide one.
            return output + F.linear(F.linear(inputs[0], self.leaves[a]) * self.scaling, self.leaves[b])

        return hook


def _adapted(x: Tensor, output: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """A projection's output with all adapters' updates: A is (G, r, in), B (G, out, r)."""
    u = torch.bmm(x.reshape(A.shape[0], -1, A.shape[2]), A.mT) * scaling  # (G, P·T, r)
    return torch.baddbmm(output.reshape(B.shape[0], -1, B.shape[1]), u, B.mT).view_as(output)


class HooksBatch(_Rival):
    """Hooks, all adapters in one batch of G·P rows: the strongest rival.

    The rows of an adapter lie together, so that its low-rank update is one matrix product of a ``bmm``, and
    ``baddbmm`` adds it to the base product.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, max(map(len, workload.probes)), workload.hf_model(with_lm_head=False))
        self._adapt()

    def _adapt(self) -> None:
        hook_projections(self.model, self._hook)

    def _hook(self, a: str, b: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return _adapted(inputs[0], output, self.leaves[a], self.leaves[b], self.scaling)

        return hook

    def step(self, adapters: int) -> list[Pass]:
        self.leaves = {name: t[:adapters].detach().requires_grad_() for name, t in self.lora.items()}
        value = self.last_hidden(self.input_ids.repeat(adapters, 1), self.mask.repeat(adapters, 1))
        value = value.unflatten(0, (adapters, -1))  # (G, P, H)
        gradients = torch.autograd.grad(value, list(self.leaves.values()), self.cotangent[:adapters])
        return [(value.detach(), dict(zip(self.leaves, gradients, strict=True)))]


class NotCompiledError(RuntimeError):
    """``torch.compile`` could not make something of a contender, or what it made does not run."""


class _AdaptedLinear(nn.Module):
    """What the hook does, as a module that holds its adapters: Dynamo traces it without a break."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.linear, self.A, self.B, self.scaling = linear, nn.Parameter(A), nn.Parameter(B), scaling

    def forward(self, x: Tensor) -> Tensor:
        return _adapted(x, self.linear(x), self.A, self.B, self.scaling)


class HooksBatchCompiled(HooksBatch):
    """The same under ``torch.compile``, which on a GPU makes CUDA graphs of the forward and of the backward.

    The adapters stay in one place, as in no training, so that no step copies them to the graphs.
    """

    warm_up = 4

    def _adapt(self) -> None:
        for name, linear, a, b in projections(self.model):
            module = _AdaptedLinear(linear, self.lora[a], self.lora[b], self.scaling)
            self.model.set_submodule(name, module)
            self.leaves |= {a: module.A, b: module.B}
        count = len(self.cotangent)
        self.inputs = self.input_ids.repeat(count, 1), self.mask.repeat(count, 1)
        self.values = torch.compile(self.last_hidden, mode="reduce-overhead", dynamic=False)

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


class Labels:
    """``compute_labels``: a table and a manifest on disk, in a new folder each time."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        config, weights = workload.engine_weights()
        self.delta = DifferentiableDeltaCompute(config, weights, workload.probes)
        self.fingerprint = model_fingerprint(config, weights)

    def weights(self) -> Iterable[Tensor]:
        return self.delta.weights.named_views(self.delta.config).values()

    def step(self, adapters: int) -> list[Pass] | None:
        folders = self.workload.adapter_folders[:adapters]
        with tempfile.TemporaryDirectory() as scratch:
            report = compute_labels(
                self.delta, folders, scratch, fingerprint=self.fingerprint,
                adapters_per_pass=self.workload.adapters_per_pass or len(folders), progress=False,
            )  # fmt: skip
            if len(report.computed) != adapters:
                failed = adapters - len(report.computed)
                raise RuntimeError(f"{failed} of {adapters} adapters failed: {report.failed[:1]}")
            labels = DeltaLabels(scratch)
            return [(torch.stack([labels[folder] for folder in folders]), {})]


class OnePass(Labels):
    """The deltas of one pass with nothing around them: what labelling holds beyond its memory is the job's."""

    def step(self, adapters: int) -> None:
        config, spec = self.delta.config, self.workload.spec
        at_once = min(self.workload.adapters_per_pass or adapters, adapters)
        tensors = {name: tensor[:at_once] for name, tensor in self.workload.lora(config).items()}
        self.delta.deltas(spec.bind(config, tensors))


class PeftLabels:
    """What one writes without this library: one base model, ``load_adapter``, the probes in a padded batch through the
    backbone, ``delete_adapter``."""

    def __init__(self, workload: Workload) -> None:
        import peft

        self.folders = workload.adapter_folders
        model = workload.hf_model(with_lm_head=True)
        self.ids, self.mask = padded(workload.probes, max(map(len, workload.probes)), workload.device)
        self.backbone, self.base_weights = model.model, list(model.parameters())
        self.base = self._pooled()
        first: dict[str, Any] = {"adapter_name": "first", "autocast_adapter_dtype": False}
        self.model: Any = peft.PeftModel.from_pretrained(model, self.folders[0], **first).eval()

    def weights(self) -> Iterable[Tensor]:
        return self.base_weights

    def step(self, adapters: int) -> list[Pass]:
        rows = []
        for folder in self.folders[:adapters]:
            # Neither random numbers nor float32 copies, which would be waste.
            self.model.load_adapter(folder, "next", autocast_adapter_dtype=False, low_cpu_mem_usage=True)
            self.model.set_adapter("next")
            rows.append(self._pooled() - self.base)
            self.model.set_adapter("first")
            self.model.delete_adapter("next")
        return [(torch.stack(rows), {})]

    def _pooled(self) -> Tensor:
        with torch.inference_mode():
            outputs = self.backbone(input_ids=self.ids, attention_mask=self.mask, use_cache=False)
            return last_hidden(outputs.last_hidden_state, self.mask).mean(0)


# {way: how it is made}; benchmarks/README.md says what each is. Those of NAMED take part only where --ways names them.
DELTA: dict[str, Callable[[Workload], Contender]] = {
    "engine": partial(Engine, prepack=True),
    "engine-plain": Engine,
    "engine-block": partial(Engine, checkpoint="block"),
    "engine-stream": partial(Engine, stream=True),
    "seed": Seed,
    "hooks-one": HooksOne,
    "hooks-batch": HooksBatch,
    "hooks-batch-compiled": HooksBatchCompiled,
}
LABELS: dict[str, Callable[[Workload], Contender]] = {
    "compute_labels": Labels, "one-pass": OnePass, "peft": PeftLabels
}  # fmt: skip
NAMED = ("engine-plain", "engine-stream", "hooks-batch-compiled")
