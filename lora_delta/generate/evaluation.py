"""How a generator does on conditions it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..shares import Shares
from .checkpoints import Metrics
from .conditions import Condition
from .tasks import Batch, Task, TrainingSet, name_of
from .terms import Terms, Written, n_targets, pairs_of

PREFIX = "held_out_"


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and when.

    Attributes:
        tasks: held-out conditions and their texts.
        every: steps between evaluations; there is one after the last step as well.
        conditions: how many conditions are evaluated, spread evenly over all of them; None for all.
        texts: how many texts of each condition, from the first; None for all.
        patience: the run ends after this many evaluations in a row without improvement; None for never.
    """

    tasks: TrainingSet
    every: int = 200
    conditions: int | None = None
    texts: int | None = 8
    patience: int | None = None

    def __post_init__(self) -> None:
        if not len(self.tasks):
            raise ValueError("the tasks of an evaluation are empty, expected at least one")

    def measured(self, generator: nn.Module, terms: Terms, shares: Shares, device: torch.device) -> Metrics:
        """``held_out_lm``, nats per token over all completions, and ``held_out_accuracy``, the share of completions
        that greedy decoding reproduces in full; with a KL loss ``held_out_kl``, nats per token; with a delta of texts
        against the prompted base ``held_out_delta``, a mean over conditions.

        There is no KL to a stored teacher, and no delta whose targets are stored or come from teachers' adapters: these
        cover the training texts only.

        Each rank of ``shares`` evaluates a part of the conditions. A condition is read with its first prompts.
        """
        if terms.texts is None:
            raise ValueError("an evaluation needs a loss on texts, expected 'lm', 'kl' or a delta of texts")
        options, lm_texts = terms.options, terms.texts
        names = self._names(terms)
        counted = [name for name in names if name not in ("lm", "accuracy")]
        n = len(self.tasks) if self.conditions is None else min(self.conditions, len(self.tasks))
        own = [index * len(self.tasks) // n for index in range(n)][shares.own(n)]
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)  # sums of values, and their counts
        was_training = generator.training
        generator.eval()
        try:
            for start in range(0, len(own), options.batch_size):
                indices = own[start : start + options.batch_size]
                batch = self._batch(indices, options.prompts_per_condition)
                condition = Condition.collate(batch.states).to(device)
                examples, count = pairs_of(batch.texts), n_targets(batch.texts)
                of = {"delta": len(indices), "accuracy": sum(map(len, examples))}
                sizes = sums.new_tensor([of.get(name, count) for name in names])
                with torch.no_grad():
                    with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                        written = Written(generator(condition.states, condition.mask), terms.format)
                    scores = [one for own in lm_texts.lm.scores(examples, written.tensors) for one in own]
                    totals = {"lm": sum(one.nats for one in scores), "accuracy": sum(one.right for one in scores)}
                    if counted:
                        # Next to the cross-entropy, a KL is computed without label smoothing.
                        ones = dict.fromkeys([*counted, *(["lm"] if "kl" in counted else [])], 1.0)
                        _, means = lm_texts.mean(written.tensors, batch.texts, ones, n_tokens=count)
                        totals |= {name: float(means[name]) * of.get(name, count) for name in counted}
                sums += torch.stack((sums.new_tensor([totals[name] for name in names]), sizes))
        finally:
            generator.train(was_training)
        values, sizes = shares.sum_(sums)
        return {f"{PREFIX}{name}": value for name, value in zip(names, (values / sizes).tolist(), strict=True)}

    def _batch(self, indices: Sequence[int], n_prompts: int) -> Batch:
        tasks = [Task(*self.tasks[index]) for index in indices]
        states = [torch.cat([task.states[i] for i in range(min(n_prompts, len(task.states)))]) for task in tasks]
        texts = [[task.texts[i] for i in range(min(self.texts or len(task.texts), len(task.texts)))] for task in tasks]
        return Batch([name_of(self.tasks, index) for index in indices], states, tasks, texts, 0)

    def score(self, metrics: Metrics, terms: Terms) -> float:
        """What generators are compared by, lower is better: the terms, weighted as in the last step."""
        options, names = terms.options, self._names(terms)
        weights = {name: options.losses[name](options.steps) for name in names if options.needs(name)}
        return sum(weight * metrics[f"{PREFIX}{name}"] for name, weight in (weights or {"lm": 1.0}).items())

    @staticmethod
    def _names(terms: Terms) -> list[str]:
        names, texts = ["lm", "accuracy"], terms.texts
        if texts is not None and texts.stored is None and terms.options.needs("kl"):
            names.append("kl")
        if texts is not None and texts.from_context and "delta" in terms.options.text_terms:
            names.append("delta")
        return names
