"""Each adapter's own texts through the engine: hidden states read from them, and several losses from one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwen_functional import Lora, LoraSpec, Qwen2Config, Qwen2Weights, pack_each
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.forward import forward_vjp
from qwen_functional.heads import Head, Hidden
from qwen_functional.packing import check_ids, token_row
from qwen_functional.plan import check_options

from . import autograd
from .frozen import Frozen, load_frozen
from .passes import AdapterPasses, check_pass_options, prepacked

Ids = Sequence[int] | Tensor
Example = tuple[Ids, Ids]  # the ids of a prompt, and of its completion
Examples = Sequence[Sequence[Example]]  # of each adapter
Contexts = Sequence[Sequence[Ids]]  # of each adapter's examples
Ask = tuple[Sequence[int], str]  # after which blocks, at which positions

POSITIONS = ("completion", "last", "all")


class OwnTexts:
    """The examples of each of G adapters, packed.

    Args:
        examples: (prompt ids, completion ids) pairs of each adapter.
        positions: which will be read: ``"completion"``, the tokens that predict those of the completions; ``"last"``,
            each text's last token; ``"all"``, every token. A completion's last token predicts nothing, and is left out
            if only the first kind is read.

    Attributes:
        trees: (G,) packed texts, those of one adapter each.
        completions: (G,) lists, the predicted tokens of each completion.

    Raises:
        ValueError: adapters without examples, an empty completion, ids outside the vocabulary, a text longer than
            the model's positions; the message names adapter and example.
    """

    def __init__(self, config: Qwen2Config, examples: Examples, positions: Sequence[str] = ("completion",)) -> None:
        whole = any(one != "completion" for one in positions)
        each = [_packed(own, index, whole) for index, own in enumerate(examples)]
        self._firsts = [firsts for _, firsts, _ in each]
        self.completions = [completions for *_, completions in each]
        self.trees = pack_each([sequences for sequences, *_ in each])
        for index, (tree, completions) in enumerate(zip(self.trees, self.completions, strict=True)):
            try:
                tree.check_fits(config)
                check_ids(torch.cat(completions), config.vocab_size)
            except ValueError as error:
                raise ValueError(f"adapter {index}: {error}") from None

    def __len__(self) -> int:
        return len(self.trees)

    def lengths(self, adapter: int) -> list[int]:
        """How many tokens of each of an adapter's completions are predicted."""
        return [len(completion) for completion in self.completions[adapter]]

    def counts(self, adapter: int, positions: str) -> list[int]:
        """How many rows of each of an adapter's examples are read."""
        if positions == "completion":
            return self.lengths(adapter)
        return [1] * len(self.completions[adapter]) if positions == "last" else list(self.trees[adapter].lengths)

    def all_counts(self, positions: str) -> list[list[int]]:
        """The same for all adapters."""
        return [self.counts(index, positions) for index in range(len(self))]

    def rows(self, adapter: int, positions: str, counts: Sequence[int] | None = None) -> Tensor:
        """The nodes that are read, one example after the other.

        Args:
            counts: with ``"all"``, how many nodes of each example to read, counted from its end.
        """
        paths, firsts = self.trees[adapter].paths, self._firsts[adapter]
        if positions == "completion":
            ends = zip(paths, firsts, self.lengths(adapter), strict=True)
            return torch.cat([path[first : first + n] for path, first, n in ends])
        counts = self.counts(adapter, positions) if counts is None else counts
        return torch.cat([path[len(path) - n :] for path, n in zip(paths, counts, strict=True)])


def _packed(
    examples: Sequence[Example], adapter: int, whole: bool
) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """For each example of an adapter: what the model reads, where the first prediction is, and what is predicted."""
    if isinstance(examples, (str, bytes)) or not isinstance(examples, Sequence) or not examples:
        empty = isinstance(examples, Sequence) and not examples
        what = "no examples" if empty else f"a {type(examples).__name__} of examples"
        raise ValueError(f"adapter {adapter} has {what}, expected at least one (prompt ids, completion ids)")
    sequences, firsts, completions = [], [], []
    for index, example in enumerate(examples):
        where = f"adapter {adapter}, example {index}:"
        if not isinstance(example, Sequence) or isinstance(example, str) or len(example) != 2:
            raise ValueError(f"{where} is not a pair, expected (prompt ids, completion ids)")
        prompt = token_row(f"{where} the prompt", example[0], 0)
        completion = token_row(f"{where} the completion", example[1], 1 if len(prompt) else 2)
        sequences.append(torch.cat((prompt, completion if whole else completion[:-1])))
        firsts.append(max(0, len(prompt) - 1))  # without a prompt the first token is not predicted
        completions.append(completion if len(prompt) else completion[1:])
    return sequences, firsts, completions


