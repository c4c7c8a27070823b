"""A bench for ``faults.py``: commands in processes that get disturbed, and their results when they are not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it: once, before the forks

import lora_delta.generate.runs  # noqa: F401
from lora_delta import DeltaLabels, save_peft_adapter
from lora_delta.cli import main as command_line
from lora_delta.embedded import embedded_checkpoint
from qwen_functional import LoraSpec, read_config

SPEC = LoraSpec(rank=2, alpha=4)
TEACHERS = 5
CONFIG = """
base = "embedded"
dtype = "float32"
device = "cpu"
labels = "../reference/deltas"
prompts = "../prompts.jsonl"
out = "run"
[format]
rank = 2
chunk_width = 64
[generator]
width = 16
depth = 1
components = 2
[training]
steps = 7
batch_size = 2
delta_batch_size = 1
warmup_steps = 1
checkpoint_every = 3
"""
TEXTS_CONFIG = """
base = "embedded"
dtype = "float32"
device = "cpu"
data = "../texts.jsonl"
out = "texts"
[adapter]
rank = 2
[generator]
width = 16
depth = 1
[training]
steps = 7
batch_size = 2
texts_per_condition = 2
warmup_steps = 1
checkpoint_every = 3
[losses]
lm = 1.0
kl = 0.5
delta = {weight = 0.3, texts = "own", target = "context", positions = "all"}
l1 = 0.1
l2 = 0.1
product_l2 = 0.1
[evaluation]
data = "../texts.jsonl"
every = 2
"""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
_SECONDS = 120  # after which a command counts as hanging


@dataclass(frozen=True)
class Fault:
    """What happens to a process the ``at``-th time (from 0) that Python changes something under ``folder``.

    Attributes:
        happens: called then; if it raises, the change raises.
        stays: whether it also happens at every later change.
    """

    folder: Path
    at: int
    happens: Callable[[], object]
    stays: bool = False

    def arm(self) -> None:
        """Install it in this process, permanently."""
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            opened = event == "open" and (arguments[2] or 0) & _WRITES
            if (opened or event in _CHANGES) and str(arguments[0]).startswith(f"{self.folder}/"):
                count += 1
                if count - 1 == self.at or (self.stays and count - 1 > self.at):
                    self.happens()

        sys.addaudithook(hook)


class Process:
    """A command in a forked process; its stderr goes to a file."""

    def __init__(self, arguments: Sequence[str], said: Path, fault: Fault | None = None) -> None:
        said.unlink(missing_ok=True)
        self.said, self.began, self.seconds = said, time.monotonic(), 0.0
        self.pid = os.fork()
        if self.pid:
            while not said.exists():  # so that a signal reaches the command, not its setup
                time.sleep(0.001)
            return
        status = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            if fault is not None:
                fault.arm()
            for number, name in ((1, os.devnull), (2, str(said))):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            status = command_line(arguments)
        except KeyboardInterrupt:
            status = 130  # before the command handles it
        finally:
            os._exit(status)

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            os.kill(self.pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for its end; returns (exit status, or minus the signal that killed it; its stderr)."""
        until = self.began + _SECONDS
        while not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        self.seconds = time.monotonic() - self.began
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.said.read_text(errors="replace")


@dataclass
class Command:
    """A command as the trials call it, each trial in its own folder.

    Attributes:
        arguments: the command line, given that folder.
        out: the folder that it writes, inside that one.
        result: everything in ``out`` that must be reproduced.
        seconds, changes: how long it takes and how many changes it makes when undisturbed.
    """

    arguments: Callable[[Path], list[str]]
    out: str
    result: Callable[[Path], Any]
    seconds: float = 0.0
    changes: int = 0
    expected: Any = None
    files: frozenset[str] = frozenset()


