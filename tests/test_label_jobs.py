"""Several processes compute the same labels as one, to the bit, whichever are killed, and whenever."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from label_workers import CONFIG, PER_PASS, Orders, delta, finished, save_adapters, start
from reference import random_lora
from torch import Tensor
from torchrun import torchrun

from lora_delta import DifferentiableDeltaCompute, cli
from lora_delta.embedded import embedded_checkpoint
from lora_delta.files import LOCK, folder_lock
from lora_delta.labelling.labels import LabelReport, compute_labels
from lora_delta.labelling.table import DeltaLabels
from lora_delta.labelling.units import JOB
from lora_delta.peft.adapters import save_peft_adapter
from qwen_functional import Lora, LoraSpec, read_config
from qwen_functional.backends.onednn import can_pack

NAMES = "abcdefghijklm"
UNITS = 7
KILLS = 20


Deltas = dict[str, bytes]


def contents(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of all files but the lock, which stays."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != LOCK]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def deltas(out: Path) -> Deltas:
    """{adapter's name: the bytes of its delta, or why it failed} of a folder without a running job."""
    assert contents(out).keys() == {"manifest.json", "labels.jsonl", "deltas.f32"}
    labels = DeltaLabels(out)
    failed = {name: failure.reason.encode() for name, failure in labels.failures.items()}
    return {**{name: delta.numpy().tobytes() for name, delta in labels.items()}, **failed}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen adapters of three kinds. One overflows, one cannot be read, and two are copies of others: they must not
    count as finished just because the originals are.
    """
    folder = save_adapters(tmp_path_factory.mktemp("adapters") / "teachers", NAMES)
    for name, original in (("k", "a"), ("m", "h")):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name / file).write_bytes((folder / original / file).read_bytes())
    (folder / "c" / "adapter_model.safetensors").write_bytes(b"1234")
    spec = LoraSpec(rank=2)
    huge = {name: 1e30 * tensor for name, tensor in random_lora(CONFIG, spec).items()}
    save_peft_adapter(folder / "d", spec, huge, base_model="a/base", config=CONFIG)
    return folder


def label(adapters: Sequence[Path], out: Path, base: DifferentiableDeltaCompute | None = None) -> LabelReport:
    """A job in this process; warnings about what a killed job left unfinished are ignored."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*it was not finished, and is ignored", UserWarning)
        return compute_labels(base or delta(), adapters, out, adapters_per_pass=PER_PASS, progress=False)


def in_one_process(adapters: Path, out: Path) -> Deltas:
    label([adapters], out)
    return deltas(out)


