"""The training loop: what it minimizes, what it leaves, and that a resumed run is the uninterrupted one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import tiny_config
from torch import Tensor

from lora_delta import DifferentiableDeltaCompute
from lora_delta.generator import LoRAGenerator
from lora_delta.losses import Schedule
from lora_delta.tokens import TokenFormat
from lora_delta.training import TrainingOptions, train
from qwen_functional import LoraSpec, Qwen2Config, init_weights

RANK, N_TEACHERS = 2, 5
WEIGHTS, DELTA = {"weights": Schedule(1.0)}, {"delta": Schedule(1.0)}
BOTH = WEIGHTS | DELTA
Data = list[tuple[list[Tensor], Tensor, Tensor]]


def spec() -> LoraSpec:
    return LoraSpec(rank=RANK, alpha=4)


@pytest.fixture(scope="module")
def config() -> Qwen2Config:
    return tiny_config(num_hidden_layers=2, hidden_size=16, intermediate_size=32, head_dim=8)


@pytest.fixture(scope="module")
def delta(config: Qwen2Config) -> DifferentiableDeltaCompute:
    return DifferentiableDeltaCompute(config, init_weights(config), [[1, 2, 3], [4, 5]], spec())


@pytest.fixture(scope="module")
def token_format(config: Qwen2Config) -> TokenFormat:
    return TokenFormat.for_config(config, RANK, 8)


@pytest.fixture(scope="module")
def teachers(config: Qwen2Config, delta: DifferentiableDeltaCompute, token_format: TokenFormat) -> Data:
    chance = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.3 * torch.randn(N_TEACHERS, *shape, generator=chance) for name, shape in spec().shapes(config).items()
    }
    tokens, targets = token_format.tokenize(tensors), delta(tensors)
    conditions = [[torch.randn(3 + i, 6, generator=chance) for i in range(2)] for _ in range(N_TEACHERS)]
    return [(conditions[i], tokens[i], targets[i]) for i in range(N_TEACHERS)]


def generator(token_format: TokenFormat, teachers: Data) -> LoRAGenerator:
    torch.manual_seed(3)
    made = LoRAGenerator(token_format, 6, width=64, depth=1, heads=2)
    made.fit(torch.stack([tokens for _, tokens, _ in teachers]))
    return made


def options(losses: Mapping[str, Schedule] = BOTH, **changes: object) -> TrainingOptions:
    return TrainingOptions(
        **{"steps": 6, "batch_size": 4, "delta_batch_size": 2, "warmup_steps": 2, "losses": losses, **changes}  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("losses", [WEIGHTS, DELTA, BOTH], ids=["weights", "delta", "both"])
def test_training_does_not_lower_its_loss(
    losses: Mapping[str, Schedule], delta: DifferentiableDeltaCompute, token_format: TokenFormat, teachers: Data
) -> None:
    made = generator(token_format, teachers)
    asked = options(losses, steps=80, delta_batch_size=4, learning_rate=5e-3)
    history = train(made, teachers, delta, token_format, asked, progress=False)
    for name in ("loss", *losses):
        first, last = (sum(m[name] for m in part) for part in (history[:5], history[-5:]))
        assert last < 0.7 * first, name


@pytest.mark.parametrize("losses", [DELTA, BOTH], ids=["delta", "both"])
def test_a_resumed_run_differs_from_an_uninterrupted_one(
    losses: Mapping[str, Schedule],
    delta: DifferentiableDeltaCompute,
    token_format: TokenFormat,
    teachers: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, cut = generator(token_format, teachers), generator(token_format, teachers)
    asked = options(losses, checkpoint_every=2)
    train(whole, teachers, delta, token_format, asked, out=tmp_path / "whole", progress=False)
    with monkeypatch.context() as context:
        forward, calls = LoRAGenerator.forward, []

        def failing(self: LoRAGenerator, states: Tensor, mask: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 4:  # after the checkpoint at step 2, in step 3
                raise KeyboardInterrupt
            return forward(self, states, mask)

        context.setattr(LoRAGenerator, "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            train(cut, teachers, delta, token_format, asked, out=tmp_path / "cut", progress=False)
    resumed = generator(token_format, teachers)
    history = train(resumed, teachers, delta, token_format, asked, out=tmp_path / "cut", progress=False)
    for name, parameter in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], parameter), name
    written = {}
    for run in ("whole", "cut"):
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        written[run] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    assert written["whole"] == written["cut"]
    assert [line["step"] for line in written["cut"]] == list(range(6)) == [metrics["step"] for metrics in history]


def test_accumulated_micro_batches_differ_from_their_mean(
    delta: DifferentiableDeltaCompute, token_format: TokenFormat, teachers: Data
) -> None:
    made = generator(token_format, teachers)
    asked = options(WEIGHTS, steps=1, accumulate=3, batch_size=N_TEACHERS, clip=1e9)
    history = train(made, teachers, delta, token_format, asked, progress=False)
    one = generator(token_format, teachers)
    expected = 0.0
    chance = torch.Generator().manual_seed(0)
    for _ in range(3):
        losses = []
        order = torch.randperm(N_TEACHERS, generator=chance).tolist()
        seeds = torch.randint(2**62, (N_TEACHERS,), generator=chance).tolist()  # each draws its own prompts
        for index, seed in zip(order, seeds, strict=True):
            prompts, target, _ = teachers[index]
            states = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[0]]
            tokens = one(states[None], torch.ones(1, len(states), dtype=torch.bool))[0]
            real = ~target.isnan()
            losses.append((tokens[real] - target[real]).square().mean())
        (torch.stack(losses).mean() / 3).backward()
        expected += float(torch.stack(losses).mean()) / 3
    norm = torch.stack([p.grad.norm() for p in one.parameters() if p.grad is not None]).norm()
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert history[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_the_base_runs_in_steps_or_for_teachers_without_a_delta_loss(
    delta: DifferentiableDeltaCompute, token_format: TokenFormat, teachers: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    mean_loss = DifferentiableDeltaCompute.mean_loss

    def counted(self: DifferentiableDeltaCompute, tensors: Mapping[str, Tensor], loss: Any) -> Tensor:
        sizes.append(len(next(iter(tensors.values()))))
        return mean_loss(self, tensors, loss)

    monkeypatch.setattr(DifferentiableDeltaCompute, "mean_loss", counted)
    made = generator(token_format, teachers)
    history = train(made, teachers, delta, token_format, options(delta_every=3), progress=False)
    assert sizes == [2, 2]
    assert ["delta" in metrics for metrics in history] == [True, False, False, True, False, False]


def test_bfloat16_changes_the_dtype_of_parameters(
    delta: DifferentiableDeltaCompute, token_format: TokenFormat, teachers: Data
) -> None:
    made = generator(token_format, teachers)
    history = train(made, teachers, delta, token_format, options(bf16=True), progress=False)
    plain = train(generator(token_format, teachers), teachers, delta, token_format, options(), progress=False)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert history[0]["loss"] != plain[0]["loss"]
    assert history[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.05)


def test_a_checkpoint_is_taken_up_under_other_options(
    delta: DifferentiableDeltaCompute, token_format: TokenFormat, teachers: Data, tmp_path: Path
) -> None:
    train(generator(token_format, teachers), teachers, delta, token_format, options(), out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"made with learning_rate = 0\.001, not 0\.5"):
        train(
            generator(token_format, teachers), teachers, delta, token_format, options(learning_rate=0.5),
            out=tmp_path, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"losses": {}}, "losses"),
        ({"losses": {"logits": Schedule(1.0)}}, "logits"),
    ],
)
def test_an_option_that_is_off_is_taken(changes: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TrainingOptions(**changes)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_is_stepped_on(
    delta: DifferentiableDeltaCompute, token_format: TokenFormat, teachers: Data
) -> None:
    broken = [(prompts, tokens, target * float("nan")) for prompts, tokens, target in teachers]
    with pytest.raises(ValueError, match="not finite"):
        train(generator(token_format, teachers), broken, delta, token_format, options(), progress=False)
