"""The terms of the training loss of what a generator has written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_functional import LoraSpec
from qwen_functional.dtypes import accumulation_dtype

from .. import autograd
from ..delta import DifferentiableDeltaCompute
from ..delta_losses import adapters_delta_loss, delta_loss
from ..lm_loss import DifferentiableLMLoss, Teacher, as_teacher
from ..own_texts import Ask, Column, Examples, OwnTexts, in_context
from ..stored_deltas import StoredDeltas
from ..teachers import StoredTopK
from ..text_delta import DeltaTarget, DifferentiableTextDelta
from .losses import product_l2, tensors_l1, tensors_l2, tensors_mse, tokens_mse
from .options import TrainingOptions
from .tasks import Batch
from .text_lines import Text
from .tokens import TokenFormat


@dataclass(frozen=True)
class TextLosses:
    """Cross-entropy, KL and delta of texts under generated adapters; the ones requested are computed in one pass.

    Attributes:
        lm: the cross-entropy; if on a mesh, one without a ``"dp"`` dimension.
        temperature: the logits of the KL's teacher are divided by it.
        stored: that teacher's distributions on all pairs of the texts' file; by default it is the bare model on the
            texts' contexts.
        delta: a delta with the same config, weights and spec.
        from_context: whether the target of the delta is the bare model on the texts' contexts; else it is a teacher's
            adapter.
        stored_deltas: the targets of the deltas of all pairs of the texts' file, instead of either.
        mse_weight, cosine_weight: weights of the parts of the delta loss, see
            :func:`lora_delta.delta_losses.adapters_delta_loss`.
    """

    lm: DifferentiableLMLoss
    temperature: float = 1.0
    stored: StoredTopK | None = None
    delta: DifferentiableTextDelta | None = None
    from_context: bool = False
    stored_deltas: StoredDeltas | None = None
    mse_weight: float = 1.0
    cosine_weight: float = 1.0

    def mean(
        self,
        tensors: Mapping[str, Tensor],
        texts: Sequence[Sequence[Text]],
        weights: Mapping[str, float],
        *,
        n_tokens: float | None = None,
        teachers: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms, and each one's mean over adapters, or over tokens if ``n_tokens`` is given.

        Args:
            teachers: teachers' adapters {PEFT name: (B, …)}, if they are the target of the delta.

        Raises:
            ValueError: a text without a context that a term needs, or no delta or no teachers for ``"delta"``.
        """
        terms = [name for name in ("kl", "lm", "delta") if name in weights]  # in the order of the columns
        parts: list[Tensor] = []

        def loss(losses: Tensor, adapters: slice) -> Tensor:
            rows = losses.reshape(len(losses), len(terms))
            parts.append(rows.detach().sum(0))
            return (rows.mean(0) * rows.new_tensor([weights[name] for name in terms])).sum()

        examples = pairs_of(texts)
        lora, own = self.lm.bound(tensors, examples), OwnTexts(self.lm.config, examples, self._positions(terms))
        said, target = self._targets(own, examples, texts, terms, teachers)
        columns: list[Column] = []
        if "kl" in terms or "lm" in terms:
            columns += self.lm.columns(own, said, cross_entropy="kl" in terms and "lm" in terms, n_tokens=n_tokens)
        if target is not None and self.delta is not None:
            part = partial(adapters_delta_loss, mse_weight=self.mse_weight, cosine_weight=self.cosine_weight)
            columns.append(self.delta.column(own, target, part))
        total = autograd.mean_loss(self.lm.passes(own, columns), lora, loss)
        means = torch.stack(parts).sum(0) / len(texts)
        return total, dict(zip(terms, means, strict=True))

    def _positions(self, terms: Sequence[str]) -> list[str]:
        own = [] if self.delta is None or "delta" not in terms else [self.delta.positions]
        return ["completion", *own]

    def _targets(
        self,
        own: OwnTexts,
        examples: Examples,
        texts: Sequence[Sequence[Text]],
        terms: Sequence[str],
        teachers: Mapping[str, Tensor] | None,
    ) -> tuple[Teacher | None, DeltaTarget | None]:
        """The KL's teacher distributions and the target deltas; the prompted base runs once for both."""
        lm, delta = self.lm, self.delta
        said: Teacher | None = None
        if "kl" in terms and self.stored is not None:
            stored = self.stored
            said = [[stored[number] for number in of] for of in numbers_of(texts)]
        asks: dict[str, Ask] = {}
        if "kl" in terms and said is None:
            asks["kl"] = (-1,), "completion"
        if "delta" in terms:
            if delta is None:
                raise ValueError("there is no delta of texts, which the loss 'delta' needs")
            if self.from_context:
                asks["delta"] = delta.layers, delta.positions
            elif teachers is None and self.stored_deltas is None:
                raise ValueError("there are no teachers' adapters, which the loss 'delta' needs as its target")
        with torch.no_grad():
            found: dict[str, list[Tensor]] = {}
            if asks:
                behind = in_context(examples, contexts_of(texts), delta.positions if "delta" in asks and delta else "")
                read = OwnTexts(lm.config, behind, [positions for _, positions in asks.values()])
                counts = own.all_counts(delta.positions) if "delta" in asks and delta else None
                values = lm.read(read, None, list(asks.values()), counts)
                found = dict(zip(asks, values, strict=True))
                if "kl" in asks:
                    said = as_teacher(found["kl"], read, lm.weights.compute_dtype, self.temperature)
            if "delta" not in terms or delta is None:
                return said, None
            if self.stored_deltas is not None:
                return said, self.stored_deltas.target(numbers_of(texts), lm.device)
            ask = [(delta.layers, delta.positions)]
            wanted = found.get("delta") or lm.read(own, lm.bound(teachers or {}, examples), ask)[0]
            return said, DeltaTarget(lm.read(own, None, ask)[0], wanted)


