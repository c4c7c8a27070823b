"""Plants bugs one at a time, runs the tests that should notice them, and reports how many do.

    python tests/mutations.py --jobs 2 --resume mutations.jsonl > mutations.md

It works in copies of the tree. First, each test file named in :data:`AREAS` must pass without a bug, and the lines that
each test runs are recorded. Then each bug is tried on the fastest tests that run its line and, if these pass, on all
others in its row of the table. A bug that no test notices has survived, and needs a new test. If it changes no result,
it is not a bug: ``mutations_explained.toml`` gets the reason, and another one is drawn in its place.

``--resume FILE`` keeps the findings, so that an interrupted run continues: what was caught stays caught, and what
survived is tried again once code or tests have changed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import tomllib
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
    CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1", MPLBACKEND="agg",
)  # fmt: skip

from mutants import Mutant, is_bug, mutants
from mutation_runs import PRODUCTS, Result, Runner, Task, import_what_tests_import

HERE = Path(__file__).resolve().parent
EXPLAINED = "mutations_explained.toml"
OURS = (EXPLAINED, "mutations.py", "mutants.py", "mutation_runs.py")
MODEL, STEPS, HOUSE = "qwen_functional/", "lora_delta/generate/", "lora_delta/"

# {area: (share of the bugs, {product files: test files that should notice})}. Names are patterns; in product files, *
# also matches subfolders. A file belongs to the first row that matches.
AREAS: dict[str, tuple[int, dict[str, str]]] = {
    "packing": (3, {f"{MODEL}packing.py": "packing own_texts engine plan cost"}),
    "plan": (4, {
        f"{MODEL}plan.py {MODEL}tables.py {MODEL}cost.py": "plan cost own_texts scale_plan engine engine_[mw]*",
    }),
    "engine": (6, {
        f"{MODEL}engine.py {MODEL}block.py {MODEL}heads.py": "engine engine_[mw]* own_texts token_loss drawn parallel",
        f"{MODEL}stacking.py": "lora engine engine_[mw]* drawn parallel",
        f"{MODEL}parallel.py": "parallel",
        f"{MODEL}forward.py": "forward* engine engine_[mw]* overflow",
        f"{MODEL}compiled.py": "compiled",
    }),
    "lm loss": (4, {
        f"{MODEL}ops/lm_head.py {MODEL}ops/sums.py": "token_loss lm_loss parallel ops evaluate",
        f"{HOUSE}lm_loss.py {HOUSE}teachers.py": "lm_loss text_training evaluate*",
        f"{HOUSE}stored.py {HOUSE}stored_deltas.py": "lm_loss stored_deltas",
        f"{HOUSE}own_texts.py {HOUSE}text_delta.py": "lm_loss text_delta text_training",
    }),
    "texts": (4, {
        f"{STEPS}texts.py {STEPS}text_lines.py": "texts bad_texts text_files stored_deltas",
        f"{STEPS}terms.py {STEPS}tasks.py {STEPS}evaluation.py {STEPS}trackers.py": (
            "text_training training training_ranks trackers evaluate* stored_deltas"),
    }),
    "evaluate": (3, {f"{STEPS}judge.py {STEPS}controls.py": "evaluate* demo"}),
    "ops": (4, {
        f"{MODEL}ops/*": "ops overflow drawn engine",
        f"{MODEL}finite.py {MODEL}dtypes.py": "lora ops losses delta_losses delta_errors delta_module engine",
    }),
    "kernels": (2, {f"{MODEL}backends/kernels/*": "kernels*"}),
    "backends": (3, {f"{MODEL}backends/*": "backends prepack engine engine_[mw]* drawn"}),
    "adapters": (5, {
        f"{HOUSE}peft/*": "adapter*",
        f"{MODEL}lora.py {MODEL}architecture.py {MODEL}patterns.py": "lora adapter* engine tokens patterns",
    }),
    "checkpoints": (4, {
        f"{MODEL}config.py": "config checkpoint",
        f"{MODEL}streaming.py": "streaming",
        f"{MODEL}memory.py": "memory checkpoint plan engine_[mw]* delta_memory",
        f"{MODEL}files.py": "files checkpoint bad_checkpoints config",
        f"{MODEL}*": "checkpoint bad_checkpoints safetensors_format config prepack streaming engine_modes",
    }),
    "delta": (3, {f"{HOUSE}delta.py {HOUSE}autograd.py {HOUSE}frozen.py {HOUSE}passes.py": "delta delta_[aempz]*"}),
    "losses": (3, {f"{STEPS}losses.py": "losses", f"{HOUSE}delta_losses.py": "delta_losses losses text_delta"}),
    "schedule": (2, {f"{STEPS}schedules.py": "schedules training runs run_config"}),
    "tokens": (4, {f"{STEPS}tokens.py": "tokens", f"{STEPS}reconstruct.py": "reconstruct"}),
    "training": (5, {f"{STEPS}training.py {STEPS}step.py {STEPS}generator.py {STEPS}conditions.py {STEPS}prompts.py": (
        "training text_training generators resume runs conditions run_config")}),
    "resume": (5, {f"{STEPS}*": "resume run_config runs training"}),
    "labelling": (5, {f"{HOUSE}labelling/*": "labels label_*"}),
    "identity, files": (3, {
        f"{HOUSE}identity.py {HOUSE}files.py": "files labels label_* training resume runs",
        f"{HOUSE}shares.py {HOUSE}distributed.py": "parallel training_ranks distributed label_jobs",
        f"{HOUSE}progress.py": "progress",
    }),
    "probes": (3, {f"{HOUSE}probes/*": "probes chat tokenization"}),
}  # fmt: skip
# They only run on a GPU, or are themselves checks against other packages.
LEFT_OUT = (f"{MODEL}backends/cuda.py", f"{MODEL}backends/graph.py", f"{HOUSE}peft/against_peft.py", "*/__init__.py")
# Tracing Triton's interpreter line by line takes minutes: these tests count as running every line.
UNTRACED = ("test_kernels*.py", "test_backends.py")
QUICK = 15.0  # total seconds of the fastest tests, which try a bug first


class Plan:
    """What to try: the files and tests of the areas in a tree, and the drawn bugs."""

    def __init__(self, tree: Path, seed: int, count: int, only: Sequence[str]) -> None:
        self.tests: dict[str, tuple[str, ...]] = {}
        self.area: dict[str, str] = {}
        files = {str(file.relative_to(tree)) for name in PRODUCTS for file in (tree / name).rglob("*.py")}
        left = sorted(file for file in files if not any(fnmatch.fnmatch(file, one) for one in LEFT_OUT))
        for area, (_, rows) in AREAS.items():
            for patterns, tests in rows.items():
                found = [file for file in left if any(fnmatch.fnmatch(file, one) for one in patterns.split())]
                if not found:
                    raise SystemExit(f"AREAS: no product file is left that fits {patterns!r}")
                left = [file for file in left if file not in found]
                names = tuple(dict.fromkeys(name for one in tests.split() for name in _tests(tree, one)))
                self.tests.update(dict.fromkeys(found, names))
                self.area.update(dict.fromkeys(found, area))
        wanted = {
            file: area for file, area in self.area.items()
            if not only or any(area == one or file == one or file.startswith(one.rstrip("/") + "/") for one in only)
        }  # fmt: skip
        if not wanted:
            raise SystemExit(f"--only {' '.join(only)}: expected areas, of {list(AREAS)}, or product files or folders")
        self.drawn: list[Mutant] = []
        self.left_out: list[tuple[Mutant, str]] = []
        shares = {area: AREAS[area][0] for area in dict.fromkeys(wanted.values())}
        done = 0
        for area, share in shares.items():
            n = round((count - len(self.drawn)) * share / (sum(shares.values()) - done))
            done += share
            sources = {file: (tree / file).read_bytes() for file, its in wanted.items() if its == area}
            self.drawn += draw(sources, seed, n, self.left_out)


def _tests(tree: Path, pattern: str) -> list[str]:
    names = sorted(file.name for file in (tree / "tests").glob(f"test_{pattern}.py"))
    if not names:
        raise SystemExit(f"AREAS: no test file fits test_{pattern}.py")
    return [name for name in names if not name.endswith("_cuda.py")]


def draw(sources: dict[str, bytes], seed: int, count: int, left_out: list[tuple[Mutant, str]]) -> list[Mutant]:
    """Draw ``count`` bugs, evenly over their kinds; an edit elsewhere in a file hardly changes which.

    Changes that are explained not to be bugs go to ``left_out``.
    """
    with (HERE / EXPLAINED).open("rb") as file:
        reasons = {(one["file"], one["function"], one["before"], one["after"]): one["why"]
                   for one in tomllib.load(file)["mutant"]}  # fmt: skip
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for path, source in sources.items():
        for one in mutants(path, source):
            kinds[one.kind].append(one)
    drawn: list[Mutant] = []
    order = sorted(kinds, key=lambda kind: hashlib.sha256(f"{seed} {kind} {min(sources)}".encode()).digest())
    for found in kinds.values():
        found.sort(key=lambda one: one.order(seed), reverse=True)
    for kind in cycle(order):
        if len(drawn) == count or not any(kinds.values()):
            return drawn
        while kinds[kind]:
            one = kinds[kind].pop()
            why = reasons.get((one.path, one.function, one.before, one.after))
            if why is not None:
                left_out.append((one, why))
            elif is_bug(one, sources[one.path]):
                drawn.append(one)
                break
    return drawn


class Record:
    """The findings so far, as JSON lines."""

    def __init__(self, path: Path | None, tree: str) -> None:
        self.path, self.tree = path, tree
        self.traces: dict[str, dict[str, Any]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line.endswith("}"):  # a line may have been cut
                    self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        if "mutant" in entry:
            if entry["outcome"] != "survived" or entry["tree"] == self.tree:
                self.results[entry["mutant"]] = entry
            else:
                self.results.pop(entry["mutant"], None)
        elif entry["tree"] == self.tree:
            self.traces[entry["tests"]] = entry

    def add(self, **entry: Any) -> None:
        entry["tree"] = self.tree
        self._take(entry)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def copy_tree(folder: Path) -> str:
    """Copy what the tests need from the repository; returns a digest of its code and tests."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(HERE.parent, folder, ignore=ignored)
    digest = hashlib.sha256()
    for name in (*PRODUCTS, "tests"):
        for file in sorted((folder / name).rglob("*.py")):
            if file.name not in OURS:
                digest.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def trace(plan: Plan, runner: Runner, record: Record) -> None:
    """Record which lines each test runs and how long it takes; exits if one fails without a bug."""
    files = dict.fromkeys(file for one in plan.drawn for file in plan.tests[one.path])
    tasks = deque(Task((file,), trace=not _untraced(file), seconds=900) for file in files if file not in record.traces)
    red: list[str] = []

    def finish(task: Task, result: Result) -> None:
        (file,) = task.files
        if result.status == 0:
            record.add(tests=file, passed=result.passed, lines=result.lines if task.trace else None)
            tell(f"{file}: {len(result.passed)} tests, {result.seconds:.0f} s")
        elif task.trace:  # perhaps tracing made it fail
            tasks.appendleft(replace(task, trace=False))
        else:
            red.append(f"{file} fails without a bug: {result.failed}\n{result.output}")

    runner.run(tasks, finish)
    if red:
        raise SystemExit("\n".join(red))


