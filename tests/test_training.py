"""The training loop: what it minimizes and how, and what it does when a gradient is not finite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import Generator
from torch import Tensor, nn
from torch.nn import functional as F
from training_case import (
    BOTH,
    CONDITION_SIZE,
    DELTA,
    N_TEACHERS,
    WEIGHTS,
    Case,
    Teachers,
    adam_step,
    options,
    training_case,
)

from lora_delta import DifferentiableDeltaCompute
from lora_delta.embedded import embedded_checkpoint
from lora_delta.generate.checkpoints import Progress, newest_checkpoint
from lora_delta.generate.generator import LoRAGenerator
from lora_delta.generate.options import TrainingOptions
from lora_delta.generate.schedules import Schedule
from lora_delta.generate.tokens import TokenFormat
from qwen_functional import LoraSpec


@pytest.fixture(scope="module")
def case(device: str) -> Case:
    return training_case(device)


@pytest.mark.parametrize("losses", [WEIGHTS, DELTA, BOTH], ids=["weights", "delta", "both"])
def test_training_lowers_each_loss(losses: Mapping[str, Schedule], case: Case) -> None:
    asked = options(losses, steps=80, delta_batch_size=4, learning_rate=5e-3)
    history = case.train(case.generator(), asked)
    for name in ("loss", *losses):
        first, last = (sum(m[name] for m in part) for part in (history[:5], history[-5:]))
        assert last < 0.7 * first, name


def plain_run(
    generator: nn.Module, case: Case, asked: TrainingOptions, without: Collection[int] = ()
) -> list[dict[str, float]]:
    """What the README and the options' docstring say, in plain torch; except for the delta, which has its own tests."""
    adam = torch.optim.AdamW(
        generator.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=asked.weight_decay
    )
    history = []
    for step in range(asked.steps):
        chance = torch.Generator().manual_seed(asked.seed * 1_000_003 + step)
        adam.zero_grad()
        found = {"loss": 0.0, "weights": 0.0}
        for _ in range(asked.accumulate):
            order = torch.randperm(N_TEACHERS, generator=chance)[: asked.batch_size].tolist()
            seeds = torch.randint(2**62, (len(order),), generator=chance).tolist()  # each draws its own prompts
            states = []
            for index, seed in zip(order, seeds, strict=True):
                prompts = case.teachers[index][0]
                drawn = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
                states.append(torch.cat([prompts[one] for one in drawn[: asked.prompts_per_condition]]))
            padded = nn.utils.rnn.pad_sequence(states, batch_first=True).to(case.device)
            mask = torch.tensor([[i < len(one) for i in range(padded.shape[1])] for one in states], device=case.device)
            tokens = generator(padded, mask).float()
            targets = torch.stack([case.teachers[index][1] for index in order]).to(case.device)
            real = ~targets.isnan()
            weights = F.mse_loss(tokens[real], targets[real])
            loss = asked.losses["weights"](step) * weights
            if step % asked.delta_every == 0:
                first = order[: asked.delta_batch_size]
                target = torch.stack([case.teachers[index][2] for index in first]).to(case.device)
                deltas = case.delta(case.format.detokenize(tokens[: len(first)]))
                angle = 1 - F.cosine_similarity(deltas, target, dim=-1).mean()
                term = asked.mse_weight * F.mse_loss(deltas, target) + asked.cosine_weight * angle
                loss = loss + asked.losses["delta"](step) * term
                found["delta"] = found.get("delta", 0.0) + term.item() / asked.accumulate
            (loss / asked.accumulate).backward()
            found["loss"] += loss.item() / asked.accumulate
            found["weights"] += weights.item() / asked.accumulate
        history.append({"step": step, **found, **adam_step(adam, asked, step, step in without)})
    return history


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mse_weight": 0.3, "cosine_weight": 2.0, "delta_batch_size": 3},
        {"accumulate": 2, "delta_every": 2, "prompts_per_condition": 2, "seed": 7},
        {"clip": 0.05, "weight_decay": 1.0, "learning_rate": 0.03},
        {"losses": {"weights": Schedule(0.5), "delta": Schedule(2.0, "linear", 4, start=0.1)}, "warmup_steps": 0},
    ],
    ids=str,
)
def test_a_run_is_that_of_a_plain_loop(changes: dict[str, Any], case: Case) -> None:
    asked = options(**{"losses": BOTH, "learning_rate": 0.01, "clip": 1e9, **changes})
    made, expected = (plain_generator(case) for _ in range(2))
    history, wanted = case.train(made, asked), plain_run(expected, case, asked)
    assert len(history) == len(wanted) == asked.steps
    for metrics, other in zip(history, wanted, strict=True):
        assert metrics.keys() - {"seconds"} == other.keys()
        for name, value in other.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4), (metrics["step"], name)
    for (name, found), parameter in zip(made.named_parameters(), expected.parameters(), strict=True):
        # Where a gradient is only rounding error, Adam still takes full steps, which differ between processors.
        assert (found - parameter).norm() <= 5e-4 * parameter.norm(), name