@pytest.fixture(scope="module")
def uninterrupted(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Deltas:
    """The result of an uninterrupted job in this process."""
    out = tmp_path_factory.mktemp("uninterrupted") / "labels"
    found = in_one_process(adapters, out)
    assert (len(DeltaLabels(out)), len(DeltaLabels(out).failures), len(found)) == (11, 2, 13)
    return found


def started_units(log: Path) -> list[tuple[int, int]]:
    """(rank, unit) of every pass that has begun."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(rank), int(unit)) for rank, unit in map(str.split, lines)]


def units_on_disk(out: Path) -> set[int]:
    """The units that a running job has finished."""
    try:
        before = json.loads((out / JOB).read_text())["lines"]
        own = [file.read_bytes().splitlines(True) for file in out.glob("labels-*.jsonl")]
        lines = [*(out / "labels.jsonl").read_bytes().splitlines(True)[before:], *chain.from_iterable(own)]
    except FileNotFoundError:  # it has ended, perhaps just now
        return set()
    return {json.loads(line)["unit"] for line in lines if line.endswith(b"\n")}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_deltas_do_not_depend_on_the_number_of_processes(
    n: int, adapters: Path, uninterrupted: Deltas, tmp_path: Path
) -> None:
    orders = Orders(tmp_path / "log", dict.fromkeys(range(n), 0.2))
    assert finished(start(n, adapters, tmp_path / "labels", orders)) == [0] * n
    assert deltas(tmp_path / "labels") == uninterrupted
    begun = started_units(orders.log)
    assert sorted(unit for _, unit in begun) == list(range(UNITS)), "a unit was computed twice, or by nobody"
    assert {rank for rank, _ in begun} == set(range(n))


def test_a_slow_process_does_not_hold_up_the_others(
    adapters: Path, uninterrupted: Deltas, tmp_path: Path
) -> None:
    orders = Orders(tmp_path / "log", {0: 0.02, 1: 1.5})
    assert finished(start(2, adapters, tmp_path / "labels", orders)) == [0, 0]
    units = Counter(rank for rank, _ in started_units(orders.log))
    assert units[1] <= 2 < units[0], units  # one being computed, one read ahead
    assert deltas(tmp_path / "labels") == uninterrupted


def test_a_killed_job_loses_its_unfinished_passes_alone_and_ends_in_the_same_deltas(
    adapters: Path, uninterrupted: Deltas, tmp_path: Path
) -> None:
    def orders(name: str) -> Orders:
        return Orders(tmp_path / name, {0: 0.04, 1: 0.04}, file_seconds=0.004)

    draw = random.Random(7)
    kills: list[int] = []  # the number of units on disk at each
    episode, runs = 0, 0
    while len(kills) < KILLS:
        out = tmp_path / str(episode) / "labels"
        runs += 1
        n = 1 + runs % 2
        before = units_on_disk(out)
        ranks = start(n, adapters, out, orders(f"log {runs}"))
        victims = draw.choice([ranks, [draw.choice(ranks)]])
        more = len(before) + draw.randrange(4)
        _wait(ranks, 30, lambda: len(units_on_disk(out)) >= more)  # noqa: B023  (called in this iteration)
        _wait(ranks, draw.uniform(0, 0.15))
        if all(process.is_alive() for process in ranks):
            for process in victims:
                process.kill()
            _wait(ranks, 0.05)  # torchrun ends the others soon after one dies
            for process in ranks:
                process.kill()
        statuses = finished(ranks)
        begun = {unit for _, unit in started_units(tmp_path / f"log {runs}")}
        assert begun.isdisjoint(before), "a finished unit was computed again"
        if -9 in statuses:
            there = units_on_disk(out)
            kills.append(len(there))
            if (out / JOB).exists():  # else it has not begun, or has finished
                assert before <= there
                assert len(begun - there) <= n, "more than the unfinished passes was lost"
            continue
        assert statuses == [0] * n
        assert deltas(out) == uninterrupted
        episode += 1
    assert finished(start(2, adapters, out, orders("log"))) == [0, 0]
    assert deltas(out) == uninterrupted
    assert len([kill for kill in kills if 0 < kill < UNITS]) >= KILLS // 4, kills


def _wait(ranks: list, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.is_alive() for process in ranks) and not until():
        time.sleep(0.002)


def test_a_job_that_dies_at_any_file_operation_or_half_way_through_it_ends_in_the_same_deltas(
    adapters: Path, uninterrupted: Deltas, tmp_path: Path
) -> None:
    units: list[list[str]] = []
    for operation in range(100):
        out, log = tmp_path / str(operation) / "labels", tmp_path / f"log {operation}"
        (status,) = finished(start(1, adapters, out, Orders(log, dies_at=operation)))
        if status == 0:
            break
        assert status == -9
        if (out / JOB).exists():
            units = json.loads((out / JOB).read_text())["units"]
        *done, _ = [unit for _, unit in started_units(log)] or [0]
        report = label([adapters], out)
        assert {name for unit in done for name in units[unit]}.isdisjoint(report.computed), operation
        assert deltas(out) == uninterrupted, operation
    assert operation >= 2 + 2 + 2 * UNITS + 2  # manifest, job, log, units, and the job's end


def test_an_interrupted_job_can_be_read_and_ends_in_the_same_deltas(
    adapters: Path, uninterrupted: Deltas, tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    for rank in (1, 0):
        orders = Orders(tmp_path / f"log {rank}", {0: 0.2, 1: 0.2}, raises=(rank, "KeyboardInterrupt"))
        assert finished(start(2, adapters, out, orders)) == [130, 130]
        done = {unit for other, unit in started_units(orders.log) if other != rank}
        assert done
        assert done <= units_on_disk(out)
        assert len(DeltaLabels(out)) > 0, "what is finished cannot be read"
    assert in_one_process(adapters, out) == uninterrupted


@pytest.mark.parametrize(("kind", "status"), [("RuntimeError", 3), ("ValueError", 2)])
def test_when_a_process_fails_the_others_end_after_what_they_have_begun(
    kind: str, status: int, adapters: Path, uninterrupted: Deltas, tmp_path: Path
) -> None:
    for rank in (0, 1):
        orders = Orders(tmp_path / f"log {rank}", {1 - rank: 0.3}, raises=(rank, kind))
        assert finished(start(2, adapters, tmp_path / "labels", orders), seconds=20) == [status, status]
        assert len(started_units(orders.log)) <= 4, "the other went on: expected its pass, and what it had read ahead"
    assert in_one_process(adapters, tmp_path / "labels") == uninterrupted


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_is_killed_the_others_end_without_torchrun(
    killed: int, adapters: Path, uninterrupted: Deltas, tmp_path: Path
) -> None:
    orders = Orders(tmp_path / "log", {killed: 60, 1 - killed: 0.02})
    ranks = start(2, adapters, tmp_path / "labels", orders)
    while killed not in {rank for rank, _ in started_units(orders.log)}:
        assert ranks[killed].is_alive()
        time.sleep(0.01)
    ranks[killed].kill()
    statuses = finished(ranks, seconds=20)
    assert (statuses[killed], statuses[1 - killed]) == (-9, 3)
    assert in_one_process(adapters, tmp_path / "labels") == uninterrupted


def test_a_job_with_other_adapters_keeps_what_a_killed_one_has_finished(adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    (status,) = finished(start(1, adapters, out, Orders(tmp_path / "log", dies_at=13)))
    assert status == -9
    there = units_on_disk(out)
    assert there
    units = json.loads((out / JOB).read_text())["units"]
    finished_names = {name for unit in there for name in units[unit]}
    some = [adapters / name for name in NAMES[::-1][:-1]]
    report = label(some, out)
    assert finished_names.isdisjoint(report.computed)
    assert set(deltas(out)) >= finished_names


def test_a_job_of_other_settings_leaves_a_killed_one_as_it_is(adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    finished(start(1, adapters, out, Orders(tmp_path / "log", dies_at=13)))
    before = contents(out)
    other = delta(pooling="none")
    with pytest.raises(ValueError, match="pooling is 'mean' there and 'none' here"):
        label([adapters], out, other)
    assert contents(out) == before


def test_two_jobs_do_not_write_to_one_folder(adapters: Path, uninterrupted: Deltas, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    first = start(2, adapters, out, Orders(tmp_path / "log", {0: 0.5, 1: 0.5}))
    while not units_on_disk(out):
        assert first[0].is_alive()
        time.sleep(0.01)
    holder = rf"{out} is in use by another job, process {first[0].pid} on {socket.gethostname()}"
    with pytest.raises(ValueError, match=holder):
        label([adapters], out)
    assert finished(start(2, adapters, out, Orders(tmp_path / "other log"))) == [2, 2]
    assert not (tmp_path / "other log").exists()
    assert finished(first) == [0, 0]
    assert deltas(out) == uninterrupted


def test_a_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(lock: FileLock) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "_acquire", refuses)
    with pytest.warns(UserWarning, match="cannot be locked on this system: run one job"), folder_lock(tmp_path / "out"):
        pass


def test_free_memory_and_threads_do_not_change_the_deltas_when_a_job_goes_on(
    adapters: Path, uninterrupted: Deltas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "labels", set()
    finished(start(1, adapters, out, Orders(tmp_path / "log", dies_at=13)))
    other = delta()
    packed = other.weights.packed is not None  # as in the killed job; this depends on the processor
    monkeypatch.setattr("qwen_functional.weights.packing_pays", can_pack)
    other.weights = replace(other.weights, packed=None) if packed else other.weights.prepack()
    compute = DifferentiableDeltaCompute.deltas

    def watched(delta: DifferentiableDeltaCompute, lora: Lora) -> Tensor:
        seen.add((delta.weights.packed is not None, torch.get_num_threads()))
        return compute(delta, lora)

    monkeypatch.setattr(DifferentiableDeltaCompute, "deltas", watched)
    torch.set_num_threads(2)
    try:
        label([adapters], out, other)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == {(packed, 1)}
    assert deltas(out) == uninterrupted


# --- The command ------------------------------------------------------------------------------------------


def label_in_processes(n: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = ["-m", "lora_delta", "label", "--device", "cpu", "--model", str(embedded_checkpoint())]
    command += map(str, arguments)
    return torchrun(n, *command, env=environment)


def test_the_command_under_torchrun_labels_as_one_process_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, spec = read_config(embedded_checkpoint()), LoraSpec(rank=2)
    for seed, name in enumerate("abc"):
        tensors = random_lora(config, spec, seed=seed)
        save_peft_adapter(tmp_path / "teachers" / name, spec, tensors, base_model="a/base", config=config)
    options = ["--adapters-per-pass", "1", "--json", tmp_path / "teachers"]
    done = label_in_processes(2, "--out", tmp_path / "two" / "labels", *options)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["labels"], facts["computed"], facts["failed"]) == (3, 3, [])
    assert "3/3" in done.stderr
    alone = ["--quiet", *options, "--out", tmp_path / "one" / "labels"]
    alone = ["label", "--device", "cpu", "--model", embedded_checkpoint(), *alone]
    assert cli.main([*map(str, alone)]) == 0
    one = deltas(tmp_path / "one" / "labels")
    assert one == deltas(tmp_path / "two" / "labels")
    capsys.readouterr()
    message = f"lora-delta label: {tmp_path / 'one' / 'labels'} is in use by another job, process {os.getpid()} on"
    with folder_lock(tmp_path / "one" / "labels"):
        assert cli.main([*map(str, alone)]) == 2
        done = label_in_processes(2, *alone[5:])
    assert message in capsys.readouterr().err
    assert message in done.stderr
    assert "(exitcode: 2)" in done.stderr, "a process has not ended by itself, or with another status"
    assert deltas(tmp_path / "one" / "labels") == one
