"""One training step: drawing the tasks, their losses, and the gradient, shared by all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import Ranks
from ..shares import Shares
from .checkpoints import Metrics
from .conditions import Condition
from .interrupts import Interrupts
from .options import TrainingOptions
from .schedules import weighted_sum
from .tasks import Batch, Draw, TrainingSet
from .terms import Terms, Written, n_targets

_SEED = 1_000_003  # distance of seeds, in steps: more than a run has
_NAMED = 3  # adapters named in a message


@dataclass(frozen=True)
class Stepper:
    """What all steps of a run share. ``generator`` may be wrapped in DistributedDataParallel."""

    generator: nn.Module
    tasks: TrainingSet
    terms: Terms
    optimizer: torch.optim.Optimizer
    device: torch.device
    shares: Shares
    ranks: Ranks
    interrupts: Interrupts
    draw: Draw = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        prompts, texts = options.prompts_per_condition, options.texts_per_condition
        texts = texts if options.text_terms else 0
        draw = Draw(self.tasks, options.batch_size, options.delta_batch_size, prompts, texts)
        object.__setattr__(self, "draw", draw)
        for name, size in (("batch_size", draw.size), ("delta_batch_size", draw.n_deltas)):
            if size % self.shares.size:  # the mean over ranks would not be that over tasks
                found = f"{name} is {size} of {len(self.tasks)} tasks"
                raise ValueError(f"{found}, expected a multiple of the {self.shares.size} ranks")

    @property
    def options(self) -> TrainingOptions:
        return self.terms.options

    def step(self, step: int) -> tuple[Metrics, str, bool]:
        """Do a step. Returns its metrics; what was not finite, if it was skipped; whether the run should end now."""
        options, sums = self.options, dict[str, float]()
        norms: list[tuple[list[str], Tensor]] = []
        self.optimizer.zero_grad()
        with _random_numbers(options.seed * _SEED + step, self.shares.rank, self.device):
            batches: Iterable[Batch] = self.micro_batches(step)
            n_tokens = None
            if options.mean == "tokens" and options.needs("lm", "kl"):
                batches = list(batches)
                count = torch.tensor(sum(n_targets(batch.texts) for batch in batches), device=self.device)
                # A rank's gradients from a micro-batch are a share of the step's.
                n_tokens = int(self.shares.sum_(count)) / (self.shares.size * options.accumulate)
            for number, batch in enumerate(batches, 1):
                with ExitStack() as stack:
                    if number < options.accumulate and isinstance(self.generator, nn.parallel.DistributedDataParallel):
                        stack.enter_context(self.generator.no_sync())  # ranks reduce their gradients once per step
                    values, rows = self.backward(step, batch, n_tokens)
                norms += [(batch.names, one) for one in rows]
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value / options.accumulate
        norm = float(nn.utils.clip_grad_norm_(self.generator.parameters(), options.clip))
        sums, is_odd, ends = self.shared(sums, math.isfinite(norm) and all(map(math.isfinite, sums.values())))
        rate = self.optimizer.param_groups[0]["lr"]
        metrics = {**sums, "gradient_norm": norm}
        odd = ""
        if is_odd:
            self.optimizer.zero_grad()  # parameters without a gradient are left alone
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
            odd = f"step {step} is not finite: {numbers}; {self.culprits(norms)}"
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.optimizer.step()
        return {"step": step, **metrics, "learning_rate": rate}, odd, ends

    def backward(self, step: int, batch: Batch, n_tokens: float | None) -> tuple[dict[str, float], list[Tensor]]:
        """Add a micro-batch's gradients. Returns the loss and its terms, empty if no term has a weight in this step.

        Also returns the norm (B,) of each adapter's gradient, in the form in which the generator wrote it.
        """
        options = self.options
        schedules = {
            name: schedule
            for name, schedule in options.losses.items()
            if name != "delta" or step % options.delta_every == 0
        }
        weights = {name: schedule(step) for name, schedule in schedules.items()}
        if not any(weights.values()):
            return {}, []  # only a delta loss, between two of its steps
        own = options.text_terms
        if "delta" not in own and not any(weight for name, weight in weights.items() if name != "delta"):
            batch = batch.first(batch.n_deltas)  # the other adapters are not needed
        condition = Condition.collate(batch.states).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bf16):
            written = Written(self.generator(condition.states, condition.mask), self.terms.format)
        of_texts = {name: weights[name] for name in own if weights.get(name)}
        of_written = [name for name in schedules if name not in own]
        values, parts = dict[str, Tensor](), list[Tensor]()
        if of_texts:
            assert self.terms.texts is not None
            teachers = None
            if "delta" in of_texts and self.terms.asks_teachers_deltas:
                teachers = self.terms.teachers(batch, "delta")
            part, found = self.terms.texts.mean(
                written.tensors, batch.texts, of_texts, n_tokens=n_tokens, teachers=teachers
            )
            parts.append(part)
            values |= found
        if any(weights[name] for name in of_written):
            functions = self.terms.functions(written, batch, of_written)
            part, found = weighted_sum(functions, {name: schedules[name] for name in of_written}, step)
            parts.append(part)
            values |= found
        loss = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if loss.requires_grad:
            (loss / options.accumulate).backward()
        named = {name: float(values[name]) for name in schedules if name in values}
        return {"loss": float(loss.detach()), **named}, written.norms

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's tasks of a step, one micro-batch after another."""
        chance = torch.Generator().manual_seed(self.options.seed * _SEED + step)
        for _ in range(self.options.accumulate):
            drawn = self.draw.indices(chance)
            first, rest = drawn[: self.draw.n_deltas], drawn[self.draw.n_deltas :]
            own = [part[i] for part in (first, rest) for i in self.shares.balanced([self.draw.cost(*d) for d in part])]
            yield self.draw.batch(own, len(first) // self.shares.size)

    def shared(self, sums: dict[str, float], is_finite: bool) -> tuple[dict[str, float], bool, bool]:
        """The means over all ranks; whether any rank met a value that is not finite; whether any was interrupted.

        This way all ranks skip the same steps, and end after the same step.
        """
        if self.ranks.world_size == 1:
            return sums, not is_finite, self.interrupts.pending
        flags = [float(not is_finite), float(self.interrupts.pending)]
        total = torch.tensor([*sums.values(), *flags], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        *values, odd, ends = (total / self.ranks.world_size).tolist()
        return dict(zip(sums, values, strict=True)), odd > 0, ends > 0

    def culprits(self, norms: Sequence[tuple[Sequence[str], Tensor]]) -> str:
        """The adapters whose gradient is not finite, or is the largest. All ranks make this call."""
        own = [(name, value) for names, row in norms for name, value in zip(names, row.tolist(), strict=True)]
        found = [pair for pairs in self.ranks.gather(own) for pair in pairs]
        odd = dict.fromkeys(name for name, value in found if not math.isfinite(value))
        if not odd and found:
            return f"the largest gradient is that of adapter {max(found, key=lambda pair: pair[1])[0]}"
        rest = f" and {len(odd) - _NAMED} others" if len(odd) > _NAMED else ""
        return f"caused by adapter {', '.join(list(odd)[:_NAMED])}{rest}"


@contextmanager
def _random_numbers(seed: int, rank: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators from these, and restore them: what is drawn does not depend on earlier steps."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((31 * seed + rank + 1) % 2**63)  # not the seed used to draw the tasks
        yield