def plain_generator(case: Case) -> Generator:
    torch.manual_seed(3)
    return Generator(CONDITION_SIZE, (case.format.n_tokens, *case.format.token_shape)).to(case.device)


def test_the_base_runs_only_in_steps_and_for_teachers_with_a_delta_loss(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    mean_loss = DifferentiableDeltaCompute.mean_loss

    def counted(self: DifferentiableDeltaCompute, tensors: Mapping[str, Tensor], loss: Any) -> Tensor:
        sizes.append(len(next(iter(tensors.values()))))
        return mean_loss(self, tensors, loss)

    monkeypatch.setattr(DifferentiableDeltaCompute, "mean_loss", counted)
    history = case.train(case.generator(), options(delta_every=3))
    assert sizes == [2, 2]
    assert ["delta" in metrics for metrics in history] == [True, False, False, True, False, False]


def test_bfloat16_leaves_the_dtype_of_parameters_and_changes_the_loss_little(case: Case) -> None:
    made = case.generator()
    history, plain = case.train(made, options(bf16=True)), case.train(case.generator(), options())
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert history[0]["loss"] != plain[0]["loss"]
    assert history[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.05)


def test_training_leaves_the_global_random_numbers_as_they_were(case: Case) -> None:
    made = case.generator()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    case.train(made, options(WEIGHTS, steps=1))
    assert torch.equal(torch.rand(3), expected)


# What is not finite


def spoilt_at(generator: nn.Module, steps: set[int]) -> nn.Module:
    """Put NaN into its gradient in these steps, whatever the loss is."""
    calls: list[None] = []
    generator.register_forward_pre_hook(lambda *_: calls.append(None))
    last = list(generator.parameters())[-1]
    last.register_hook(lambda gradient: gradient * math.nan if len(calls) - 1 in steps else gradient)
    return generator


def test_a_step_without_a_finite_gradient_changes_nothing(case: Case) -> None:
    kept: list[dict[str, Tensor]] = []
    made = spoilt_at(case.generator(), {2, 3, 5})
    made.register_forward_pre_hook(lambda *_: kept.append({n: t.clone() for n, t in made.state_dict().items()}))
    said = r"step . is not finite: loss .*, gradient_norm nan; the largest gradient is that of adapter '"
    with pytest.warns(UserWarning, match=said):
        history = case.train(made, options(steps=7))
    kept.append(made.state_dict())
    assert [metrics.get("skipped") for metrics in history] == [None, None, 1, 2, None, 3, None]
    for step, (before, after) in enumerate(itertools.pairwise(kept)):
        assert all(tensor.isfinite().all() for tensor in after.values())
        same = all(torch.equal(before[name], tensor) for name, tensor in after.items())
        assert same == (step in {2, 3, 5}), step
    for metrics in history:
        assert ("gradient_norm" in metrics) == ("skipped" not in metrics)
        assert all(math.isfinite(value) for value in metrics.values())


def test_a_skipped_step_leaves_the_optimizer_as_if_it_had_not_been(case: Case) -> None:
    asked = options(learning_rate=0.01, clip=1e9)
    made, expected = spoilt_at(plain_generator(case), {1, 4}), plain_generator(case)
    with pytest.warns(UserWarning, match="step 4 is not finite"):
        history = case.train(made, asked)
    wanted = plain_run(expected, case, asked, without={1, 4})
    assert [m["learning_rate"] for m in history] == pytest.approx([m["learning_rate"] for m in wanted], rel=1e-6)
    for (name, found), parameter in zip(made.named_parameters(), expected.parameters(), strict=True):
        assert (found - parameter).norm() <= 1e-4 * parameter.norm(), name


def test_a_gradient_that_overflows_under_a_finite_loss_is_skipped(device: str) -> None:
    spec, chance = LoraSpec(rank=4), torch.Generator().manual_seed(0)
    delta = DifferentiableDeltaCompute.from_pretrained(
        embedded_checkpoint(), ["cat=", "dog=t"], spec, torch.float32, device, layer=3
    )
    format = TokenFormat.for_config(delta.config, 4, 64)
    tensors = {name: 50 * torch.randn(2, *shape, generator=chance) for name, shape in delta.lora_shapes.items()}
    tokens, targets = format.tokenize(tensors), torch.randn(2, delta.config.hidden_size, generator=chance)
    teachers = Teachers(([torch.randn(3, CONDITION_SIZE, generator=chance)], tokens[i], targets[i]) for i in range(2))
    made = LoRAGenerator(format, CONDITION_SIZE, width=8, depth=1, heads=1, components=1).to(device)
    made.fit(tokens)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with pytest.warns(UserWarning, match=r"step 0 is not finite: .*gradient_norm nan; caused by adapter '(ann|bob)'"):
        history = Case(delta, format, teachers, device).train(made, options(DELTA, steps=2))
    assert all(math.isfinite(metrics["loss"]) for metrics in history)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())


