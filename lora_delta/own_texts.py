"""Texts that each adapter has for itself, through the engine: what is read of them, and losses of it, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwen_functional import Lora, Qwen2Config, Qwen2Weights, pack_each
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.forward import forward_vjp
from qwen_functional.heads import Head, Hidden
from qwen_functional.packing import check_ids, token_row

from .passes import AdapterPasses

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
        positions: which will be read: ``"completion"``, the tokens that predict the completions'; ``"last"``, each
            text's last one; ``"all"``, every one. A completion's last token predicts nothing, and is left out where
            the first kind is all that is read.

    Attributes:
        trees: (G,) packed, one adapter's each.
        completions: (G,) lists, the tokens of each completion that are predicted.

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
        """How many tokens of each of its completions are predicted."""
        return [len(completion) for completion in self.completions[adapter]]

    def counts(self, adapter: int, positions: str) -> list[int]:
        """How many rows of each of its examples are read."""
        if positions == "completion":
            return self.lengths(adapter)
        return [1] * len(self.completions[adapter]) if positions == "last" else list(self.trees[adapter].lengths)

    def all_counts(self, positions: str) -> list[list[int]]:
        """The same of all adapters."""
        return [self.counts(index, positions) for index in range(len(self))]

    def rows(self, adapter: int, positions: str, counts: Sequence[int] | None = None) -> Tensor:
        """The nodes that are read, one example after the other.

        Args:
            counts: of ``"all"`` so many of each example, the last ones.
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
    """Of one adapter: what the model reads, where the first prediction is, and what is predicted, of each example."""
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
        sequences.append(torch.cat((prompt, completion if whole else completion[:-1])))
        firsts.append(max(0, len(prompt) - 1))  # without a prompt the first token is not predicted
        completions.append(completion if len(prompt) else completion[1:])
    return sequences, firsts, completions


class Column(Protocol):
    """A loss of each adapter's texts: what it reads of them, and what it makes of that."""

    def head(self, texts: OwnTexts, adapters: slice) -> Head:
        """What reads the texts of the adapters in a slice."""

    def losses(self, read: Tensor, texts: OwnTexts, adapters: slice) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The losses (g,) of what the head gave, and the way back from their cotangent to that of ``read``."""


class TextPasses(AdapterPasses):
    """The losses of one call's adapters, all of one pass: (G,) of one column, or (G, columns).

    Args:
        adapters_per_pass, mesh: see :class:`AdapterPasses`.
        engine: what :func:`forward_vjp` takes besides.
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
    """Hidden states of texts without gradients, of one pass: for each ask, of each adapter, (layers, rows, H).

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
    """The examples as a teacher reads them, each behind its context.

    Where a prompt is empty, the completion's first token is no target, and part of the context.

    Raises:
        ValueError: contexts of other examples; with ``"all"`` positions one that does not end with the prompt.
    """
    if len(contexts) != len(examples):
        raise ValueError(f"contexts are of {len(contexts)} adapters, expected {len(examples)} as the examples")
    found = []
    for adapter, (own, before) in enumerate(zip(examples, contexts, strict=True)):
        if len(own) != len(before):
            raise ValueError(f"contexts of adapter {adapter} are of {len(before)} examples, expected {len(own)}")
        behind = []
        for index, ((prompt_ids, completion_ids), context_ids) in enumerate(zip(own, before, strict=True)):
            prompt, completion, context = (
                torch.as_tensor(ids, dtype=torch.int64) for ids in (prompt_ids, completion_ids, context_ids)
            )
            if positions == "all" and not torch.equal(context[len(context) - len(prompt) :], prompt):
                where = f"the context of adapter {adapter}, example {index},"
                raise ValueError(f"{where} does not end with its prompt, expected so where all positions are read")
            first = 0 if len(prompt) else 1
            behind.append((torch.cat((context, completion[:first])), completion[first:]))
        found.append(behind)
    return found


def require_examples(examples: Examples, n_adapters: int) -> None:
    """Raises ``ValueError`` where they are not those of so many adapters."""
    if not isinstance(examples, Sequence) or isinstance(examples, str) or len(examples) != n_adapters:
        found = f"of {len(examples)}" if isinstance(examples, Sequence) else f"a {type(examples).__name__}"
        raise ValueError(f"examples are {found}, expected a list for each of {n_adapters} adapters")
