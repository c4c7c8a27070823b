"""One step of training: the teachers that are drawn, their losses, and the gradient, shared by all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..delta import DifferentiableDeltaCompute
from ..distributed import Ranks
from ..shares import Shares
from .checkpoints import Metrics
from .conditions import Condition
from .interrupts import Interrupts
from .losses import delta_loss, tokens_mse
from .options import TrainingOptions
from .schedules import weighted_sum
from .tokens import TokenFormat

_SEED = 1_000_003  # steps of a seed: more than a run has
_NAMED = 3  # adapters in a message


class TrainingSet(Protocol):
    """N teachers. Item i: the states (T, H) of each of its prompts, its tokens (L, h, w), its delta (H,).

    Only those of the prompts that are drawn are looked up. An attribute ``names``, if there is one, names the teachers
    in messages.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Sequence[Tensor], Tensor, Tensor]: ...


@dataclass(frozen=True)
class Stepper:
    """What all steps of a run share. ``generator`` may be a DistributedDataParallel of it."""

    generator: nn.Module
    teachers: TrainingSet
    delta: DifferentiableDeltaCompute
    format: TokenFormat
    options: TrainingOptions
    optimizer: torch.optim.Optimizer
    shares: Shares
    ranks: Ranks
    interrupts: Interrupts

    @property
    def device(self) -> torch.device:
        return self.delta.weights.device

    def step(self, step: int) -> tuple[Metrics, str, bool]:
        """A step: its metrics; what was not finite, for which it was skipped; whether the run is to end after it."""
        options, sums = self.options, dict[str, float]()
        largest: list[tuple[list[str], Tensor]] = []
        self.optimizer.zero_grad()
        with _random_numbers(options.seed * _SEED + step, self.shares.rank, self.device):
            for number, (names, items, n_deltas) in enumerate(self.micro_batches(step), 1):
                with ExitStack() as stack:
                    if number < options.accumulate and isinstance(self.generator, nn.parallel.DistributedDataParallel):
                        stack.enter_context(self.generator.no_sync())  # ranks sum their gradients once a step
                    values, rows = self.backward(step, items, n_deltas)
                largest += [(names, one) for one in rows]
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value / options.accumulate
        norm = float(nn.utils.clip_grad_norm_(self.generator.parameters(), options.clip))
        sums, is_odd, ends = self.shared(sums, math.isfinite(norm) and all(map(math.isfinite, sums.values())))
        rate = self.optimizer.param_groups[0]["lr"]
        metrics = {**sums, "gradient_norm": norm}
        odd = ""
        if is_odd:
            self.optimizer.zero_grad()  # a parameter without a gradient is left alone
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
            odd = f"step {step} is not finite: {numbers}; {self.culprits(largest)}"
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.optimizer.step()
        return {"step": step, **metrics, "learning_rate": rate}, odd, ends

    def backward(
        self, step: int, items: Sequence[tuple[Tensor, Tensor, Tensor]], n_deltas: int
    ) -> tuple[dict[str, float], list[Tensor]]:
        """Adds a micro-batch's gradients; the loss and its terms, none where nothing counts in this step.

        Also the largest entry (B,) of the gradient of each adapter's tokens.
        """
        schedules = {
            name: schedule
            for name, schedule in self.options.losses.items()
            if name != "delta" or step % self.options.delta_every == 0
        }
        if not any(schedule(step) for schedule in schedules.values()):
            return {}, []  # delta loss alone, between two of its steps
        condition = Condition.collate([states for states, _, _ in items]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            tokens = self.generator(condition.states, condition.mask).float()
        largest: list[Tensor] = []
        if tokens.requires_grad:
            tokens.register_hook(lambda gradient: largest.append(gradient.abs().flatten(1).amax(1)))
        targets = torch.stack([target for _, target, _ in items]).to(self.device)
        wanted = torch.stack([target for _, _, target in items[:n_deltas]]).to(self.device)
        losses = {
            "weights": partial(tokens_mse, tokens, targets),
            "delta": partial(self.delta_term, tokens[:n_deltas], wanted),
        }
        loss, values = weighted_sum({name: losses[name] for name in schedules}, schedules, step)
        if loss.requires_grad:
            (loss / self.options.accumulate).backward()
        return {"loss": float(loss.detach()), **{name: float(value) for name, value in values.items()}}, largest

    def delta_term(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        def loss(deltas: Tensor, adapters: slice) -> Tensor:
            target, mse, cosine = wanted[adapters], self.options.mse_weight, self.options.cosine_weight
            return delta_loss(deltas, target, mse_weight=mse, cosine_weight=cosine)

        return self.delta.mean_loss(self.format.detokenize(tokens), loss)

    def micro_batches(
        self, step: int
    ) -> Iterator[tuple[list[str], list[tuple[Tensor, Tensor, Tensor]], int]]:
        """This rank's teachers of a step, by name and as items, and how many, the first ones, are for the delta loss.

        Drawn by the step's number alone: a resumed run draws the same, and so do all ranks.
        """
        chance = torch.Generator().manual_seed(self.options.seed * _SEED + step)
        size, n_deltas = _sizes(len(self.teachers), self.options)
        known = getattr(self.teachers, "names", None)
        for _ in range(self.options.accumulate):
            drawn = torch.randperm(len(self.teachers), generator=chance)[:size].tolist()
            seeds = torch.randint(2**62, (size,), generator=chance).tolist()
            own = list(zip(drawn, seeds, strict=True))
            own = own[:n_deltas][self.shares.own(n_deltas)] + own[n_deltas:][self.shares.own(size - n_deltas)]
            items = []
            for index, seed in own:
                prompts, tokens, target = self.teachers[index]
                order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
                chosen = order[: self.options.prompts_per_condition].tolist()
                items.append((torch.cat([prompts[one] for one in chosen]), tokens, target))
            names = [f"number {index}" if known is None else repr(known[index]) for index, _ in own]
            yield names, items, n_deltas // self.shares.size

    def shared(self, sums: dict[str, float], is_finite: bool) -> tuple[dict[str, float], bool, bool]:
        """The means over all ranks; whether one of them met what is not finite; whether one was interrupted.

        So that all skip alike, and end after the same step.
        """
        if self.ranks.world_size == 1:
            return sums, not is_finite, self.interrupts.pending
        flags = [float(not is_finite), float(self.interrupts.pending)]
        total = torch.tensor([*sums.values(), *flags], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        *values, odd, ends = (total / self.ranks.world_size).tolist()
        return dict(zip(sums, values, strict=True)), odd > 0, ends > 0

    def culprits(self, largest: Sequence[tuple[Sequence[str], Tensor]]) -> str:
        """The adapters whose tokens' gradient is not finite, or is the largest. All ranks make this call."""
        own = [(name, value) for names, row in largest for name, value in zip(names, row.tolist(), strict=True)]
        found = [pair for pairs in self.ranks.gather(own) for pair in pairs]
        odd = dict.fromkeys(name for name, value in found if not math.isfinite(value))
        if not odd and found:
            return f"the largest gradient is that of adapter {max(found, key=lambda pair: pair[1])[0]}"
        rest = f" and {len(odd) - _NAMED} others" if len(odd) > _NAMED else ""
        return f"by adapter {', '.join(list(odd)[:_NAMED])}{rest}"


@contextmanager
def _random_numbers(seed: int, rank: int, device: torch.device) -> Iterator[None]:
    """Global generators seeded by these, and left as they were: what is drawn depends on no earlier step."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((31 * seed + rank + 1) % 2**63)  # not the seed that draws the teachers
        yield


def _sizes(n_teachers: int, options: TrainingOptions) -> tuple[int, int]:
    """Teachers of a micro-batch, and how many of them are for the delta loss."""
    size = min(options.batch_size, n_teachers)
    return size, min(options.delta_batch_size, size)


def check_shares(shares: Shares, n_teachers: int, options: TrainingOptions) -> None:
    """Raises ``ValueError`` where the mean over ranks would not be the mean over teachers."""
    for name, size in zip(("batch_size", "delta_batch_size"), _sizes(n_teachers, options), strict=True):
        if size % shares.size:
            raise ValueError(
                f"{name} is {size} of {n_teachers} teachers, expected a multiple of the {shares.size} ranks"
            )
