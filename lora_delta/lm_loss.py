"""The language model's loss on each adapter's own texts, differentiable in the LoRA tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights
from qwen_functional.compiled import opaque
from qwen_functional.heads import TokenLoss
from qwen_functional.ops.lm_head import StateTargets, Targets, lm_head_scores

from . import autograd
from .own_texts import Column, Examples, OverTexts, OwnTexts
from .teachers import States, TopK

REDUCTIONS = ("token", "example")
Teacher = Sequence[Sequence[TopK | States]]  # for each example; one kind for all


class Score(NamedTuple):
    """How well a model does on a completion.

    Attributes:
        nats: the sum of −log p over its tokens.
        n_tokens: how many they are.
        right: whether greedy decoding writes the whole completion.
    """

    nats: float
    n_tokens: int
    right: bool


def _mean(losses: Tensor, adapters: slice) -> Tensor:
    return losses.mean()


class DifferentiableLMLoss(OverTexts):
    """Maps LoRA tensors to the loss of the adapted model on each adapter's own examples, with gradients.

    Only the completions' tokens count. All adapters run at once, nothing is padded, prompts that an adapter's examples
    share are computed once for it, and logits are computed for a few rows at a time: see ``heads.py`` of
    ``qwen_functional``. The base model is not among the module's parameters, is never changed and gets no gradient. For
    torch.compile and torch.func see :class:`DifferentiableDeltaCompute`.

    Args:
        config, weights: the base model with its lm_head, from :func:`qwen_functional.load_pretrained`.
        spec: the LoRA; by default rank 16, alpha 32, all seven projections.
        label_smoothing: of the cross-entropy, as in ``torch.nn.functional.cross_entropy``.
        reduction: within an adapter, ``"token"`` averages over all tokens of its completions, ``"example"`` over the
            tokens of each example and then over its examples.
        adapters_per_pass: how many adapters to run at once; None for all. See :meth:`mean_loss`.
        checkpoint, memory_budget: see :func:`qwen_functional.forward.forward_vjp`.
        validate, prepack, mesh: as for :class:`DifferentiableDeltaCompute`; every rank is given all examples.

    Raises:
        ValueError: weights without an lm_head, or another invalid argument.
    """

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        spec: LoraSpec | None = None,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "token",
        adapters_per_pass: int | None = None,
        checkpoint: str = "auto",
        memory_budget: int | None = None,
        prepack: bool | str = "auto",
        mesh: DeviceMesh | None = None,
        validate: bool = True,
    ) -> None:
        if weights.lm_head is None:
            raise ValueError("weights have no lm_head, which a loss needs; expected load_pretrained with lm_head=True")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}, expected one of {REDUCTIONS}")
        TokenLoss((), label_smoothing)
        super().__init__(
            config, weights, spec, adapters_per_pass=adapters_per_pass, checkpoint=checkpoint,
            memory_budget=memory_budget, prepack=prepack, mesh=mesh, validate=validate,
        )  # fmt: skip
        self.label_smoothing, self.reduction = label_smoothing, reduction

    @opaque
    def forward(
        self,
        tensors: Mapping[str, Tensor],
        examples: Examples,
        teacher: Teacher | None = None,
        *,
        cross_entropy: bool = False,
    ) -> Tensor:
        """The loss (G,) of each adapter on its examples, in nats; float32, or float64 for float64 weights.

        Args:
            tensors: as :meth:`LoraSpec.bind` takes them; for one adapter without a leading G the loss is a scalar.
            examples: for each adapter, (prompt ids, completion ids) pairs. Where a prompt is empty, the completion's
                first token is not a target, as nothing precedes it.
            teacher: for each example, a teacher's predictions of the completion's tokens, from :meth:`states` or
                :meth:`top_k`; the loss is then KL(teacher ‖ adapted model). Tokens outside a top k do not count, so
                the value can be below zero.
            cross_entropy: with a teacher, return (G, 2): the KL and the cross-entropy, from the same pass.

        Raises:
            ValueError: adapters without examples, an empty completion, ids outside the vocabulary, a text longer than
                the model's positions, a teacher for other examples; or as :meth:`LoraSpec.bind`.
        """
        lora, texts = self.bound(tensors, examples), OwnTexts(self.config, examples)
        passes = self.passes(texts, self.columns(texts, teacher, cross_entropy=cross_entropy))
        value = autograd.values(passes, lora)
        return value if lora.batched else value[0]

    @opaque
    def mean_loss(
        self,
        tensors: Mapping[str, Tensor],
        examples: Examples,
        teacher: Teacher | None = None,
        *,
        cross_entropy: bool = False,
        loss: Callable[[Tensor, slice], Tensor] = _mean,
        over: str = "adapters",
        n_tokens: float | None = None,
    ) -> Tensor:
        """The mean loss over all adapters, a scalar: each pass runs forward and backward before the next one.

        The value and the gradients are those of ``self(tensors, examples, teacher).mean()``, whose backward, with
        several passes, computes nearly all of them twice.

        Args:
            cross_entropy: as in :meth:`forward`.
            loss: maps the losses (g,) or (g, 2) of some adapters, and the slice of these adapters, to a scalar, the
                mean over them: of a weighted sum of KL and cross-entropy, for example.
            over: ``"adapters"``, or ``"tokens"`` for the mean over all completion tokens of the batch, whatever
                ``reduction`` is.
            n_tokens: with ``"tokens"``, the number to divide by, such as that of all accumulated batches. By default
                that of this call, :meth:`n_targets`.

        Raises:
            ValueError: as :meth:`forward`; another ``over``.
        """
        if over not in ("adapters", "tokens"):
            raise ValueError(f"over is {over!r}, expected 'adapters' or 'tokens'")
        lora, texts = self.bound(tensors, examples), OwnTexts(self.config, examples)
        total = None
        if over == "tokens":
            total = self.n_targets(examples) if n_tokens is None else n_tokens
        columns = self.columns(texts, teacher, cross_entropy=cross_entropy, n_tokens=total)
        return autograd.mean_loss(self.passes(texts, columns), lora, loss)

    @staticmethod
    def n_targets(examples: Examples) -> int:
        """How many completion tokens the loss is taken over."""
        return sum(len(completion) - (not len(prompt)) for own in examples for prompt, completion in own)

    def top_k(
        self,
        examples: Examples,
        k: int,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        temperature: float = 1.0,
    ) -> list[list[TopK]]:
        """The model's predictions of each completion's tokens: the k likeliest ones and their log-probabilities.

        These serve as a teacher: the bare model, or adapters. With the same completions after prompts that say more, a
        document or an instruction, they are what context distillation learns from.

        Args:
            examples: as for :meth:`forward`; for the bare model, grouped in any way.
            tensors: of one adapter for each group of examples; None for the bare model.
            temperature: by which logits are divided.

        Raises:
            ValueError: a k that is not from 1 to the size of the vocabulary, or as :meth:`forward`.
        """
        if not isinstance(k, int) or not 1 <= k <= self.config.vocab_size:
            raise ValueError(f"k is {k!r}, expected 1 to {self.config.vocab_size}, the size of the vocabulary")
        assert self.weights.lm_head is not None
        E, found = self.weights.lm_head.to(self.weights.compute_dtype), list[list[TopK]]()
        for own in self.states(examples, tensors, temperature=temperature):
            found.append([TopK.of_states(one.states.to(E.device), E, k, temperature) for one in own])
        return found

    def states(
        self, examples: Examples, tensors: Mapping[str, Tensor] | None = None, *, temperature: float = 1.0
    ) -> list[list[States]]:
        """Like :meth:`top_k`, but the whole distributions, as the states from which the lm_head computes them.

        A teacher then takes only the memory of its hidden states, whatever the vocabulary; the loss computes both
        models' logits a few rows at a time.

        Args, Raises: as :meth:`top_k`.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature!r}, expected above 0")
        lora = None if tensors is None else self.bound(tensors, examples)
        texts = OwnTexts(self.config, examples)
        (found,) = self.read(texts, lora, [((-1,), "completion")])
        return as_teacher(found, texts, self.weights.compute_dtype, temperature)

    def scores(
        self, examples: Examples, tensors: Mapping[str, Tensor] | None = None
    ) -> list[list[Score]]:
        """How well the model does on each example, from one forward pass: with adapters, or bare.

        Greedy decoding writes a completion exactly if each of its tokens is the likeliest one after those before it.

        Args, Raises: as :meth:`top_k`.
        """
        lora = None if tensors is None else self.bound(tensors, examples)
        texts = OwnTexts(self.config, examples)
        (read,) = self.read(texts, lora, [((-1,), "completion")])
        return [self.scored(one[0], texts.completions[index]) for index, one in enumerate(read)]

    def scored(self, states: Tensor, completions: Sequence[Tensor]) -> list[Score]:
        """The same from states (T, H), after the final norm, that predict the tokens of some completions."""
        assert self.weights.lm_head is not None
        E = self.weights.lm_head.to(self.weights.compute_dtype)
        tokens = torch.cat(list(completions)).long().to(E.device)
        each = lm_head_scores(states.to(E), E, tokens)
        lengths = [len(one) for one in completions]
        losses, right = (one.cpu().split(lengths) for one in each)
        pairs = zip(losses, right, strict=True)
        return [Score(float(own.double().sum()), len(own), bool(all_.all())) for own, all_ in pairs]

    def columns(
        self,
        texts: OwnTexts,
        teacher: Teacher | None = None,
        *,
        cross_entropy: bool = False,
        n_tokens: float | None = None,
    ) -> list[Column]:
        """What one pass over texts computes: the cross-entropy; or the KL, followed by the cross-entropy if asked for.

        Args:
            teacher, cross_entropy: as in :meth:`forward`.
            n_tokens: if given, the losses are sums over tokens divided by it, times the number of adapters, whatever
                ``reduction`` is.

        Raises:
            ValueError: a teacher for other examples; ``cross_entropy`` without a teacher.
        """
        if teacher is None and cross_entropy:
            raise ValueError("cross_entropy is True without a teacher, expected False: the loss is the cross-entropy")
        total = None if n_tokens is None else n_tokens / len(texts)
        plain = _TokenColumn(None, self.reduction, total, self.label_smoothing, 1.0)
        if teacher is None:
            return [plain]
        temperature = _checked(texts, teacher, self.config)
        smoothing = 0.0 if cross_entropy else self.label_smoothing
        kl = _TokenColumn(teacher, self.reduction, total, smoothing, temperature)
        return [kl, plain] if cross_entropy else [kl]


