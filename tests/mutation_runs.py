"""Runs of pytest in forked children, each in a copy of the tree, with or without a bug in it."""

from __future__ import annotations

import compileall
import importlib
import json
import os
import py_compile
import resource
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import psutil
import pytest
from mutants import Mutant

PRODUCTS = ("qwen_functional", "lora_delta")
MEMORY = 12 << 30  # bytes of data that a child may allocate
# Third-party modules that the tests import: once here, not in every child.
IMPORTED = (
    "numpy", "torch", "torch.distributed", "torch.distributed.device_mesh", "torch.nn.parallel", "torch.func",
    "torch.testing", "torch.utils.checkpoint", "torch._dynamo", "torch.multiprocessing", "safetensors.torch",
    "huggingface_hub", "tokenizers", "jinja2.sandbox", "filelock", "tqdm", "hypothesis", "hypothesis.strategies",
    "_hypothesis_pytestplugin", "transformers", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.tokenization_auto", "peft", "triton",
    "triton.language", "triton.runtime.interpreter", "sklearn.decomposition", "sklearn.metrics", "matplotlib.pyplot",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A run of the tests ``chosen``, or of all, in ``files`` of ``tests/``.

    It counts as hanging after ``seconds`` of processor time, or four times as many of wall-clock time. With ``trace``,
    it continues after a failure and records which lines of the products each test runs.
    """

    files: tuple[str, ...]
    chosen: frozenset[str] | None = None
    mutant: Mutant | None = None
    trace: bool = False
    seconds: float = 600.0


@dataclass
class Result:
    """How a run ended.

    Attributes:
        status: pytest's exit status; minus the signal that ended it; None after the time limit.
        seconds: wall-clock time.
        failed: the first test that failed.
        passed: the seconds of each test that passed.
        lines: {test: {product file: the lines it runs, as the bits of a hexadecimal number}}.
        output: the end of what was printed.
    """

    status: int | None
    seconds: float
    failed: str = ""
    passed: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, str]] = field(default_factory=dict)
    output: str = ""

    @property
    def outcome(self) -> str:
        if self.status is None or self.status == -signal.SIGXCPU:
            return "time-out"
        return "survived" if self.status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else "caught"


def import_what_tests_import() -> None:
    for name in IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)


class Runner:
    """Runs tasks, ``jobs`` at a time, each in a copy of ``tree`` under ``folder``."""

    def __init__(self, tree: Path, folder: Path, jobs: int) -> None:
        self.tree = tree
        self.places = [folder / str(number) for number in range(jobs)]
        for place in self.places:
            shutil.copytree(tree, place / "tree")
            for name in PRODUCTS:  # a bug that keeps size and second of the file must not run stale bytecode
                checked = py_compile.PycInvalidationMode.CHECKED_HASH
                compileall.compile_dir(place / "tree" / name, quiet=1, invalidation_mode=checked)

    def run(self, tasks: deque[Task], finish: Callable[[Task, Result], None]) -> None:
        """Run until no task is left; ``finish``, called with the result of each, may add more."""
        free, running = list(self.places), dict[int, tuple[Task, Path, float]]()
        try:
            while tasks or running:
                while tasks and free:
                    task, place = tasks.popleft(), free.pop()
                    running[self._start(task, place)] = task, place, time.monotonic()
                for pid, (task, place, start) in list(running.items()):
                    status, late = _poll(pid), time.monotonic() - start > 4 * task.seconds
                    if status is None and not late:
                        continue
                    _end(pid)
                    del running[pid]
                    free.append(place)
                    if task.mutant is not None:
                        shutil.copyfile(self.tree / task.mutant.path, place / "tree" / task.mutant.path)
                    finish(task, _result(place, status, time.monotonic() - start))
                time.sleep(0.02)
        finally:
            for pid in running:
                _end(pid)

    def _start(self, task: Task, place: Path) -> int:
        for file in place.glob("*.txt"):
            file.unlink()
        shutil.rmtree(place / "tmp", ignore_errors=True)
        if task.mutant is not None:
            file = place / "tree" / task.mutant.path
            file.write_bytes(task.mutant.apply(file.read_bytes()))
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            _child(task, place)
        return pid


def _poll(pid: int) -> int | None:
    """A child's exit status, or minus its signal, once it has ended; else None."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _end(pid: int) -> None:
    """Kill a child, its descendants, and the rest of its process group."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _result(place: Path, status: int | None, seconds: float) -> Result:
    found: dict[str, Any] = {}
    if (place / "result.txt").exists():
        found = json.loads((place / "result.txt").read_text())
    output = (place / "output.txt").read_text(errors="replace")[-3000:]
    return Result(status, seconds, output=output, **found)


def _child(task: Task, place: Path) -> None:
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        sys.modules["__main__"] = ModuleType("__main__")  # or processes that tests spawn would import it
        out = os.open(place / "output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        seconds = int(task.seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        tests = Tests(task, place)
        status = tests.run()
        (place / "result.tmp").write_text(json.dumps(tests.found()))
        (place / "result.tmp").rename(place / "result.txt")
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


class Tests:
    """A pytest plugin that selects tests, times them, and records the lines that they run."""

    __test__ = False

    def __init__(self, task: Task, place: Path) -> None:
        self.task, self.place, self.tree = task, place, str(place / "tree") + os.sep
        self.failed, self.passed, self.taken = "", dict[str, float](), dict[str, float]()
        self.lines: dict[str, dict[str, int]] = {}
        self.now: dict[str, int] = {}
        self.ours: dict[str, str | None] = {}

    def run(self) -> int:
        import hypothesis

        tests = self.tree + "tests"
        here = str(Path(__file__).parent)
        sys.path[:] = [self.tree, tests, *(one for one in sys.path if one != here)]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        os.chdir(self.tree)
        # The same examples in every run, and no time spent shrinking them.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutations", database=None, derandomize=True, deadline=None, phases=phases)
        options = ["-q", "--tb=line", "-p", "no:cacheprovider", "-o", "addopts=", "-p", "no:xdist"]
        options += [f"--rootdir={self.tree}", f"--basetemp={self.place / 'tmp'}", "--hypothesis-profile=mutations"]
        if not self.task.trace:
            options.append("-x")
        status = int(pytest.main([*options, *(f"tests/{name}" for name in self.task.files)], plugins=[self]))
        for name in PRODUCTS:
            file = getattr(sys.modules.get(name), "__file__", None) or self.tree
            assert file.startswith(self.tree), f"{name} was imported from {file}"
        return status

    def found(self) -> dict[str, Any]:
        lines = {
            test: {path: f"{bits:x}" for path, bits in files.items()}
            for test, files in self.lines.items()
            if test in self.passed
        }
        return {"failed": self.failed, "passed": self.passed, "lines": lines}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.task.chosen is not None:
            items[:] = [item for item in items if item.nodeid in self.task.chosen]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if not self.task.trace:
            return (yield)
        self.now = self.lines.setdefault(item.nodeid, {})
        sys.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        self.taken[test] = self.taken.get(test, 0.0) + report.duration
        if report.failed and not self.failed:
            self.failed = test
        if report.passed and report.when == "call":
            self.passed[test] = 0.0
        if test in self.passed:
            self.passed[test] = round(self.taken[test], 3)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Callable | None:
        name = frame.f_code.co_filename
        if name not in self.ours:
            inside = name.removeprefix(self.tree)
            self.ours[name] = inside if inside != name and inside.startswith(PRODUCTS) else None
        path = self.ours[name]
        if path is None:
            return None
        self.now[path] = self.now.get(path, 0) | 1 << frame.f_lineno
        return self._trace
