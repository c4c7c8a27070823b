"""The whole method on the embedded checkpoint, in four minutes: adapters for tasks that nobody trained on.

A task is an operation on words and a decoration ("reverse then add ing"); 120 of them are seen in training and 24
others are not, though their parts are. Two generators learn to write adapters from instructions, with the same files
and runs as any user's: one from the cross-entropy of the seen tasks' answers, one from deltas alone, whose targets are
how the bare model's hidden states move when it reads the instruction. Then both are judged against controls.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .embedded.build import END
from .embedded.tasks import CONTEXT, SEEN, SEEN_WORDINGS, VALIDATION, Task, lines, word
from .files import replaces, write_json
from .generate.checkpoints import Metrics
from .generate.conditions import Condition
from .generate.controls import Limits, base_judge, judge_base, judge_run, read_cases, seen_conditions
from .generate.judge import GENERATED, HELD_OUT, Verdict, figures, table
from .generate.run_config import RunConfig
from .generate.runs import Run, load_run, train_run
from .text_delta import DifferentiableTextDelta

LOSSES = {
    "cross-entropy": "lm = 1.0",
    "deltas": 'delta = {weight = 1.0, texts = "own", target = "context"}',
}
RUN = """\
base = "embedded"
dtype = "float32"
data = "train.jsonl"              # conditions, questions and answers of the seen tasks
out = "runs/{name}"
condition_layer = 0               # early: the words of an instruction are not mixed yet
[adapter]
rank = 8
[generator]
kind = "additive"
[training]
steps = {steps}
batch_size = 16
texts_per_condition = 6
learning_rate = 3e-3
warmup_steps = 30
seed = {seed}
[losses]
{losses}
[teacher]
context = "{context}"
[evaluation]
data = "validation.jsonl"         # the held-out tasks
every = {every}
conditions = 48
texts = 4
"""
TEXTS, EVALUATIONS = 6, 8
LIMITS = Limits(conditions=144, texts=6)
_PROBES = 16  # words


def run_demo(
    out: str | Path,
    *,
    steps: int = 300,
    seed: int = 0,
    device: torch.device | str | None = None,
    plots: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo; writes data, runs, pictures and ``verdict.json`` to ``out``.

    Args:
        steps: for each training run.
        device: by default a GPU if there is one, else the CPU.
        say: called with each line of output.

    Returns:
        The contents of ``verdict.json`` (tasks, figures, and seconds by part), and the metrics of each training run.
    """
    out, started = Path(out), time.perf_counter()
    seconds: dict[str, float] = {}
    chance = random.Random(seed)
    write_lines(out / "train.jsonl", lines(SEEN, chance, per_condition=TEXTS))
    write_lines(out / "validation.jsonl", lines(VALIDATION, chance, per_condition=TEXTS))
    n_parts = [len({getattr(task, part).name for task in SEEN}) for part in ("operation", "decoration")]
    say(f"{n_parts[0]} operations and {n_parts[1]} decorations: {len(SEEN)} tasks seen, {len(VALIDATION)} held out")
    histories: dict[str, list[Metrics]] = {}
    for name, losses in LOSSES.items():
        part, every = time.perf_counter(), max(1, steps // EVALUATIONS)
        path = out / f"{name}.toml"
        with replaces(path) as unfinished:
            unfinished.write_text(
                RUN.format(name=name, steps=steps, seed=seed, losses=losses, context=CONTEXT, every=every)
            )
        config = RunConfig.from_toml(path)
        config = config if device is None else replace(config, device=str(device))
        histories[name] = train_run(config, progress=progress)
        seconds[f"generator by {name}"] = time.perf_counter() - part

    part = time.perf_counter()
    where = None if device is None else str(device)
    runs = {name: load_run(out / "runs" / name, where, lm_head=True) for name in LOSSES}
    found = judged(runs, out, seed, progress=progress)
    seconds["verdict"] = time.perf_counter() - part
    record = {"tasks": [task.name for task in VALIDATION], "figures": found, "seconds": seconds}
    write_json(out / "verdict.json", record)
    say(table(found))
    if plots:
        part = time.perf_counter()
        for path in draw(out, runs, histories, found):
            say(f"drew {path}")
        seconds["pictures"] = time.perf_counter() - part
    say(f"{time.perf_counter() - started:.0f} s in all: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()))
    return {**record, "histories": histories}


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines atomically."""
    with replaces(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def judged(runs: Mapping[str, Run], out: Path, seed: int, *, progress: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """The figures of each run's adapters and their controls, as in ``lora-delta evaluate``."""
    ways: dict[str, list[Verdict | None]] = {}
    base: dict[str, list[Verdict | None]] = {}
    cases = None
    for name, run in runs.items():
        seen = seen_conditions(out / "runs" / name, run.facts)
        data = [out / "train.jsonl", out / "validation.jsonl"]
        given: dict[str, Any] = {"encoder": run.encoder, "seen": seen, "context": CONTEXT, "limits": LIMITS}
        cases = read_cases(data, run.folder, run.config, progress=progress, **given)
        judge = base_judge(run.config, run.weights, cases)
        own = judge_run(run, judge, seed=seed)
        ways |= {(name if way == GENERATED else f"{way}, {name}"): verdicts for way, verdicts in own.items()}
        base = base or judge_base(judge)
    assert cases is not None
    order = [*runs, *(way for way in ways if way not in runs)]
    return figures(cases, [{way: ways[way] for way in order} | base], seed=seed)


def task_deltas(run: Run, tasks: Sequence[Task], seed: int = 0) -> Tensor:
    """The delta (tasks, H) of the adapter written for each task: its mean over the tokens of answers to some words."""
    chance, tokenizer = random.Random(seed), run.encoder.tokenizer
    words = [word(chance) for _ in range(_PROBES)]
    examples = [
        [(tokenizer.encode(f"{one}=").ids, tokenizer.encode(task.answer(one) + END).ids) for one in words]
        for task in tasks
    ]
    delta = DifferentiableTextDelta(run.config, run.weights, run.spec, pooling="mean", prepack=False)
    states = run.encoder([task.conditions(slice(SEEN_WORDINGS))[0] for task in tasks])
    given = Condition.collate(states).to(run.weights.device)
    with torch.no_grad():
        return delta(run.write(given.states, given.mask), examples)


def draw(
    out: Path,
    runs: Mapping[str, Run],
    histories: Mapping[str, list[Metrics]],
    found: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[Path]:
    """The pictures: deltas by the parts of their tasks, accuracy over seconds, and the verdict as bars."""
    from .plots.charts import plot_deltas, plot_loss_curves, plot_verdict

    tasks = [*VALIDATION]
    kinds, operations = [task.decoration.name.split()[0] for task in tasks], [task.operation.name for task in tasks]
    curves = {}
    for name, history in histories.items():
        seconds, curve = 0.0, list[tuple[float, float]]()
        for metrics in history:
            seconds += metrics["seconds"]
            if "held_out_accuracy" in metrics:
                curve.append((seconds, 100 * metrics["held_out_accuracy"]))
        curves[name] = curve
    run = runs["deltas"]
    return [
        plot_deltas(
            task_deltas(run, tasks), kinds, marks=operations, path=out / "deltas.png",
            title="Adapters written for unseen tasks, by what they do",
        ),
        plot_loss_curves(
            curves, out / "accuracy.png", title="Right answers on held-out tasks",
            ylabel="%", xlabel="seconds of training", log=False,
        ),
        plot_verdict({HELD_OUT: found[HELD_OUT]}, out / "verdict.png"),
    ]  # fmt: skip
