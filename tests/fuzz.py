"""Random files at every door: each is accepted, or refused in one line that names the cause, fast and in little memory.

    python tests/fuzz.py --count 20000 --seed 0 --jobs 2
    python tests/fuzz.py --only template:17      # one input again, in this process, with its traceback

Child processes open the inputs in batches, so that hangs, aborts and excessive memory are noticed and counted. So is
anything that a door runs, sends over a network, or writes where it may not.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

# No GPU: it is of no use after a fork, and takes more address space than an input may.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import bad_doors
import torch
from doors import KINDS, drawn_run_folder, outcome
from valid_files import make_valid

from lora_delta.probes import chat

MEMORY = 2 << 30  # address space that one process may add to what it starts with
RESIDENT = 1 << 29  # bytes that one input may add to a process
PER_PROCESS = 150
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RUNS = (
    "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "socket.getaddrinfo",
    "pty.spawn",
)  # fmt: skip
# For each event, the positions of its path arguments and of the folder descriptors that they are relative to.
_CHANGES = {"os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),),
            "os.symlink": ((1, 2),), "os.link": ((1, 3),), "os.chmod": ((0, 2),)}  # fmt: skip


class Guard:
    """Records what the process writes, runs and connects to, from Python's audit events, while :attr:`outs` is set."""

    def __init__(self) -> None:
        self.outs: list[str] | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.outs is None:
            return
        runs = event in _RUNS and not _is_own(arguments)
        if runs or (event == "pickle.find_class" and arguments[0].split(".")[0] not in ("torch", "numpy")):
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)) and (arguments[2] or 0) & _WRITES:
            self._check(event, arguments[0])
        elif event in _CHANGES:
            for path, folder in _CHANGES[event]:
                self._check(event, arguments[path], arguments[folder])

    def _check(self, event: str, path: Any, folder: int = -1) -> None:
        if isinstance(path, int) or self.outs is None:
            return
        parent = "" if folder < 0 else os.readlink(f"/proc/self/fd/{folder}")  # noqa: PTH115
        place = os.path.abspath(os.path.join(parent, os.fsdecode(path)))  # noqa: PTH100, PTH118  (links are not followed)
        if place == os.devnull or (event == "os.mkdir" and os.path.isdir(place)):  # noqa: PTH112
            return
        if not any(place == out or place.startswith((f"{out}/", f"{out}.")) for out in self.outs):  # out.….unfinished
            self.seen.append(f"{event} {place}")


def _is_own(arguments: tuple[Any, ...]) -> bool:
    """Whether a new process is the one that renders templates, whose own limits are tested."""
    command = arguments[1] if len(arguments) > 1 else ()
    return isinstance(command, list) and any(str(part).endswith("lora_delta/probes/sandbox.py") for part in command)


def schedule(count: int, seed: int, kinds: Sequence[str]) -> list[tuple[str, int]]:
    """(kind, number) of each input: all kinds in proportion to their shares, evenly mixed."""
    total = sum(KINDS[kind].share for kind in kinds)
    counts = {kind: max(1, round(count * KINDS[kind].share / total)) for kind in kinds}
    order = [(number / counts[kind], kind, number) for kind in kinds for number in range(counts[kind])]
    return [(kind, seed * 1_000_000 + number) for _, kind, number in sorted(order)]


class Bench:
    """A folder with the valid files, and a place for one input at a time.

    Args:
        root: an empty folder. In it, ``outside`` must stay unchanged and ``ran`` must never appear.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.valid, self.outside = root, root / "valid", root / "outside"
        for folder in (self.outside, root / "inputs", root / "home", root / "tmp"):
            folder.mkdir()
        (self.outside / "file").write_text("{}")
        os.environ.update(HOME=str(root / "home"), TMPDIR=str(root / "tmp"), MPLCONFIGDIR=str(root / "home"))
        for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "HF_HUB_CACHE"):
            os.environ.pop(name, None)
        tempfile.tempdir = None
        make_valid(self.valid)
        self.before = self._outside()

    def _outside(self) -> dict[str, str]:
        own = re.compile(rf"({'|'.join(KINDS)})-\d+")
        places = [path for path in (self.root / "inputs").iterdir() if not own.fullmatch(path.name)]
        places += [*self.outside.rglob("*"), *self.root.iterdir()]
        return {str(path): path.read_text() if path.is_file() else "" for path in places}

    def input(self, kind: str, number: int) -> tuple[Path, Random, list[str]]:
        """The folder of an input, the random generator for its door, and the names of the corrupted files."""
        folder, chance = self.root / "inputs" / f"{kind}-{number}", Random(f"{kind}:{number}")
        folder.mkdir()
        return folder, chance, KINDS[kind].make(self.valid, folder, chance, self.outside)

    def open(self, kind: str, number: int, guard: Guard) -> dict[str, Any]:
        """Make an input, open it and remove it; returns the outcome."""
        folder, chance, spoiled = self.input(kind, number)
        outs = [str(folder / out) for out in KINDS[kind].outs]
        if kind == "train":
            outs += [str(drawn_run_folder(folder, run)) for run in ("run.toml", "texts.toml")]
        began, resident = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        guard.outs, guard.seen = [*outs, str(self.root / "home"), str(self.root / "tmp")], []
        what, words = outcome(kind, folder, chance)
        guard.outs = None
        seconds = time.monotonic() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) << 10
        shutil.rmtree(folder, ignore_errors=True)
        if grown > RESIDENT:
            what, words = "memory", f"{grown:,} bytes; {words}"
        if guard.seen or self._outside() != self.before:
            changed = sorted(set(self._outside().items()) ^ set(self.before.items()))
            what, words = "outside", f"{guard.seen[:3]} {changed[:3]} {words}"
            for place in {Path(place) for place, _ in changed if place not in self.before}:
                shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
        return {"kind": kind, "number": number, "what": what, "words": words[:2000], "seconds": seconds,
                "spoiled": spoiled}  # fmt: skip


def run(bench: Bench, inputs: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The outcome of each input, opened in processes that are replaced when they hang or die."""
    left = list(inputs)
    while left:
        some = left[:PER_PROCESS]
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            _serve(bench, some, write)
        os.close(write)
        answers = list(_answers(read, child, some))
        os.close(read)
        for answer in answers[-1:]:
            shutil.rmtree(bench.root / "inputs" / f"{answer['kind']}-{answer['number']}", ignore_errors=True)
            if answer["what"] == "hangs" and len(answers) > 1:  # try again, alone: the machine may have been busy
                answers.pop()
        yield from answers
        left = left[len(answers) :]


