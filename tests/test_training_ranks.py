"""Training on several ranks: losses and parameters are those of one process; any number of ranks can resume it."""

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
from lora_delta.generate.checkpoints import METRICS, newest_checkpoint
from lora_delta.generate.options import TrainingOptions
from lora_delta.generate.schedules import Schedule
from lora_delta.generate.tokens import TokenFormat
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
def test_two_ranks_train_as_one(
    sizes: dict[str, int], changes: dict[str, Any], training: jobs.Training, two_ranks: Ranks
) -> None:
    changed = dataclasses.replace(training, options=dataclasses.replace(training.options, **changes))
    expected = changed.run(None)
    assert expected is not None
    assert all("delta" in step for step in expected[0]) is not bool(changes)
    for found in two_ranks.call(jobs.trained, changed, None, sizes):
        assert_same_run(found, expected)


@pytest.mark.parametrize("first_on", [1, 2])
def test_a_checkpoint_resumes_on_another_number_of_ranks(
    first_on: int, training: jobs.Training, two_ranks: Ranks, tmp_path: Path
) -> None:
    expected, cut = training.run(None), dataclasses.replace(training, passes=9)  # in the fifth step, two passes each
    folder = tmp_path / "run"
    if first_on == 1:
        assert cut.run(folder) is None
        resumed = two_ranks.call(jobs.trained, training, folder, {"dp": 2})
    else:
        assert two_ranks.call(jobs.trained, cut, folder, {"dp": 2}) == [None, None]
        with pytest.warns(UserWarning, match="1 for steps after the checkpoint's 3, which are computed again"):
            resumed = [training.run(folder)]
    for found in resumed:
        assert_same_run(found, expected)
    lines = (folder / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(training.options.steps))


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}], ids=str)
def test_all_ranks_skip_a_step_whose_gradient_is_not_finite_on_one(
    sizes: dict[str, int], training: jobs.Training, two_ranks: Ranks
) -> None:
    changed = dataclasses.replace(training, spoilt=(3, 10))  # in the second and the fifth step of two passes each
    with pytest.warns(UserWarning, match="step 4 is not finite"):
        expected = changed.run(None)
    assert expected is not None
    assert [step.get("skipped") for step in expected[0]] == [None, 1, None, None, 2, None]
    for history, state in two_ranks.call(jobs.trained, changed, None, sizes):
        assert [step.get("skipped") for step in history] == [None, 1, None, None, 2, None]
        for name, tensor in expected[1].items():
            assert relative_error(state[name], tensor) <= 1e-5, name


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}], ids=str)
def test_all_ranks_end_after_the_same_step_when_one_is_interrupted(
    sizes: dict[str, int], training: jobs.Training, two_ranks: Ranks, tmp_path: Path
) -> None:
    expected, folder = training.run(None), tmp_path / "run"
    interrupted = dataclasses.replace(training, signalled=9)  # in the fifth step
    assert two_ranks.call(jobs.trained, interrupted, folder, sizes) == [None, None]
    found = newest_checkpoint(folder)
    assert found is not None
    assert found[1]["progress"]["steps"] == 5
    for resumed in two_ranks.call(jobs.trained, training, folder, sizes):
        assert_same_run(resumed, expected)


def test_ranks_that_share_a_batch_draw_their_own_random_numbers_and_others_the_same(
    training: jobs.Training, two_ranks: Ranks
) -> None:
    one, other = two_ranks.call(jobs.drawn, training, {"dp": 2})
    assert len({*one, *other}) == 2 * 2 * training.options.steps  # different in each step, pass and rank
    assert two_ranks.call(jobs.drawn, training, {"tp": 2}) == [one, one]  # the numbers of a single process
    alone: list[float] = []
    dataclasses.replace(training, drawn=alone).run(None)
    assert alone == one


def test_all_ranks_refuse_what_the_first_one_refuses(
    training: jobs.Training, two_ranks: Ranks, tmp_path: Path
) -> None:
    two_ranks.call(jobs.trained, training, tmp_path, {"dp": 2})
    changed = dataclasses.replace(training, options=dataclasses.replace(training.options, seed=1))
    with pytest.raises(AssertionError, match=r"rank 0 failed:(.|\n)*training\.seed is 0 there and 1 here"):
        two_ranks.call(jobs.trained, changed, tmp_path, {"dp": 2})
    two_ranks.call(jobs.trained, training, tmp_path, {"dp": 2})  # no rank is left waiting


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"batch_size": 3}, "batch_size is 3"), ({"delta_batch_size": 1}, "delta_batch_size is 1")],
    ids=str,
)
def test_batches_that_ranks_cannot_share_evenly_are_refused(
    changes: dict[str, Any], what: str, training: jobs.Training, two_ranks: Ranks
) -> None:
    changed = dataclasses.replace(training, options=dataclasses.replace(training.options, **changes))
    with pytest.raises(AssertionError, match=f"{what} of 6 tasks, expected a multiple of the 2 ranks"):
        two_ranks.call(jobs.trained, changed, None, {"dp": 2})


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize(
    ("mean", "losses"),
    [("tokens", {"lm": Schedule(1.0)}), ("adapters", {"lm": Schedule(1.0), "kl": Schedule(0.5), "l2": Schedule(0.1)})],
)
def test_two_ranks_train_on_texts_as_one(
    mean: str, losses: dict[str, Schedule], sizes: dict[str, int], two_ranks: Ranks
) -> None:
    options = TrainingOptions(
        steps=5, batch_size=4, accumulate=2, texts_per_condition=2, warmup_steps=2, losses=losses, mean=mean
    )
    training = jobs.TextTraining(options)
    expected = training.run()
    assert "held_out_lm" in expected[0][-1]
    for found in two_ranks.call(jobs.trained_on_texts, training, sizes):
        assert_same_run(found, expected)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_share_a_batch_by_what_it_costs(seed: int, two_ranks: Ranks) -> None:
    costs = torch.randn(8, generator=torch.Generator().manual_seed(seed)).exp().mul(600).tolist()
    shares = two_ranks.call(jobs.balanced, costs)
    assert sorted(shares[0] + shares[1]) == list(range(8))
    assert [len(share) for share in shares] == [4, 4]
    heaviest = max(sum(costs[item] for item in share) for share in shares)
    assert heaviest - sum(costs) / 2 <= max(costs) / 2
    assert two_ranks.call(jobs.balanced, [0.0] * 6) == [[0, 1, 2], [3, 4, 5]]