@dataclass(frozen=True)
class _TokenColumn:
    """The cross-entropy, or the KL from a teacher."""

    teacher: Teacher | None
    reduction: str
    n_tokens: float | None  # if given, sums over tokens are divided by it instead
    smoothing: float
    temperature: float

    def head(self, texts: OwnTexts, adapters: slice) -> TokenLoss:
        targets: list[Any] = [self._targets(texts, index) for index in range(len(texts))[adapters]]
        return TokenLoss(targets, self.smoothing, self.temperature)

    def losses(self, read: Tensor, texts: OwnTexts, adapters: slice) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return read, lambda cotangent: cotangent

    def _targets(self, texts: OwnTexts, index: int) -> Targets | StateTargets:
        lengths = texts.lengths(index)
        n = torch.tensor(lengths)
        if self.n_tokens is not None:
            each = torch.full((len(lengths),), 1 / self.n_tokens, dtype=torch.float64)
        elif self.reduction == "token":
            each = torch.full((len(lengths),), 1 / sum(lengths), dtype=torch.float64)
        else:
            each = 1 / (len(lengths) * n.double())
        weights, rows = each.repeat_interleave(n), texts.rows(index, "completion")
        if self.teacher is None:
            return Targets.of_tokens(rows, torch.cat(texts.completions[index]), weights)
        said = self.teacher[index]
        if states := [one.states for one in said if isinstance(one, States)]:
            return StateTargets(rows, torch.cat(states), weights)
        top = [one for one in said if isinstance(one, TopK)]
        return Targets.joined([
            Targets(part, one.indices.cpu().long(), one.log_probs.cpu().double().exp(), weight)
            for part, weight, one in zip(rows.split(lengths), weights.split(lengths), top, strict=True)
        ])  # fmt: skip


