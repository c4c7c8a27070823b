"""The language model's loss of each adapter's own texts, differentiable in the LoRA tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwen_functional import Lora, LoraSpec, Qwen2Config, Qwen2Weights, load_pretrained, pack_each
from qwen_functional.compiled import opaque
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.forward import forward_vjp
from qwen_functional.heads import TokenLoss
from qwen_functional.ops.lm_head import StateTargets, Targets
from qwen_functional.packing import PackedTokens, check_ids, token_row
from qwen_functional.plan import check_options

from . import autograd
from .distributed import default_device
from .frozen import Frozen
from .passes import AdapterPasses, check_pass_options, prepacked
from .teachers import States, TopK

REDUCTIONS = ("token", "example")
Ids = Sequence[int] | Tensor
Example = tuple[Ids, Ids]  # the ids of a prompt, and of its completion
Examples = Sequence[Sequence[Example]]  # of each adapter
Teacher = Sequence[Sequence[TopK | States]]  # of each example, one kind for all


def _mean(losses: Tensor, adapters: slice) -> Tensor:
    return losses.mean()


class DifferentiableLMLoss(Frozen):
    """Maps LoRA tensors to the loss of the adapted model on each adapter's own examples, with gradients.

    The loss is of the completions' tokens alone. All adapters run at once, nothing is padded, prompts that an adapter's
    examples share are computed once for it, and logits are made for a few rows at a time: see ``heads.py`` of
    ``qwen_functional``. The base model has no parameters here, is never changed and gets no gradient. Under
    torch.compile and torch.func as :class:`DifferentiableDeltaCompute`.

    Args:
        config, weights: the base model with its lm_head, from :func:`qwen_functional.load_pretrained`.
        spec: the LoRA; by default rank 16, alpha 32, all seven projections.
        label_smoothing: of the cross-entropy, as in ``torch.nn.functional.cross_entropy``.
        reduction: within an adapter ``"token"`` is the mean over all tokens of its completions, ``"example"`` the mean
            over its examples of the mean over an example's.
        adapters_per_pass: how many adapters to run at once; None for all. See :meth:`mean_loss`.
        checkpoint, memory_budget: see :func:`qwen_functional.forward.forward_vjp`.
        validate, prepack, mesh: as for :class:`DifferentiableDeltaCompute`; every rank is given all examples.

    Raises:
        ValueError: weights without an lm_head, or another argument that is off.
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
        super().__init__()
        if weights.lm_head is None:
            raise ValueError("weights have no lm_head, which a loss needs; expected load_pretrained with lm_head=True")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}, expected one of {REDUCTIONS}")
        TokenLoss((), label_smoothing)
        check_pass_options(adapters_per_pass, prepack)
        check_options(checkpoint)
        self.spec = LoraSpec() if spec is None else spec
        self.lora_shapes = self.spec.shapes(config)
        self.config, self.weights = config, prepacked(weights, prepack)
        self.label_smoothing, self.reduction = label_smoothing, reduction
        self._passes_options: dict[str, Any] = {"adapters_per_pass": adapters_per_pass, "mesh": mesh}
        self._engine: dict[str, Any] = {"checkpoint": checkpoint, "memory_budget": memory_budget}
        self._validate = validate

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        spec: LoraSpec | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        compute_dtype: torch.dtype | None = None,
        mesh: DeviceMesh | None = None,
        stream: bool | str = False,
        **options: Any,
    ) -> DifferentiableLMLoss:
        """Load a base model.

        Args:
            model: hub id or folder.
            device: by default a GPU where there is one, else the CPU.
            compute_dtype: of the matrix multiplications, see :meth:`qwen_functional.Qwen2Weights.compute_in`.
            mesh: of several processes: ``"tp"`` splits the model, ``"dp"`` the adapters.
            stream: leave the base on ``"disk"`` (True) or in the ``"host"``'s memory, see ``load_pretrained``.
            options: the keyword arguments of the constructor.

        Raises:
            ValueError: as the constructor and ``load_pretrained`` do.
        """
        device = default_device() if device is None else device
        where: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        config, weights = load_pretrained(model, dtype=dtype, device=device, mesh=mesh, stream=stream, **where)
        weights = weights if compute_dtype is None else weights.compute_in(compute_dtype)
        return cls(config, weights, spec, mesh=mesh, **options)

    @property
    def device(self) -> torch.device:
        """Where the LoRA tensors are expected, and the losses come out."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base model is stored in."""
        return self.weights.dtype

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
            tensors: as :meth:`LoraSpec.bind` takes them; of one adapter without a leading G the loss is a scalar.
            examples: of each adapter, (prompt ids, completion ids) pairs. Where a prompt is empty, the completion's
                first token is no target, as nothing is before it.
            teacher: for each example what a teacher says of the completion's tokens, :meth:`states` or :meth:`top_k`;
                the loss is then KL(teacher ‖ adapted model). What a top k leaves out does not count: the value can be
                below zero.
            cross_entropy: with a teacher, give (G, 2): the KL, and beside it the cross-entropy, of the same pass.

        Raises:
            ValueError: adapters without examples, an empty completion, ids outside the vocabulary, a text longer than
                the model's positions, a teacher of other examples; or as :meth:`LoraSpec.bind`.
        """
        lora = self._bound(tensors, examples)
        value = autograd.values(self._passes(examples, teacher, cross_entropy), lora)
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
        """The mean loss of all adapters, a scalar: each pass goes forwards and back before the next one begins.

        The number and the gradients are those of ``self(tensors, examples, teacher).mean()``, whose backward in several
        passes computes nearly all of them twice.

        Args:
            cross_entropy: as in :meth:`forward`.
            loss: a scalar, the mean over some adapters, of their losses (g,) or (g, 2), and of which adapters they are:
                such as a weighted sum of KL and cross-entropy.
            over: ``"adapters"``, or ``"tokens"`` for the mean over all completions' tokens of the batch, whatever
                ``reduction`` is.
            n_tokens: for the latter, by how many to divide: of all batches that are accumulated, say. By default those
                of this call, :meth:`n_targets`.

        Raises:
            ValueError: as :meth:`forward`; a word that is neither.
        """
        if over not in ("adapters", "tokens"):
            raise ValueError(f"over is {over!r}, expected 'adapters' or 'tokens'")
        lora = self._bound(tensors, examples)
        total = None
        if over == "tokens":
            total = (self.n_targets(examples) if n_tokens is None else n_tokens) / lora.n_adapters
        passes = self._passes(examples, teacher, cross_entropy, total)
        return autograd.mean_loss(passes, lora, loss)

    @staticmethod
    def n_targets(examples: Examples) -> int:
        """How many tokens of the completions a loss is taken of."""
        return sum(len(completion) - (not len(prompt)) for own in examples for prompt, completion in own)

    def top_k(
        self,
        examples: Examples,
        k: int,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        temperature: float = 1.0,
    ) -> list[list[TopK]]:
        """What the model says of each example's completion: its k likeliest tokens and their log-probabilities.

        As a teacher: of the bare model, or of adapters. With the same completions behind prompts that say more, a
        document or an instruction, it is what context distillation learns from.

        Args:
            examples: as for :meth:`forward`; of the bare model in groups of any kind.
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
        """What :meth:`top_k` gives, whole: the states of which the head makes each token's distribution.

        A teacher that is there takes as much memory so as its hidden states, whatever the vocabulary; the loss makes
        both models' logits a few rows at a time.

        Args, Raises: as :meth:`top_k`.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature!r}, expected above 0")
        lora = Lora({}, len(examples), batched=True) if tensors is None else self._bound(tensors, examples)
        passes = self._passes(examples, None)
        with torch.no_grad():
            return [passes.states(lora, index, temperature) for index in range(len(examples))]

    def _bound(self, tensors: Mapping[str, Tensor], examples: Examples) -> Lora:
        lora = autograd.bound(self.spec, self.config, tensors, self.device, validate=self._validate)
        if not isinstance(examples, Sequence) or isinstance(examples, str) or len(examples) != lora.n_adapters:
            found = f"of {len(examples)}" if isinstance(examples, Sequence) else f"a {type(examples).__name__}"
            raise ValueError(f"examples are {found}, expected a list for each of {lora.n_adapters} adapters")
        return lora

    def _passes(
        self,
        examples: Examples,
        teacher: Teacher | None,
        cross_entropy: bool = False,
        n_tokens: float | None = None,
    ) -> _LMPasses:
        if cross_entropy and teacher is None:
            raise ValueError("cross_entropy is True without a teacher, expected False: the loss is the cross-entropy")
        texts = [_Texts.of(own, index) for index, own in enumerate(examples)]
        wanted: list[Teacher | None] = [teacher, None] if cross_entropy else [teacher]
        targets = [_targets(texts, one, self.config, self.reduction, n_tokens) for one in wanted]
        return _LMPasses(self, texts, targets)


class _Texts:
    """An adapter's examples, packed: what the model reads, and where in it what should follow is predicted."""

    def __init__(self, sequences: list[Tensor], firsts: list[int], completions: list[Tensor]) -> None:
        self.sequences, self.firsts, self.completions = sequences, firsts, completions

    @classmethod
    def of(cls, examples: Sequence[Example], adapter: int) -> _Texts:
        if isinstance(examples, (str, bytes)) or not isinstance(examples, Sequence) or not examples:
            empty = isinstance(examples, Sequence) and not examples
            what = "no examples" if empty else f"a {type(examples).__name__} of examples"
            raise ValueError(f"adapter {adapter} has {what}, expected at least one (prompt ids, completion ids)")
        sequences, firsts, completions = [], [], []
        for index, example in enumerate(examples):
            where = f"adapter {adapter}, example {index}:"
            if not isinstance(example, Sequence) or isinstance(example, str) or len(example) != 2:
                raise ValueError(f"{where} is no pair, expected (prompt ids, completion ids)")
            prompt = token_row(f"{where} the prompt", example[0], 0)
            completion = token_row(f"{where} the completion", example[1], 1 if len(prompt) else 2)
            # The last token predicts nothing that is asked for; without a prompt the first one is not predicted.
            sequences.append(torch.cat((prompt, completion[:-1])))
            firsts.append(max(0, len(prompt) - 1))
            completions.append(completion if len(prompt) else completion[1:])
        return cls(sequences, firsts, completions)

    def rows(self, tokens: PackedTokens) -> Tensor:
        """The nodes that predict the completions' tokens, one example after the other."""
        return torch.cat([path[first:] for path, first in zip(tokens.paths, self.firsts, strict=True)])


