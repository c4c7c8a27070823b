"""Values by step, and the sum of loss terms weighted by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..delta_losses import check_float
from .fields import Range, check_fields, check_value, option

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A value by step: ``start`` until step ``begin``, ``weight`` from ``begin + warmup_steps`` on.

    Args:
        weight: the value after the ramp.
        kind: the ramp between the two: ``"constant"`` has none, the value is ``weight`` from ``begin`` on; ``"linear"``
            is a line, ``"cosine"`` half a period of a cosine, which starts and ends flat.
        warmup_steps: the length of the ramp; 0 for ``"constant"``, else 1 or more.
        start: the value before the ramp.
        begin: the first step of the ramp, from 0.

    Raises:
        ValueError: an unknown kind, weights that are not finite, steps that are not integers or out of range.
    """

    weight: float
    kind: str = option("constant", one_of=SCHEDULES)
    warmup_steps: int = option(0, least=0)
    start: float = 0.0
    begin: int = option(0, least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.kind == "constant") != (self.warmup_steps == 0):
            expected = "0" if self.kind == "constant" else "1 or more"
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected {expected} for kind {self.kind!r}")

    def __call__(self, step: int) -> float:
        """The value at a step, from 0.

        Raises:
            ValueError: a step that is not an integer of 0 or more.
        """
        check_value("step", step, int, Range(least=0))
        if step >= self.begin + self.warmup_steps:
            return self.weight
        ramp = max(0, step - self.begin) / max(1, self.warmup_steps)
        if self.kind == "cosine":
            ramp = (1 - math.cos(math.pi * ramp)) / 2
        return self.start + ramp * (self.weight - self.start)


def learning_rate(warmup_steps: int, steps: int) -> Callable[[int], float]:
    """Learning rate factors by step: linear up to 1 in ``warmup_steps``, then a cosine down to a tenth.

    The first step has ``1 / warmup_steps``; step ``warmup_steps − 1`` and the next one have 1; step ``steps``, the one
    after the last, would have a tenth. For :class:`torch.optim.lr_scheduler.LambdaLR`.
    """
    up = Schedule(1.0, "linear", warmup_steps) if warmup_steps else Schedule(1.0)
    down = Schedule(0.1, "cosine", max(1, steps - warmup_steps), start=1.0, begin=warmup_steps)
    return lambda step: up(step + 1) if step < warmup_steps else down(step)


def weighted_sum(
    terms: Mapping[str, Tensor | Callable[[], Tensor]], schedules: Mapping[str, Schedule], step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of loss terms, each times its weight at a step, and every term's own value.

    Args:
        terms: {name: scalar, or a function without arguments that computes it}. A function whose weight is 0 is not
            called.
        schedules: {name: its schedule}, the same names.
        step: from 0.

    Returns:
        The sum, and {name: value}, unweighted and detached, in the order of ``terms`` and without those not called.
        A term with weight 0 stays out of the sum, even if it is NaN.

    Raises:
        ValueError: names that differ, a term that is not one floating-point number, an invalid step, or all weights 0:
            such a step would train nothing.
    """
    odd = sorted(set(terms) ^ set(schedules))
    if odd:
        raise ValueError(f"loss {odd[0]!r} has no {'schedule' if odd[0] in terms else 'term'}, expected one for each")
    weighted, values = [], {}
    for name, term in terms.items():
        weight = schedules[name](step)
        if not isinstance(term, Tensor):
            if not callable(term):
                raise ValueError(f"loss {name!r} is a {type(term).__name__}, expected a torch.Tensor or a function")
            if weight == 0:
                continue
            term = term()
        check_float(f"loss {name!r}", term)
        if term.dim():
            raise ValueError(f"loss {name!r} has shape {tuple(term.shape)}, expected a scalar")
        values[name] = term.detach()
        if weight != 0:
            weighted.append(weight * term)
    if not weighted:
        raise ValueError(f"no loss has a weight other than 0 at step {step}: {sorted(terms)}")
    total = weighted[0]
    for part in weighted[1:]:
        total = total + part
    return total, values