def _untraced(file: str) -> bool:
    return any(fnmatch.fnmatch(file, one) for one in UNTRACED)


def tests_that_run(one: Mutant, plan: Plan, record: Record) -> dict[str, float]:
    """The tests in its row that run a bug's line, with their seconds; all of them for a line outside functions."""
    first, last = one.statement or (0, 0)
    found = {}
    for file in plan.tests[one.path]:
        lines = record.traces[file]["lines"]
        for test, seconds in record.traces[file]["passed"].items():
            bits = int(lines.get(test, {}).get(one.path, "0"), 16) if lines is not None else -1
            if one.statement is None or bits >> first & (1 << last - first + 1) - 1:
                found[test] = seconds
    return found


def tasks_of(one: Mutant, plan: Plan, record: Record) -> list[Task]:
    """Runs of the fastest tests that run its line, of the others that do, and of the rest of its row."""
    runs = tests_that_run(one, plan, record)
    quick, left = set[str](), QUICK
    for test in sorted(runs, key=runs.__getitem__):
        left -= runs[test]
        if left >= 0 or not quick:
            quick.add(test)
    every = {test: seconds for file in plan.tests[one.path] for test, seconds in record.traces[file]["passed"].items()}
    tasks = []
    for chosen in (quick, runs.keys() - quick, every.keys() - runs.keys()):
        if chosen:
            seconds: dict[str, float] = defaultdict(float)
            for test in chosen:
                seconds[test.partition("::")[0].removeprefix("tests/")] += every[test]
            files = tuple(sorted(seconds, key=seconds.__getitem__))
            tasks.append(Task(files, frozenset(chosen), mutant=one, seconds=30 + 4 * sum(seconds.values())))
    return tasks


