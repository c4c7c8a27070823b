"""The benchmark of the language model's loss: its ways agree, and it prints what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from reference import relative_error

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import lm_loss
from lm_ways import LM_WAYS, TextWorkload, draw_examples, make_lm_way

EXAMPLES = draw_examples(3, 2, 6, 20, range(1000))
WORKLOAD = TextWorkload(None, "tiny", [[0]], 3, 4, torch.float32, 1, examples=EXAMPLES)


def test_examples_are_as_long_as_asked_and_a_third_is_completion() -> None:
    lengths = [(len(prompt) + len(completion), len(completion)) for own in EXAMPLES for prompt, completion in own]
    assert len(EXAMPLES) == 3
    assert all(6 <= whole <= 20 and third == whole // 3 for whole, third in lengths)
    assert len(set(lengths)) > 1
    assert WORKLOAD.tokens == sum(whole for whole, _ in lengths)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("name", [name for name in LM_WAYS if name != "engine"])
def test_every_way_has_the_engines_losses_and_gradients(name: str) -> None:
    ((expected, gradients),) = make_lm_way("engine", WORKLOAD).step(3)
    passes = make_lm_way(name, WORKLOAD).step(3)
    assert relative_error(torch.cat([value for value, _ in passes]), expected) <= 1e-5
    for tensor, gradient in gradients.items():
        assert relative_error(torch.cat([own[tensor] for _, own in passes]), gradient) <= 1e-4, tensor
    assert len(passes) == (3 if name.startswith("peft") else 1)


def test_a_run_prints_a_row_for_each_way_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--size", "tiny", "--lengths", "6", "20", "--rounds", "1", "--threads", "1"]
    arguments += ["--ways", "engine", "hooks", "--json", str(tmp_path / "run.json")]
    monkeypatch.setattr(sys, "argv", ["lm_loss.py", *arguments])
    assert lm_loss.main() == 0
    printed = capsys.readouterr().out
    (run,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert list(run["ways"]) == ["engine", "hooks"]
    for way, entry in run["ways"].items():
        (seconds,) = entry["seconds"]
        assert seconds > 0
        assert f"| {way} | {seconds:.3g} | {run['tokens'] / seconds:,.0f} |" in printed
