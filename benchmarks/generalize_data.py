"""What ``generalize.py`` trains on: texts of tasks, the prompted base's own answers, and a teacher for each task."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_delta import DifferentiableDeltaCompute, DifferentiableLMLoss, save_peft_adapter
from lora_delta.demo import write_lines
from lora_delta.embedded import embedded_checkpoint
from lora_delta.embedded.build import END
from lora_delta.embedded.tasks import CONTEXT, SEEN, SEEN_WORDINGS, Task, lines, word
from lora_delta.files import write_json
from lora_delta.labelling.labels import compute_labels
from lora_delta.probes.tokenization import load_tokenizer, tokenize_probes
from qwen_functional import LoraSpec, load_pretrained, pack_each
from qwen_functional.forward import forward_vjp

TEACHER_STEPS, TEACHER_WORDS = 80, 8
SPEC = LoraSpec(rank=8, alpha=16)
TEXTS = 24  # of each condition; one where the prompted base writes the answers
FIXED = 16  # words, where all texts are of the same few


def write_data(folder: Path, name: str, seed: int) -> tuple[Path, float]:
    """A file of texts that ways are trained on, the same whenever it is written, and the seconds of what it needs."""
    path, seconds = folder / f"{name}-{seed}.jsonl", folder / f"{name}-{seed}.json"
    if path.exists():
        return path, json.loads(seconds.read_text()) if seconds.exists() else 0.0
    chance, kind = random.Random(seed), name.split()
    every = list(lines(SEEN, chance, per_condition=1 if name == "answered" else TEXTS))
    if kind[0] == "fixed":
        words = [word(chance) for _ in range(FIXED)]
        tasks = {task.name: task for task in SEEN}
        for line in every:
            given = chance.choice(words)
            line |= {"prompt": f"{given}=", "completion": tasks[line["task"]].answer(given)}
    if kind[-1] == "questions":
        every = [{**line, "prompt": line["prompt"][:-1], "completion": "="} for line in every]
    elif name == "named":
        every = [{**line, "condition": f"teachers-{seed}/{line['task']}"} for line in every]
    elif name == "foreign":
        completions = [line["completion"] for line in every]
        chance.shuffle(completions)
        every = [{**line, "completion": other} for line, other in zip(every, completions, strict=True)]
    elif name == "answered":
        started = time.perf_counter()
        every = answered(every)
        write_json(seconds, time.perf_counter() - started)
    elif kind[0] == "train" and len(kind) == 2:  # on fewer tasks
        few = {task.name for task in random.Random(seed + 1).sample(list(SEEN), int(kind[1]))}
        every = [line for line in every if line["task"] in few]
    write_lines(path, every)
    return path, json.loads(seconds.read_text()) if seconds.exists() else 0.0


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
    labels, adapters = folder / f"labels-{seed}-{probes}", folder / f"teachers-{seed}"
    facts, facts_of_labels = folder / f"seconds-{seed}.json", folder / f"seconds-{seed}-{probes}.json"
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
    if not facts_of_labels.exists():
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
        write_json(facts_of_labels, time.perf_counter() - started)
    return labels, sum(json.loads(file.read_text()) for file in (facts, facts_of_labels))


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