def numbers_of(texts: Sequence[Sequence[Text]]) -> list[list[int]]:
    """The numbers of all pairs in the texts' file."""
    return [[text.number + index for text in own for index in range(len(text.pairs))] for own in texts]


def contexts_of(texts: Sequence[Sequence[Text]]) -> list[list[Tensor]]:
    """The contexts of all pairs, as a teacher reads them.

    Raises:
        ValueError: a text has none.
    """
    for own in texts:
        for text in own:
            if len(text.contexts) != len(text.pairs):
                raise ValueError("a text has no context for a teacher to read, expected one for each pair")
    return [[context for text in own for context in text.contexts] for own in texts]


def n_targets(texts: Sequence[Sequence[Text]]) -> int:
    """How many tokens the losses on texts are computed on."""
    return DifferentiableLMLoss.n_targets(pairs_of(texts))


def pairs_of(texts: Sequence[Sequence[Text]]) -> list[list[tuple[Tensor, Tensor]]]:
    """All (prompt, completion) of each adapter's texts."""
    return [[pair for text in own for pair in text.pairs] for own in texts]


class Written:
    """What a generator has written for a batch: tokens (B, L, h, w) in ``format``, or LoRA tensors."""

    def __init__(self, output: Tensor | Mapping[str, Tensor], format: TokenFormat | None) -> None:
        self.format = format
        self.tokens = _wide(output) if isinstance(output, Tensor) else None
        self._tensors = None if isinstance(output, Tensor) else {name: _wide(one) for name, one in output.items()}
        self.norms: list[Tensor] = []  # (B,) after the backward: each adapter's gradient norm
        look = partial(_add_norm, self.norms)
        for one in [self.tokens] if self.tokens is not None else (self._tensors or {}).values():
            if one.requires_grad:
                one.register_hook(look)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all adapters, {PEFT name: (B, …)}."""
        if self._tensors is None:
            self._tensors = self._read(self.tokens)
        return self._tensors

    def first(self, n: int) -> dict[str, Tensor]:
        """The tensors of the first n adapters."""
        if self._tensors is not None:
            return {name: one[:n] for name, one in self._tensors.items()}
        return self.tensors if self.tokens is not None and n == len(self.tokens) else self._read(self.tokens, n)

    def _read(self, tokens: Tensor | None, n: int | None = None) -> dict[str, Tensor]:
        if self.format is None or tokens is None:
            raise ValueError("the generator writes tokens but there is no format, expected the format of its tokens")
        return self.format.detokenize(tokens[:n], validate=False)  # a step checks its loss and gradient instead


def _add_norm(norms: list[Tensor], gradient: Tensor) -> None:
    """A hook. If it referred to its own tensor, that would never be freed, nor would the autograd graph behind it."""
    norm = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.dim())))
    norms[:] = [torch.hypot(norms[0], norm) if norms else norm]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


@dataclass(frozen=True)
class Terms:
    """Builds the terms of the loss.

    Attributes:
        format: the format of a generator that writes tokens.
        delta, texts: for the delta loss on probes, and for the losses on texts.
    """

    options: TrainingOptions
    format: TokenFormat | None = None
    delta: DifferentiableDeltaCompute | None = None
    texts: TextLosses | None = None

    def __post_init__(self) -> None:
        needed: dict[str, tuple[str, Any]] = {"delta": ("delta", self.delta)}
        needed |= dict.fromkeys(self.options.text_terms, ("texts", self.texts))
        for name, (argument, value) in needed.items():
            if name in self.options.losses and value is None:
                raise ValueError(f"{argument} is None, which the loss {name!r} needs")

    @property
    def device(self) -> torch.device | None:
        """Where the base model is, if there is one."""
        return self.delta.device if self.delta is not None else self.texts.lm.device if self.texts is not None else None

    def functions(self, written: Written, batch: Batch, names: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
        """The terms with these names, except those on texts."""
        made: dict[str, Callable[[], Tensor]] = {
            "weights": partial(self._weights, written, batch),
            "delta": partial(self._delta, written, batch),
            "l1": lambda: tensors_l1(written.tensors),
            "l2": lambda: tensors_l2(written.tensors),
            "product_l2": lambda: product_l2(written.tensors, spec=self._spec),
        }
        return {name: made[name] for name in names if name in made}

    @property
    def asks_teachers_deltas(self) -> bool:
        """Whether deltas of texts are compared with those of teachers' adapters, which each step must read."""
        texts = self.texts
        return texts is not None and not texts.from_context and texts.stored_deltas is None

    @property
    def _spec(self) -> LoraSpec | None:
        return self.delta.spec if self.delta is not None else self.texts.lm.spec if self.texts is not None else None

    def teachers(self, batch: Batch, loss: str) -> dict[str, Tensor]:
        """The adapters {PEFT name: (B, …)} of a batch's teachers.

        Raises:
            ValueError: a task has none, or teachers are tokens and there is no format.
        """
        if any(task.tensors is not None for task in batch.tasks):
            each = batch.targets("tensors", loss)
            return {name: torch.stack([one[name] for one in each]).to(self.device) for name in each[0]}
        tokens = torch.stack(batch.targets("tokens", loss)).to(self.device or "cpu")
        if self.format is None:
            raise ValueError(f"teachers are tokens but there is no format, which the loss {loss!r} needs")
        return self.format.detokenize(_wide(tokens))

    def _weights(self, written: Written, batch: Batch) -> Tensor:
        if written.tokens is None:
            teachers = self.teachers(batch, "weights")
            return tensors_mse(written.tensors, {name: teachers[name].to(one) for name, one in written.tensors.items()})
        device = written.tokens.device
        return tokens_mse(written.tokens, [one.to(device) for one in batch.targets("tokens", "weights")])

    def _delta(self, written: Written, batch: Batch) -> Tensor:
        assert self.delta is not None
        mse, cosine = self.options.mse_weight, self.options.cosine_weight
        wanted = torch.stack(batch.targets("delta", "delta", batch.n_deltas)).to(self.delta.device)

        def loss(deltas: Tensor, adapters: slice) -> Tensor:
            return delta_loss(deltas, wanted[adapters], mse_weight=mse, cosine_weight=cosine)

        return self.delta.mean_loss(written.first(batch.n_deltas), loss)