def _targets(
    texts: Sequence[_Texts],
    teacher: Teacher | None,
    config: Qwen2Config,
    reduction: str,
    n_tokens: float | None,
) -> Callable[[Sequence[PackedTokens], slice], tuple[list[Any], float | None]]:
    """The targets of the adapters in a slice, and the temperature of a teacher; all checked here."""
    temperature = None
    if teacher is not None:
        if len(teacher) != len(texts):
            raise ValueError(f"teacher is of {len(teacher)} adapters, expected {len(texts)} as the examples")
        for index, (own, said) in enumerate(zip(texts, teacher, strict=True)):
            if len(said) != len(own.completions):
                n = len(own.completions)
                raise ValueError(f"teacher of adapter {index} is of {len(said)} examples, expected {n}")
            for example, (one, completion) in enumerate(zip(said, own.completions, strict=True)):
                size = config.vocab_size if isinstance(one, TopK) else config.hidden_size
                one.check(len(completion), size, f"teacher of adapter {index}, example {example}")
        if len({type(one) for said in teacher for one in said}) > 1:
            raise ValueError("teacher is of states and of top k, expected one kind for all examples")
        temperatures = {one.temperature for said in teacher for one in said}
        if len(temperatures) > 1:
            raise ValueError(f"teacher is of temperatures {sorted(temperatures)}, expected one")
        (temperature,) = temperatures

    def of(trees: Sequence[PackedTokens], adapters: slice) -> tuple[list[Any], float | None]:
        made = list[Any]()
        for index, tree in zip(range(len(texts))[adapters], trees, strict=True):
            own = texts[index]
            lengths = torch.tensor([len(completion) for completion in own.completions])
            if n_tokens is not None:
                each = torch.full((len(lengths),), 1 / n_tokens, dtype=torch.float64)
            elif reduction == "token":
                each = torch.full((len(lengths),), 1 / int(lengths.sum()), dtype=torch.float64)
            else:
                each = 1 / (len(lengths) * lengths.double())
            weights, rows = each.repeat_interleave(lengths), own.rows(tree)
            if teacher is None:
                made.append(Targets.of_tokens(rows, torch.cat(own.completions), weights))
            elif states := [one.states for one in teacher[index] if isinstance(one, States)]:
                made.append(StateTargets(rows, torch.cat(states), weights))
            else:
                top = [one for one in teacher[index] if isinstance(one, TopK)]
                made.append(Targets.joined([
                    Targets(part, said.indices.cpu().long(), said.log_probs.cpu().double().exp(), weight)
                    for part, weight, said in zip(
                        rows.split(lengths.tolist()), weights.split(lengths.tolist()), top, strict=True
                    )
                ]))  # fmt: skip
        return made, temperature

    return of


