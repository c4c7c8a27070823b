"""The single entry point of all commands: exit statuses, one line per error, signals."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_delta import cli
from lora_delta.commands import plot
from lora_delta.embedded import embedded_checkpoint

MODEL = str(embedded_checkpoint())
Run = Callable[[Callable[[Namespace], int]], int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a function in place of a command, through the entry point."""

    def through_the_door(command: Callable[[Namespace], int]) -> int:
        monkeypatch.setattr(plot, "_plot", command)
        return cli.main(["plot", "deltas"])

    return through_the_door


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def command(options: Namespace) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("rank is 0,\n  expected\n\n1 or more"), "rank is 0, expected 1 or more"),
        (ImportError("No module named 'peft'"), "No module named 'peft'"),
        (json.JSONDecodeError("Expecting value", "x", 0), "Expecting value: line 1 column 1 (char 0)"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x"), "[Errno 28] No space left on device: 'out/x'"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "out/x"), "[Errno 30] Read-only file system: 'out/x'"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "[Errno 13] Permission denied: 'out'"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "[Errno 2] No such file or directory: 'x'"),
        (TimeoutError(), "TimeoutError"),
        (MemoryError(), "not enough memory"),
        (ValueError("\x1b[2J\x07\u202e"), r"\x1b[2J\x07\u202e"),
        (ValueError("a" * 1000 + "b" * 5000 + "c" * 1000), "a" * 1000 + " … " + "c" * 1000),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "CUDA out of memory. Tried to"),
    ],
)
def test_an_error_of_the_user_or_the_system_is_one_line_and_exit_status_2(
    error: BaseException, line: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == 2
    assert capsys.readouterr() == ("", f"lora-delta plot: {line}\n")


def test_what_is_not_foreseen_is_exit_status_3_and_a_file_with_the_traceback(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run(raising(KeyError("half\nof it \ud800"))) == 3
    out, line = capsys.readouterr()
    file = next(tmp_path.iterdir())
    assert (out, line.count("\n")) == ("", 1)
    assert line.startswith("lora-delta plot: unexpected error, KeyError: ")
    assert line.endswith(f"; the traceback is in {file}\n")
    text = file.read_text(encoding="utf-8")
    assert text.startswith("Traceback (most recent call last):")
    assert "in command\n    raise error" in text


def test_a_traceback_goes_to_the_current_folder_and_then_to_stderr_where_there_is_no_place_for_its_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    assert run(raising(KeyError("first"))) == 3
    assert "KeyError: 'first'" in next(tmp_path.glob("lora-delta-*.txt")).read_text()
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "mkstemp", lambda **options: raising(OSError("full"))(Namespace()))
    assert run(raising(KeyError("second"))) == 3
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("KeyError: 'second'; the traceback is above, since no file could be written\n")


def test_ctrl_c_is_one_line_with_what_the_command_says_and_exit_status_130(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(KeyboardInterrupt())) == 130
    error = KeyboardInterrupt()
    error.add_note("the same command goes on")
    assert run(raising(error)) == 130
    lines = ["lora-delta plot: interrupted", "lora-delta plot: interrupted; the same command goes on", ""]
    assert capsys.readouterr() == ("", "\n".join(lines))


def test_sigterm_is_an_interrupt_with_exit_status_143_and_a_second_one_does_not_disturb_the_way_out(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    ways: list[str] = []

    def command(options: Namespace) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        except KeyboardInterrupt as error:
            ways.append(type(error).__name__)
            os.kill(os.getpid(), signal.SIGTERM)
            ways.append("saved")
            raise
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert run(command) == 143
    assert ways == ["Terminated", "saved"]
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "lora-delta plot: terminated\n"


def test_the_door_opens_outside_the_main_thread(run: Run) -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(run(lambda options: 0)))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_the_status_of_a_command_is_passed_on(run: Run) -> None:
    assert run(lambda options: 0) == 0
    assert run(lambda options: 1) == 1


def test_a_warning_is_one_line_without_its_code(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def command(options: Namespace) -> int:
        warnings.warn("this is\n  slow", stacklevel=1)
        return 0

    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _shown  # pytest has replaced it
        assert run(command) == 0
    assert capsys.readouterr().err == "lora-delta plot: warning: this is slow\n"
    assert warnings.formatwarning is before


def _shown(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def test_a_process_of_several_says_which_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run(raising(ValueError("no"))) == 2
    assert capsys.readouterr().err == "lora-delta plot: no\nlora-delta plot (rank 1): no\n"


def test_a_full_disk_behind_stdout_is_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("a system without /dev/full")

    def command(options: Namespace) -> int:
        print("a result")
        return 0

    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(command) == 2
    assert capsys.readouterr().err == "lora-delta plot: [Errno 28] No space left on device\n"


def test_every_command_explains_itself_and_the_exit_statuses_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    for command in ("demo", "check", "label", "train", "generate", "plot"):
        assert f"    {command} " in printed
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
    for status in ("0 ", "1 ", "2 ", "3 ", "130 ", "143 "):
        assert f"\n  {status}" in printed


@pytest.mark.parametrize("arguments", [[], ["bake"], ["label"], ["label", "--model", "x", "--out", "y", "--odd", "z"]])
def test_a_command_line_that_is_none_is_exit_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("label --model {model} --out {file} {adapter}", "{file} is a file, expected a folder, or none yet"),
        ("label --model {model} --out /proc/none/out {adapter}", "[Errno 2] No such file or directory: '/proc/none"),
        ("label --model {model} --out {new} {adapter} --probes {pipe}", "{pipe} is not a file, expected a text file"),
        ("label --model {model} --out {new} {adapter} --probes {latin}", "{latin} is not UTF-8 text, expected a text"),
        ("label --model {model} --out {new} {adapter} --chat-template-kwargs {{", "--chat-template-kwargs is not val"),
        ("label --model {model} --out {new} {adapter} --chat --chat-template-kwargs 3", "chat_template_kwargs is 3: "),
        ("label --model {model} --out {new} {adapter} --device gpu", "device is 'gpu', expected one such as 'cpu'"),
        ("label --model {new} --out {new} {adapter}", "model is '{new}', a folder that does not exist; expected"),
        ("check --device gpu", "device is 'gpu', expected one such as 'cpu', 'cuda' or 'cuda:1'"),
        ("check --device cpu:7", "device is 'cpu:7', and there is 1 CPU here"),
        ("demo --device gpu --out {new}", "device is 'gpu', expected one such as 'cpu', 'cuda' or 'cuda:1'"),
        ("demo --out {file}", "--out is {file}, which is a file: expected a new folder"),
        ("demo --out {folder}", "--out is {folder}, which is not empty: expected a new folder"),
        ("train {new}", "{new}"),
        ("train {file}", "{file}"),
        ("train {latin}", "{latin}"),
        ("generate --run {new} --prompts {file} --out {folder}", "{new}"),
        ("generate --run {new} --prompts {new} --out {folder}", "{new} does not exist"),
        ("plot {new}", "{new}"),
        ("plot {file}", "{file}"),
    ],
)
def test_what_cannot_be_done_names_the_thing_in_one_line_and_writes_nothing(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: tmp_path / name for name in ("file", "pipe", "latin", "folder", "new", "adapter")}
    names["file"].write_text("a line\n")
    os.mkfifo(names["pipe"])
    names["latin"].write_bytes(b"caf\xe9\n")
    names["folder"].mkdir()
    (names["folder"] / "something").touch()
    names["adapter"].mkdir()
    (names["adapter"] / "adapter_config.json").touch()
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([word.format(model=MODEL, **names) for word in arguments.split()]) == 2
    out, line = capsys.readouterr()
    assert line.startswith(f"lora-delta {arguments.split()[0]}: {message.format(**names)}")
    assert (out, line.count("\n")) == ("", 1)
    assert sorted(tmp_path.rglob("*")) == before


# --- As a program -------------------------------------------------------------------------------------------


def test_a_program_ends_with_its_status_and_no_traceback_by_signals_and_when_nobody_reads_it() -> None:
    """All three run at once, since each imports torch first."""
    command = [sys.executable, "-m", "lora_delta", "check", "--steps", "1000", "--device", "cpu"]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
        for _ in range(3)
    ]
    for process, number in zip(started, (None, signal.SIGINT, signal.SIGTERM), strict=True):
        assert process.stdout is not None
        assert process.stdout.readline().startswith("embedded checkpoint, float32")
        process.stdout.close()
        if number is not None:
            process.send_signal(number)
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in started]
    assert ends == [("", 141), ("lora-delta check: interrupted\n", 130), ("lora-delta check: terminated\n", 143)]
