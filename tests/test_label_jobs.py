"""Labels by several processes: the same bytes as by one, whoever is killed, and whenever."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from label_workers import CONFIG, PER_PASS, Orders, delta, finished, save_adapters, start
from reference import random_lora
from torch import Tensor
from torchrun import torchrun

from lora_delta import DifferentiableDeltaCompute, cli
from lora_delta.adapters import save_peft_adapter
from lora_delta.embedded import embedded_checkpoint
from lora_delta.label_parts import LabelJob
from lora_delta.label_table import DeltaLabels
from lora_delta.labels import compute_labels
from lora_delta.lock import folder_lock
from qwen_functional import Lora, LoraSpec, Qwen2Config
from qwen_functional.ops.linear import can_pack

NAMES = "abcdefghijklm"
UNITS = 7
KILLS = 20


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen adapters of three kinds. One overflows, one cannot be read, and two are copies of others, which must not
    be taken for finished because those are.
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


def in_one_process(adapters: Path, out: Path) -> dict[str, bytes]:
    compute_labels(delta(), [adapters], out, adapters_per_pass=PER_PASS, progress=False)
    return contents(out)


@pytest.fixture(scope="module")
def uninterrupted(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of all files that an uninterrupted job in this very process leaves."""
    files = in_one_process(adapters, tmp_path_factory.mktemp("uninterrupted") / "labels")
    manifest = json.loads(files["manifest.json"])
    assert (len(files), len(manifest["adapters"]), len(manifest["failed"])) == (2, 11, 2)
    return files


