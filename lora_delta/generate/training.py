"""Training a generator on teachers: their weights, their deltas, or both."""

from __future__ import annotations

import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from ..delta import DifferentiableDeltaCompute
from ..distributed import Ranks
from ..identity import Identity
from ..labelling.settings import label_identity, label_settings, spec_facts
from ..shares import Shares
from .checkpoints import Metrics, Progress, RunFolder
from .interrupts import Interrupts
from .options import TERMS, TrainingOptions
from .schedules import learning_rate
from .step import Stepper, TrainingSet, check_shares
from .tokens import TokenFormat


def train(
    generator: nn.Module,
    teachers: TrainingSet,
    delta: DifferentiableDeltaCompute,
    format: TokenFormat,
    options: TrainingOptions,
    *,
    out: str | Path | RunFolder | None = None,
    progress: bool = True,
    label: str = "train",
    mesh: DeviceMesh | None = None,
) -> list[Metrics]:
    """Train ``generator``, from (states, mask) to tokens, in place, on the device where it and ``delta`` are.

    With ``out``, that folder holds what :mod:`lora_delta.generate.checkpoints` describes; a checkpoint that is there
    already is taken up where it was left, and gives the numbers of an uninterrupted run: to the bit on such a machine
    with as many threads. Ctrl-C, and SIGTERM where it is handled, end the run after the step that is under way, and its
    state is saved before that.

    A step whose loss or gradient is not finite changes nothing: it is skipped, counted in its metrics, and a warning
    names the adapters that did it.

    The ranks of a mesh's ``"dp"`` dimension share each micro-batch, under DistributedDataParallel: the numbers are
    those of one process, and so are the checkpoints, which resume on any number of ranks. ``delta`` then has no
    ``"dp"`` dimension of its own. Ranks of a ``"tp"`` dimension, over which its weights are split, do the same work.
    The mesh is one of all processes.

    Random numbers that a generator draws, such as dropout's, depend on the seed, the step and the rank; the global
    generators are left as they were.

    Args:
        out: a folder, of which a run knows by itself the options, the sizes, the base model and the probes; or one
            that is held with an identity of the caller's own.

    Returns:
        The metrics of every step: the loss, each of its terms, the gradient's norm, the learning rate, and seconds;
        of a skipped one those that are finite, and ``"skipped"``, how many there have been.

    Raises:
        ValueError: no teachers, a generator on another device than ``delta``, batch sizes that the ranks cannot share
            evenly, ``max_skipped_steps`` of them in a row, or as :meth:`RunFolder.held`.
    """
    if not len(teachers):
        raise ValueError("teachers is empty, expected at least one")
    device = next(generator.parameters()).device
    if device != delta.weights.device:
        raise ValueError(f"generator is on {device}, expected {delta.weights.device} as the delta")
    shares, ranks = Shares.of(mesh), Ranks() if mesh is None else Ranks.current(device)
    check_shares(shares, len(teachers), options)
    optimizer = torch.optim.AdamW(
        generator.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.98)
    )
    factors = learning_rate(options.warmup_steps, options.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    with ExitStack() as stack:
        if isinstance(out, (str, Path)):
            identity = _identity(generator, teachers, delta, format, options)
            out = stack.enter_context(RunFolder.held(out, identity, ranks))
        done, history = Progress(), list[Metrics]()
        if out is not None:
            done, history = out.resume(generator, optimizer, schedule), out.history
        replica = generator
        if shares.mesh is not None:
            replica = nn.parallel.DistributedDataParallel(generator, process_group=shares.mesh.get_group())
        interrupts = stack.enter_context(Interrupts())
        stepper = Stepper(replica, teachers, delta, format, options, optimizer, shares, ranks, interrupts)
        steps = range(done.steps, options.steps)
        bar = tqdm(
            steps, label, initial=done.steps, total=options.steps, disable=not progress or ranks.rank > 0
        )
        for step in bar:
            start = time.perf_counter()
            metrics, odd, ends = stepper.step(step)
            schedule.step()
            done.steps, done.skipped_in_a_row = step + 1, done.skipped_in_a_row + 1 if odd else 0
            if odd:
                done.skipped += 1
                metrics["skipped"] = done.skipped
            metrics["seconds"] = time.perf_counter() - start
            history.append(metrics)
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", *TERMS) if name in metrics})
            if out is not None:
                out.write(metrics)
            if odd:
                _report(odd, done, options, ranks)
            due = done.steps % options.checkpoint_every == 0 or done.steps == options.steps
            if out is not None and (due or ends):
                out.save(generator, optimizer, schedule, done)
            if ends:
                ranks.gather(None)  # torchrun ends all when one has ended: not before the state is on disk
                kept = "" if out is None else f"; {out.folder} holds them, and the same command goes on there"
                interrupts.end(f"{done.steps} of {options.steps} steps are done{kept}")
    return history


def _identity(
    generator: nn.Module,
    teachers: TrainingSet,
    delta: DifferentiableDeltaCompute,
    format: TokenFormat,
    options: TrainingOptions,
) -> Identity:
    """What a run depends on, as far as it can be told from what :func:`train` is given."""
    return Identity(
        {
            "labels": label_identity(label_settings(delta)).facts,
            "spec": spec_facts(delta.spec),
            "format": asdict(format),
            "generator": {name: list(tensor.shape) for name, tensor in generator.state_dict().items()},
            "teachers": len(teachers),
            "training": options.facts,
        }
    )


def _report(odd: str, done: Progress, options: TrainingOptions, ranks: Ranks) -> None:
    """Say that a step was skipped, and end the run after too many."""
    if done.skipped_in_a_row >= options.max_skipped_steps:
        raise ValueError(
            f"{done.skipped_in_a_row} steps in a row have changed nothing, expected fewer than max_skipped_steps; {odd}"
        )
    if ranks.rank == 0:
        warnings.warn(f"{odd}. The step is skipped: {done.skipped_in_a_row} in a row", stacklevel=3)