class Column(Protocol):
    """A loss on each adapter's texts: what it reads from them, and how it computes losses from that."""

    def head(self, texts: OwnTexts, adapters: slice) -> Head:
        """The head that reads the texts of the adapters in a slice."""

    def losses(self, read: Tensor, texts: OwnTexts, adapters: slice) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The losses (g,) of what the head read, and the vjp from their cotangent to that of ``read``."""


class TextPasses(AdapterPasses):
    """The losses of one call's adapters, with all columns from one pass: (G,) for one column, else (G, columns).

    Args:
        adapters_per_pass, mesh: see :class:`AdapterPasses`.
        engine: further arguments of :func:`forward_vjp`.
    """

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        texts: OwnTexts,
        columns: Sequence[Column],
        adapters_per_pass: int | None = None,
        mesh: DeviceMesh | None = None,
        **engine: Any,
    ) -> None:
        super().__init__(adapters_per_pass, mesh)
        self.config, self.weights, self.texts, self.columns = config, weights, texts, list(columns)
        self.engine = engine

    @property
    def one(self) -> Tensor:
        dtype, device = accumulation_dtype(self.weights.compute_dtype), self.weights.device
        return torch.zeros([len(self.columns)] * (len(self.columns) > 1), dtype=dtype, device=device)

    def base(self, lora: Lora) -> Tensor:
        return self.one.expand(lora.n_adapters, *self.one.shape)

    def run(self, lora: Lora, adapters: slice, wanted: Sequence[str] | None) -> tuple[Tensor, Callable]:
        heads = [column.head(self.texts, adapters) for column in self.columns]
        read, vjp = forward_vjp(
            self.config, self.weights, self.texts.trees[adapters], lora[adapters], heads=heads, wrt=wanted,
            **self.engine,
        )  # fmt: skip
        made = [column.losses(one, self.texts, adapters) for column, one in zip(self.columns, read, strict=True)]
        losses, backs = [one for one, _ in made], [back for _, back in made]
        if len(losses) == 1:
            return losses[0], lambda cotangent: vjp((backs[0](cotangent),))

        def back(cotangent: Tensor) -> dict[str, Tensor]:
            return vjp([own(d.contiguous()) for own, d in zip(backs, cotangent.unbind(-1), strict=True)])

        return torch.stack(losses, -1), back


def read_states(
    config: Qwen2Config,
    weights: Qwen2Weights,
    texts: OwnTexts,
    lora: Lora | None,
    asks: Sequence[Ask],
    *,
    counts: Sequence[Sequence[int]] | None = None,
    adapters_per_pass: int | None = None,
    **engine: Any,
) -> list[list[Tensor]]:
    """Hidden states on texts, without gradients, from one pass: for each ask and each adapter, (layers, rows, H).

    Args:
        lora: None for the bare model.
        asks: layers as for :func:`forward_vjp`, and positions.
        counts: see :meth:`OwnTexts.rows`.
    """
    n = len(texts)
    lora = Lora({}, n, batched=True) if lora is None else lora
    found: list[list[Tensor]] = [[] for _ in asks]
    step = adapters_per_pass or n
    for start in range(0, n, step):
        own = range(start, min(start + step, n))
        nodes = [[texts.rows(i, positions, counts[i] if counts else None) for i in own] for _, positions in asks]
        heads = [Hidden(tuple(layers), rows) for (layers, _), rows in zip(asks, nodes, strict=True)]
        values, _ = forward_vjp(
            config, weights, texts.trees[own.start : own.stop], lora[own.start : own.stop], heads=heads, wrt=(),
            **engine,
        )  # fmt: skip
        for into, value, rows in zip(found, values, nodes, strict=True):
            into += value.split([len(one) for one in rows], dim=1)
    return found


def in_context(examples: Examples, contexts: Contexts, positions: str) -> list[list[tuple[Tensor, Tensor]]]:
    """The examples as a teacher reads them, each after its context.

    Where a prompt is empty, the completion's first token is not a target, and becomes part of the context.

    Raises:
        ValueError: contexts for other examples; with ``"all"`` positions, one that does not end with the prompt.
    """
    if len(contexts) != len(examples):
        raise ValueError(f"contexts are for {len(contexts)} adapters, expected {len(examples)} to match the examples")
    found = []
    for adapter, (own, before) in enumerate(zip(examples, contexts, strict=True)):
        if len(own) != len(before):
            raise ValueError(f"contexts of adapter {adapter} are for {len(before)} examples, expected {len(own)}")
        behind = []
        for index, ((prompt_ids, completion_ids), context_ids) in enumerate(zip(own, before, strict=True)):
            prompt, completion, context = (
                torch.as_tensor(ids, dtype=torch.int64) for ids in (prompt_ids, completion_ids, context_ids)
            )
            if positions == "all" and not torch.equal(context[len(context) - len(prompt) :], prompt):
                where = f"the context of adapter {adapter}, example {index},"
                raise ValueError(f"{where} does not end with its prompt, expected it to where all positions are read")
            first = 0 if len(prompt) else 1
            behind.append((torch.cat((context, completion[:first])), completion[first:]))
        found.append(behind)
    return found


class OverTexts(Frozen):
    """A differentiable function of LoRA tensors on each adapter's own texts.

    Args:
        config, weights: the base model.
        spec: the LoRA; by default rank 16, alpha 32, all seven projections.
        adapters_per_pass, prepack, mesh, validate: as for :class:`lora_delta.DifferentiableDeltaCompute`.
        checkpoint, memory_budget: see :func:`qwen_functional.forward.forward_vjp`.
    """

    reads_lm_head = True

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        spec: LoraSpec | None,
        *,
        adapters_per_pass: int | None,
        checkpoint: str,
        memory_budget: int | None,
        prepack: bool | str,
        mesh: DeviceMesh | None,
        validate: bool,
    ) -> None:
        super().__init__()
        check_pass_options(adapters_per_pass, prepack)
        check_options(checkpoint)
        self.spec = LoraSpec() if spec is None else spec
        self.lora_shapes = self.spec.shapes(config)
        self.config, self.weights = config, prepacked(weights, prepack)
        self.adapters_per_pass, self.mesh = adapters_per_pass, mesh
        self.engine: dict[str, Any] = {"checkpoint": checkpoint, "memory_budget": memory_budget}
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
    ) -> Self:
        """Load a base model.

        Args:
            model: hub id or folder.
            device: by default a GPU where there is one, else the CPU.
            compute_dtype: of the matrix multiplications, see :meth:`qwen_functional.Qwen2Weights.compute_in`.
            mesh: of several processes: ``"tp"`` splits the model, ``"dp"`` the adapters.
            stream: leave the base on ``"disk"`` (True) or in ``"host"`` memory, see ``load_pretrained``.
            options: the keyword arguments of the constructor.

        Raises:
            ValueError: as the constructor and ``load_pretrained`` do.
        """
        where: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        where["lm_head"] = cls.reads_lm_head
        base = load_frozen(model, device, compute_dtype, dtype=dtype, mesh=mesh, stream=stream, **where)
        return cls(*base, spec, mesh=mesh, **options)

    def read(
        self,
        texts: OwnTexts,
        lora: Lora | None,
        asks: Sequence[Ask],
        counts: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Tensor]]:
        """Hidden states on texts, see :func:`read_states`."""
        return read_states(
            self.config, self.weights, texts, lora, asks, counts=counts, adapters_per_pass=self.adapters_per_pass,
            **self.engine,
        )  # fmt: skip

    def passes(self, texts: OwnTexts, columns: Sequence[Column]) -> TextPasses:
        """The passes of texts through the engine, with this object's options."""
        return TextPasses(self.config, self.weights, texts, columns, self.adapters_per_pass, self.mesh, **self.engine)

    def bound(self, tensors: Mapping[str, Tensor], examples: Examples) -> Lora:
        """LoRA tensors as the engine takes them.

        Raises:
            ValueError: as :meth:`LoraSpec.bind`; examples for another number of adapters.
        """
        lora = autograd.bound(self.spec, self.config, tensors, self.device, validate=self._validate)
        n = lora.n_adapters
        if not isinstance(examples, Sequence) or isinstance(examples, str) or len(examples) != n:
            found = f"length {len(examples)}" if isinstance(examples, Sequence) else f"type {type(examples).__name__}"
            raise ValueError(f"examples are of {found}, expected a list for each of {n} adapters")
        return lora
