"""The terms of a training loss, of what a generator has written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_functional import LoraSpec
from qwen_functional.dtypes import accumulation_dtype

from ..delta import DifferentiableDeltaCompute
from ..lm_loss import DifferentiableLMLoss
from ..teachers import States, StoredTopK, TopK
from .losses import delta_loss, product_l2, tensors_l1, tensors_l2, tokens_mse
from .options import TrainingOptions
from .tasks import Batch
from .text_lines import Text
from .tokens import TokenFormat

TEXT_TERMS = ("lm", "kl")


@dataclass(frozen=True)
class TextLosses:
    """Cross-entropy and KL of texts under generated adapters, both in one pass where both are asked for.

    Attributes:
        lm: on the ranks of a mesh without a ``"dp"`` dimension.
        temperature: of the teacher, by which logits are divided.
        stored: what a teacher said of all pairs of the texts' file; by default the bare model is asked, on the texts'
            contexts.
    """

    lm: DifferentiableLMLoss
    temperature: float = 1.0
    stored: StoredTopK | None = None

    def said(self, texts: Sequence[Sequence[Text]]) -> list[list[TopK]] | list[list[States]]:
        """What the teacher says of each adapter's texts.

        Raises:
            ValueError: a text without a context.
        """
        if self.stored is not None:
            return [[self.stored[text.number + i] for text in own for i in range(len(text.pairs))] for own in texts]
        asked = [[pair for text in own for pair in in_context(text)] for own in texts]
        return self.lm.states(asked, temperature=self.temperature)

    def mean(
        self,
        tensors: Mapping[str, Tensor],
        texts: Sequence[Sequence[Text]],
        weights: Mapping[str, float],
        *,
        n_tokens: float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms, and each one's mean over adapters, or over tokens where they are counted."""
        terms = [name for name in ("kl", "lm") if name in weights]  # in the order of the columns
        parts: list[Tensor] = []

        def loss(losses: Tensor, adapters: slice) -> Tensor:
            rows = losses.reshape(len(losses), len(terms))
            parts.append(rows.detach().sum(0))
            return (rows.mean(0) * rows.new_tensor([weights[name] for name in terms])).sum()

        teacher = self.said(texts) if "kl" in weights else None
        over = "adapters" if n_tokens is None else "tokens"
        total = self.lm.mean_loss(
            tensors, _pairs(texts), teacher, cross_entropy=len(terms) > 1, loss=loss, over=over, n_tokens=n_tokens
        )
        means = torch.stack(parts).sum(0) / len(texts)
        return total, dict(zip(terms, means, strict=True))


def in_context(text: Text) -> list[tuple[Tensor, Tensor]]:
    """(context, completion) of a text's pairs, as a teacher reads them.

    Where a prompt is empty, the completion's first token is no target, and part of the context.

    Raises:
        ValueError: it has no contexts.
    """
    if len(text.contexts) != len(text.pairs):
        raise ValueError("a text has no context for the teacher of the loss 'kl', expected one")
    found = []
    for context, (prompt, completion) in zip(text.contexts, text.pairs, strict=True):
        first = 0 if len(prompt) else 1
        found.append((torch.cat((context, completion[:first])), completion[first:]))
    return found


def n_targets(texts: Sequence[Sequence[Text]]) -> int:
    """How many tokens the losses of texts are taken of."""
    return DifferentiableLMLoss.n_targets(_pairs(texts))


def _pairs(texts: Sequence[Sequence[Text]]) -> list[list[tuple[Tensor, Tensor]]]:
    return [[pair for text in own for pair in text.pairs] for own in texts]


class Written:
    """What a generator has written for a batch: tokens (B, L, h, w), which ``format`` reads, or LoRA tensors."""

    def __init__(self, output: Tensor | Mapping[str, Tensor], format: TokenFormat | None) -> None:
        self.format = format
        self.tokens = _wide(output) if isinstance(output, Tensor) else None
        self._tensors = None if isinstance(output, Tensor) else {name: _wide(one) for name, one in output.items()}
        self._norms: list[Tensor] = []
        for one in [self.tokens] if self.tokens is not None else (self._tensors or {}).values():
            if one.requires_grad:
                one.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.dim())))
        self._norms = [torch.hypot(self._norms[0], norm) if self._norms else norm]

    @property
    def norms(self) -> list[Tensor]:
        """After the backward: the norm (B,) of each adapter's gradient, as it was written; or nothing."""
        return self._norms

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Of all adapters, {PEFT name: (B, …)}."""
        if self._tensors is None:
            self._tensors = self._read(self.tokens)
        return self._tensors

    def first(self, n: int) -> dict[str, Tensor]:
        """Of the first n adapters."""
        if self._tensors is not None:
            return {name: one[:n] for name, one in self._tensors.items()}
        return self.tensors if self.tokens is not None and n == len(self.tokens) else self._read(self.tokens, n)

    def _read(self, tokens: Tensor | None, n: int | None = None) -> dict[str, Tensor]:
        if self.format is None or tokens is None:
            raise ValueError("the generator writes tokens and there is no format, expected the format of its tokens")
        return self.format.detokenize(tokens[:n], validate=False)  # a step looks at its loss and gradient


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


@dataclass(frozen=True)
class Terms:
    """Makes the terms of the loss.

    Attributes:
        format: of a generator that writes tokens.
        delta, texts: for the losses of these names.
    """

    options: TrainingOptions
    format: TokenFormat | None = None
    delta: DifferentiableDeltaCompute | None = None
    texts: TextLosses | None = None

    def __post_init__(self) -> None:
        needed: dict[str, tuple[str, Any]] = {"weights": ("format", self.format), "delta": ("delta", self.delta)}
        needed |= dict.fromkeys(TEXT_TERMS, ("texts", self.texts))
        for name, (argument, value) in needed.items():
            if name in self.options.losses and value is None:
                raise ValueError(f"{argument} is None, which the loss {name!r} needs")

    @property
    def device(self) -> torch.device | None:
        """Where the base model is, if there is one."""
        return self.delta.device if self.delta is not None else self.texts.lm.device if self.texts is not None else None

    def functions(self, written: Written, batch: Batch, names: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
        """The terms of these names, those of texts aside."""
        made: dict[str, Callable[[], Tensor]] = {
            "weights": partial(self._weights, written, batch),
            "delta": partial(self._delta, written, batch),
            "l1": lambda: tensors_l1(written.tensors),
            "l2": lambda: tensors_l2(written.tensors),
            "product_l2": lambda: product_l2(written.tensors, spec=self._spec),
        }
        return {name: made[name] for name in names if name in made}

    @property
    def _spec(self) -> LoraSpec | None:
        return self.delta.spec if self.delta is not None else self.texts.lm.spec if self.texts is not None else None

    def _weights(self, written: Written, batch: Batch) -> Tensor:
        if written.tokens is None:
            raise ValueError("the generator writes LoRA tensors, expected tokens for the loss 'weights'")
        device = written.tokens.device
        return tokens_mse(written.tokens, [one.to(device) for one in batch.targets("tokens", "weights")])

    def _delta(self, written: Written, batch: Batch) -> Tensor:
        assert self.delta is not None
        mse, cosine = self.options.mse_weight, self.options.cosine_weight
        wanted = torch.stack(batch.targets("delta", "delta", batch.n_deltas)).to(self.delta.device)

        def loss(deltas: Tensor, adapters: slice) -> Tensor:
            return delta_loss(deltas, wanted[adapters], mse_weight=mse, cosine_weight=cosine)

        return self.delta.mean_loss(written.first(batch.n_deltas), loss)
