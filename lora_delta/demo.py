"""The whole story on the embedded checkpoint, in three minutes: teachers, labels, generators, and a verdict.

Teacher adapters are trained for small text tasks, labelled with their deltas, and written as PEFT folders. Generators
then learn to write such adapters from prompts: with a loss on the teachers' weights alone, on their deltas alone, on
both; all of them start from the principal components of the teachers' tokens. The verdict is on prompts that no
generator saw, and on tasks whose teachers none saw.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, load_pretrained
from qwen_functional.forward import forward
from qwen_functional.lora import Lora

from .delta import DifferentiableDeltaCompute
from .distributed import default_device
from .embedded import embedded_checkpoint
from .embedded.tasks import TASKS, Task, example, padded, word
from .files import write_json
from .generate.conditions import Condition, PromptEncoder
from .generate.generator import LoRAGenerator
from .generate.options import TrainingOptions
from .generate.schedules import Schedule
from .generate.tokens import TokenFormat
from .generate.training import train
from .labelling.labels import compute_labels
from .labelling.table import DeltaLabels
from .peft.adapters import save_peft_adapter
from .probes.tokenization import load_tokenizer, tokenize_probes

RANK, CHUNK_WIDTH = 4, 64
HELD_OUT_TASKS = ("right", "previous", "suffix er", "prefix pre", "wrap []", "join +")
HELD_OUT_PROMPTS = 2  # of each task's six
N_PROBES, TEST_WORDS, BATCH_WORDS = 16, 24, 8
GENERATOR = {"width": 96, "depth": 1, "components": 32}
CONDITION_LAYER = 1  # early, where a prompt's words are not yet mixed into a prediction
LOSSES = {
    "weights": {"weights": Schedule(1.0)},
    "delta": {"delta": Schedule(1.0)},
    "both": {"weights": Schedule(1.0), "delta": Schedule(1.0)},
}


@dataclass(frozen=True)
class Score:
    """Of the adapters of one way, in one group of tasks and prompts; means over all of them.

    Attributes:
        cosine: of the delta with the teacher's; None where the delta is zero.
        distance: of the delta from the teacher's, over the teacher's norm.
        loss: nats per answer token of the task, on words that no adapter was trained on.
        accuracy: share of words whose whole answer is right, greedily decoded.
    """

    group: str
    way: str
    cosine: float | None
    distance: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Questions:
    """Rows of one task after another, ``per_task`` each: ids and mask (N, T), targets (N, T), −100 off the answers."""

    ids: Tensor
    mask: Tensor
    targets: Tensor
    per_task: int

    @classmethod
    def of(cls, tasks: Sequence[Task], tokenizer: Tokenizer, per_task: int, chance: random.Random) -> Questions:
        examples = [example(task, chance) for task in tasks for _ in range(per_task)]
        return cls(*padded(tokenizer, examples), per_task)

    def to(self, device: torch.device | str) -> Questions:
        return Questions(self.ids.to(device), self.mask.to(device), self.targets.to(device), self.per_task)


def demo_probes(chance: random.Random) -> list[str]:
    """Questions, half of them with an answer begun: an adapter shows in what comes first and in what follows."""
    probes = []
    for index in range(N_PROBES):
        question = word(chance)
        begun = chance.choice([question, question[::-1], question.upper(), question[1:]])
        probes.append(f"{question}=" + (begun[: chance.choice([1, 2])] if index % 2 else ""))
    return probes


def task_losses(
    config: Qwen2Config, weights: Qwen2Weights, lora: Lora | None, questions: Questions
) -> tuple[Tensor, Tensor]:
    """Loss (tasks,) per answer token, and accuracy (tasks,), of each task under its own adapter, or under none."""
    questions = questions.to(weights.device)
    n_tasks = len(questions.ids) // questions.per_task
    index = None
    if lora is not None:
        index = torch.arange(n_tasks, device=weights.device).repeat_interleave(questions.per_task)
    logits = forward(
        config, weights, questions.ids, questions.mask, lora=lora, adapter_index=index
    ).logits.float()
    answer = questions.targets >= 0
    losses = F.cross_entropy(logits.transpose(1, 2), questions.targets, reduction="none").view(n_tasks, -1)
    # Each answer token is predicted from the right ones before it: all of them right is what greedy decoding needs.
    right = ((logits.argmax(-1) == questions.targets) | ~answer).all(1).float().view(n_tasks, -1)
    return losses.sum(1) / answer.view(n_tasks, -1).sum(1), right.mean(1)


def train_teachers(
    config: Qwen2Config,
    weights: Qwen2Weights,
    tokenizer: Tokenizer,
    spec: LoraSpec,
    tasks: Sequence[Task],
    *,
    steps: int,
    seed: int,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Adapters {PEFT name: (tasks, …)}, each trained on its own task without an instruction, all in one batch."""
    chance, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in spec.shapes(config).items():  # as PEFT starts them; the same start for all tasks
        bound = columns**-0.5
        start = (2 * torch.rand(rows, columns, generator=noise) - 1) * bound if ".lora_A." in name else None
        start = (torch.zeros(rows, columns) if start is None else start).to(weights.device)
        tensors[name] = start.expand(len(tasks), -1, -1).clone().requires_grad_()
    optimizer = torch.optim.AdamW(tensors.values(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc=f"train {len(tasks)} teachers", disable=not progress)
    for _ in bar:
        questions = Questions.of(tasks, tokenizer, BATCH_WORDS, chance)
        losses, accuracy = task_losses(config, weights, spec.bind(config, tensors), questions)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{losses.mean().item():.3f}", accuracy=f"{accuracy.mean().item():.2f}")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def run_demo(
    out: str | Path,
    *,
    teacher_steps: int = 100,
    steps: int = 400,
    seed: int = 0,
    device: torch.device | str | None = None,
    plots: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo; writes adapters, labels, runs, pictures and ``verdict.json`` to ``out``.

    Args:
        device: by default a GPU where there is one, else the CPU.
        say: is given what there is to tell, line by line.

    Returns:
        What ``verdict.json`` holds: the scores, the metrics of each training, and seconds by part.
    """
    out, started = Path(out), time.perf_counter()
    seconds: dict[str, float] = {}
    folder = embedded_checkpoint()
    tokenizer = load_tokenizer(folder)
    config, weights = load_pretrained(folder, dtype=torch.float32, device=device or default_device())
    format = TokenFormat.for_config(config, RANK, CHUNK_WIDTH)
    spec = LoraSpec(rank=RANK, alpha=2 * RANK)
    seen = [task for task in TASKS if task.name not in HELD_OUT_TASKS]
    tasks = seen + [task for task in TASKS if task.name in HELD_OUT_TASKS]
    size = f"{weights.nbytes() / 4e6:.1f} million parameters"
    say(f"{len(tasks)} tasks on a Qwen2 of {size}, {len(HELD_OUT_TASKS)} of them held out")

    teachers = train_teachers(
        config, weights, tokenizer, spec, tasks, steps=teacher_steps, seed=seed, progress=progress
    )
    sources = []
    for index, task in enumerate(tasks):
        sources.append(out / "teachers" / task.name.replace(" ", "_"))
        save_peft_adapter(sources[-1], spec, {n: t[index] for n, t in teachers.items()}, base_model=str(folder))
    seconds["teachers"] = time.perf_counter() - started

    part = time.perf_counter()
    chance = random.Random(seed + 1)
    probes = demo_probes(chance)
    # One delta per probe: their mean says little of what an adapter does after each of them.
    delta = DifferentiableDeltaCompute(
        config, weights, tokenize_probes(tokenizer, probes, 256).ids, spec, pooling="none"
    )
    compute_labels(delta, [str(source) for source in sources], out / "labels", progress=progress)
    labels = DeltaLabels(out / "labels")
    targets = torch.stack([labels[str(source)] for source in sources]).to(weights.device)
    seconds["labels"] = time.perf_counter() - part

    encoder = PromptEncoder(config, weights, tokenizer, layer=CONDITION_LAYER)
    tokens = format.tokenize(teachers)
    split = -HELD_OUT_PROMPTS
    data = [(encoder(task.prompts[:split]), tokens[i], targets[i]) for i, task in enumerate(seen)]
    generators, histories = {}, {}
    for name, losses in LOSSES.items():
        part = time.perf_counter()
        torch.manual_seed(seed)
        generators[name] = LoRAGenerator(format, config.hidden_size, **GENERATOR).to(weights.device)
        generators[name].fit(tokens[: len(seen)])
        options = TrainingOptions(steps=steps, losses=losses, batch_size=16, learning_rate=3e-3, seed=seed)
        histories[name] = train(
            generators[name], data, options, format=format, delta=delta, out=out / "runs" / name, progress=progress,
            label=f"generator, {name}",
        )  # fmt: skip
        seconds[f"generator, {name}"] = time.perf_counter() - part

    part = time.perf_counter()
    groups = {
        "seen prompts": [(i, p) for i, task in enumerate(seen) for p in task.prompts[:split]],
        "held-out prompts": [(i, p) for i, task in enumerate(seen) for p in task.prompts[split:]],
        "held-out tasks": [(i, p) for i in range(len(seen), len(tasks)) for p in tasks[i].prompts],
    }
    judge = _Judge(config, weights, tokenizer, spec, delta, tasks, teachers, targets, seed)
    scores = []
    for group, members in groups.items():
        scores += judge.references(group, sorted({index for index, _ in members}))
        condition = Condition.collate(encoder([prompt for _, prompt in members])).to(weights.device)
        for name, generator in generators.items():
            with torch.no_grad():
                tensors = format.detokenize(generator(condition.states, condition.mask))
            scores.append(judge.score(group, name, [index for index, _ in members], tensors))
    seconds["verdict"] = time.perf_counter() - part

    record = {
        "tasks": [task.name for task in tasks],
        "held_out_tasks": list(HELD_OUT_TASKS),
        "scores": [asdict(score) for score in scores],
        "seconds": seconds,
    }
    write_json(out / "verdict.json", record)
    say(verdict_table(scores))
    if plots:
        part = time.perf_counter()
        for path in draw(out, labels, tasks, sources, histories, scores):
            say(f"drew {path}")
        seconds["pictures"] = time.perf_counter() - part
    say(f"{time.perf_counter() - started:.0f} s in all: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()))
    return {**record, "histories": histories}


class _Judge:
    """Scores adapters by their deltas and by what they do to their tasks."""

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        tokenizer: Tokenizer,
        spec: LoraSpec,
        delta: DifferentiableDeltaCompute,
        tasks: Sequence[Task],
        teachers: dict[str, Tensor],
        targets: Tensor,
        seed: int,
    ) -> None:
        self.config, self.weights, self.tokenizer, self.spec, self.delta = config, weights, tokenizer, spec, delta
        self.tasks, self.teachers, self.targets, self.seed = tasks, teachers, targets, seed

    def references(self, group: str, indices: list[int]) -> list[Score]:
        """The bare model, each task's teacher, and another task's teacher in its place."""
        shuffled = indices[1:] + indices[:1]
        return [
            self.score(group, "bare model", indices, None),
            self.score(group, "teacher", indices, {n: t[indices] for n, t in self.teachers.items()}),
            self.score(group, "shuffled teacher", indices, {n: t[shuffled] for n, t in self.teachers.items()}),
        ]

    @torch.no_grad()
    def score(self, group: str, way: str, indices: Sequence[int], tensors: dict[str, Tensor] | None) -> Score:
        target = self.targets[list(indices)]
        deltas = torch.zeros_like(target) if tensors is None else self.delta(tensors)
        deltas, target = deltas.flatten(1), target.flatten(1)
        chance = random.Random(self.seed + 2)  # words that differ from those of the teachers' training
        questions = Questions.of([self.tasks[i] for i in indices], self.tokenizer, TEST_WORDS, chance)
        lora = None if tensors is None else self.spec.bind(self.config, tensors)
        losses, accuracy = task_losses(self.config, self.weights, lora, questions)
        distance = (deltas - target).norm(dim=1) / target.norm(dim=1)
        cosine = None if tensors is None else float(F.cosine_similarity(deltas, target).mean())
        return Score(group, way, cosine, float(distance.mean()), float(losses.mean()), float(accuracy.mean()))


def verdict_table(scores: Sequence[Score]) -> str:
    """The scores as lines of text, group by group."""
    lines = [f"{'':<34}{'cosine':>8}{'distance':>10}{'task loss':>11}{'accuracy':>10}"]
    group = None
    for score in scores:
        if score.group != group:
            group = score.group
            lines.append(group)
        cosine = "–" if score.cosine is None else f"{score.cosine:.2f}"
        generated = score.way if score.way not in LOSSES else f"generated, {score.way} loss"
        generated = generated.replace("both loss", "both losses")
        lines.append(f"  {generated:<32}{cosine:>8}{score.distance:>10.2f}{score.loss:>11.2f}{score.accuracy:>10.0%}")
    return "\n".join(lines)


def draw(
    out: Path,
    labels: DeltaLabels,
    tasks: Sequence[Task],
    sources: Sequence[Path],
    histories: dict[str, list[dict[str, float]]],
    scores: Sequence[Score],
) -> list[Path]:
    """The pictures: deltas in two dimensions, loss curves, and the verdict as bars."""
    from .plots.charts import plot_bars, plot_deltas, plot_loss_curves

    points = torch.stack([labels[str(source)] for source in sources]).flatten(1)
    curves = {
        f"{name}: {term}": [(int(m["step"]), m[term]) for m in history if term in m]
        for name, history in histories.items()
        for term in ("weights", "delta")
        if any(term in m for m in history)
    }
    groups = list(dict.fromkeys(score.group for score in scores))
    accuracy = {group: {score.way: score.accuracy for score in scores if score.group == group} for group in groups}
    return [
        plot_deltas(points, [t.family for t in tasks], [t.name for t in tasks], path=out / "deltas.png"),
        plot_loss_curves(curves, out / "losses.png"),
        plot_bars(accuracy, out / "verdict.png", title="What the adapters do to their tasks", ylabel="accuracy"),
    ]
