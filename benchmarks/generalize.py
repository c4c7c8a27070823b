"""Which loss makes a generator write adapters for tasks that it never saw: each of many, at equal seconds.

Each way trains on the tasks that are seen for the steps that fit into ``--seconds`` of this machine: one is timed with
nothing beside it, and the seconds that teachers or the prompted base's answers took are taken off. The trainings
themselves go ``--jobs`` at once. They are judged on the validation split; ``--test`` looks at the test split instead.
What is done is kept in ``--out``: a run that was interrupted goes on, and the table is of all that is there. It
is for one base model, dtype, learning rate and size of batches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from generalize_data import SPEC, teachers, write_data
from measure import machine_facts, machine_line, set_threads

from lora_delta import DifferentiableLMLoss, DifferentiableTextDelta
from lora_delta.demo import write_lines
from lora_delta.embedded.build import END
from lora_delta.embedded.tasks import CONTEXT, SEEN, SEEN_WORDINGS, TEST, VALIDATION, lines
from lora_delta.files import write_json
from lora_delta.generate.conditions import Condition
from lora_delta.generate.controls import Limits, base_judge, judge_base, judge_run, read_cases
from lora_delta.generate.judge import HELD_OUT, LEVEL, figures, interval, resampled
from lora_delta.generate.judge import SEEN as SEEN_GROUP
from lora_delta.generate.run_config import RunConfig
from lora_delta.generate.runs import Run, load_run, train_run
from qwen_functional.dtypes import DTYPES
from qwen_functional.memory import keep_freed_memory

EMBEDDED = "embedded"
OF_A_FOLDER = ("base", "dtype", "learning_rate", "batch", "judged")
TIMED_STEPS, TIMED_ROUNDS, TIMED_CONDITIONS = 20, 3, 160
RUN = """\
base = "{base}"
dtype = "{dtype}"
out = "{out}"
condition_layer = 0
{data}
[generator]
kind = "additive"
{generator}
[training]
steps = 1000000
batch_size = {batch}
delta_batch_size = {batch}
texts_per_condition = {texts}
learning_rate = {learning_rate}
warmup_steps = 30
checkpoint_every = 400
seed = {seed}
[losses]
{losses}
[teacher]
context = "{context}"
"""
LM, CONTEXT_DELTA, TEACHER_DELTA = (
    "lm = 1.0",
    'delta = {weight = 1.0, texts = "own", target = "context"}',
    'delta = {weight = 1.0, texts = "own", target = "teacher"}',
)


@dataclass(frozen=True)
class Way:
    """A loss, and what it is taken of.

    Attributes:
        data: the file of texts, if there is one, see :func:`write_data`.
        probes: how many fixed ones the teachers are labelled with; None where it needs no teachers.
        writes: what the generator writes; sizes: of it, where they are not the defaults.
        like: the way that is timed instead, where a step is the same work.
    """

    losses: str
    data: str | None = "train"
    probes: int | None = None
    writes: str = "B"
    sizes: str = ""
    like: str | None = None


OWN = "deltas to the prompted base"
WAYS = {
    "cross-entropy": Way(LM),
    OWN: Way(CONTEXT_DELTA),
    "the same on its own answers": Way(CONTEXT_DELTA, "answered"),
    "cross-entropy + 0.5 deltas": Way(LM + "\n" + CONTEXT_DELTA.replace("1.0", "0.5")),
    "cross-entropy + 2 deltas": Way(LM + "\n" + CONTEXT_DELTA.replace("1.0", "2.0")),
    "KL to the prompted base": Way("kl = 1.0"),
    "cross-entropy + KL": Way(LM + "\nkl = 1.0"),
    "weights of teachers": Way("weights = 1.0", None, 16, "AB"),
    "deltas of teachers, 16 fixed probes": Way("delta = 1.0", None, 16),
    "deltas of teachers, 256 fixed probes": Way("delta = 1.0", None, 256),
    "deltas of teachers, own texts": Way(TEACHER_DELTA, "named", 16),
    # Which of text, freshness and position makes fixed probes fail: deltas to the prompted base on other texts.
    "deltas, own answers to 16 fixed words": Way(CONTEXT_DELTA, "fixed", like=OWN),
    "deltas, fresh words, others' answers": Way(CONTEXT_DELTA, "foreign", like=OWN),
    "deltas, fresh words, no answers": Way(CONTEXT_DELTA, "questions", like=OWN),
    "deltas, 16 fixed words, no answers": Way(CONTEXT_DELTA, "fixed questions", like=OWN),
    **{f"cross-entropy, {n} tasks": Way(LM, f"train {n}", like="cross-entropy") for n in (10, 40)},
    **{f"{OWN}, {n} tasks": Way(CONTEXT_DELTA, f"train {n}", like=OWN) for n in (10, 40)},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("generalize"), help="folder (default: ./%(default)s)")
    add("--seconds", type=float, default=200, help="of each training (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    add("--test", action="store_true", help="judge on the test split, which is looked at once")
    add("--base", default=EMBEDDED, metavar="FOLDER", help="a checkpoint, for ways without teachers and answers of it")
    add("--dtype", default="float32", choices=DTYPES, help="of the base weights (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-3, help="(default: %(default)s)")
    add("--batch", type=int, nargs=2, default=[16, 6], metavar=("CONDITIONS", "TEXTS"), help="of a step (16, 6)")
    add("--judged", type=int, nargs=2, default=[288, 6], metavar=("CONDITIONS", "TEXTS"), help="of a split (288, 6)")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of the timing (default: %(default)s)")
    add("--jobs", type=int, help="trainings at once (default: as many as threads)")
    options = parser.parse_args()
    keep_freed_memory()
    set_threads(options.threads)
    print(machine_line(machine_facts(options.threads)), flush=True)
    split = "test" if options.test else "validation"
    folder = options.out / f"{options.seconds:g} s"
    of_embedded = [name for name in options.ways if WAYS[name].probes is not None or WAYS[name].data == "answered"]
    if options.base != EMBEDDED and of_embedded:
        parser.error(f"--base has no {of_embedded[0]!r}: name other --ways")
    settings, kept = {name: getattr(options, name) for name in OF_A_FOLDER}, options.out / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        parser.error(f"{options.out} is for {json.loads(kept.read_text())}, expected another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(kept, settings)
    todo = [(name, seed) for seed in options.seeds for name in options.ways]
    before = {(name, seed): prepare(name, seed, folder / f"{name}, seed {seed}", options) for name, seed in todo}
    before = {(name, seed): min(before[name, one] for one in options.seeds) for name, seed in todo}  # a calm machine's
    times = options.out / f"seconds of a step, {options.threads} threads.json"
    known = json.loads(times.read_text()) if times.exists() else {}
    timed = {name: WAYS[name].like or name for name in options.ways}
    new = [name for name in dict.fromkeys(timed.values()) if name not in known]
    for name in new:
        prepare(name, options.seeds[0], folder / f"{name}, seed {options.seeds[0]}", options)
    for _ in range(TIMED_ROUNDS):
        for name in new:
            each = step_seconds(folder / f"{name}, seed {options.seeds[0]}")
            known[name] = min(each, known.get(name, each))
    write_json(times, known)
    for name, seed in todo:
        if not (folder / f"{name}, seed {seed}" / "steps.json").exists():
            each, spent = known[timed[name]], before[name, seed]
            steps = max(1, int((options.seconds - spent) / each))
            facts = {"steps": steps, "step_seconds": each, "seconds_before": spent}
            write_json(folder / f"{name}, seed {seed}" / "steps.json", facts)
            print(f"{name}, seed {seed}: {steps} steps of {each:.3f} s, {spent:.0f} s before", flush=True)
    n_jobs = options.jobs or options.threads
    # A fresh process for each, or what one keeps the next has less of.
    context, start = multiprocessing.get_context("spawn"), partial(_start, max(1, options.threads // n_jobs))
    with ProcessPoolExecutor(n_jobs, context, start, max_tasks_per_child=1) as pool:
        for at, (name, seed) in enumerate(pool.map(partial(work, folder, split, Limits(*options.judged)), todo), 1):
            print(f"{at} of {len(todo)}: {name}, seed {seed}", file=sys.stderr, flush=True)
    print(table(folder, options.ways, split))
    return 0


def prepare(name: str, seed: int, path: Path, options: argparse.Namespace) -> float:
    """Write the file of a run, with the data and teachers that it needs, and say how many seconds those took."""
    way, spent, parts, out = WAYS[name], 0.0, [], options.out
    if way.data is not None:
        data, spent = write_data(out / "data", way.data, seed)
        parts.append(f'data = "{data.resolve()}"')
    if way.probes is not None:
        labels, spent = teachers(out / "teachers", seed, way.probes)
        prompts = labels.parent / f"prompts-{seed}.jsonl"
        parts += [f'labels = "{labels.resolve()}"', f'prompts = "{prompts.resolve()}"']
    else:
        parts.append(f"[adapter]\nrank = {SPEC.rank}\nalpha = {SPEC.alpha}")
        if options.base != EMBEDDED:  # all seven would be a generator of 155 million parameters at 0.5B
            parts.append('target_modules = ["q_proj", "v_proj", "down_proj"]')
    base = options.base if options.base == EMBEDDED else Path(options.base).resolve()
    text = RUN.format(
        out="OUT", data="\n".join(parts), generator=f'writes = "{way.writes}"\n{way.sizes}', seed=seed,
        losses=way.losses, context=CONTEXT, batch=options.batch[0], texts=options.batch[1], base=base,
        dtype=options.dtype, learning_rate=options.learning_rate,
    )  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.toml").write_text(text)
    return spent


def step_seconds(path: Path) -> float:
    """The median of some steps, on few conditions with all their texts; the best round counts, as noise only adds."""
    config, folder = RunConfig.from_toml(path / "run.toml"), path / "timed"
    shutil.rmtree(folder, ignore_errors=True)
    if config.data is not None:
        with Path(config.data).open() as file:
            groups = ["".join(own) for _, own in groupby(file, lambda line: json.loads(line)["condition"])]
        folder.mkdir()
        (folder / "few.jsonl").write_text("".join(groups[:: max(1, len(groups) // TIMED_CONDITIONS)]))
        config = replace(config, data=folder / "few.jsonl")
    training = replace(config.training, steps=TIMED_STEPS)
    timed = replace(config, out=folder / "run", training=training)
    each = [metrics["seconds"] for metrics in train_run(timed, progress=False)]
    shutil.rmtree(folder)
    return statistics.median(each)


def _start(threads: int) -> None:
    keep_freed_memory()
    set_threads(threads)


def work(folder: Path, split: str, limits: Limits, which: tuple[str, int]) -> tuple[str, int]:
    """Train and judge a way, as far as it is not done."""
    name, seed = which
    path = folder / f"{name}, seed {seed}"
    if not (path / f"{split}.json").exists():
        steps = json.loads((path / "steps.json").read_text())["steps"]
        config = RunConfig.from_toml(path / "run.toml")
        run = replace(config, out=path / "run", training=replace(config.training, steps=steps))
        train_run(run, progress=False)  # goes on, or is done
        judge(path / "run", path, split, seed, limits)
    return which


def judge(run_folder: Path, path: Path, split: str, seed: int, limits: Limits) -> None:
    """Figures of a run, in seen wordings and in others."""
    run = load_run(run_folder, lm_head=True)
    tasks = {"test": TEST, "validation": VALIDATION}[split]
    found: dict[str, Any] = {"steps": json.loads((path / "steps.json").read_text())["steps"]}
    chance = random.Random(1000 + seed)
    for wordings, which in (("seen", slice(SEEN_WORDINGS)), ("other", slice(SEEN_WORDINGS, None))):
        data = [path / "seen.jsonl", path / "held-out.jsonl"]
        for file, of in zip(data, (SEEN, tasks), strict=True):
            write_lines(file, lines(of, chance, per_condition=6, wordings=which))
        seen = frozenset(condition for task in SEEN for condition in task.conditions())
        given: dict[str, Any] = {"encoder": run.encoder, "context": CONTEXT, "limits": limits, "seen": seen}
        cases = read_cases(data, run.folder, run.config, progress=False, **given)
        own = base_judge(run.config, run.weights, cases)
        found[wordings] = figures(cases, [judge_run(run, own, seed=seed) | judge_base(own)])
    if "lm" in run.facts["training"]["losses"] and "delta" in run.facts["training"]["losses"]:
        found["delta_share"] = delta_share(run, seed)
    write_json(path / f"{split}.json", found)


def delta_share(run: Run, seed: int, n_tasks: int = 48) -> float:
    """How much of the gradient a sum's delta makes where the training has ended: its norm over that of both apart."""
    chance, tokenizer = random.Random(seed), run.encoder.tokenizer
    end = tokenizer.token_to_id(END) or 0
    every = list(lines(SEEN, chance, per_condition=6))
    starts = [6 * at for at in chance.sample(range(len(every) // 6), n_tasks)]
    own = [every[start : start + 6] for start in starts]
    examples = [
        [(tokenizer.encode(o["prompt"]).ids, [*tokenizer.encode(o["completion"]).ids, end]) for o in one] for one in own
    ]
    contexts = [[tokenizer.encode(CONTEXT.format(**line)).ids for line in one] for one in own]
    given = Condition.collate(run.encoder([one[0]["condition"] for one in own]))
    lm = DifferentiableLMLoss(run.config, run.weights, run.spec)
    delta = DifferentiableTextDelta(run.config, run.weights, run.spec)
    target = delta.target(examples, contexts=contexts)
    norms = []
    for loss in (lambda tensors: lm.mean_loss(tensors, examples), lambda t: delta.mean_loss(t, examples, target)):
        run.generator.zero_grad()
        loss(run.generator(given.states, given.mask)).backward()
        gradients = [parameter.grad for parameter in run.generator.parameters() if parameter.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
    weights = [run.facts["training"]["losses"][name]["weight"] for name in ("lm", "delta")]
    of_lm, of_delta = (weight * norm for weight, norm in zip(weights, norms, strict=True))
    return of_delta / (of_lm + of_delta)


def table(folder: Path, ways: Sequence[str], split: str) -> str:
    """Means over seeds; the nats are of held-out tasks, and the controls all but the prompted base."""
    rows = [f"| loss | seeds | steps | seen | held out ({split}) | nats per token | in other wordings | controls |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in ways:
        files = sorted(folder.glob(f"{name}, seed */{split}.json"))
        each = [json.loads(file.read_text()) for file in files]
        if not each:
            continue
        columns = [("seen", SEEN_GROUP), ("seen", HELD_OUT), ("other", HELD_OUT)]
        values = [[one[wordings][group]["generated"]["accuracy"] for one in each] for wordings, group in columns]
        controls = [
            figure["accuracy"] for one in each for way, figure in one["seen"][HELD_OUT].items()
            if way not in ("generated", "prompted base")
        ]  # fmt: skip
        shown = [f"{statistics.mean(own):.1%}" for own in values]
        shown.insert(2, f"{statistics.mean(one['seen'][HELD_OUT]['generated']['loss'] for one in each):.3f}")
        steps = statistics.mean(one["steps"] for one in each)
        if all("delta_share" in one for one in each):
            share = statistics.mean(one["delta_share"] for one in each)
            name += f" (deltas make {share:.0%} of the gradient)"
        rows.append(f"| {name} | {len(each)} | {steps:,.0f} | {' | '.join(shown)} | ≤ {max(controls):.1%} |")
    return "\n".join([*rows, "", *comparisons(folder, ways, split)])


def comparisons(folder: Path, ways: Sequence[str], split: str) -> list[str]:
    """Each sum of losses against its parts: the ratio of accuracies on held-out tasks, over the seeds that both have.

    The interval is that of the ratio when seeds and tasks are drawn anew, the same ones for both.
    """
    lines = []
    for name in (way for way in ways if len(WAYS[way].losses.splitlines()) > 1):
        for other in (way for way in ways if WAYS[way].losses in (LM, CONTEXT_DELTA) and WAYS[way].data == "train"):
            own_files = sorted(folder.glob(f"{name}, seed */{split}.json"))
            seeds = [file.parent.name.rpartition(" ")[2] for file in own_files]
            files = [[folder / f"{way}, seed {seed}" / f"{split}.json" for way in (name, other)] for seed in seeds]
            pairs = [
                [json.loads(file.read_text())["seen"][HELD_OUT]["generated"]["task_accuracies"] for file in both]
                for both in files if both[1].exists()
            ]  # fmt: skip
            if not pairs:
                continue
            tasks = list(pairs[0][0])
            # Two of (seeds, tasks).
            own, base = torch.tensor([[[one[task][0] for task in tasks] for one in pair] for pair in pairs]).unbind(1)
            sums = resampled(len(pairs), len(tasks), seed=0)
            low, high = interval(sums(own) / sums(base))
            ratio = float(own.sum() / base.sum())
            told = f"{low:.3f} to {high:.3f} in {LEVEL:.0%} of resamples, {len(pairs)} seeds"
            lines.append(f"{name}: {ratio:.3f} times as often right as {other} ({told}).")
    return lines


if __name__ == "__main__":
    sys.exit(main())
