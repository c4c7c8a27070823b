"""What a generator is trained on: conditions with what there is to learn for each, and the batches of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..labelling.table import LabelDataset
from .conditions import PromptEncoder, PromptStates
from .text_lines import Text
from .texts import Texts, TextSet


class Task(NamedTuple):
    """A condition, and what its adapter should be or do; what no loss needs may be None.

    Attributes:
        states: (T, H) for each of the condition's prompts; only those that are drawn are looked up.
        tokens: (L, h, w), a teacher's; or
        tensors: {PEFT name: tensor}, its A and B.
        delta: (H,) or another shape of deltas, a teacher's.
        texts: the texts the adapter is meant for; only those that are drawn are looked up.
    """

    states: Sequence[Tensor]
    tokens: Tensor | None = None
    delta: Tensor | None = None
    texts: Sequence[Text] = ()
    tensors: Mapping[str, Tensor] | None = None


class TrainingSet(Protocol):
    """N tasks, each a :class:`Task` or a tuple of its first fields.

    Two members are optional: ``names``, the tasks' names in messages, and ``texts(index)``, whose result has a method
    ``n_tokens(i)`` that tells a text's length without reading it: ranks then share a batch by its tokens.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Task | tuple: ...


class Tasks:
    """What a run is trained on; states of prompts are computed, and texts read, on access.

    Args:
        names: the tasks' names.
        prompts: the prompts of each name; None if the conditions of ``texts`` are themselves the prompts.
        dataset: the teachers, if there are any, in the order of the names.
        texts: texts by condition, if there are any; every name is one of their conditions.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        names: Sequence[str],
        prompts: Mapping[str, Sequence[str]] | None,
        dataset: LabelDataset | None = None,
        texts: TextSet | None = None,
    ) -> None:
        self.encoder, self.names, self.prompts, self.dataset, self._texts = encoder, names, prompts, dataset, texts
        self._places: Mapping[str, int] | None = None
        if texts is not None and prompts is not None:
            self._places = {name: index for index, name in enumerate(texts.conditions)}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Task:
        states: Sequence[Tensor]
        if self.prompts is None:
            states = _Item(PromptStates(self.encoder, self.names), index)
        else:
            states = self.encoder.lazily(self.prompts[self.names[index]])
        _, *target, delta = (None, None) if self.dataset is None else self.dataset[index]
        tokens, tensors = None, None
        if target and isinstance(target[0], Tensor):
            tokens = target[0]
        elif target:
            tensors = target[0]
        return Task(states, tokens, delta, self.texts(index), tensors)

    def texts(self, index: int) -> Texts | tuple[()]:
        """The texts of a task."""
        if self._texts is None:
            return ()
        return self._texts.texts(index if self._places is None else self._places[self.names[index]])


class _Item(Sequence[Any]):
    """One item of a sequence, as a sequence; it is looked up on access."""

    def __init__(self, of: Sequence[Any], index: int) -> None:
        self._of, self._index = of, index

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        range(1)[index]  # or IndexError
        return self._of[self._index]


@dataclass(frozen=True)
class Batch:
    """This rank's tasks of a micro-batch, with the prompts and texts that were drawn.

    Attributes:
        names: the tasks' names, for messages.
        states: (T, H) for each task.
        n_deltas: how many tasks, from the first, are for the delta loss.
    """

    names: list[str]
    states: list[Tensor]
    tasks: list[Task]
    texts: list[list[Text]]
    n_deltas: int

    def first(self, n: int) -> Batch:
        """Its first n tasks."""
        return Batch(self.names[:n], self.states[:n], self.tasks[:n], self.texts[:n], self.n_deltas)

    def targets(self, name: str, loss: str, n: int | None = None) -> list[Any]:
        """The tokens, tensors or deltas of the first n tasks.

        Raises:
            ValueError: a task has none.
        """
        found = [getattr(task, name) for task in self.tasks[:n]]
        for who, one in zip(self.names, found, strict=False):
            if one is None:
                raise ValueError(f"task {who} has no {name}, which the loss {loss!r} needs")
        return found


class Draw:
    """Draws the tasks of each step from the step's number alone: a resumed run draws the same, and so do all ranks.

    Args:
        size, n_deltas: how many tasks a micro-batch has, and how many of them for the delta loss.
        prompts, texts: how many of each task's are drawn.
    """

    def __init__(self, tasks: TrainingSet, size: int, n_deltas: int, prompts: int, texts: int) -> None:
        self.tasks, self.prompts, self.texts = tasks, prompts, texts
        self.size = min(size, len(tasks))
        self.n_deltas = min(n_deltas, self.size)
        self._texts_of = getattr(tasks, "texts", None)

    def indices(self, chance: torch.Generator) -> list[tuple[int, int]]:
        """(task, seed for what is drawn within it) for each task of a micro-batch."""
        drawn = torch.randperm(len(self.tasks), generator=chance)[: self.size].tolist()
        return list(zip(drawn, torch.randint(2**62, (self.size,), generator=chance).tolist(), strict=True))

    def cost(self, index: int, seed: int) -> int:
        """How many tokens a task's drawn texts have; 0 if that is not known without reading them."""
        if self._texts_of is None:
            return 0
        texts = self._texts_of(index)
        return sum(texts.n_tokens(one) for one in _chosen(len(texts), self.texts, seed ^ 1))

    def batch(self, drawn: Sequence[tuple[int, int]], n_deltas: int) -> Batch:
        """The batch of some of the indices; the first ``n_deltas`` are for the delta loss."""
        names, states, tasks, texts = [], [], [], []
        for index, seed in drawn:
            task = Task(*self.tasks[index])
            chosen = _chosen(len(task.states), self.prompts, seed)
            names.append(name_of(self.tasks, index))
            states.append(torch.cat([task.states[one] for one in chosen]))
            texts.append([task.texts[one] for one in _chosen(len(task.texts), self.texts, seed ^ 1)])
            tasks.append(task)
        return Batch(names, states, tasks, texts, n_deltas)


def name_of(tasks: TrainingSet, index: int) -> str:
    """A task's name, for messages."""
    names: Sequence[str] | None = getattr(tasks, "names", None)
    return f"number {index}" if names is None else repr(names[index])


def _chosen(n: int, k: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].tolist()