class _LMPasses(AdapterPasses):
    """The losses of one call's adapters: (G,) of one kind, or (G, kinds)."""

    def __init__(self, lm: DifferentiableLMLoss, texts: list[_Texts], targets: list[Callable]) -> None:
        super().__init__(**lm._passes_options)
        self.config, self.weights, self.smoothing, self.engine = lm.config, lm.weights, lm.label_smoothing, lm._engine
        self.texts, self.targets = texts, targets
        self.trees = pack_each([own.sequences for own in texts])
        for index, (tree, own) in enumerate(zip(self.trees, texts, strict=True)):
            try:
                tree.check_fits(lm.config)
                check_ids(torch.cat(own.completions), lm.config.vocab_size)
            except ValueError as error:
                raise ValueError(f"adapter {index}: {error}") from None

    @property
    def one(self) -> Tensor:
        dtype, device = accumulation_dtype(self.weights.compute_dtype), self.weights.device
        return torch.zeros([len(self.targets)] * (len(self.targets) > 1), dtype=dtype, device=device)

    def base(self, lora: Lora) -> Tensor:
        return self.one.expand(lora.n_adapters, *self.one.shape)

    def run(self, lora: Lora, adapters: slice, wanted: Sequence[str] | None) -> tuple[Tensor, Callable]:
        trees = self.trees[adapters]
        heads = []
        for of in self.targets:
            targets, temperature = of(trees, adapters)
            smoothing = self.smoothing if temperature is None or len(self.targets) == 1 else 0.0
            heads.append(TokenLoss(targets, smoothing, temperature or 1.0))
        values, vjp = forward_vjp(
            self.config, self.weights, trees, lora[adapters], heads=heads, wrt=wanted, **self.engine
        )
        if len(heads) == 1:
            return values[0], lambda cotangent: vjp((cotangent,))
        return torch.stack(values, -1), lambda cotangent: vjp([one.contiguous() for one in cotangent.unbind(-1)])

    def states(self, lora: Lora, index: int, temperature: float) -> list[States]:
        """Of one adapter's completions."""
        tree, own = self.trees[index], self.texts[index]
        states, _ = forward_vjp(
            self.config, self.weights, (tree,), lora[index : index + 1], read="all", wrt=(), **self.engine
        )
        place = torch.cat(tree.paths)
        at = torch.empty(len(tree), dtype=torch.int64)
        at[place] = torch.arange(len(place))  # a node is read in every sequence that has it
        h = states[at[own.rows(tree)].to(states.device)].to(self.weights.compute_dtype)
        lengths = [len(completion) for completion in own.completions]
        return [States(part, temperature) for part in h.split(lengths)]
