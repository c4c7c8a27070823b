"""Training on several ranks: the losses and parameters of one process, and checkpoints that any number resumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import rank_jobs as jobs
import torch
from ranks import Ranks
from reference import random_lora, relative_error, tiny_config

from lora_delta import DifferentiableDeltaCompute
from lora_delta.losses import Schedule
from lora_delta.tokens import TokenFormat
from lora_delta.training import METRICS, TrainingOptions
from qwen_functional import LoraSpec

PROBES = [[1, 2, 3], [4, 5]]
N_TEACHERS, WIDTH = 6, 8


@pytest.fixture(scope="module")
def training() -> jobs.Training:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    config, spec = tiny_config(**sizes), LoraSpec(rank=2, alpha=4)
    case = jobs.Case(config, spec, random_lora(config, spec, N_TEACHERS), PROBES)
    deltas = DifferentiableDeltaCompute(config, case.weights(), PROBES, spec)(case.tensors)
    tokens = TokenFormat.for_config(config, spec.rank, WIDTH).tokenize(case.tensors).float()
    chance = torch.Generator().manual_seed(0)
    states = [[torch.randn(3 + i, 6, generator=chance) for i in range(3)]] * N_TEACHERS
    teachers = [(states[i], tokens[i], deltas[i].detach().float()) for i in range(N_TEACHERS)]
    options = TrainingOptions(
        steps=6,
        batch_size=4,
        delta_batch_size=2,
        accumulate=2,
        warmup_steps=2,
        checkpoint_every=3,
        learning_rate=3e-3,
        losses={"weights": Schedule(1.0), "delta": Schedule(1.0)},
    )
    return jobs.Training(case, teachers, options, WIDTH)


def assert_same_run(found: Any, expected: Any, first: int = 0) -> None:
    """The same metrics from step ``first`` on, and the same parameters."""
    (history, state), (wanted, wanted_state) = found, expected
    assert len(history) == len(wanted)
    for step, other in zip(history[first:], wanted[first:], strict=True):
        assert step.keys() == other.keys()
        for name in step.keys() - {"seconds"}:
            assert step[name] == pytest.approx(other[name], rel=1e-5), (step["step"], name)
    assert state.keys() == wanted_state.keys()
    for name, tensor in wanted_state.items():
        assert relative_error(state[name], tensor) <= 1e-5, name


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}, {"dp": 2, "tp": 1}], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"delta_every": 2}, {"losses": {"delta": Schedule(1.0)}, "delta_every": 2}], ids=str
)
def test_two_ranks_train_otherwise_than_one(
    sizes: dict[str, int], changes: dict[str, Any], training: jobs.Training, two_ranks: Ranks
) -> None:
    changed = dataclasses.replace(training, options=dataclasses.replace(training.options, **changes))
    expected = changed.run(None)
    assert expected is not None
    assert all("delta" in step for step in expected[0]) is not bool(changes)
    for found in two_ranks.call(jobs.trained, changed, None, sizes):
        assert_same_run(found, expected)


@pytest.mark.parametrize("first_on", [1, 2])
def test_a_checkpoint_does_not_resume_on_another_number_of_ranks(
    first_on: int, training: jobs.Training, two_ranks: Ranks, tmp_path: Path
) -> None:
    expected, cut = training.run(None), dataclasses.replace(training, passes=9)  # in the fifth step of two each
    folder = tmp_path / "run"
    if first_on == 1:
        assert cut.run(folder) is None
        resumed = two_ranks.call(jobs.trained, training, folder, {"dp": 2})
    else:
        assert two_ranks.call(jobs.trained, cut, folder, {"dp": 2}) == [None, None]
        resumed = [training.run(folder)]
    for found in resumed:
        assert_same_run(found, expected)
    lines = (folder / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(training.options.steps))


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"batch_size": 3}, "batch_size is 3"), ({"delta_batch_size": 1}, "delta_batch_size is 1")],
    ids=str,
)
def test_ranks_share_a_batch_unevenly(
    changes: dict[str, Any], what: str, training: jobs.Training, two_ranks: Ranks
) -> None:
    changed = dataclasses.replace(training, options=dataclasses.replace(training.options, **changes))
    with pytest.raises(AssertionError, match=f"{what} of 6 teachers, expected a multiple of the 2 ranks"):
        two_ranks.call(jobs.trained, changed, None, {"dp": 2})
