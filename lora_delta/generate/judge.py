"""What adapters do on the texts they are meant for, next to controls, without which such figures mean nothing.

A *case* is a condition with texts; a *way* is an adapter for each case, or none: the generated one, another
condition's, one for gibberish, the mean of all, the bare model. The prompted base, which reads the condition in its
context, is the reference. A way's figures are means over cases, with an interval over tasks, and over runs if there
are several.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_functional import Lora

from ..delta_losses import cosine_distances
from ..lm_loss import DifferentiableLMLoss
from ..own_texts import Examples, OwnTexts, in_context

SEEN, HELD_OUT = "seen conditions", "held-out conditions"
GENERATED, OTHER, GIBBERISH = "generated", "another condition's", "of gibberish"
MEAN, BARE, PROMPTED = "mean of generated", "bare model", "prompted base"
RESAMPLES, LEVEL = 2000, 0.95
_LAYER = -1

Adapters = Callable[[Sequence[int]], Lora]  # the adapters of the cases with these indices


@dataclass(frozen=True)
class Case:
    """A condition that adapters are judged on.

    Attributes:
        group: ``"seen conditions"`` or another; figures are computed for each group.
        task: what intervals resample: cases of one task are not independent.
        condition: its text, or its name.
        states: (T, H), as a generator reads it; None without a generator.
        examples: (prompt ids, completion ids) pairs.
        contexts: what the prompted base reads instead of each prompt.
        name: the condition's name if it has one, else the condition.
    """

    group: str
    task: str
    condition: str
    states: Tensor | None
    examples: Sequence[tuple[Tensor, Tensor]]
    contexts: Sequence[Tensor]
    name: str = ""


class Verdict(NamedTuple):
    """The result of one way on one case.

    Attributes:
        nats, n_tokens: the sum of −log p over all tokens of its completions, and how many there are.
        n_right, n_texts: how many completions greedy decoding reproduces in full, and how many there are.
        cosine, distance: deltas at the tokens that predict the completions, after the final norm, against those of the
            prompted base: the mean of their cosines, and the root of Σ‖delta − target‖² / Σ‖target‖².
    """

    nats: float
    n_tokens: int
    n_right: int
    n_texts: int
    cosine: float | None
    distance: float


class Judge:
    """Judges ways on cases, several at a time.

    Args:
        lm: the loss of the base model; its spec does not matter here.
        per_pass: cases at a time.
    """

    def __init__(self, lm: DifferentiableLMLoss, cases: Sequence[Case], *, per_pass: int = 16) -> None:
        if not cases:
            raise ValueError("there are no cases to judge, expected at least one")
        self.lm, self.cases, self.per_pass = lm, list(cases), per_pass
        self._base: list[Tensor] = []
        self._wanted: list[Tensor] = []
        for numbers in self.passes():
            self._base += self._read(numbers, None, False)
            self._wanted += self._read(numbers, None, True)

    def passes(self, per_pass: int | None = None) -> Iterator[Sequence[int]]:
        """The indices of the cases of each pass."""
        n, step = len(self.cases), per_pass or self.per_pass
        yield from (range(start, min(start + step, n)) for start in range(0, n, step))

    def bare(self) -> list[Verdict]:
        """Verdicts on the bare model."""
        return [self._verdict(number, self._base[number]) for number in range(len(self.cases))]

    def prompted(self) -> list[Verdict]:
        """Verdicts on the bare model with each condition in its context."""
        return [self._verdict(number, self._wanted[number]) for number in range(len(self.cases))]

    def judged(self, adapters: Adapters, *, per_pass: int | None = None) -> list[Verdict]:
        """Verdicts on an adapter for each case."""
        found = []
        for numbers in self.passes(per_pass):
            states = self._read(numbers, adapters(numbers), False)
            found += [self._verdict(number, one) for number, one in zip(numbers, states, strict=True)]
        return found

    def others(self) -> list[int]:
        """For each case the index of another one of its group, with another task if there is one."""
        found = []
        for number, case in enumerate(self.cases):
            order = [*range(number + 1, len(self.cases)), *range(number)]
            same = [one for one in order if self.cases[one].group == case.group] or order or [number]
            found.append(next((one for one in same if self.cases[one].task != case.task), same[0]))
        return found

    def _read(self, numbers: Sequence[int], lora: Lora | None, prompted: bool) -> list[Tensor]:
        """(T, H) for each case: the states at the tokens that predict its completions, on the CPU."""
        examples: Examples = [self.cases[number].examples for number in numbers]
        if prompted:
            examples = in_context(examples, [self.cases[number].contexts for number in numbers], "completion")
        texts = OwnTexts(self.lm.config, examples)
        (states,) = self.lm.read(texts, lora, [((_LAYER,), "completion")])
        return [one[0].cpu() for one in states]

    def _verdict(self, number: int, states: Tensor) -> Verdict:
        case = self.cases[number]
        completions = [c if len(p) else c[1:] for p, c in case.examples]
        scores = self.lm.scored(states, completions)
        deltas, target = (one - self._base[number] for one in (states, self._wanted[number]))
        moves = bool(deltas.any()) and bool(target.any())
        cosine = 1 - float(cosine_distances(deltas, target).mean()) if moves else None
        scale = float(target.square().sum()) or 1.0
        return Verdict(
            sum(one.nats for one in scores), sum(one.n_tokens for one in scores),
            sum(one.right for one in scores), len(scores),
            cosine, (float((deltas - target).square().sum()) / scale) ** 0.5,
        )  # fmt: skip


def gibberish(condition: str, seed: int) -> str:
    """Random letters and spaces, as many as the condition has characters."""
    chance = random.Random(f"{seed} {condition}")
    return "".join(chance.choice("abcdefghijklmnopqrstuvwxyz ") for _ in condition).strip() or "x"


def mean_adapter(adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean (…) of each tensor over all adapters, from batches (B, …)."""
    n = sum(len(next(iter(one.values()))) for one in adapters)
    return {name: torch.stack([one[name].sum(0) for one in adapters]).sum(0) / n for name in adapters[0]}