@pytest.mark.parametrize("losses", [WEIGHTS, DELTA, BOTH], ids=["weights", "delta", "both"])
def test_a_loss_that_is_not_finite_is_said_with_its_adapter(losses: Mapping[str, Schedule], case: Case) -> None:
    spoilt = Teachers(case.teachers)
    prompts, tokens, target = spoilt[2]
    spoilt[2] = prompts, torch.where(tokens.isnan(), tokens, math.inf), math.nan * target
    asked = options(losses, steps=2, batch_size=N_TEACHERS, delta_batch_size=N_TEACHERS)
    with pytest.warns(UserWarning, match=r"step 1 is not finite: loss (nan|inf), .*; caused by adapter 'cid'\. The"):
        history = case.train(case.generator(), asked, teachers=spoilt)
    assert all("loss" not in metrics and "gradient_norm" not in metrics for metrics in history)
    with pytest.warns(UserWarning, match=r"caused by adapter number 2\. "):
        case.train(case.generator(), asked, teachers=list(spoilt))  # teachers without names


def test_too_many_skipped_steps_in_a_row_end_the_run_with_the_last_good_state(case: Case, tmp_path: Path) -> None:
    made = spoilt_at(case.generator(), {1, 2, 4, 5, 6, 7})
    asked = options(steps=20, max_skipped_steps=3, checkpoint_every=4)
    with (
        pytest.warns(UserWarning, match="is skipped: 2 in a row"),
        pytest.raises(ValueError, match=r"^3 steps in a row were skipped, expected fewer .*; step 6 is"),
    ):
        case.train(made, asked, tmp_path)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["progress"] == asdict(Progress(steps=4, skipped=2))
    for name, tensor in made.state_dict().items():
        assert torch.equal(found[1]["generator"][name], tensor.cpu()), name
        assert tensor.isfinite().all()


# What is refused


