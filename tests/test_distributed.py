"""Which device each of several processes computes on, and how an error reaches the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_delta import cli
from lora_delta.distributed import (
    Ranks,
    _own_device,
    as_told,
    default_device,
    process_group,
    told,
    usable_device,
)
from lora_delta.embedded import embedded_checkpoint

RUN = 'base = "embedded"\nlabels = "x"\nprompts = "x"\nout = "run"\n[format]\nrank = 4\nchunk_width = 64\n'


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the second of three processes that torchrun starts on a machine with two GPUs."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 3, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


TOO_MANY = r"there are 3 processes on this machine and 2 GPUs, expected a GPU for each: start fewer \(torchrun "
TOO_MANY += r"--nproc-per-node 2\), or all with --device cpu"


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("device", [None, "cuda"])
def test_every_rank_says_that_there_are_more_ranks_than_gpus(
    gpus: pytest.MonkeyPatch, rank: int, device: str | None
) -> None:
    gpus.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(ValueError, match=TOO_MANY), process_group(device):
        pass


def test_a_rank_beyond_the_gpus_is_refused_where_the_number_of_ranks_is_not_told(gpus: pytest.MonkeyPatch) -> None:
    gpus.delenv("LOCAL_WORLD_SIZE")
    assert _own_device(None, under_torchrun=True) == torch.device("cuda:1")
    gpus.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=TOO_MANY):
        _own_device(None, under_torchrun=True)
    gpus.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"3 processes on this machine and 1 GPU, expected .*--nproc-per-node 1"):
        _own_device(None, under_torchrun=True)
    gpus.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"3 processes on this machine and 0 GPUs, .*: start them with --device cpu"):
        _own_device("cuda", under_torchrun=True)


def test_each_rank_has_the_gpu_of_its_own_number(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("LOCAL_WORLD_SIZE", "2")
    assert _own_device(None, under_torchrun=True) == _own_device("cuda", under_torchrun=True) == torch.device("cuda:1")
    assert _own_device("cuda:0", under_torchrun=True) == torch.device("cuda:0")  # as requested
    assert _own_device("cpu", under_torchrun=True) == torch.device("cpu")
    assert _own_device(None, under_torchrun=False) == default_device() == torch.device("cuda")
    gpus.setattr(torch.cuda, "is_available", lambda: False)
    assert _own_device(None, under_torchrun=True) == default_device() == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", 5, ""])
def test_a_device_that_is_neither_the_cpu_nor_a_gpu_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=f"device is {device!r}, expected one such as 'cpu', 'cuda' or 'cuda:1'"):
        usable_device(device)


@pytest.mark.parametrize(
    ("device", "gpus", "words"),
    [
        ("cuda:2", 2, r"are 2 GPU\(s\)"),
        ("cuda:1", 1, r"is 1 GPU\(s\)"),
        ("cuda", 0, r"are 0 GPU\(s\)"),
        ("cpu:3", 0, "is 1 CPU"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    device: str, gpus: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=rf"device is '{device}', and .*{words} here"):
        usable_device(device)
    with pytest.raises(ValueError, match=rf"device is '{device}', and .*{words} here"), process_group(device):
        pass


def test_label_and_train_end_with_what_to_do_about_too_many_processes(
    gpus: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    model = str(embedded_checkpoint())
    for command in (
        ["label", "--model", model, "--out", str(tmp_path / "labels"), str(tmp_path / "adapter")],
        ["train", str(tmp_path / "run.toml")],
        ["train", "--device", "cuda", str(tmp_path / "run.toml")],
    ):
        assert cli.main(command) == 2
        assert "start fewer (torchrun --nproc-per-node 2), or all with --device cpu" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "run.toml"]


@pytest.mark.parametrize("error", [PermissionError(13, "denied", "out"), ValueError("no"), ImportError("no")])
def test_an_error_that_one_rank_foresaw_is_foreseen_on_all(error: Exception) -> None:
    there = as_told(0, told(error))
    assert isinstance(error, type(there))
    assert isinstance(there, (OSError, ValueError, ImportError))
    assert str(there) == str(error)


def test_the_rank_that_failed_raises_its_own_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda answer: None)
    error = LookupError("nothing there")

    def fails() -> None:
        raise error

    with pytest.raises(LookupError) as caught:
        Ranks(rank=0, world_size=2).first(fails)
    assert caught.value is error