class Bench:
    """Teachers, and the results of each command when undisturbed."""

    def __init__(self, root: Path) -> None:
        self.root, self.reference = root, root / "reference"
        config = read_config(embedded_checkpoint())
        chance = torch.Generator().manual_seed(0)
        for i in range(TEACHERS):
            lora = {n: 0.1 * torch.randn(shape, generator=chance) for n, shape in SPEC.shapes(config).items()}
            save_peft_adapter(root / "teachers" / f"t{i}", SPEC, lora, base_model="embedded", config=config)
        lines = [json.dumps({"adapter": str(root / "teachers" / f"t{i}"), "prompts": [f"task {i}", f"do {i}"]})
                 for i in range(TEACHERS)]  # fmt: skip
        (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        texts = [{"condition": f"task {i % 3}", "prompt": f"{i}=", "completion": "x" * (1 + i)} for i in range(9)]
        (root / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        (root / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(10)))
        (root / "probes.txt").write_text("cat=\n3 + 4 =\n")
        label = ["label", "--quiet", "--model", str(embedded_checkpoint()), "--probes", str(root / "probes.txt")]
        label += ["--device", "cpu", "--dtype=float32", "--adapters-per-pass=2", str(root / "teachers")]
        generate = ["generate", "--quiet", "--run", str(self.reference / "run"), "--prompts", str(root / "prompts.txt")]
        generate += ["--device", "cpu"]
        teach = ["teach", "--quiet", "--deltas"]
        evaluate = ["evaluate", "--quiet", "--run", str(self.reference / "texts"), "--data", str(root / "texts.jsonl")]
        evaluate += ["--device", "cpu", "--texts", "1"]
        self.commands = {
            "label": Command(
                lambda folder: [*label, "--out", str(folder / "deltas")], "deltas", _labels
            ),
            "train": Command(lambda folder: ["train", "--quiet", str(folder / "run.toml")], "run", run_state),
            "train on texts": Command(
                lambda folder: ["train", "--quiet", str(folder / "texts.toml")], "texts", run_state
            ),
            "generate": Command(
                lambda folder: [*generate, "--out", str(folder / "out")], "out", contents
            ),
            "teach": Command(
                lambda folder: [*teach, "--out", str(folder / "taught" / "deltas"), str(folder / "texts.toml")],
                "taught", contents,
            ),
            "evaluate": Command(
                lambda folder: [*evaluate, "--out", str(folder / "verdict")], "verdict", contents
            ),
        }  # fmt: skip
        folder = self.folder("reference")
        for name, command in self.commands.items():
            process = Process(command.arguments(folder), folder / "said")
            status, said = process.end()
            if status:
                raise RuntimeError(f"{name} fails undisturbed: {said}")
            out = folder / command.out
            command.expected, command.files = command.result(out), frozenset(contents(out))
            self._measure(command)

    def folder(self, name: str) -> Path:
        """A new folder for a trial."""
        folder = self.root / name
        folder.mkdir()
        (folder / "run.toml").write_text(CONFIG)
        (folder / "texts.toml").write_text(TEXTS_CONFIG)
        return folder

    def _measure(self, command: Command) -> None:
        folder = self.folder("counting")
        log = self.root / "changes"
        log.write_text("")
        with log.open("a") as out:
            fault = Fault(folder / command.out, 0, lambda: print(end=".", file=out, flush=True), stays=True)
            process = Process(command.arguments(folder), folder / "said", fault)
            process.end()
        shutil.rmtree(folder)
        command.seconds, command.changes = process.seconds, len(log.read_text())

    def finishes(self, name: str, folder: Path) -> str:
        """Run a command undisturbed where one was disturbed; returns what is wrong afterwards, or ""."""
        command = self.commands[name]
        status, said = Process(command.arguments(folder), folder / "said").end()
        if status:
            return f"the same command ends with {status}: {said.strip()[-400:]}"
        return self.differs(name, folder / command.out)

    def differs(self, name: str, out: Path) -> str:
        """How a folder differs from the reference's, or ""."""
        command = self.commands[name]
        odd = command.files.symmetric_difference(contents(out)) - {"checkpoint.previous.pt"}  # need not be there
        if odd:
            return f"files that should not be there or are missing: {sorted(odd)}"
        return "" if command.result(out) == command.expected else "the result is another one"


def _labels(out: Path) -> Any:
    labels = DeltaLabels(out)
    return {name: labels[name].numpy().tobytes() for name in sorted(labels)}


def run_state(out: Path) -> Any:
    """Everything a checkpoint holds, to the bit, and the metrics without the seconds."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = out / "best.pt"
    kept = _bits(torch.load(best, weights_only=True)) if best.exists() else None
    return (_bits(state), kept), {line["step"]: {**line, "seconds": None} for line in lines}


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: _bits(one) for key, one in value.items() if key != "seconds"}
    return [_bits(one) for one in value] if isinstance(value, (list, tuple)) else value


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