def as_teacher(
    states: Sequence[Tensor], texts: OwnTexts, dtype: torch.dtype, temperature: float
) -> list[list[States]]:
    """The states (1, T, H) read from each adapter's completions, split by example."""
    parts = [one[0].to(dtype).split(texts.lengths(index)) for index, one in enumerate(states)]
    return [[States(part, temperature) for part in own] for own in parts]


def _checked(texts: OwnTexts, teacher: Teacher, config: Qwen2Config) -> float:
    """The temperature of a teacher.

    Raises:
        ValueError: a teacher for other examples, or one of several kinds or temperatures.
    """
    if len(teacher) != len(texts):
        raise ValueError(f"teacher is for {len(teacher)} adapters, expected {len(texts)} to match the examples")
    for index, said in enumerate(teacher):
        lengths = texts.lengths(index)
        if len(said) != len(lengths):
            raise ValueError(f"teacher of adapter {index} is for {len(said)} examples, expected {len(lengths)}")
        for example, (one, n) in enumerate(zip(said, lengths, strict=True)):
            size = config.vocab_size if isinstance(one, TopK) else config.hidden_size
            one.check(n, size, f"teacher of adapter {index}, example {example}")
    if len({type(one) for said in teacher for one in said}) > 1:
        raise ValueError("teacher mixes states and top k, expected one kind for all examples")
    temperatures = {one.temperature for said in teacher for one in said}
    if len(temperatures) > 1:
        raise ValueError(f"teacher has temperatures {sorted(temperatures)}, expected one for all examples")
    return temperatures.pop()