def test_a_generator_on_another_device_than_the_delta_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=f"generator is on meta, expected {case.device}.* like the base model"):
        case.train(case.generator().to("meta"), options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, expected an integer of at least 1"),
        ({"steps": 10**10}, "steps is 10000000000, expected an integer of at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5, expected an integer"),
        ({"accumulate": True}, "accumulate is True, expected an integer"),
        ({"bf16": 1}, "bf16 is 1, expected true or false"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a finite number above 0 and at most 1"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a finite number"),
        ({"clip": math.inf}, "clip is inf, expected a finite number"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected a finite number of at least 0"),
        ({"checkpoint_every": math.nan}, "checkpoint_every is nan, expected an integer of at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"max_skipped_steps": 0}, "max_skipped_steps is 0"),
        ({"seed": -1}, "seed is -1, expected an integer of at least 0"),
        ({"warmup_steps": None}, "warmup_steps is None"),
        ({"mse_weight": 0, "cosine_weight": 0}, "mse_weight and cosine_weight are both 0"),
        ({"losses": {}}, "losses names nothing"),
        ({"losses": 1.0}, "losses is 1.0, expected a table"),
        ({"losses": {"weights": 1.0}}, "losses.weights is 1.0, expected a Schedule"),
        ({"losses": {"logits": Schedule(1.0)}}, r"losses names \['logits'\], expected some of"),
        ({"losses": {"weights": Schedule(0.0)}}, "losses all have weight 0"),
    ],
    ids=str,
)
def test_an_option_that_is_off_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**changes)


def test_a_whole_number_is_the_same_option_as_a_fraction_that_is_whole() -> None:
    facts = [TrainingOptions(clip=one, losses={"weights": Schedule(one)}).facts for one in (1, 1.0)]
    assert repr(facts[0]) == repr(facts[1])


# The reference generator


def test_a_generator_starts_alike_on_every_device(case: Case, device: str) -> None:
    expected = training_case("cpu").generator().state_dict()
    made = case.generator()
    for name, parameter in made.state_dict().items():
        assert parameter.device.type == device
        assert torch.equal(parameter.cpu(), expected[name]), name
    made.fit(torch.stack([tokens for _, tokens, _ in case.teachers]).to(device))  # on any device
    assert torch.equal(made.basis.cpu(), expected["basis"])


def test_a_generator_starts_from_components_in_which_the_teachers_shares_have_a_mean_square_of_one(
    case: Case,
) -> None:
    made = case.generator().cpu()
    tokens = torch.stack([tokens for _, tokens, _ in case.teachers])
    mean = made.basis[:, 0].detach().unflatten(1, made.format.token_shape)
    rows = (tokens - mean).nan_to_num().flatten(2).double()  # (N, L, h·w)
    torch.testing.assert_close(mean, tokens.mean(0).nan_to_num(), rtol=1e-5, atol=1e-6)
    for slot in range(made.format.n_tokens):
        components = made.basis[slot, 1:N_TEACHERS].detach().double()  # as many as N teachers span
        shares = torch.linalg.lstsq(components.T, rows[:, slot].T).solution  # (components, N)
        torch.testing.assert_close(components.T @ shares, rows[:, slot].T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(shares.square().mean(1), torch.ones(N_TEACHERS - 1).double(), rtol=1e-3, atol=0)
        singular = torch.linalg.svdvals(rows[:, slot])[: N_TEACHERS - 1] / N_TEACHERS**0.5
        torch.testing.assert_close(components.norm(dim=1), singular, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("change", [lambda tokens: tokens[0], lambda tokens: tokens[:0], lambda tokens: tokens[:, 1:]])
def test_a_generator_does_not_start_from_tokens_of_another_shape(
    change: Callable[[Tensor], Tensor], case: Case
) -> None:
    tokens = torch.stack([tokens for _, tokens, _ in case.teachers])
    with pytest.raises(ValueError, match=r"tokens have shape \(.*\), expected \(N, .*\) with an N of 1 or more"):
        case.generator().fit(change(tokens))


def test_a_new_generator_writes_nothing_but_small_components(case: Case) -> None:
    made = LoRAGenerator(case.format, CONDITION_SIZE, width=8, depth=1, heads=1, components=1)
    assert not made.basis[:, 0].any()
    assert 0.01 < float(made.basis[:, 1:].detach().std()) < 0.03
