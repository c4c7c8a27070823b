"""``lora-delta label``: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import random_lora, relative_error
from torch import Tensor

from lora_delta import DifferentiableDeltaCompute, cli
from lora_delta.embedded import embedded_checkpoint
from lora_delta.labelling.table import DeltaLabels
from lora_delta.peft.adapters import save_peft_adapter
from qwen_functional import LoraSpec, read_config

SPEC = LoraSpec(rank=3, alpha=5)


def save(folder: Path, seed: int) -> None:
    config = read_config(embedded_checkpoint())
    tensors = random_lora(config, SPEC, seed=seed, dtype=torch.float32)
    save_peft_adapter(folder, SPEC, tensors, base_model="a/base", config=config)


def command(*arguments: Any, device: str = "cpu") -> int:
    return cli.main(["label", "--model", str(embedded_checkpoint()), "--device", device, *map(str, arguments)])


@pytest.fixture
def embedded_teachers(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        save(tmp_path / "teachers" / name, seed)
    return tmp_path / "teachers"


@pytest.mark.parametrize("stream", [[], ["--stream", "disk"], ["--stream", "host"]], ids=" ".join)
def test_the_command_labels_as_the_library_does(
    stream: list[str], embedded_teachers: Path, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probes, listed = tmp_path / "probes.txt", tmp_path / "adapters.txt"
    probes.write_text("one probe\n\nand another\n")
    listed.write_text("teachers/a\nteachers/b  # the second\n")
    options = ["--dtype", "float32", "--probes", probes, "--layer=-1,2", "--layer", "0", "--pooling", "none", "--json"]
    assert command(*options, *stream, "--out", tmp_path / "labels", listed, "--quiet", device=device) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    facts = json.loads(printed.out)
    # Paths in the list are relative to the list, names to the folder of labels.
    assert (facts["labels"], facts["computed"], facts["reused"], facts["failed"]) == (2, 2, 0, [])
    read = DeltaLabels(tmp_path / "labels")
    assert read.names == ["teachers/a", "teachers/b"]
    assert read.entry("teachers/a")["source"] == str((embedded_teachers / "a").resolve())
    assert read.settings["probes"] == ["one probe", "and another"]
    assert (read.settings["chat"], read.settings["max_length"], read.settings["dtype"]) == (False, 256, "float32")
    delta = DifferentiableDeltaCompute.from_pretrained(
        embedded_checkpoint(),
        ["one probe", "and another"],
        SPEC,
        torch.float32,
        "cpu",
        layer=(-1, 2, 0),
        pooling="none",
    )
    tensors = [random_lora(delta.config, SPEC, seed=seed, dtype=torch.float32) for seed in (0, 1)]
    assert relative_error(read.tensor, delta.forward_batch(tensors)) <= 1e-4


def test_the_command_says_what_failed(
    embedded_teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (embedded_teachers / "b" / "adapter_model.safetensors").unlink()
    assert command("--out", tmp_path / "labels", embedded_teachers) == 1
    printed = capsys.readouterr()
    assert "holds 1 labels: 1 computed" in printed.out
    assert "1 failed:\n  teachers/b: " in printed.out
    assert "2/2" in printed.err
    save(embedded_teachers / "b", seed=1)
    assert command("--out", tmp_path / "labels", embedded_teachers, "--quiet") == 0
    assert "holds 2 labels: 1 computed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "9"], "layer is 9"),
        (["--layer", "last"], "--layer is 'last'"),
        (["--probes", "/no/such/file"], "/no/such/file does not exist, expected a text file with one probe per line"),
        (["--dtype", "float32"], "dtype is 'bfloat16' there and 'float32' here"),
        (["/no/such/adapter"], "/no/such/adapter does not exist"),
    ],
)
def test_a_command_that_cannot_run_ends_with_status_2(
    arguments: list[str],
    message: str,
    embedded_teachers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("--out", tmp_path / "labels", embedded_teachers, "--quiet") == 0
    assert command("--out", tmp_path / "labels", embedded_teachers, *arguments) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    embedded_teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(delta: DifferentiableDeltaCompute, lora: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(DifferentiableDeltaCompute, "deltas", interrupted)
    assert command("--out", tmp_path / "labels", embedded_teachers, "--quiet") == 130
    assert "the same command resumes from there" in capsys.readouterr().err
