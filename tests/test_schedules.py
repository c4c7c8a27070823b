"""Schedules, the learning rate and sums of losses, against their plain formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_case import randn

from lora_delta.generate.schedules import Schedule, learning_rate, weighted_sum

NAN = math.nan


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(2), {0: 2, 7: 2}),
        (Schedule(2, begin=3, start=0.5), {0: 0.5, 2: 0.5, 3: 2, 9: 2}),
        (Schedule(2, "linear", 4), {0: 0, 1: 0.5, 2: 1, 3: 1.5, 4: 2, 5: 2}),
        (Schedule(0, "linear", 4, start=2, begin=10), {0: 2, 10: 2, 11: 1.5, 13: 0.5, 14: 0, 99: 0}),
        (Schedule(1, "cosine", 4), {0: 0, 1: (1 - 0.5**0.5) / 2, 2: 0.5, 3: (1 + 0.5**0.5) / 2, 4: 1, 8: 1}),
        (Schedule(3, "cosine", 6, start=1, begin=2), {0: 1, 2: 1, 4: 1.5, 5: 2, 6: 2.5, 8: 3}),
    ],
)
def test_a_weight_is_on_its_schedule(schedule: Schedule, expected: dict[int, float]) -> None:
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, abs=1e-12)
    assert schedule(10**6) == schedule.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "exponential"}, r"kind is 'exponential', expected one of \('constant', 'linear', 'cosine'\)"),
        ({"weight": NAN}, "weight is nan, expected a finite number"),
        ({"start": "1"}, "start is '1', expected a finite number"),
        ({"kind": "linear"}, "warmup_steps is 0, expected 1 or more for kind 'linear'"),
        ({"warmup_steps": 5}, "warmup_steps is 5, expected 0 for kind 'constant'"),
        ({"kind": "cosine", "warmup_steps": 1.5}, "warmup_steps is 1.5, expected an integer of at least 0"),
        ({"begin": -1}, "begin is -1, expected an integer of at least 0"),
    ],
)
def test_a_bad_schedule_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**{"weight": 1.0, **options})
    with pytest.raises(ValueError, match="step is -1, expected an integer of at least 0"):
        Schedule(1)(-1)


@pytest.mark.parametrize(("warmup", "steps"), [(50, 1000), (1, 10), (0, 7), (3, 4), (5, 5), (9, 4)])
def test_the_learning_rate_is_a_line_up_and_a_cosine_down_to_a_tenth(warmup: int, steps: int) -> None:
    factor = learning_rate(warmup, steps)
    for step in range(steps):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert factor(step) == pytest.approx(expected, rel=1e-12), step


def test_the_learning_rate_is_whole_after_the_warmup_and_a_tenth_after_the_last_step() -> None:
    factor = learning_rate(4, 12)
    assert [factor(step) for step in (0, 3, 4)] == [0.25, 1, 1]
    assert factor(8) == pytest.approx(0.55)
    assert factor(11) == pytest.approx(0.1 + 0.45 * (1 - math.cos(math.pi / 8)))
    assert factor(12) == pytest.approx(0.1)
    assert factor(10**6) == pytest.approx(0.1)


def test_a_weighted_sum_reports_values_unweighted_and_detached() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    terms: dict[str, Any] = {"square": x**2, "cube": lambda: x**3}
    total, values = weighted_sum(terms, {"cube": Schedule(4, "linear", 4), "square": Schedule(0.5)}, step=1)
    assert total == 0.5 * 9 + 1 * 27
    assert list(values.items()) == [("square", 9), ("cube", 27)]
    assert not any(value.requires_grad for value in values.values())
    assert torch.autograd.grad(total, x)[0] == 0.5 * 6 + 27


def test_a_term_of_weight_zero_is_not_computed_and_does_not_spoil_the_sum() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    terms: dict[str, Any] = {"x": x, "nan": x * NAN, "never": lambda: pytest.fail("the term was computed")}
    total, values = weighted_sum(terms, {"x": Schedule(2), "nan": Schedule(0), "never": Schedule(1, begin=5)}, 4)
    assert total == 6
    assert torch.autograd.grad(total, x)[0] == 2
    assert list(values) == ["x", "nan"]
    assert values["nan"].isnan()


@pytest.mark.parametrize(
    ("terms", "schedules", "message"),
    [
        ({"a": randn()}, {}, "loss 'a' has no schedule, expected one for each"),
        ({}, {"a": Schedule(1)}, "loss 'a' has no term, expected one for each"),
        ({}, {}, "no loss has a weight other than 0 at step 7"),
        ({"a": randn()}, {"a": Schedule(1, begin=8)}, "no loss has a weight other than 0 at step 7"),
        ({"a": randn(1)}, {"a": Schedule(1)}, r"loss 'a' has shape \(1,\), expected a scalar"),
        ({"a": lambda: 1.0}, {"a": Schedule(1)}, "loss 'a' is a float, expected a torch.Tensor"),
        ({"a": 1.0}, {"a": Schedule(1)}, "loss 'a' is a float, expected a torch.Tensor or a function"),
        ({"a": torch.tensor(1)}, {"a": Schedule(1)}, "loss 'a' has dtype torch.int64, expected a floating-point"),
    ],
)
def test_bad_terms_are_refused(terms: dict[str, Any], schedules: dict[str, Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_sum(terms, schedules, 7)
