"""The ways judged on a file of texts: a run's generator, adapters from elsewhere, teachers, and controls."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen_functional import Lora, LoraSpec, Qwen2Config, Qwen2Weights
from qwen_functional.files import parse_json

from ..labelling.table import DeltaLabels
from ..lm_loss import DifferentiableLMLoss
from ..peft.adapters import load_peft_adapter
from .conditions import Condition, PromptEncoder
from .judge import (
    BARE,
    GENERATED,
    GIBBERISH,
    HELD_OUT,
    MEAN,
    OTHER,
    PROMPTED,
    SEEN,
    Case,
    Judge,
    Verdict,
    gibberish,
    mean_adapter,
)
from .runs import Run
from .text_lines import CONTEXT, TextReader
from .texts import TextSet

TEACHER, MEAN_TEACHER, NEAREST_TEACHER = "its teacher", "mean teacher", "nearest teacher"
_TASK = b'"task"'


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much of a file is judged: conditions per group, spread evenly, and texts per condition; None for all."""

    conditions: int | None = 64
    texts: int | None = 16


def read_cases(
    paths: Sequence[str | Path],
    folder: str | Path,
    config: Qwen2Config,
    *,
    encoder: PromptEncoder | None = None,
    seen: frozenset[str] = frozenset(),
    prompts: Mapping[str, Sequence[str]] | None = None,
    context: str = CONTEXT,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    limits: Limits = Limits(),
    progress: bool = True,
) -> list[Case]:
    """Cases from files of texts.

    Each condition is a case; if conditions are names in ``prompts``, each prompt of a name is a case. A case's task is
    the first ``"task"`` among the condition's lines, or the condition itself if there is none.

    Args:
        folder: the base model's checkpoint.
        encoder: the encoder of a generator's conditions.
        seen: the conditions a generator was trained on; all others are held out.
        context, chat_template_kwargs: how the prompted base's context is made, see :class:`TextReader`.

    Raises:
        ValueError: an invalid file; the message has the line number.
    """
    names = None if prompts is None else {name: own[0] for name, own in prompts.items()}
    reader = TextReader(
        folder, max_tokens=config.max_position_embeddings, vocab_size=config.vocab_size,
        max_condition=encoder.max_length if encoder is not None and prompts is None else None, names=names,
        context=context, chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    cases: dict[str, list[Case]] = {SEEN: [], HELD_OUT: []}
    with tempfile.TemporaryDirectory() as scratch:
        for path in paths:
            texts, tasks = TextSet.compiled(path, scratch, reader, progress=progress), _tasks(Path(path))
            for group, own in _groups(texts, seen, limits).items():
                for index in own:
                    cases[group] += _cases(texts, index, group, tasks, prompts, limits.texts)
    found = [case for own in cases.values() for case in own]
    if encoder is None:
        return found
    states = encoder([case.condition for case in found])
    return [dataclasses.replace(case, states=one) for case, one in zip(found, states, strict=True)]


def _groups(texts: TextSet, seen: frozenset[str], limits: Limits) -> dict[str, list[int]]:
    """The indices of the conditions to judge, by group."""
    groups: dict[str, list[int]] = {SEEN: [], HELD_OUT: []}
    for index, condition in enumerate(texts.conditions):
        groups[SEEN if condition in seen else HELD_OUT].append(index)
    if limits.conditions is not None:
        for group, own in groups.items():
            n = min(limits.conditions, len(own))
            groups[group] = [own[index * len(own) // n] for index in range(n)]
    return groups


def _cases(
    texts: TextSet,
    index: int,
    group: str,
    tasks: Mapping[str, str],
    prompts: Mapping[str, Sequence[str]] | None,
    most: int | None,
) -> list[Case]:
    name, every = texts.conditions[index], texts.texts(index)
    chosen = [every[number] for number in range(len(every) if most is None else min(most, len(every)))]
    pairs = [pair for text in chosen for pair in text.pairs]
    contexts = [one for text in chosen for one in text.contexts]
    conditions = [name] if prompts is None else prompts[name]
    task = tasks.get(name, name)
    return [Case(group, task, condition, None, pairs, contexts, name) for condition in conditions]


def _tasks(path: Path) -> dict[str, str]:
    """{condition: task} from the lines that name a task; the lines have been validated by now."""
    found: dict[str, str] = {}
    with path.open("rb") as lines:
        for line in lines:
            if _TASK in line:
                entry = parse_json(line, "a line", "JSON")
                if isinstance(entry.get("task"), str):
                    found.setdefault(entry["condition"], entry["task"])
    return found


def judge_run(run: Run, judge: Judge, *, seed: int = 0) -> dict[str, list[Verdict | None]]:
    """The adapters that a generator writes, and controls for them."""

    def lora(tensors: Mapping[str, Tensor]) -> Lora:
        return run.spec.bind(run.config, tensors)

    def written(states: Sequence[Tensor | None]) -> dict[str, Tensor]:
        given = Condition.collate([one for one in states if one is not None]).to(run.weights.device)
        return run.write(given.states, given.mask)

    states = [case.states for case in judge.cases]
    others = judge.others()
    nonsense = run.encoder([gibberish(case.condition, seed) for case in judge.cases])
    groups = {case.group for case in judge.cases}
    of_mean = [number for number, case in enumerate(judge.cases) if case.group == SEEN or SEEN not in groups]
    parts = [written([states[i] for i in of_mean[at : at + judge.per_pass]]) for at in _starts(of_mean, judge)]
    mean = mean_adapter(parts)
    return {
        GENERATED: list(judge.judged(lambda numbers: lora(written([states[i] for i in numbers])))),
        OTHER: list(judge.judged(lambda numbers: lora(written([states[others[i]] for i in numbers])))),
        GIBBERISH: list(judge.judged(lambda numbers: lora(written([nonsense[i] for i in numbers])))),
        MEAN: list(judge.judged(lambda numbers: lora(_expanded(mean, len(numbers))))),
    }


def judge_base(judge: Judge) -> dict[str, list[Verdict | None]]:
    """The bare model, without and with the condition in its context."""
    return {BARE: list(judge.bare()), PROMPTED: list(judge.prompted())}


def judge_teachers(
    labels: DeltaLabels,
    prompts: Mapping[str, Sequence[str]],
    spec: LoraSpec,
    run: Run,
    judge: Judge,
) -> dict[str, list[Verdict | None]]:
    """The mean teacher, the teacher with the nearest condition, and each case's own teacher, if one has its name.

    The nearest condition is the one with the largest cosine between mean states, after the mean over all teachers is
    subtracted.

    Args:
        prompts: the teachers' prompts, by their names in the labels.
    """
    names = list(prompts)
    each = [load_peft_adapter(labels.source(name), config=run.config)[1] for name in names]
    device = run.weights.device
    tensors = {name: torch.stack([one[name] for one in each]).float().to(device) for name in each[0]}
    pooled = torch.stack([torch.cat(run.encoder(prompts[name])).mean(0) for name in names])
    ours = torch.stack([case.states.mean(0) for case in judge.cases if case.states is not None])
    centre = pooled.mean(0)
    nearest = ((ours - centre) @ F.normalize(pooled - centre, dim=-1).T).argmax(1).tolist()  # whatever a case's norm
    mean = mean_adapter([tensors])

    def chosen(indices: Sequence[int]) -> Lora:
        return spec.bind(run.config, {name: one[list(indices)] for name, one in tensors.items()})

    found: dict[str, list[Verdict | None]] = {
        MEAN_TEACHER: list(judge.judged(lambda numbers: spec.bind(run.config, _expanded(mean, len(numbers))))),
        NEAREST_TEACHER: list(judge.judged(lambda numbers: chosen([nearest[i] for i in numbers]))),
    }
    places = {name: index for index, name in enumerate(names)}
    own = [places.get(case.name) for case in judge.cases]
    if any(place is not None for place in own):
        whole = judge.judged(lambda numbers: chosen([own[i] or 0 for i in numbers]))
        found[TEACHER] = [None if place is None else one for place, one in zip(own, whole, strict=True)]
    return found


def judge_adapters(
    adapters: Mapping[str, str | Path], config: Qwen2Config, weights: Qwen2Weights, judge: Judge
) -> dict[str, list[Verdict | None]]:
    """Each case's adapter from elsewhere, found by name, another case's, and their mean if they share a spec.

    Raises:
        ValueError: a case without an adapter.
    """
    missing = [case.name for case in judge.cases if case.name not in adapters]
    if missing:
        raise ValueError(f"there is no adapter for {missing[0]!r}, expected a folder of this name among the adapters")
    read: dict[str, tuple[LoraSpec, dict[str, Tensor]]] = {}

    def bound(name: str) -> Lora:
        if name not in read:
            spec, tensors = load_peft_adapter(adapters[name], config=config)
            read[name] = spec, {key: one.to(weights.device) for key, one in tensors.items()}
        spec, tensors = read[name]
        return spec.bind(config, {key: one[None] for key, one in tensors.items()})

    names, others = [case.name for case in judge.cases], judge.others()
    found: dict[str, list[Verdict | None]] = {
        "adapters": list(judge.judged(lambda numbers: bound(names[numbers[0]]), per_pass=1)),
        OTHER: list(judge.judged(lambda numbers: bound(names[others[numbers[0]]]), per_pass=1)),
    }
    (first, *rest) = read.values()
    if all(spec == first[0] and tensors.keys() == first[1].keys() for spec, tensors in rest):
        mean = mean_adapter([{key: one[None].float() for key, one in tensors.items()} for _, tensors in read.values()])
        found["mean of adapters"] = list(
            judge.judged(lambda numbers: first[0].bind(config, _expanded(mean, len(numbers))))
        )
    return found


def seen_conditions(folder: str | Path, facts: Mapping[str, Any]) -> frozenset[str]:
    """The conditions a run was trained on, as far as its folder tells: those of its texts."""
    for place in sorted(Path(folder).glob("texts-*")):
        try:
            texts = TextSet.opened(place)
        except ValueError as error:
            warnings.warn(f"which conditions the run has seen is not known: {error}", stacklevel=2)
            continue
        if dict(texts.facts) == json.loads(json.dumps(facts.get("texts"))):
            return frozenset(texts.conditions)
    return frozenset()


def base_judge(
    config: Qwen2Config, weights: Qwen2Weights, cases: Sequence[Case], per_pass: int = 16
) -> Judge:
    """A judge of adapters of a base model."""
    return Judge(DifferentiableLMLoss(config, weights), cases, per_pass=per_pass)


def _expanded(adapter: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    return {name: one.expand(n, *one.shape) for name, one in adapter.items()}


def _starts(items: Sequence[Any], judge: Judge) -> range:
    return range(0, len(items), judge.per_pass)
