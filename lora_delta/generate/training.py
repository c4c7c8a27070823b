"""Training a generator: on teachers' weights, their deltas, the language model's loss on texts, or a sum of these."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..delta import DifferentiableDeltaCompute
from ..distributed import Ranks
from ..identity import Identity
from ..labelling.settings import label_identity, label_settings, model_fingerprint, spec_facts
from ..progress import progress_bar
from ..shares import Shares
from .checkpoints import Metrics, Progress, RunFolder
from .evaluation import Evaluation
from .interrupts import Interrupts
from .options import TERMS, TrainingOptions
from .schedules import learning_rate
from .step import Stepper
from .tasks import TrainingSet
from .terms import Terms, TextLosses
from .tokens import TokenFormat
from .trackers import TrackerOptions, Trackers


def train(
    generator: nn.Module,
    tasks: TrainingSet,
    options: TrainingOptions,
    *,
    format: TokenFormat | None = None,
    delta: DifferentiableDeltaCompute | None = None,
    texts: TextLosses | None = None,
    evaluation: Evaluation | None = None,
    out: str | Path | RunFolder | None = None,
    trackers: TrackerOptions | None = None,
    progress: bool = True,
    label: str = "train",
    mesh: DeviceMesh | None = None,
) -> list[Metrics]:
    """Train ``generator``, which maps (states, mask) to LoRA tokens or tensors, in place, on the base model's device.

    With ``out``, that folder holds what :mod:`lora_delta.generate.checkpoints` describes. A checkpoint found there is
    resumed, and the run gives the numbers of an uninterrupted one: bit for bit on the same kind of machine with as many
    threads. Ctrl-C, and SIGTERM if it is handled, end the run after the step in progress, once its state is saved.

    A step whose loss or gradient is not finite changes nothing: it is skipped, counted in its metrics, and a warning
    names the adapters that caused it.

    The ranks of a mesh's ``"dp"`` dimension share each micro-batch, balanced by the tokens of its texts if it has any,
    under DistributedDataParallel: the numbers are those of one process, and so are the checkpoints, which resume on any
    number of ranks. ``delta`` and ``texts`` must then have no ``"dp"`` dimension of their own. Ranks of a ``"tp"``
    dimension, over which the weights are split, do the same work. The mesh spans all processes.

    Random numbers that a generator draws, such as dropout's, depend on the seed, the step and the rank; the global
    random state is restored afterwards.

    Args:
        format: the tokens' format, if the generator writes tokens.
        delta: for the loss ``"delta"`` on probes.
        texts: for the losses on texts, and for an evaluation.
        evaluation: held-out conditions to evaluate from time to time; the best generator is kept alongside the last.
        out: a folder, whose run is identified by the options, the sizes, the base model and the probes; or a locked
            one, with the caller's own identity.
        trackers: where else metrics go; needs ``out``.

    Returns:
        The metrics of every step: the loss, each of its terms, the gradient's norm, the learning rate, and seconds;
        for a skipped step those that are finite, and ``"skipped"``, how many there have been; with an evaluation also
        its results, see :meth:`Evaluation.measured`.

    Raises:
        ValueError: no tasks, a task without what a loss needs, a generator on another device than the base model, batch
            sizes that the ranks cannot share evenly, fewer steps than the run has done, ``max_skipped_steps`` skipped
            in a row, or as :meth:`RunFolder.held`.
    """
    if not len(tasks):
        raise ValueError("tasks are empty, expected at least one")
    terms = Terms(options, format, delta, texts)
    device = next(generator.parameters()).device
    if terms.device not in (None, device):
        raise ValueError(f"generator is on {device}, expected {terms.device} like the base model")
    shares, ranks = Shares.of(mesh), Ranks() if mesh is None else Ranks.current(device)
    optimizer = torch.optim.AdamW(
        generator.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.98),
        fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip
    factor = learning_rate(options.warmup_steps, options.steps)
    with ExitStack() as stack:
        interrupts = Interrupts()
        replica = generator
        stepper = Stepper(replica, tasks, terms, optimizer, device, shares, ranks, interrupts)
        if isinstance(out, (str, Path)):
            out = stack.enter_context(RunFolder.held(out, _identity(generator, tasks, terms), ranks))
        done, history, tracked = Progress(), list[Metrics](), None
        if out is not None:
            done, history = out.resume(generator, optimizer), out.history
            if trackers is not None and ranks.rank == 0:
                run_id = out.identity.sha256[:16]
                tracked = stack.enter_context(Trackers(trackers, out.folder, out.identity.facts, run_id))
        if done.steps > options.steps:
            raise ValueError(f"steps is {options.steps}, expected at least the {done.steps} that the run has done")
        if shares.mesh is not None:
            replica = nn.parallel.DistributedDataParallel(generator, process_group=shares.mesh.get_group())
            stepper = replace(stepper, generator=replica)
        stack.enter_context(interrupts)
        steps = range(done.steps, options.steps)
        shown = progress and ranks.rank == 0
        bar = progress_bar(steps, label, initial=done.steps, total=options.steps, disable=not shown)
        for step in bar:
            if evaluation is not None and evaluation.patience is not None and done.stale >= evaluation.patience:
                break
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * factor(step)
            metrics, odd, ends = stepper.step(step)
            done.steps, done.skipped_in_a_row = step + 1, done.skipped_in_a_row + 1 if odd else 0
            if odd:
                done.skipped += 1
                metrics["skipped"] = done.skipped
            metrics["seconds"] = time.perf_counter() - start
            if evaluation is not None and (done.steps % evaluation.every == 0 or done.steps == options.steps):
                metrics |= _evaluated(evaluation, generator, stepper, done, out)
            history.append(metrics)
            said = {name: f"{metrics[name]:.3f}" for name in ("loss", *TERMS) if name in metrics}
            bar.set_postfix(said, refresh=False)
            if out is not None:
                out.write(metrics)
            if tracked is not None:
                tracked.write(metrics)
            if odd:
                _report(odd, done, options, ranks)
            due = done.steps % options.checkpoint_every == 0 or done.steps == options.steps
            stops = evaluation is not None and evaluation.patience is not None and done.stale >= evaluation.patience
            if out is not None and (due or ends or stops):
                out.save(generator, optimizer, done)
            if ends:
                ranks.gather(None)  # torchrun ends all ranks once one has ended: wait until the state is on disk
                kept = "" if out is None else f"; {out.folder} holds them, and the same command resumes from there"
                interrupts.end(f"{done.steps} of {options.steps} steps are done{kept}")
    return history


def _evaluated(
    evaluation: Evaluation, generator: nn.Module, stepper: Stepper, done: Progress, out: RunFolder | None
) -> Metrics:
    """The results of an evaluation; if they are the best so far, the generator is saved."""
    found = evaluation.measured(generator, stepper.terms, stepper.shares, stepper.device)
    score = evaluation.score(found, stepper.terms)
    if math.isfinite(score) and (done.best is None or score < done.best):
        done.best, done.best_step, done.stale = score, done.steps, 0
        if out is not None:
            out.save_best(generator, done)
    else:
        done.stale += 1
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _identity(generator: nn.Module, tasks: TrainingSet, terms: Terms) -> Identity:
    """What a run depends on, as far as the arguments of :func:`train` tell."""
    facts: dict[str, Any] = {
        "generator": {name: list(tensor.shape) for name, tensor in generator.state_dict().items()},
        "teachers": len(tasks),
        "training": terms.options.facts,
    }
    if terms.format is not None:
        facts["format"] = asdict(terms.format)
    if terms.delta is not None:
        facts |= {"labels": label_identity(label_settings(terms.delta)).facts, "spec": spec_facts(terms.delta.spec)}
    if terms.texts is not None:
        lm = terms.texts.lm
        facts |= {"spec": spec_facts(lm.spec), "loss": loss_facts(terms.texts)}
        if terms.delta is None:
            facts["model_sha256"] = model_fingerprint(lm.config, lm.weights)
    return Identity(facts)


def loss_facts(texts: TextLosses) -> dict[str, Any]:
    """What the losses on texts depend on besides model, spec and texts."""
    kept = texts.stored_deltas
    return {
        "reduction": texts.lm.reduction,
        "label_smoothing": texts.lm.label_smoothing,
        "temperature": texts.temperature,
        "teacher_sha256": None if texts.stored is None else texts.stored.sha256,
        **({} if kept is None else {"deltas_sha256": kept.sha256}),
    }


def _report(odd: str, done: Progress, options: TrainingOptions, ranks: Ranks) -> None:
    """Warn that a step was skipped, and end the run after too many."""
    if done.skipped_in_a_row >= options.max_skipped_steps:
        raise ValueError(
            f"{done.skipped_in_a_row} steps in a row were skipped, expected fewer than max_skipped_steps; {odd}"
        )
    if ranks.rank == 0:
        warnings.warn(f"{odd}. The step is skipped: {done.skipped_in_a_row} in a row", stacklevel=3)
