"""Which loss makes a generator write adapters for tasks that it never saw: each of the demo's losses, at equal seconds.

Each way trains on the tasks that are seen, for ``--seconds`` of this machine, teachers' training counted, and is judged
on the validation split; ``--test`` looks at the test split instead. What is done is kept in ``--out``: a run that was
interrupted goes on, and the table is of all that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import machine_facts, machine_line
from torch import Tensor
from tqdm import tqdm
from workers import set_threads

from lora_delta import DeltaLabels, DifferentiableDeltaCompute, DifferentiableLMLoss, save_peft_adapter
from lora_delta.demo import write_lines
from lora_delta.embedded import embedded_checkpoint
from lora_delta.embedded.build import END
from lora_delta.embedded.tasks import CONTEXT, SEEN, SEEN_WORDINGS, TEST, VALIDATION, Task, lines, word
from lora_delta.files import write_json
from lora_delta.generate.controls import Limits, base_judge, judge_base, judge_run, read_cases
from lora_delta.generate.judge import HELD_OUT, figures
from lora_delta.generate.judge import SEEN as SEEN_GROUP
from lora_delta.generate.run_config import RunConfig
from lora_delta.generate.runs import load_run, train_run
from lora_delta.labelling.labels import compute_labels
from lora_delta.probes.tokenization import load_tokenizer, tokenize_probes
from qwen_functional import LoraSpec, load_pretrained, pack_each
from qwen_functional.forward import forward_vjp

TEACHER_STEPS, TEACHER_WORDS = 80, 8
SPEC = LoraSpec(rank=8, alpha=16)
RUN = """\
base = "embedded"
dtype = "float32"
out = "{out}"
condition_layer = 0
{data}
[generator]
kind = "additive"
{generator}
[training]
steps = 1000000
batch_size = 16
delta_batch_size = 16
texts_per_condition = 6
learning_rate = 3e-3
warmup_steps = 30
checkpoint_every = 1000000
seed = {seed}
[losses]
{losses}
[teacher]
context = "{context}"
"""
OWN = 'delta = {{weight = {weight}, texts = "own", target = "{target}"}}'


@dataclass(frozen=True)
class Way:
    """A loss, and what it is taken of.

    Attributes:
        data: the file of texts, if there is one.
        probes: how many fixed ones the teachers are labelled with; None where it needs no teachers.
        writes: what the generator writes.
    """

    losses: str
    data: str | None = "train"
    probes: int | None = None
    writes: str = "B"
    n_tasks: int = len(SEEN)


WAYS = {
    "cross-entropy": Way("lm = 1.0"),
    "deltas, own texts, to the prompted base": Way(OWN.format(weight=1.0, target="context")),
    "the same, its own answers": Way(OWN.format(weight=1.0, target="context"), data="answered"),
    "cross-entropy + 0.5 deltas": Way("lm = 1.0\n" + OWN.format(weight=0.5, target="context")),
    "KL to the prompted base": Way("kl = 1.0"),
    "weights of teachers": Way("weights = 1.0", data=None, probes=16, writes="AB"),
    "deltas of teachers, 16 fixed probes": Way("delta = 1.0", data=None, probes=16),
    "deltas of teachers, 256 fixed probes": Way("delta = 1.0", data=None, probes=256),
    "deltas of teachers, own texts": Way(OWN.format(weight=1.0, target="teacher"), data="named", probes=16),
    # Which of text, freshness and position makes fixed probes fail: own texts but the same few, or read at one place.
    "deltas to the prompted base, 2 fixed own texts": Way(OWN.format(weight=1.0, target="context"), data="few"),
    "deltas to the prompted base, others' answers": Way(OWN.format(weight=1.0, target="context"), data="foreign"),
    "deltas to the prompted base, no answers": Way(OWN.format(weight=1.0, target="context"), data="questions"),
    **{f"cross-entropy, {n} tasks": Way("lm = 1.0", data=f"train{n}", n_tasks=n) for n in (10, 40)},
    **{
        f"deltas to the prompted base, {n} tasks": Way(OWN.format(weight=1.0, target="context"), f"train{n}", n_tasks=n)
        for n in (10, 40)
    },
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("generalize"), help="folder (default: ./%(default)s)")
    add("--seconds", type=float, default=200, help="of each training (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    add("--test", action="store_true", help="judge on the test split, which is looked at once")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    set_threads(options.threads)
    print(machine_line(machine_facts(options.threads)), flush=True)
    split = "test" if options.test else "validation"
    for seed in options.seeds:
        for name in options.ways:
            path = options.out / f"{options.seconds:g} s" / f"{name}, seed {seed}"
            if not (path / f"{split}.json").exists():
                judge(train(name, seed, path, options), path, split, seed)
    print(table(options.out / f"{options.seconds:g} s", options.ways, split))
    return 0


def train(name: str, seed: int, path: Path, options: argparse.Namespace) -> Path:
    """A run of a way, for its seconds; kept where it is there."""
    way, run = WAYS[name], path / "run"
    if (path / "done.json").exists():
        return run
    spent, parts = 0.0, []
    if way.data is not None:
        data = write_data(options.out / "data", way.data, seed)
        parts.append(f'data = "{data.resolve()}"')
    if way.probes is not None:
        labels, spent = teachers(options.out / "teachers", seed, way.probes)
        prompts = labels.parent / f"prompts-{seed}.jsonl"
        parts += [f'labels = "{labels.resolve()}"', f'prompts = "{prompts.resolve()}"']
    else:
        parts.append(f"[adapter]\nrank = {SPEC.rank}\nalpha = {SPEC.alpha}")
    text = RUN.format(
        out="OUT", data="\n".join(parts), generator=f'writes = "{way.writes}"', seed=seed, losses=way.losses,
        context=CONTEXT,
    )  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.toml").write_text(text)
    config = RunConfig.from_toml(path / "run.toml")
    few = replace(config, out=path / "timed", training=replace(config.training, steps=12))
    each = statistics.median(metrics["seconds"] for metrics in train_run(few, progress=False)[2:])
    steps = max(1, int((options.seconds - spent) / each))
    started = time.perf_counter()
    train_run(replace(config, out=run, training=replace(config.training, steps=steps)))
    write_json(path / "done.json", {"steps": steps, "seconds": time.perf_counter() - started, "teachers": spent})
    return run


def judge(run_folder: Path, path: Path, split: str, seed: int) -> None:
    """Figures of a run, in seen wordings and in others."""
    run = load_run(run_folder, lm_head=True)
    tasks = {"test": TEST, "validation": VALIDATION}[split]
    found: dict[str, Any] = {"done": json.loads((path / "done.json").read_text())}
    chance = random.Random(1000 + seed)
    for wordings, which in (("seen", slice(SEEN_WORDINGS)), ("other", slice(SEEN_WORDINGS, None))):
        data = [path / "seen.jsonl", path / "held-out.jsonl"]
        for file, of in zip(data, (SEEN, tasks), strict=True):
            write_lines(file, lines(of, chance, per_condition=6, wordings=which))
        seen = frozenset(condition for task in SEEN for condition in task.conditions())
        given: dict[str, Any] = {"encoder": run.encoder, "context": CONTEXT, "limits": Limits(288, 6), "seen": seen}
        cases = read_cases(data, run.folder, run.config, progress=False, **given)
        own = base_judge(run.config, run.weights, cases)
        found[wordings] = figures(cases, [judge_run(run, own, seed=seed) | judge_base(own)])
    write_json(path / f"{split}.json", found)


def table(folder: Path, ways: Sequence[str], split: str) -> str:
    """Means over seeds."""
    rows = [f"| loss | seeds | steps | seen | held-out tasks ({split}) | in other wordings | controls, at most |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
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
        shown = " | ".join(f"{statistics.mean(own):.1%}" for own in values)
        steps = statistics.mean(one["done"]["steps"] for one in each)
        rows.append(f"| {name} | {len(each)} | {steps:,.0f} | {shown} | {max(controls):.1%} |")
    return "\n".join(rows)


def write_data(folder: Path, name: str, seed: int) -> Path:
    """A file of texts that ways are trained on; the same whenever it is written."""
    path = folder / f"{name}-{seed}.jsonl"
    if path.exists():
        return path
    chance = random.Random(seed)
    every = list(lines(SEEN, chance, per_condition=6))
    if name == "few":
        every = list(lines(SEEN, random.Random(seed), per_condition=2))
    elif name == "named":
        every = [{**line, "condition": f"teachers-{seed}/{line['task']}"} for line in every]
    elif name == "foreign":
        completions = [line["completion"] for line in every]
        chance.shuffle(completions)
        every = [{**line, "completion": other} for line, other in zip(every, completions, strict=True)]
    elif name == "answered":
        every = answered(every)
    elif name == "questions":
        every = [{**line, "prompt": line["prompt"][:-1], "completion": "="} for line in every]
    elif name != "train":  # on fewer tasks
        few = {task.name for task in random.Random(seed + 1).sample(list(SEEN), int(name.removeprefix("train")))}
        every = [line for line in every if line["task"] in few]
    write_lines(path, every)
    return path


def answered(every: Sequence[dict[str, str]], most: int = 48, at_once: int = 64) -> list[dict[str, str]]:
    """The same questions with what the prompted base answers, greedily; those that it ends."""
    folder = embedded_checkpoint()
    config, weights = load_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    end, found = tokenizer.token_to_id(END), []
    head = weights.lm_head
    assert isinstance(head, Tensor)
    for start in tqdm(range(0, len(every), at_once), "the prompted base answers"):
        own = every[start : start + at_once]
        texts = [tokenizer.encode(CONTEXT.format(**line)).ids for line in own]
        answers: list[list[int]] = [[] for _ in own]
        for _ in range(most):
            open_ones = [i for i, answer in enumerate(answers) if end not in answer]
            if not open_ones:
                break
            trees = pack_each([[texts[i] + answers[i]] for i in open_ones])
            states, _ = forward_vjp(config, weights, trees, wrt=())
            for i, token in zip(open_ones, (states @ head.T).argmax(-1).tolist(), strict=True):
                answers[i].append(token)
        pairs = zip(own, answers, strict=True)
        found += [{**line, "completion": tokenizer.decode(a[:-1])} for line, a in pairs if len(a) > 1 and a[-1] == end]
    return found


def teachers(folder: Path, seed: int, probes: int) -> tuple[Path, float]:
    """Labels of teachers, an adapter trained for each seen task, and the seconds that both took."""
    labels, facts = folder / f"labels-{seed}-{probes}", folder / f"seconds-{seed}.json"
    adapters = folder / f"teachers-{seed}"
    base = embedded_checkpoint()
    config, weights = load_pretrained(base, dtype=torch.float32)
    tokenizer = load_tokenizer(base)
    if not facts.exists():
        started = time.perf_counter()
        trained = train_teachers(DifferentiableLMLoss(config, weights, SPEC), tokenizer, SEEN, seed)
        for index, task in enumerate(SEEN):
            own = {name: tensor[index] for name, tensor in trained.items()}
            save_peft_adapter(adapters / task.name, SPEC, own, base_model=str(base))
        prompts = {task.name: task.conditions(slice(SEEN_WORDINGS)) for task in SEEN}
        entries = ({"adapter": f"teachers-{seed}/{name}", "prompts": own} for name, own in prompts.items())
        write_lines(folder / f"prompts-{seed}.jsonl", entries)
        write_json(facts, time.perf_counter() - started)
    started = time.perf_counter()
    chance = random.Random(9)
    texts = []
    for index in range(probes):
        given = word(chance)
        begun = chance.choice([given, given[::-1], given.upper(), given[1:]])
        texts.append(f"{given}=" + (begun[: chance.choice([1, 2])] if index % 2 else ""))
    ids = tokenize_probes(tokenizer, texts, 64).ids
    delta = DifferentiableDeltaCompute(config, weights, ids, SPEC, pooling="none")
    compute_labels(delta, [str(adapters / task.name) for task in SEEN], labels)
    DeltaLabels(labels)
    return labels, json.loads(facts.read_text()) + time.perf_counter() - started


def train_teachers(lm: DifferentiableLMLoss, tokenizer: Any, tasks: Sequence[Task], seed: int) -> dict[str, Tensor]:
    """Adapters {PEFT name: (tasks, …)} that each do their task without an instruction; all start alike."""
    chance, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    end, tensors = tokenizer.token_to_id(END), {}
    for name, (rows, columns) in lm.lora_shapes.items():  # as PEFT starts them
        start = torch.zeros(rows, columns)
        if ".lora_A." in name:
            start = (2 * torch.rand(rows, columns, generator=noise) - 1) * columns**-0.5
        tensors[name] = start.expand(len(tasks), -1, -1).clone().requires_grad_()
    optimizer = torch.optim.AdamW(tensors.values(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=TEACHER_STEPS, pct_start=0.1)
    for _ in tqdm(range(TEACHER_STEPS), f"train {len(tasks)} teachers"):
        examples = []
        for task in tasks:
            words = [word(chance) for _ in range(TEACHER_WORDS)]
            examples.append([
                (tokenizer.encode(f"{one}=").ids, [*tokenizer.encode(task.answer(one)).ids, end]) for one in words
            ])  # fmt: skip
        optimizer.zero_grad()
        (lm.mean_loss(tensors, examples) * len(tasks)).backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}


if __name__ == "__main__":
    sys.exit(main())
