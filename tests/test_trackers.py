"""Metrics for TensorBoard and Weights & Biases, as they are passed to their packages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from text_case import direct_generator, text_losses, text_tasks

from lora_delta.generate.checkpoints import METRICS
from lora_delta.generate.evaluation import Evaluation
from lora_delta.generate.options import TrainingOptions
from lora_delta.generate.schedules import Schedule
from lora_delta.generate.trackers import TrackerOptions, Trackers
from lora_delta.generate.training import train


class Recorder(ModuleType):
    """Stands in for ``wandb``, and for the writer of ``torch.utils.tensorboard``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.scalars: list[tuple[str, float, int]] = []
        self.ended: list[Any] = []

    def init(self, **given: Any) -> Any:
        self.inits.append(given)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((values, step)),
            finish=lambda exit_code: self.ended.append(exit_code),
        )

    def SummaryWriter(self, folder: str) -> Any:
        self.inits.append({"folder": folder})
        return SimpleNamespace(
            add_scalar=lambda *given: self.scalars.append(given), close=lambda: self.ended.append("closed")
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder("recorder")
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    return made


def run(folder: Path, steps: int, trackers: TrackerOptions) -> None:
    options = TrainingOptions(
        steps=steps, batch_size=2, texts_per_condition=1, warmup_steps=1, losses={"lm": Schedule(1.0)}
    )
    held_out = Evaluation(text_tasks(2, seed=9), every=2)
    given: dict[str, Any] = {"texts": text_losses(), "evaluation": held_out, "out": folder, "progress": False}
    train(direct_generator(), text_tasks(3), options, trackers=trackers, **given)


def test_trackers_are_given_each_line_of_the_log_once_and_one_run_however_often_it_is_taken_up(
    recorder: Recorder, tmp_path: Path
) -> None:
    asked = TrackerOptions(tensorboard=True, wandb="a-project")
    run(tmp_path, 3, asked)
    run(tmp_path, 5, asked)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(values | {"step": step}) for values, step in recorder.logged] == lines
    assert recorder.scalars == [
        (name, value, line["step"]) for line in lines for name, value in line.items() if name != "step"
    ]
    tensorboard, wandb = recorder.inits[::2], recorder.inits[1::2]
    assert {one["folder"] for one in tensorboard} == {str(tmp_path / "tensorboard")}
    assert {one["project"] for one in wandb} == {"a-project"}
    assert len({one["id"] for one in wandb}) == 1
    assert {one["resume"] for one in wandb} == {"allow"}
    assert wandb[0]["config"]["training"]["batch_size"] == 2
    assert sorted(map(str, recorder.ended)) == ["0", "0", "closed", "closed"]


def test_a_run_that_fails_is_said_to_have_failed(recorder: Recorder, tmp_path: Path) -> None:
    class Failed(RuntimeError):
        pass

    with pytest.raises(Failed), Trackers(TrackerOptions(wandb="p"), tmp_path, {}, "id"):
        raise Failed
    assert recorder.ended == [1]


@pytest.mark.parametrize(
    ("asked", "module", "message"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", r"log\.tensorboard needs the package tensorboard"),
        ({"wandb": "p"}, "wandb", r"log\.wandb needs the package wandb"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(
    asked: dict[str, Any], module: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        Trackers(TrackerOptions(**asked), tmp_path, {}, "id")


def test_tensorboard_reads_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, 3, TrackerOptions(tensorboard=True))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [event.value for event in read.Scalars("lm")] == pytest.approx([line["lm"] for line in lines], rel=1e-6)