def plant(plan: Plan, runner: Runner, record: Record) -> None:
    """Try each bug not in the record. A test that notices one must pass alone without it, or the program exits."""
    todo = {one.key: tasks_of(one, plan, record) for one in plan.drawn if one.key not in record.results}
    tasks = deque(some.pop(0) for some in todo.values())
    taken: dict[str, float] = defaultdict(float)
    sure = {entry["by"] for entry in record.results.values()}
    waiting: dict[str, list[tuple[Mutant, str]]] = defaultdict(list)

    def note(one: Mutant, outcome: str, by: str) -> None:
        record.add(mutant=one.key, outcome=outcome, by=by, seconds=round(taken[one.key], 1))
        done = sum(other.key in record.results for other in plan.drawn)
        tell(f"{done}/{len(plan.drawn)} {outcome}: {one.path}:{one.line} {one.kind}, {taken[one.key]:.1f} s, {by}")

    def finish(task: Task, result: Result) -> None:
        one = task.mutant
        if one is None:
            (by,) = task.chosen or ("",)
            if result.outcome != "survived":
                raise SystemExit(f"{by} noticed a bug, but fails alone without one:\n{result.output}")
            sure.add(by)
            for mutant, outcome in waiting.pop(by):
                note(mutant, outcome, by)
            return
        taken[one.key] += result.seconds
        by = result.failed or f"exit status {result.status}"
        if result.outcome == "survived" and todo[one.key]:
            tasks.appendleft(todo[one.key].pop(0))
        elif "::" not in result.failed or by in sure:
            note(one, result.outcome, by)
        else:
            if by not in waiting:
                tasks.appendleft(Task((by.partition("::")[0].removeprefix("tests/"),), frozenset((by,))))
            waiting[by].append((one, result.outcome))

    runner.run(tasks, finish)


