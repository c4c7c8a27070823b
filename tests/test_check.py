"""``lora-delta check``: what it finds, what it prints, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_delta import check, cli
from lora_delta.delta import DifferentiableDeltaCompute
from lora_delta.embedded import embedded_checkpoint


def test_check_on_the_embedded_checkpoint_agrees_with_peft(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rank", "4", "--steps", "8", "--device", device, "--against-peft", "--json"]
    assert cli.main(["check", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert [entry["name"] for entry in report["checks"] if "PEFT" in entry["name"]]
    assert len(report["checks"]) == 8


def test_check_in_bfloat16_errs_no_more_than_peft(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rank", "4", "--steps", "8", "--device", device, "--against-peft", "--dtype", "bfloat16"]
    assert cli.main(["check", *options]) == 0
    printed = capsys.readouterr().out
    assert "56 of 56 tensors" in printed
    assert "all 7 passed" in printed


def _cut(values: Any) -> Any:
    return lambda self, tensors: values(self, {n: t.detach() if "q_proj" in n else t for n, t in tensors.items()})


def _offset(values: Any) -> Any:
    return lambda self, tensors: values(self, tensors) + 1e-3


def _constant(values: Any) -> Any:
    return lambda self, tensors: 0 * values(self, tensors)


def _wrong_gradient(values: Any, by: float = 0.001) -> Any:
    def forward(self: DifferentiableDeltaCompute, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        delta = values(self, tensors)
        return (1 + by) * delta - by * delta.detach()

    return forward


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        (_cut, ["gradient flow to the LoRA tensors"]),
        (_offset, ["delta sensitivity", "against PEFT + functional_call"]),
        (_constant, ["gradient flow to the LoRA tensors", "delta sensitivity", "against PEFT + functional_call"]),
        (_wrong_gradient, ["against PEFT + functional_call"]),
    ],
)
def test_check_fails_a_broken_delta(
    broken: Callable[[Any], Any],
    caught: list[str],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(DifferentiableDeltaCompute, "forward", broken(DifferentiableDeltaCompute.forward))
    options = ["--rank", "4", "--steps", "4", "--device", device, "--against-peft", "--json"]
    assert cli.main(["check", *options]) == 1
    failed = {entry["name"] for entry in json.loads(capsys.readouterr().out)["checks"] if not entry["passed"]}
    assert set(caught) <= failed


def test_check_in_bfloat16_fails_a_gradient_that_is_off_by_a_quarter(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = _wrong_gradient(DifferentiableDeltaCompute.forward, by=0.25)
    monkeypatch.setattr(DifferentiableDeltaCompute, "forward", broken)
    given: dict[str, Any] = {"rank": 4, "steps": 4, "device": device, "dtype": torch.bfloat16}
    results = {result.name: result for result in check.run_check(against_peft=True, **given)}
    assert not results["against PEFT + functional_call"].passed


def test_check_sees_memory_grow(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaked: list[torch.Tensor] = []
    step = check._value_and_gradient

    def leaking(delta: DifferentiableDeltaCompute) -> tuple[torch.Tensor, torch.Tensor]:
        leaked.append(torch.ones(4 << 20, device=device))  # 16 MiB
        return step(delta)

    monkeypatch.setattr(check, "_value_and_gradient", leaking)
    results = {result.name: result for result in check.run_check(rank=4, steps=12, device=device)}
    assert not results["repeated steps, flat memory"].passed


def test_memory_that_the_first_steps_keep_is_no_growth(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    step = check._value_and_gradient

    def caching(delta: DifferentiableDeltaCompute) -> tuple[torch.Tensor, torch.Tensor]:
        if len(kept) < 3:
            kept.append(torch.ones(16 << 20, device=device))  # 64 MiB
        return step(delta)

    monkeypatch.setattr(check, "_value_and_gradient", caching)
    delta = DifferentiableDeltaCompute.from_pretrained(embedded_checkpoint(), device=device)
    passed, detail = check._flat_memory(delta, 4)
    assert passed, detail
    assert len(kept) == 3


def test_memory_on_a_gpu_is_what_is_allocated_once_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7 * len(waited))
    assert check._memory(torch.device("cuda")) == 7
    assert waited == [torch.device("cuda")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "does not exist"),
        (["--rank", "0"], "rank is 0"),
        (["--steps", "1"], "steps is 1"),
    ],
)
def test_bad_input_to_check_is_an_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_module_runs_as_a_program() -> None:
    result = subprocess.run([sys.executable, "-m", "lora_delta", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "check" in result.stdout


@pytest.mark.real_checkpoint
def test_check_on_real_weights_agrees_with_peft(
    real_checkpoint: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", real_checkpoint, "--device", device, "--steps", "4", "--against-peft", "--json"]
    status = cli.main(["check", *options])
    details = {entry["name"]: entry["detail"] for entry in json.loads(capsys.readouterr().out)["checks"]}
    assert status == 0, details
    tensors = details["gradient flow to the LoRA tensors"].split(" tensors")[0]
    assert len(set(tensors.split(" of "))) == 1, tensors