def started_units(log: Path) -> list[tuple[int, int]]:
    """(rank, unit) of every pass that was begun."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(rank), int(unit)) for rank, unit in map(str.split, lines)]


def units_on_disk(out: Path) -> set[int]:
    """Units that a job has finished, as long as it is under way."""
    files = [file for job in out.glob("parts-*/job.json") for file in job.parent.glob("unit-*.safetensors")]
    return {int(file.stem.removeprefix("unit-")) for file in files}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_bytes_depend_on_the_number_of_processes(
    n: int, adapters: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    orders = Orders(tmp_path / "log", dict.fromkeys(range(n), 0.2))
    assert finished(start(n, adapters, tmp_path / "labels", orders)) == [0] * n
    assert contents(tmp_path / "labels") == uninterrupted
    begun = started_units(orders.log)
    assert sorted(unit for _, unit in begun) == list(range(UNITS)), "a unit was computed twice, or by nobody"
    assert {rank for rank, _ in begun} == set(range(n))


def test_a_slow_process_holds_up_the_others(
    adapters: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    orders = Orders(tmp_path / "log", {0: 0.02, 1: 1.5})
    assert finished(start(2, adapters, tmp_path / "labels", orders)) == [0, 0]
    units = Counter(rank for rank, _ in started_units(orders.log))
    assert units[1] <= 2 < units[0], units  # one that computes, one that is read ahead
    assert contents(tmp_path / "labels") == uninterrupted


def test_a_job_that_was_killed_loses_more_than_its_passes_or_ends_in_other_bytes(
    adapters: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    def orders(name: str) -> Orders:
        return Orders(tmp_path / name, {0: 0.04, 1: 0.04}, file_seconds=0.004)

    began = time.monotonic()
    assert finished(start(1, adapters, tmp_path / "whole" / "labels", orders("log"))) == [0]
    seconds = time.monotonic() - began
    draw = random.Random(7)
    kills: list[int] = []  # units on disk at each
    episode, runs = 0, 0
    while len(kills) < KILLS:
        out = tmp_path / str(episode) / "labels"
        runs += 1
        n = 1 + runs % 2
        before = units_on_disk(out)
        ranks = start(n, adapters, out, orders(f"log {runs}"))
        victims = draw.choice([ranks, [draw.choice(ranks)]])
        _wait(ranks, draw.uniform(0, seconds))
        if all(process.is_alive() for process in ranks):
            for process in victims:
                process.kill()
            _wait(ranks, 0.05)  # torchrun ends the others soon after one has died
            for process in ranks:
                process.kill()
        statuses = finished(ranks)
        begun = {unit for _, unit in started_units(tmp_path / f"log {runs}")}
        assert begun.isdisjoint(before), "a finished unit was computed again"
        if -9 in statuses:
            there = units_on_disk(out)
            kills.append(len(there))
            if list(out.glob("parts-*/job.json")):  # else it had not begun, or had finished
                assert before <= there
                assert len(begun - there) <= n, "more than the unfinished passes was lost"
            continue
        assert statuses == [0] * n
        assert contents(out) == uninterrupted
        episode += 1
    assert finished(start(2, adapters, out, orders("log"))) == [0, 0]
    assert contents(out) == uninterrupted
    assert len([kill for kill in kills if 0 < kill < UNITS]) >= KILLS // 4, kills


def _wait(ranks: list, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.is_alive() for process in ranks):
        time.sleep(0.002)


def test_a_file_that_is_not_written_or_removed_when_the_process_dies_makes_other_bytes(
    adapters: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    units: list[list[str]] = []
    for operation in range(100):
        out, log = tmp_path / str(operation) / "labels", tmp_path / f"log {operation}"
        (status,) = finished(start(1, adapters, out, Orders(log, dies_at=operation)))
        if status == 0:
            break
        assert status == -9
        for job in out.glob("parts-*/job.json"):
            units = json.loads(job.read_text())["units"]
        *done, _ = [unit for _, unit in started_units(log)] or [0]
        report = compute_labels(delta(), [adapters], out, adapters_per_pass=PER_PASS, progress=False)
        assert {name for unit in done for name in units[unit]}.isdisjoint(report.computed), operation
        assert contents(out) == uninterrupted, operation
    assert operation >= 2 + UNITS + 4  # the job, its units, table, manifest, job and lock


def test_an_interrupted_job_ends_in_other_bytes(
    adapters: Path, uninterrupted: dict[str, bytes], tmp_path: Path
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
def test_a_process_that_fails_leaves_the_others_waiting(
    kind: str, status: int, adapters: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    for rank in (0, 1):
        orders = Orders(tmp_path / f"log {rank}", {1 - rank: 0.3}, raises=(rank, kind))
        assert finished(start(2, adapters, tmp_path / "labels", orders), seconds=20) == [status, status]
        assert len(started_units(orders.log)) <= 4, "the other went on: expected its pass, and what it had read ahead"
    assert in_one_process(adapters, tmp_path / "labels") == uninterrupted


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_leaves_the_others_waiting_without_torchrun(
    killed: int, adapters: Path, uninterrupted: dict[str, bytes], tmp_path: Path
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


def test_a_job_with_other_adapters_loses_what_a_killed_one_has_finished(adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    (status,) = finished(start(1, adapters, out, Orders(tmp_path / "log", dies_at=4)))
    assert status == -9
    there = units_on_disk(out)
    assert there
    (job,) = (LabelJob.read(file.parent) for file in out.glob("parts-*/job.json"))
    finished_names = {name for unit in there for name in job.units[unit]}
    some = [adapters / name for name in NAMES[::-1][:-1]]
    report = compute_labels(delta(), some, out, adapters_per_pass=PER_PASS, progress=False)
    assert finished_names.isdisjoint(report.computed)
    assert set(DeltaLabels(out).names) >= finished_names - {failure.name for failure in report.failed}
    assert len(contents(out)) == 2


def test_parts_of_other_settings_go_into_the_table(adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    finished(start(1, adapters, out, Orders(tmp_path / "log", dies_at=4)))
    before = contents(out)
    other = delta()
    other.pooling = "none"
    with pytest.raises(ValueError, match="pooling is 'mean' there and 'none' here"):
        compute_labels(other, [adapters], out, adapters_per_pass=PER_PASS, progress=False)
    del before[".lock"]
    assert contents(out) == before


def test_two_jobs_write_to_one_folder(adapters: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "labels"
    first = start(2, adapters, out, Orders(tmp_path / "log", {0: 0.5, 1: 0.5}))
    while not units_on_disk(out):
        assert first[0].is_alive()
        time.sleep(0.01)
    holder = rf"{out} is in use by another job, process {first[0].pid} on {socket.gethostname()}"
    with pytest.raises(ValueError, match=holder):
        compute_labels(delta(), [adapters], out, adapters_per_pass=PER_PASS, progress=False)
    assert finished(start(2, adapters, out, Orders(tmp_path / "other log"))) == [2, 2]
    assert not (tmp_path / "other log").exists()
    assert finished(first) == [0, 0]
    assert contents(out) == uninterrupted


def test_a_system_without_locks_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_delta.lock.fcntl", None)
    with pytest.warns(UserWarning, match="cannot be locked on this system: run one job"), folder_lock(tmp_path / "out"):
        assert list((tmp_path / "out").iterdir()) == []


def test_free_memory_and_threads_change_the_bytes_when_a_job_goes_on(
    adapters: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "labels", set()
    finished(start(1, adapters, out, Orders(tmp_path / "log", dies_at=4)))
    other = delta()
    packed = other.weights.packed is not None  # as the killed job had it: it depends on the processor
    monkeypatch.setattr("qwen_functional.weights.packing_pays", can_pack)
    other.weights = replace(other.weights, packed=None) if packed else other.weights.prepack()
    compute = DifferentiableDeltaCompute.deltas

    def watched(delta: DifferentiableDeltaCompute, lora: Lora) -> Tensor:
        seen.add((delta.weights.packed is not None, torch.get_num_threads()))
        return compute(delta, lora)

    monkeypatch.setattr(DifferentiableDeltaCompute, "deltas", watched)
    torch.set_num_threads(2)
    try:
        compute_labels(other, [adapters], out, adapters_per_pass=PER_PASS, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == {(packed, 1)}
    assert contents(out) == uninterrupted


# --- The command ------------------------------------------------------------------------------------------


def label_in_processes(n: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = ["-m", "lora_delta", "label", "--model", str(embedded_checkpoint()), *map(str, arguments)]
    return torchrun(n, *command, env=environment)


def test_the_command_under_torchrun_labels_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, spec = Qwen2Config.from_json_file(embedded_checkpoint() / "config.json"), LoraSpec(rank=2)
    for seed, name in enumerate("abc"):
        tensors = random_lora(config, spec, seed=seed)
        save_peft_adapter(tmp_path / "teachers" / name, spec, tensors, base_model="a/base", config=config)
    options = ["--adapters-per-pass", "1", "--json", tmp_path / "teachers"]
    done = label_in_processes(2, "--out", tmp_path / "two" / "labels", *options)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["labels"], facts["computed"], facts["failed"]) == (3, 3, [])
    assert "3/3" in done.stderr
    alone = ["label", "--model", embedded_checkpoint(), "--quiet", *options, "--out", tmp_path / "one" / "labels"]
    assert cli.main([*map(str, alone)]) == 0
    assert contents(tmp_path / "one" / "labels") == contents(tmp_path / "two" / "labels")
    capsys.readouterr()
    message = f"lora-delta label: {tmp_path / 'one' / 'labels'} is in use by another job, process {os.getpid()} on"
    with folder_lock(tmp_path / "one" / "labels"):
        assert cli.main([*map(str, alone)]) == 2
        done = label_in_processes(2, *alone[3:])
    assert message in capsys.readouterr().err
    assert message in done.stderr
    assert "(exitcode: 2)" in done.stderr, "a process has not ended by itself, or with another status"
    assert contents(tmp_path / "one" / "labels") == contents(tmp_path / "two" / "labels")