def report(plan: Plan, record: Record) -> str:
    """A table of areas, the bugs that survived, and the drawn changes that are no bugs."""
    rows: dict[str, list[int]] = {area: [0, 0, 0] for area in AREAS if area in map(plan.area.get, plan.tests)}
    survivors, others = list[str](), list[str]()
    for one in plan.drawn:
        survived = record.results[one.key]["outcome"] == "survived"
        for index, value in enumerate((1, not survived, survived)):
            rows[plan.area[one.path]][index] += value
        if survived:
            survivors += _shown(one, "**survived**")
    for one, why in plan.left_out:
        others += _shown(one, why)
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = ["| area | planted | caught | survived | caught |", "|---|---:|---:|---:|---:|"]
    for area, (planted, caught, survived) in rows.items():
        if planted:
            lines.append(f"| {area} | {planted} | {caught} | {survived} | {caught / planted:.0%} |")
    drawn = f"Drawn as well, and no bugs, since no result changes: {len(plan.left_out)}"
    return "\n".join([*lines, "", *survivors, drawn, "", *others])


def _shown(one: Mutant, what: str) -> list[str]:
    change = [
        f"    {sign} {line}" for sign, text in (("-", one.before), ("+", one.after)) for line in text.split("\n")
    ]
    return [f"`{one.path}:{one.line}`, {one.function}, {one.kind}: {what}", "", *change, ""]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--count", type=int, default=240, help="bugs, over all areas by their shares")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATH", help="areas, product files or folders")
    parser.add_argument("--jobs", type=int, default=2, help="runs of pytest at a time")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what is found there, and go on from it")
    parser.add_argument("--list", action="store_true", help="print the bugs, plant none")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children end and copies are removed
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Path(folder).resolve() / "whole"
        digest = copy_tree(tree)
        plan = Plan(tree, options.seed, options.count, options.only)
        if options.list:
            for one in plan.drawn:
                print(f"{one.path}:{one.line} {one.function}, {one.kind}\n- {one.before}\n+ {one.after}\n")
            return 0
        record = Record(options.resume, digest)
        import_what_tests_import()
        runner = Runner(tree, tree.parent, options.jobs)
        trace(plan, runner, record)
        plant(plan, runner, record)
        print(report(plan, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
