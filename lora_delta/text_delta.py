"""How a LoRA moves a frozen model's hidden states on each adapter's own texts, differentiable in the LoRA tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwen_functional import Lora, LoraSpec, Qwen2Config, Qwen2Weights
from qwen_functional.backends import choose
from qwen_functional.compiled import opaque
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.forward import forward_vjp
from qwen_functional.heads import Hidden
from qwen_functional.ops.sums import index_sum_
from qwen_functional.plan import checked_layers

from . import autograd
from .delta import POOLINGS
from .delta_losses import adapters_delta_loss
from .own_texts import POSITIONS, Column, Contexts, Examples, OverTexts, OwnTexts, in_context
from .passes import AdapterPasses, zero_lora

AdaptersLoss = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # see adapters_delta_loss


@dataclass(frozen=True)
class DeltaTarget:
    """What the deltas on some texts should be.

    Attributes:
        base: for each adapter, the bare model's hidden states (layers, P, H) on its texts.
        wanted: those that the adapted model should have; the target is their difference from ``base``.
    """

    base: list[Tensor]
    wanted: list[Tensor]

    @property
    def deltas(self) -> list[Tensor]:
        return [wanted - base for base, wanted in zip(self.base, self.wanted, strict=True)]


class DifferentiableTextDelta(OverTexts):
    """Maps LoRA tensors to their deltas on texts, with gradients: ``h(base + θ) − h(base)`` at each position.

    Unlike in :class:`DifferentiableDeltaCompute`, which reads the same few probes for all adapters and all steps, each
    adapter has its own texts, which may differ from call to call. The target comes from a teacher's adapter, or from
    the *prompted base*: the bare model reading the same completions after a context that says more, an instruction or
    a document, so that no teacher is needed. A LoRA of zeros has deltas of exactly zero.

    Args:
        config, weights: the base model, from :func:`qwen_functional.load_pretrained`; the lm_head is not read.
        spec: the LoRA; by default rank 16, alpha 32, all seven projections.
        layer: after which block to read, from 0; −1 is after the last block and the final norm. A sequence reads
            several.
        positions: ``"completion"``: the tokens that predict those of the completion, from the prompt's last token on;
            ``"last"``: each text's last token; ``"all"``: every token.
        pooling: ``"none"`` gives a delta for each position, ``"mean"`` the mean over all positions of an adapter.
        adapters_per_pass, mesh, prepack, validate: as for :class:`DifferentiableDeltaCompute`.
        checkpoint, memory_budget: see :func:`qwen_functional.forward.forward_vjp`.

    Raises:
        ValueError: an invalid argument.
    """

    reads_lm_head = False

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        spec: LoraSpec | None = None,
        *,
        layer: int | Sequence[int] = -1,
        positions: str = "completion",
        pooling: str = "none",
        adapters_per_pass: int | None = None,
        checkpoint: str = "auto",
        memory_budget: int | None = None,
        prepack: bool | str = "auto",
        mesh: DeviceMesh | None = None,
        validate: bool = True,
    ) -> None:
        for name, value, known in (("positions", positions, POSITIONS), ("pooling", pooling, POOLINGS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {known}")
        layers = checked_layers(config, layer)
        super().__init__(
            config, weights, spec, adapters_per_pass=adapters_per_pass, checkpoint=checkpoint,
            memory_budget=memory_budget, prepack=prepack, mesh=mesh, validate=validate,
        )  # fmt: skip
        self.layers, self.single_layer = layers, isinstance(layer, int)
        self.positions, self.pooling = positions, pooling

    @opaque
    def forward(self, tensors: Mapping[str, Tensor], examples: Examples) -> Tensor:
        """The deltas (G, P, H) of G adapters; P is the most positions of any adapter, the others are padded with zeros.

        Several layers add a dimension before P; with ``pooling="mean"`` there is no P. For one adapter without a
        leading G the delta has none either. float32, or float64 for float64 weights.

        Args:
            tensors: as :meth:`LoraSpec.bind` takes them.
            examples: for each adapter, (prompt ids, completion ids) pairs; see :meth:`DifferentiableLMLoss.forward`.

        Raises:
            ValueError: as :meth:`DifferentiableLMLoss.forward`.
        """
        lora, texts = self.bound(tensors, examples), self.texts(examples)
        passes = _DeltaPasses(self, texts)
        value = autograd.values(passes, lora) - passes.base(lora)
        value = value[:, 0] if self.single_layer else value
        return value if lora.batched else value[0]

    @opaque
    def mean_loss(
        self,
        tensors: Mapping[str, Tensor],
        examples: Examples,
        target: DeltaTarget,
        loss: AdaptersLoss = adapters_delta_loss,
    ) -> Tensor:
        """The mean over adapters of a loss on their deltas, a scalar; each pass runs backward before the next one.

        Args:
            target: from :meth:`target`, of the same examples.
            loss: maps the deltas and targets (layers, V, H) of some adapters, the adapter (V,) of each vector, and
                the number g of adapters to their losses (g,); with ``pooling="mean"`` each adapter has one vector.

        Raises:
            ValueError: as :meth:`forward`; a target for other examples.
        """
        lora, texts = self.bound(tensors, examples), self.texts(examples)
        passes = self.passes(texts, [self.column(texts, target, loss)])
        return autograd.mean_loss(passes, lora, lambda losses, adapters: losses.mean())

    def target(
        self,
        examples: Examples,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        contexts: Contexts | None = None,
    ) -> DeltaTarget:
        """What deltas should be: those of a teacher's adapters, or of the prompted base.

        Args:
            examples: as in :meth:`forward`.
            tensors: of the teachers; may be combined with ``contexts``.
            contexts: for each example, the ids that the teacher reads in place of its prompt; with ``positions="all"``
                they must end with the prompt. Without a prompt the whole completion follows them.

        Raises:
            ValueError: neither, contexts for other examples, or ones that do not end with the prompt where they must.
        """
        if tensors is None and contexts is None:
            raise ValueError("tensors and contexts are both None, expected at least one of them")
        texts = self.texts(examples)
        base = self._states(texts, None)
        return DeltaTarget(base, self.wanted(examples, tensors=tensors, contexts=contexts))

    def wanted(
        self,
        examples: Examples,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        contexts: Contexts | None = None,
    ) -> list[Tensor]:
        """The teacher's states for :meth:`target`, (layers, P, H) for each adapter."""
        lora, texts = None if tensors is None else self.bound(tensors, examples), self.texts(examples)
        if contexts is None:
            return self._states(texts, lora)
        behind = self.texts(in_context(examples, contexts, self.positions))
        return self._states(behind, lora, texts.all_counts(self.positions))

    def column(self, texts: OwnTexts, target: DeltaTarget, loss: AdaptersLoss = adapters_delta_loss) -> Column:
        """The loss on the deltas as one column of a pass, see :class:`lora_delta.own_texts.TextPasses`.

        Raises:
            ValueError: a target for other texts.
        """
        for name, states in (("base", target.base), ("wanted", target.wanted)):
            if len(states) != len(texts):
                raise ValueError(f"target is for {len(states)} adapters, expected {len(texts)} to match the examples")
            for index, one in enumerate(states):
                expected = len(self.layers), sum(texts.counts(index, self.positions)), self.config.hidden_size
                if tuple(one.shape) != expected:
                    found = f"{name} of adapter {index} has shape {tuple(one.shape)}"
                    raise ValueError(f"target: {found}, expected {expected} to match its examples")
        return _DeltaColumn(self, target, loss)

    def head(self, texts: OwnTexts, adapters: slice) -> Hidden:
        """The head that reads the texts of the adapters in a slice."""
        own = range(len(texts))[adapters]
        return Hidden(self.layers, [texts.rows(index, self.positions) for index in own])

    def texts(self, examples: Examples) -> OwnTexts:
        """The examples, packed for what this reads; raises as :class:`OwnTexts` does."""
        return OwnTexts(self.config, examples, [self.positions])

    def _states(
        self, texts: OwnTexts, lora: Lora | None, counts: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        return self.read(texts, lora, [(self.layers, self.positions)], counts)[0]


class _DeltaColumn:
    """A loss on the deltas of each adapter."""

    def __init__(self, delta: DifferentiableTextDelta, target: DeltaTarget, loss: AdaptersLoss) -> None:
        self.delta, self.target, self.loss = delta, target, loss

    def head(self, texts: OwnTexts, adapters: slice) -> Hidden:
        return self.delta.head(texts, adapters)

    def losses(self, read: Tensor, texts: OwnTexts, adapters: slice) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        own = range(len(texts))[adapters]
        base, wanted = (torch.cat(one[adapters], 1).to(read) for one in (self.target.base, self.target.wanted))
        counts = torch.tensor([self.target.base[index].shape[1] for index in own])
        of = torch.arange(len(own)).repeat_interleave(counts).to(read.device)
        with torch.enable_grad():
            leaf = read.detach().requires_grad_()
            deltas, targets = leaf - base, wanted - base
            if self.delta.pooling == "mean":
                deltas, targets = (_means(one, of, counts) for one in (deltas, targets))
                of = torch.arange(len(own), device=read.device)
            losses = self.loss(deltas, targets, of, len(own))
        return losses.detach(), lambda cotangent: torch.autograd.grad(losses, leaf, cotangent)[0]


class _DeltaPasses(AdapterPasses):
    """Hidden states (G, layers, P, H), or their means (G, layers, H), on the adapters' own texts."""

    def __init__(self, delta: DifferentiableTextDelta, texts: OwnTexts) -> None:
        super().__init__(delta.adapters_per_pass, delta.mesh)
        self.delta, self.texts = delta, texts
        self.counts = torch.tensor([sum(texts.counts(index, delta.positions)) for index in range(len(texts))])

    @property
    def one(self) -> Tensor:
        delta = self.delta
        rows = [] if delta.pooling == "mean" else [int(self.counts.max())]
        dtype = accumulation_dtype(delta.weights.compute_dtype)
        return torch.zeros(len(delta.layers), *rows, delta.config.hidden_size, dtype=dtype, device=delta.device)

    def base(self, lora: Lora) -> Tensor:
        """Those of the bare model, computed as the adapters' are: the delta of a zero LoRA is exactly zero."""
        delta = self.delta
        as_adapters = choose(delta.config, delta.weights, lora).ranks_decide
        bare = zero_lora(lora) if as_adapters else Lora({}, lora.n_adapters, batched=True)
        with torch.no_grad():
            return self.values(bare)

    def run(self, lora: Lora, adapters: slice, wanted: Sequence[str] | None) -> tuple[Tensor, Callable]:
        delta, texts = self.delta, self.texts
        own, head = range(len(texts))[adapters], delta.head(texts, adapters)
        (read,), vjp = forward_vjp(
            delta.config, delta.weights, texts.trees[adapters], lora[adapters], heads=[head], wrt=wanted,
            **delta.engine,
        )  # fmt: skip
        counts = self.counts[adapters]
        of = torch.arange(len(own)).repeat_interleave(counts).to(read.device)
        if delta.pooling == "mean":
            sizes = counts.to(read)[of, None]
            return _means(read, of, counts).transpose(0, 1), lambda d: vjp((d.transpose(0, 1)[:, of] / sizes,))
        n = int(self.counts.max())
        place = torch.cat([index * n + torch.arange(int(count)) for index, count in enumerate(counts)]).to(read.device)
        padded = read.new_zeros(len(own) * n, *read.transpose(0, 1).shape[1:])
        padded[place] = read.transpose(0, 1)
        shape = len(own), n, *padded.shape[1:]

        def back(cotangent: Tensor) -> dict[str, Tensor]:
            return vjp((cotangent.transpose(1, 2).reshape(padded.shape)[place].transpose(0, 1),))

        return padded.view(shape).transpose(1, 2), back


def _means(vectors: Tensor, of: Tensor, counts: Tensor) -> Tensor:
    """The mean (layers, g, H) of each adapter's vectors (layers, V, H)."""
    zeros = vectors.new_zeros(len(vectors), len(counts), vectors.shape[-1])
    return index_sum_(zeros, 1, of, vectors) / counts.to(vectors)[:, None]
