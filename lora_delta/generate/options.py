"""How a generator is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..delta import POOLINGS
from ..own_texts import POSITIONS
from .fields import Range, check_fields, check_value, option
from .schedules import Schedule

TERMS = ("weights", "delta", "lm", "kl", "l1", "l2", "product_l2")
MEANS = ("adapters", "tokens")
PROBES, OWN = "probes", "own"
TEACHER, CONTEXT = "teacher", "context"
_NO_MATTER = ("steps", "checkpoint_every", "max_skipped_steps")  # to the outcome of the steps already done


@dataclass(frozen=True)
class DeltaOptions:
    """Which deltas the loss ``"delta"`` compares, and with what.

    Attributes:
        texts: ``"probes"``, those of the labels, the same for all adapters and steps; or each adapter's ``"own"``,
            drawn anew in each step. The options below apply to the latter: see
            :class:`lora_delta.DifferentiableTextDelta`.
        target: the deltas of a ``"teacher"``, whose adapter is among the labels; or those of the prompted base, the
            bare model with the condition in its ``"context"``.
        positions, pooling: where a text is read, and whether an adapter's positions are averaged.
        layers: the blocks whose outputs are read.
    """

    texts: str = option(PROBES, one_of=(PROBES, OWN))
    target: str = option(TEACHER, one_of=(TEACHER, CONTEXT))
    positions: str = option("completion", one_of=POSITIONS)
    layers: list = field(default_factory=lambda: [-1])
    pooling: str = option("none", one_of=POOLINGS)

    def __post_init__(self) -> None:
        check_fields(self)
        for layer in self.layers:
            check_value("layers", layer, int, Range(least=-1))
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers is {self.layers}, expected some, each once")
        of_texts = {f.name: f.default for f in fields(self)[1:]} | {"layers": [-1]}
        if self.texts == PROBES and any(getattr(self, name) != value for name, value in of_texts.items()):
            raise ValueError("delta has options for own texts, expected texts = 'own' as well: probes are the labels'")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        steps: the length of the run. It may be raised, or lowered to no fewer steps than are done, and the run resumes:
            the learning rate then follows the new curve.
        batch_size: conditions in a micro-batch; a step has ``accumulate`` micro-batches.
        prompts_per_condition: how many of a condition's prompts, drawn anew each time, are read together.
        texts_per_condition: how many of its texts, likewise drawn, the losses on texts are computed on.
        delta_batch_size: the delta loss on probes takes at most this many conditions of a micro-batch, in every
            ``delta_every``-th step: it costs a pass through the whole base model.
        learning_rate, warmup_steps: for AdamW; a linear warm-up, then a cosine decay to a tenth.
        clip: the gradient's norm, over all parameters, is clipped to this.
        losses: the schedule of each term's weight: ``"weights"``, a mean squared error over tokens, or over A and B if
            the generator writes these; ``"delta"``, as ``delta`` says; ``"lm"``, the cross-entropy of the texts'
            completions; ``"kl"``, KL(teacher ‖ adapted model) on them; and, for the matrices written, ``"l1"`` and
            ``"l2"``, the mean absolute value and the mean square of the entries of A and B, and ``"product_l2"``, the
            mean square of the entries of the weight updates s·BA.
        delta: which deltas.
        mse_weight, cosine_weight: weights of the two parts of the delta loss, mean squared error and one minus the
            cosine: see :func:`lora_delta.delta_losses.delta_loss`, and ``adapters_delta_loss`` for own texts.
        mean: of ``"lm"`` and ``"kl"``: over ``"adapters"``, or over the ``"tokens"`` of all completions of a step.
        bf16: run the generator under autocast to bfloat16; its parameters stay float32.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        max_skipped_steps: a step whose loss or gradient is not finite is skipped; this many in a row end the run.

    Raises:
        ValueError: a value of another type, or out of its range; unknown losses, or all with weight 0.
    """

    steps: int = option(1000, least=1)
    batch_size: int = option(8, least=1)
    prompts_per_condition: int = option(1, least=1)
    texts_per_condition: int = option(4, least=1)
    delta_batch_size: int = option(8, least=1)
    delta_every: int = option(1, least=1)
    accumulate: int = option(1, least=1)
    learning_rate: float = option(1e-3, above=0, most=1)
    warmup_steps: int = option(50, least=0)
    weight_decay: float = option(0.01, least=0, most=1)
    clip: float = option(1.0, above=0, most=1e9)
    bf16: bool = False
    seed: int = option(0, least=0, most=2**40)
    checkpoint_every: int = option(200, least=1)
    max_skipped_steps: int = option(10, least=1)
    losses: Mapping[str, Schedule] = option(
        lambda: {"weights": Schedule(1.0), "delta": Schedule(1.0, "linear", warmup_steps=100)}
    )
    delta: DeltaOptions = field(default_factory=DeltaOptions)
    mse_weight: float = option(1.0, least=0)
    cosine_weight: float = option(1.0, least=0)
    mean: str = option("adapters", one_of=MEANS)

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = sorted(set(self.losses) - set(TERMS))
        if unknown or not self.losses:
            raise ValueError(f"losses names {unknown or 'nothing'}, expected some of {TERMS}")
        if not any(schedule.weight or schedule.start for schedule in self.losses.values()):
            raise ValueError("losses all have weight 0, expected one that does not")
        if "delta" in self.losses and not self.mse_weight and not self.cosine_weight:
            raise ValueError("mse_weight and cosine_weight are both 0, expected one above 0")

    @property
    def facts(self) -> dict[str, Any]:
        """The options that affect the outcome, as JSON can hold them."""
        return {name: value for name, value in asdict(self).items() if name not in _NO_MATTER}

    def needs(self, *terms: str) -> bool:
        """Whether any of these is among the losses."""
        return any(term in self.losses for term in terms)

    @property
    def text_terms(self) -> tuple[str, ...]:
        """The losses that are computed on adapters' own texts."""
        own = ("lm", "kl", "delta") if self.delta.texts == OWN else ("lm", "kl")
        return tuple(name for name in own if name in self.losses)

    @property
    def delta_from_context(self) -> bool:
        """Whether the delta loss on adapters' own texts has the prompted base as its target."""
        return "delta" in self.text_terms and self.delta.target == CONTEXT

    @property
    def teacher_terms(self) -> tuple[str, ...]:
        """The losses that need teachers' adapters."""
        needs_delta = self.delta.texts == PROBES or self.delta.target == TEACHER
        return tuple(name for name in ("weights", "delta") if name in self.losses and (name != "delta" or needs_delta))
