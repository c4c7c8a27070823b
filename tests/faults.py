"""Commands of ``lora-delta`` that write, under kill -9, signals, failing disks, and files as a power cut leaves them.

    python tests/faults.py --times 50 --seed 0     # prints what happened, how often, and what was wrong

In each trial, a command runs in a forked process and is disturbed at a moment drawn from the trial's seed; then the
same command runs again, undisturbed. The result must be, bit for bit, that of a command that was never disturbed.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from fault_bench import Bench, Command, Fault, Process, contents

COMMANDS = ("label", "train", "train on texts", "generate", "teach", "evaluate")


@dataclass
class Count:
    """What happened in the trials of a scenario, and what was wrong, each with its seed."""

    happened: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def _raises(number: int) -> Callable[[], object]:
    def raises() -> None:
        raise OSError(number, os.strerror(number))

    return raises


def _dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Scenarios. Each gets a bench, a command's name, a folder and a random generator, and returns what happened. If
# something is wrong, it raises Wrong.


class Wrong(Exception):
    """Something that must not happen."""


def _signalled(command: Command, folder: Path, chance: Random, number: int) -> tuple[int, str]:
    """Run a command and send it a signal, at a random time or right before a random change to the folder."""
    if chance.random() < 0.5:
        fault = Fault(folder / command.out, chance.randrange(command.changes), lambda: os.kill(os.getpid(), number))
        return Process(command.arguments(folder), folder / "said", fault).end()
    process = Process(command.arguments(folder), folder / "said")
    time.sleep(chance.uniform(0.05, 1) * command.seconds)
    process.send(number)
    return process.end()


def kill(bench: Bench, name: str, folder: Path, chance: Random) -> str:
    """kill -9 at a random time, or right before a random change to the folder, up to three times."""
    command = bench.commands[name]
    ended = [_signalled(command, folder, chance, signal.SIGKILL)[0] for _ in range(chance.choice((1, 1, 2, 3)))]
    if set(ended) - {0, -signal.SIGKILL}:
        raise Wrong(f"ended with {ended}: {(folder / 'said').read_text()[-400:]}")
    return f"killed {sum(status != 0 for status in ended)} times"


def interrupt(bench: Bench, name: str, folder: Path, chance: Random) -> str:
    """Ctrl-C or SIGTERM at a random time: exit 130 or 143, no traceback, and all steps made so far are saved."""
    command = bench.commands[name]
    number, status = chance.choice(((signal.SIGINT, 130), (signal.SIGTERM, 143)))
    ended, said = _signalled(command, folder, chance, number)
    unheard = ended == -signal.SIGTERM and not (folder / command.out).exists()  # before the command began
    if (ended not in (0, status) and not unheard) or "Traceback" in said:
        raise Wrong(f"{number.name}: ended with {ended}: {said[-400:]}")
    checkpoint = folder / command.out / "checkpoint.pt"
    metrics = folder / command.out / "metrics.jsonl"
    if metrics.exists():
        made = len(metrics.read_text().splitlines())
        saved = torch.load(checkpoint, weights_only=True)["progress"]["steps"] if checkpoint.exists() else 0
        if made != saved:
            raise Wrong(f"{number.name}: {made} steps were made and {saved} are saved")
    return f"{number.name}, {'in time' if ended else 'too late'}"


def failing_disk(bench: Bench, name: str, folder: Path, chance: Random) -> str:
    """From a random change on, the disk is full, read-only or failing: one line and exit 2, and nothing is lost."""
    command = bench.commands[name]
    number = chance.choice((errno.ENOSPC, errno.EROFS, errno.EIO))
    fault = Fault(folder / command.out, chance.randrange(command.changes), _raises(number), stays=True)
    ended, said = Process(command.arguments(folder), folder / "said", fault).end()
    _check_refusal(name, ended, said, os.strerror(number))
    return f"{errno.errorcode[number]}, exit {ended}"


def full_disk(bench: Bench, name: str, folder: Path, chance: Random) -> str:
    """A file system with room for only a part of what is written, then for everything."""
    command = bench.commands[name]
    size = sum(path.stat().st_size for path in (bench.reference / command.out).rglob("*"))
    out = folder / command.out
    out.mkdir()
    room = (1 + int(size * chance.random()) // 4096) * 4096
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", out], capture_output=True)
    if mounted.returncode:
        return "nothing: this system lets us mount nothing"
    try:
        ended, said = Process(command.arguments(folder), folder / "said").end()
        shutil.copytree(out, folder / "kept")
    finally:
        subprocess.run(["umount", out], check=True)
    _check_refusal(name, ended, said, "")
    out.rmdir()
    (folder / "kept").rename(out)
    return f"exit {ended}"


def _check_refusal(name: str, ended: int, said: str, words: str) -> None:
    lines = said.splitlines()
    clear = len(lines) == 1 and lines[0].startswith(f"lora-delta {name.split()[0]}: ") and words in said
    if ended and not (ended == 2 and clear):
        raise Wrong(f"ended with {ended}: {said[-400:]}")


def two_writers(bench: Bench, name: str, folder: Path, chance: Random) -> str:
    """A second writer while the first is at work: it is refused in one line, and the first is not disturbed."""
    command = bench.commands[name]
    moment = chance.randrange(2, command.changes - 2) if command.changes > 4 else 0  # while it holds the lock
    stop = Fault(folder / command.out, moment, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    first = Process(command.arguments(folder), folder / "first", stop)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    ended, said = Process(command.arguments(folder), folder / "said").end()
    first.send(signal.SIGCONT)
    first_ended, first_said = first.end()
    if ended != 2 or len(said.splitlines()) != 1 or "in use" not in said:
        raise Wrong(f"the second one ended with {ended}: {said[-400:]}")
    if first_ended:
        raise Wrong(f"the first one ended with {first_ended}: {first_said[-400:]}")
    if wrong := bench.differs(name, folder / command.out):
        raise Wrong(f"after the first one: {wrong}")
    return "the second one was refused"


def power_cut(bench: Bench, name: str, folder: Path, chance: Random) -> str:
    """Killed, and then a file is empty, cut, gone, or has extra lines: it is mended, or one line names it."""
    command, out = bench.commands[name], folder / bench.commands[name].out
    fault = Fault(out, chance.randrange(command.changes // 2, command.changes), _dies)
    Process(command.arguments(folder), folder / "said", fault).end()
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    if not files:
        return "nothing was there"
    file = chance.choice(files)
    began = any(path.name == "checkpoint.pt" for path in files)  # without a checkpoint, no log line is missed
    data, how = file.read_bytes(), chance.choice(("empty", "half", "gone", "longer"))
    if how == "longer" and file.suffix != ".jsonl":
        how = "half"
    file.unlink()  # it may have a second name
    match how:
        case "empty":
            file.write_bytes(b"")
        case "half":
            file.write_bytes(data[: chance.randrange(len(data) or 1)])
        case "longer":
            lines = data.splitlines(keepends=True)
            file.write_bytes(data + b"".join(lines[-chance.randrange(1, 3) :]) + chance.choice((b"", b'{"step": 9')))
    what = "generated file" if name == "generate" else _generic(file.relative_to(out))
    before = contents(out)
    ended, said = Process(command.arguments(folder), folder / "said").end()
    if ended == 0:
        lines_are_lost = file.name == "metrics.jsonl"
        if wrong := _log_differs(command, out) if lines_are_lost else bench.differs(name, out):
            raise Wrong(f"{what} {how}: {wrong}")
        if began and file.name in ("checkpoint.pt", "metrics.jsonl") and file.name not in said:
            raise Wrong(f"{what} {how}: nothing is said of it: {said[-400:]}")
        if lines_are_lost:
            shutil.rmtree(out)
        return f"{what} {how}: mended"
    _check_refusal(name, ended, said, file.name)
    after = {path: content for path, content in contents(out).items() if not path.endswith((".lock", ".unfinished"))}
    if {path: content for path, content in before.items() if path in after} != after:
        raise Wrong(f"{what} {how}: a command that was refused has written")
    shutil.rmtree(out)
    return f"{what} {how}: said"


def _log_differs(command: Command, out: Path) -> str:
    """How a run is wrong: the checkpoint, or a line that the log still has. Lost lines stay lost."""
    state, log = command.result(out)
    expected, whole = command.expected
    return "" if state == expected and log.items() <= whole.items() else "the result is another one"


def _generic(path: Path) -> str:
    return "/".join("".join("#" if c.isdigit() else c for c in part.split("-")[0]) for part in path.parts)


SCENARIOS: dict[str, Callable[[Bench, str, Path, Random], str]] = {
    "kill": kill,
    "interrupt": interrupt,
    "failing disk": failing_disk,
    "full disk": full_disk,
    "two writers": two_writers,
    "power cut": power_cut,
}


def trials(bench: Bench, scenario: str, name: str, seeds: Sequence[int]) -> Count:
    """Disturb a command and then finish it, once for each seed."""
    count = Count()
    for seed in seeds:
        folder = bench.folder(f"{scenario}-{name}-{seed}".replace(" ", "-"))
        try:
            what = SCENARIOS[scenario](bench, name, folder, Random(f"{scenario}:{name}:{seed}"))
            if wrong := bench.finishes(name, folder):
                raise Wrong(f"{what}: {wrong}")
            count.happened[what] += 1
        except Wrong as wrong:
            count.happened["wrong"] += 1
            count.wrong.append(f"{scenario} {name} {seed}: {wrong}")
        finally:
            shutil.rmtree(folder)
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit status 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="trials of each scenario and command")
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--json", action="store_true", help="print what was wrong as JSON, by scenario and command")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts: dict[str, Count] = {}
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as root:
        bench = Bench(Path(root).resolve())
        for scenario in options.scenarios:
            for name in options.commands:
                seeds = range(options.seed, options.seed + options.times)
                count = counts[f"{scenario} {name}"] = trials(bench, scenario, name, seeds)
                if not options.json:
                    print(f"{scenario}, {name}: {dict(count.happened)}", *count.wrong, sep="\n  ", flush=True)
    if options.json:
        print(json.dumps({key: [dict(count.happened), count.wrong] for key, count in counts.items()}))
    return int(any(count.wrong for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
