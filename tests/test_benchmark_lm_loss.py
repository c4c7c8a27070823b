"""The benchmark of the language model's loss: its ways agree by cross-entropy and KL, and a run prints its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import throughput
import torch
from bench import tiny
from lm_ways import LM, draw_examples, draw_teacher
from reference import relative_error
from workload import Workload

EXAMPLES = draw_examples(3, 2, 6, 20, range(1000))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return tiny(tmp_path_factory.mktemp("model"), probes=[[0]], adapters=3, examples=EXAMPLES)


def test_examples_are_as_long_as_asked_and_a_third_is_completion(work: Workload) -> None:
    lengths = [(len(prompt) + len(completion), len(completion)) for own in EXAMPLES for prompt, completion in own]
    assert len(EXAMPLES) == 3
    assert all(6 <= whole <= 20 and third == whole // 3 for whole, third in lengths)
    assert len(set(lengths)) > 1
    assert work.tokens == work.tree_tokens == sum(whole for whole, _ in lengths)


def test_a_teacher_tells_distinct_tokens_with_a_part_of_its_mass(work: Workload) -> None:
    assert draw_teacher(work) is None
    teacher = draw_teacher(Workload(**{**vars(work), "top_k": 8}))
    assert teacher is not None
    for own, told in zip(EXAMPLES, teacher, strict=True):
        for (_, completion), top in zip(own, told, strict=True):
            top.check(len(completion), 1000, "teacher")
            assert all(len(set(row)) == 8 for row in top.indices.tolist())
            torch.testing.assert_close(top.log_probs.exp().sum(1), torch.full((len(completion),), 0.9))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize("name", [name for name in LM if name != "engine"])
def test_every_way_has_the_engines_losses_and_gradients(name: str, top_k: int | None, work: Workload) -> None:
    work = Workload(**{**vars(work), "top_k": top_k})
    engine: Any = LM["engine"](work)
    ((expected, gradients),) = engine.step(3)
    passes = LM[name](work).step(3) or []
    assert relative_error(torch.cat([value for value, _ in passes]), expected) <= 1e-5
    for tensor, gradient in gradients.items():
        assert relative_error(torch.cat([own[tensor] for _, own in passes]), gradient) <= 1e-4, tensor
    assert len(passes) == (3 if name.startswith("peft") else 1)


@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_a_run_prints_a_row_for_each_way_and_writes_what_it_measured(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    options = ["--loss", loss, "--size", "tiny", "--lengths", "6", "20", "--rounds", "1", "--threads", "1"]
    options += ["--one-process", "--device", "cpu", "--ways", "engine", "hooks", "--json", str(tmp_path / "run.json")]
    assert throughput.main(options) == 0
    printed = capsys.readouterr().out
    (run,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert list(run["ways"]) == ["engine", "hooks"]
    assert run["texts"]["kind"] == "own examples"
    assert run["texts"]["count"] == 8
    for way, entry in run["ways"].items():
        (seconds,) = entry["seconds"]["samples"]
        assert entry["tokens_per_second"] == pytest.approx(run["texts"]["tokens"] / seconds)
        assert f"| {way} | {seconds:.3g} " in printed
