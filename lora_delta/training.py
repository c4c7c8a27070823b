"""Training a generator on teachers: their weights, their deltas, or both."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from .conditions import Condition
from .delta import DifferentiableDeltaCompute
from .files import replaces
from .losses import Schedule, delta_loss, tokens_mse, weighted_sum
from .shares import Shares
from .tokens import TokenFormat

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
TERMS = ("weights", "delta")


class TrainingSet(Protocol):
    """N teachers. Item i: the states (T, H) of each of its prompts, its tokens (L, h, w), its delta (H,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Sequence[Tensor], Tensor, Tensor]: ...


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        batch_size: teachers in a micro-batch; a step has ``accumulate`` of them.
        prompts_per_condition: how many of a teacher's prompts, drawn anew each time, make its condition.
        delta_batch_size: the delta loss takes so many of a micro-batch, in every ``delta_every``-th step: it costs
            a pass of the whole base model.
        losses: the weight of ``"weights"``, a mean squared error over tokens, and of ``"delta"``, by step.
        mse_weight, cosine_weight: of the two parts of the delta loss, mean squared error and one minus the cosine:
            see :func:`lora_delta.losses.delta_loss`.
        bf16: run the generator under autocast to bfloat16; its parameters stay float32.
        checkpoint_every: steps between checkpoints, the last one aside.
    """

    steps: int = 1000
    batch_size: int = 16
    prompts_per_condition: int = 1
    delta_batch_size: int = 4
    delta_every: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    checkpoint_every: int = 200
    losses: Mapping[str, Schedule] = field(
        default_factory=lambda: {"weights": Schedule(1.0), "delta": Schedule(1.0, "linear", warmup_steps=100)}
    )
    mse_weight: float = 1.0
    cosine_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "prompts_per_condition", "delta_batch_size", "delta_every", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a number above 0")
        unknown = sorted(set(self.losses) - set(TERMS))
        if unknown or not self.losses:
            raise ValueError(f"losses names {unknown or 'nothing'}, expected some of {TERMS}")


def train(
    generator: nn.Module,
    teachers: TrainingSet,
    delta: DifferentiableDeltaCompute,
    format: TokenFormat,
    options: TrainingOptions,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    label: str = "train",
    mesh: DeviceMesh | None = None,
) -> list[dict[str, float]]:
    """Train ``generator``, from (states, mask) to tokens, in place.

    With ``out``, that folder gets ``metrics.jsonl``, a line per step, and ``checkpoint.pt``; a checkpoint that is
    there already is taken up where it was left, and gives the numbers of an uninterrupted run.

    The ranks of a mesh's ``"dp"`` dimension share each micro-batch, under DistributedDataParallel: the numbers are
    those of one process, and so are the checkpoints, which resume on any number of ranks. ``delta`` then has no
    ``"dp"`` dimension of its own. Ranks of a ``"tp"`` dimension, over which its weights are split, do the same work.

    Returns:
        The metrics of every step: the loss, each of its terms, the gradient's norm, the learning rate, and seconds.

    Raises:
        ValueError: no teachers, a checkpoint made with other options, a loss that is not finite, or batch sizes
            that the ranks cannot share evenly.
    """
    if not len(teachers):
        raise ValueError("teachers is empty, expected at least one")
    shares = Shares.of(mesh)
    _check_shares(shares, len(teachers), options)
    is_first = mesh is None or dist.get_rank() == 0
    optimizer = torch.optim.AdamW(
        generator.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, options))
    folder = None if out is None else Path(out)
    history: list[dict[str, float]] = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        history = _resume(folder, generator, optimizer, schedule, options, is_first=is_first)
    replica = generator
    if shares.mesh is not None:
        replica = nn.parallel.DistributedDataParallel(generator, process_group=shares.mesh.get_group())
    steps = range(len(history), options.steps)
    with ExitStack() as stack:
        log = None
        if folder is not None and is_first:
            log = stack.enter_context((folder / METRICS).open("a", encoding="utf-8"))
        bar = tqdm(
            steps, desc=label, initial=len(history), total=options.steps, disable=not progress or not is_first
        )
        for step in bar:
            start = time.perf_counter()
            metrics = _step(step, replica, teachers, delta, format, options, optimizer, shares)
            schedule.step()
            metrics["seconds"] = time.perf_counter() - start
            history.append(metrics)
            _write(log, metrics)
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", *TERMS) if name in metrics})
            due = (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps
            if folder is not None and is_first and due:
                _save(folder, generator, optimizer, schedule, options, step + 1)
    return history


def _step(
    step: int,
    generator: nn.Module,
    teachers: TrainingSet,
    delta: DifferentiableDeltaCompute,
    format: TokenFormat,
    options: TrainingOptions,
    optimizer: torch.optim.Optimizer,
    shares: Shares,
) -> dict[str, float]:
    device = next(generator.parameters()).device
    sums: dict[str, float] = {}
    optimizer.zero_grad()
    for number, (items, n_deltas) in enumerate(_micro_batches(step, teachers, options, shares), 1):
        with ExitStack() as stack:
            if number < options.accumulate and isinstance(generator, nn.parallel.DistributedDataParallel):
                stack.enter_context(generator.no_sync())  # ranks sum their gradients once a step
            values = _backward(step, items, n_deltas, generator, delta, format, options, device)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value / options.accumulate
    sums = _mean_over_ranks(sums, shares, device)
    norm = torch.nn.utils.clip_grad_norm_(generator.parameters(), options.clip)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    return {"step": step, **sums, "gradient_norm": float(norm), "learning_rate": rate}


def _backward(
    step: int,
    items: Sequence[tuple[Tensor, Tensor, Tensor]],
    n_deltas: int,
    generator: nn.Module,
    delta: DifferentiableDeltaCompute,
    format: TokenFormat,
    options: TrainingOptions,
    device: torch.device,
) -> dict[str, float]:
    """Adds a micro-batch's gradients; the loss and its terms, none where nothing counts in this step."""
    schedules = {
        name: schedule
        for name, schedule in options.losses.items()
        if name != "delta" or step % options.delta_every == 0
    }
    if not any(schedule(step) for schedule in schedules.values()):
        return {}  # delta loss alone, between two of its steps
    condition = Condition.collate([states for states, _, _ in items]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
        tokens = generator(condition.states, condition.mask).float()
    targets = torch.stack([target for _, target, _ in items]).to(device)
    wanted = torch.stack([target for _, _, target in items[:n_deltas]]).to(device)
    losses = {
        "weights": partial(tokens_mse, tokens, targets),
        "delta": partial(_delta_term, tokens[:n_deltas], wanted, delta, format, options),
    }
    loss, values = weighted_sum({name: losses[name] for name in schedules}, schedules, step)
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss of step {step} is not finite: {values}")
    if loss.requires_grad:
        (loss / options.accumulate).backward()
    return {"loss": float(loss.detach()), **{name: float(value) for name, value in values.items()}}


def _delta_term(
    tokens: Tensor, wanted: Tensor, delta: DifferentiableDeltaCompute, format: TokenFormat, options: TrainingOptions
) -> Tensor:
    def loss(deltas: Tensor, adapters: slice) -> Tensor:
        target, mse, cosine = wanted[adapters], options.mse_weight, options.cosine_weight
        return delta_loss(deltas, target, mse_weight=mse, cosine_weight=cosine)

    return delta.mean_loss(format.detokenize(tokens), loss)


def _micro_batches(
    step: int, teachers: TrainingSet, options: TrainingOptions, shares: Shares
) -> Iterator[tuple[list[tuple[Tensor, Tensor, Tensor]], int]]:
    """This rank's teachers of a step, and how many of them, the first ones, are for the delta loss.

    Drawn by the step's number alone: a resumed run draws the same, and so do all ranks.
    """
    chance = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    size, n_deltas = _sizes(len(teachers), options)
    for _ in range(options.accumulate):
        drawn = torch.randperm(len(teachers), generator=chance)[:size].tolist()
        seeds = torch.randint(2**62, (size,), generator=chance).tolist()
        own = list(zip(drawn, seeds, strict=True))
        own = own[:n_deltas][shares.own(n_deltas)] + own[n_deltas:][shares.own(size - n_deltas)]
        items = []
        for index, seed in own:
            prompts, tokens, target = teachers[index]
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
            chosen = order[: options.prompts_per_condition].tolist()
            items.append((torch.cat([prompts[one] for one in chosen]), tokens, target))
        yield items, n_deltas // shares.size


def _sizes(n_teachers: int, options: TrainingOptions) -> tuple[int, int]:
    """Teachers of a micro-batch, and how many of them are for the delta loss."""
    size = min(options.batch_size, n_teachers)
    return size, min(options.delta_batch_size, size)


def _check_shares(shares: Shares, n_teachers: int, options: TrainingOptions) -> None:
    """Raises ``ValueError`` where the mean over ranks would not be the mean over teachers."""
    for name, size in zip(("batch_size", "delta_batch_size"), _sizes(n_teachers, options), strict=True):
        if size % shares.size:
            raise ValueError(
                f"{name} is {size} of {n_teachers} teachers, expected a multiple of the {shares.size} ranks"
            )


def _mean_over_ranks(sums: Mapping[str, float], shares: Shares, device: torch.device) -> dict[str, float]:
    if shares.mesh is None or not sums:
        return dict(sums)
    values = shares.sum_(torch.tensor(list(sums.values()), device=device)) / shares.size
    return dict(zip(sums, values.tolist(), strict=True))


def _learning_rate(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, then a cosine down to a tenth; as a factor."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    part = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, part))


def _facts(options: TrainingOptions) -> dict[str, Any]:
    """What a checkpoint depends on."""
    facts = asdict(options)
    facts.pop("checkpoint_every")
    return facts


def _write(log: TextIO | None, metrics: Mapping[str, float]) -> None:
    if log is not None:
        log.write(json.dumps(metrics) + "\n")
        log.flush()


def _save(
    folder: Path,
    generator: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    options: TrainingOptions,
    steps: int,
) -> None:
    state = {
        "generator": generator.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
        "options": json.dumps(_facts(options), sort_keys=True),
        "steps": steps,
    }
    with replaces(folder / CHECKPOINT) as unfinished:
        torch.save(state, unfinished)


def _resume(
    folder: Path,
    generator: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    options: TrainingOptions,
    *,
    is_first: bool,
) -> list[dict[str, float]]:
    """Take up the checkpoint in ``folder``, if there is one; the metrics of the steps before it.

    Every rank reads; the first one alone writes.
    """
    path, metrics = folder / CHECKPOINT, folder / METRICS
    if not path.exists():
        if is_first:
            metrics.unlink(missing_ok=True)  # of a run that never reached a checkpoint
        return []
    state = torch.load(path, weights_only=True)
    made, asked = json.loads(state["options"]), json.loads(json.dumps(_facts(options)))
    for name in sorted(asked):
        if made.get(name) != asked[name]:
            raise ValueError(
                f"{path} was made with {name} = {made.get(name)!r}, not {asked[name]!r}: expected the same options, "
                "or another folder"
            )
    generator.load_state_dict(state["generator"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])
    lines = metrics.read_text(encoding="utf-8").splitlines()[: state["steps"]]
    if is_first:
        with replaces(metrics) as unfinished:
            unfinished.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return [json.loads(line) for line in lines]


def load_generator_state(folder: str | Path) -> dict[str, Tensor]:
    """The generator's parameters and buffers in the checkpoint of a run.

    Raises:
        ValueError: no checkpoint there.
    """
    path = Path(folder) / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CHECKPOINT}, expected the folder of a training run")
    return torch.load(path, weights_only=True)["generator"]