def figures(
    cases: Sequence[Case], runs: Sequence[Mapping[str, Sequence[Verdict | None]]], *, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """{group: {way: figures}} for one or more runs over the same cases.

    Each has ``loss``, nats per token; ``accuracy``, the share of completions that are right; ``cosine`` and
    ``distance`` as in :class:`Verdict`, means over cases; ``accuracy_interval``, which holds the accuracy of 95 % of
    2,000 resamples of tasks and runs; ``task_accuracies``, {task: that of each run}; and the numbers of conditions,
    tasks, runs and texts. A way that lacks a verdict on a case of a group has no figures for that group.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for group in dict.fromkeys(case.group for case in cases):
        numbers = [number for number, case in enumerate(cases) if case.group == group]
        tasks = [cases[number].task for number in numbers]
        names = list(dict.fromkeys(tasks))
        found[group] = {}
        for way in dict.fromkeys(way for run in runs for way in run):
            own = [{number: run[way][number] for number in numbers} for run in runs if way in run]
            every = [one for run in own for one in run.values() if one is not None]
            if len(every) < len(own) * len(numbers):
                continue
            cosines = [one.cosine for one in every if one.cosine is not None]
            n_right = torch.zeros(len(own), len(names), dtype=torch.float64)
            n_texts = torch.zeros_like(n_right)
            for row, run in enumerate(own):
                for verdict, task in zip(run.values(), tasks, strict=True):
                    assert verdict is not None
                    n_right[row, names.index(task)] += verdict.n_right
                    n_texts[row, names.index(task)] += verdict.n_texts
            sums = resampled(len(own), len(names), seed)
            found[group][way] = {
                "loss": sum(one.nats for one in every) / sum(one.n_tokens for one in every),
                "accuracy": float(n_right.sum() / n_texts.sum()),
                "accuracy_interval": interval(sums(n_right) / sums(n_texts)),
                "task_accuracies": dict(zip(names, (n_right / n_texts).T.tolist(), strict=True)),
                "cosine": sum(cosines) / len(cosines) if cosines else None,
                "distance": sum(one.distance for one in every) / len(every),
                "conditions": len(numbers),
                "tasks": len(names),
                "runs": len(own),
                "texts": int(n_texts[0].sum()),
            }
    return found


def resampled(runs: int, tasks: int, seed: int) -> Callable[[Tensor], Tensor]:
    """The sums (2,000,) of something (runs, tasks) over runs and tasks drawn anew, the same ones in every call."""
    chance = torch.Generator().manual_seed(seed)
    rows = torch.randint(runs, (RESAMPLES, runs), generator=chance)
    columns = torch.randint(tasks, (RESAMPLES, tasks), generator=chance)
    return lambda values: values[rows[:, :, None], columns[:, None]].sum((1, 2))


def interval(values: Tensor) -> list[float]:
    """The ends of the middle 95 % of some resampled values."""
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=values.dtype)
    return values.quantile(edges).tolist()


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The figures as lines of text, group by group."""
    width = max([34, *(len(way) + 3 for ways in found.values() for way in ways)])
    lines = [f"{'':<{width}}{'accuracy':>9}{'95 %':>14}{'nats/token':>12}{'cosine':>8}{'distance':>10}"]
    for group, ways in found.items():
        first = next(iter(ways.values()))
        runs = max(one["runs"] for one in ways.values())
        of = f"{first['tasks']} tasks, " if first["tasks"] < first["conditions"] else ""
        of += f"{first['conditions']} conditions, {first['texts']} texts" + (f", {runs} runs" if runs > 1 else "")
        lines.append(f"{group} ({of})")
        for way, one in ways.items():
            cosine = "–" if one["cosine"] is None else f"{one['cosine']:.2f}"
            low, high = (f"{value:.1%}" for value in one["accuracy_interval"])
            figures = f"{one['accuracy']:>9.1%}{f'{low}–{high}':>14}{one['loss']:>12.3f}{cosine:>8}"
            lines.append(f"  {way:<{width - 2}}{figures}{one['distance']:>10.2f}")
    return "\n".join(lines)