def _serve(bench: Bench, inputs: Sequence[tuple[str, int]], write: int) -> None:
    """In a child: open the inputs and write a line for each to the pipe; never returns."""
    try:
        _bound_memory()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        guard = Guard()
        for kind, number in inputs:
            os.write(write, json.dumps(bench.open(kind, number, guard)).encode() + b"\n")
    except BaseException:
        os.write(write, traceback.format_exc().replace("\n", "\r").encode("utf-8", "replace"))
        os._exit(1)
    os._exit(0)


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answers(read: int, child: int, inputs: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The child's answers; if it hangs or dies, the last one says so."""
    buffer, answered = b"", 0
    while answered < len(inputs):
        kind, number = inputs[answered]
        ready = select.select([read], [], [], KINDS[kind].seconds)[0]
        data = os.read(read, 1 << 16) if ready else b""
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            answered += 1
            yield json.loads(line)
        if not data:
            if not ready:
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            kind, number = inputs[answered]
            what = f"died with {os.waitstatus_to_exitcode(status)}" if ready else "hangs"
            seconds, words = KINDS[kind].seconds, buffer.decode()
            yield {"kind": kind, "number": number, "what": what, "words": words, "seconds": seconds, "spoiled": []}
            return
    os.waitpid(child, 0)


def run_jobs(bench: Bench, inputs: Sequence[tuple[str, int]], jobs: int) -> list[dict[str, Any]]:
    """:func:`run` in several processes."""
    files, children = [], []
    for job in range(jobs):
        file = bench.root / "home" / f"job-{job}.jsonl"
        child = os.fork()
        if not child:
            with file.open("w") as out:
                for answer in run(bench, inputs[job::jobs]):
                    out.write(json.dumps(answer) + "\n")
            os._exit(0)
        files.append(file)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def table(answers: Sequence[dict[str, Any]]) -> str:
    """A line per kind: inputs, succeeded, refused, other, slowest. Then a line for each of the others."""
    lines = [f"{'kind':<18}{'inputs':>8}{'succeeded':>11}{'refused':>9}{'other':>7}{'slowest s':>11}"]
    others = [answer for answer in answers if answer["what"] not in ("succeeded", "refused")]
    for kind in [*KINDS, "all"]:
        own = [answer for answer in answers if kind in (answer["kind"], "all")]
        if own:
            taken, refused = (sum(answer["what"] == what for answer in own) for what in ("succeeded", "refused"))
            slowest = max(answer["seconds"] for answer in own)
            counts = f"{len(own):>8}{taken:>11}{refused:>9}{len(own) - taken - refused:>7}"
            lines.append(f"{kind:<18}{counts}{slowest:>11.2f}")
    for answer in sorted(others, key=lambda answer: (answer["kind"], answer["what"], answer["words"])):
        words = " ".join(answer["words"].split())[:200]
        lines.append(f"{answer['kind']}:{answer['number']}  {answer['what']}  {answer['spoiled']}  {words}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit status 1 if an input is neither accepted nor properly refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one input, in this process, with its traceback")
    parser.add_argument("--bad-doors", action="store_true", help="open doors too that do what none may, to see it seen")
    parser.add_argument("--template-seconds", type=int, help="of a processor, to render one (default: the package's)")
    parser.add_argument("--json", action="store_true", help="print all answers as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.template_seconds:
        chat._CPU_SECONDS = options.template_seconds
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared, ignore_cleanup_errors=True) as root:
        os.chdir(root)
        bench = Bench(Path(root).resolve())
        if options.only:
            return _one(bench, *options.only.split(":"))
        inputs = schedule(options.count, options.seed, options.kinds)
        if options.bad_doors:
            inputs += [(kind, 0) for kind in bad_doors.add()]
        answers = run_jobs(bench, inputs, options.jobs)
        print(json.dumps(answers) if options.json else table(answers))
        return int(any(answer["what"] not in ("succeeded", "refused") for answer in answers))


def _one(bench: Bench, kind: str, number: str) -> int:
    folder, chance, spoiled = bench.input(kind, int(number))
    for name in spoiled:
        print(f"{name}: {(folder / name).read_bytes()[:1000]!r}" if (folder / name).is_file() else name, flush=True)
    _bound_memory()
    faulthandler.dump_traceback_later(KINDS[kind].seconds, exit=True)
    with contextlib.redirect_stdout(sys.stderr):
        print(KINDS[kind].open(folder, chance))
    return 0


if __name__ == "__main__":
    sys.exit(main())
