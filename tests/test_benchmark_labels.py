"""The labels' benchmark compares what it says it compares, and times nothing that disagrees. No speed is asserted."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CHATML, make_checkpoint, save_checkpoint
from reference import hf_model, hidden_states_at_end, one_by_one, peft_model, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from lora_delta.probes.texts import create_mixed_probes
from qwen_functional.dtypes import cpu_multiplies_bfloat16

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import floor  # noqa: E402
import labels  # noqa: E402
from compare import DisagreementError  # noqa: E402
from labels import FLOOR, LABELS, PEFT, Job  # noqa: E402
from measure import Timing  # noqa: E402
from probe_sets import synthetic_probes  # noqa: E402
from workload import Workload  # noqa: E402

TINY = ["--size", "tiny", "--adapters", "3", "--adapters-per-pass", "2", "--rank", "4", "--rounds", "1"]
FAST = ["--threads", "1", "--dtype", "float32"]


def deltas_here(way: str, job: Job, n: int, scratch: Path) -> Tensor:
    """``labels.deltas_of`` without a process of its own."""
    made: Any = labels.WAYS[way](job)
    return made.label(n).double()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run on the tiny size, timed in processes: the file that it wrote, and what it printed.

    The folder ``scratch`` beside the file is for temporary files.
    """
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    scratch = path.parent / "scratch"
    scratch.mkdir()
    deltas_of = labels.deltas_of
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        # To import PEFT once more takes as long as all the rest.
        patch.setattr(labels, "deltas_of", lambda way, *rest: (deltas_here if way == PEFT else deltas_of)(way, *rest))
        patch.setattr(tempfile, "tempdir", str(scratch))
        patch.setenv("TMPDIR", str(scratch))
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(variable, "1")
        assert labels.main([*TINY, *FAST, "--json", str(path)]) == 0
    return path, printed.getvalue()


def job_of(folder: Path, adapters: int = 3, dtype: torch.dtype = torch.float32) -> Job:
    workload = Workload(None, "tiny", synthetic_probes("generic", 1000), adapters, 4, dtype, 1)
    return Job(workload, labels.save_adapters(workload, folder), 2)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Three adapters, two per pass, so that the last pass is not full."""
    return job_of(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Folder of the temporary files of a run that checks in this process, and fails where it comes to the timing."""

    def process(way: str, job: Job) -> None:
        raise AssertionError(f"{way} was timed")

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(labels, "deltas_of", deltas_here)
    monkeypatch.setattr(labels, "process", process)
    monkeypatch.setattr(labels, "set_threads", lambda threads: None)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return scratch


class Clock:
    """In place of a process: takes the given seconds, one after another, and 200 bytes, 80 of them weights."""

    def __init__(self, way: str, seconds: list[float], others: float | None, calls: list[str]) -> None:
        self.way, self.seconds, self.others, self.calls = way, iter(seconds), others, calls

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if call is labels._timed:
            self.calls.append(self.way)
            future.set_result((Timing(next(self.seconds), self.others), 200, 80))
        else:
            future.set_result(160)  # a peak
        return future


def clocks(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]], others: float | None = None) -> list[str]:
    """Nothing is timed; the ways in the order in which they would have been."""
    calls: list[str] = []
    monkeypatch.setattr(labels, "process", lambda way, job: Clock(way, seconds[way], others, calls))
    return calls


def numbers(value: Any) -> Iterator[float]:
    """Every number of a record."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)):
        yield value


def test_the_ways_agree_and_the_record_is_complete(finished: tuple[Path, str]) -> None:
    record = json.loads(finished[0].read_text())
    assert record["model"] == "random weights of size tiny"
    assert record["probes"] == {"kind": "generic", "count": 5, "tokens": 158, "tree_tokens": 155}
    assert (record["adapters"], record["adapters_per_pass"], record["rank"]) == (3, 2, 4)
    assert record["machine"]["threads"] == 1
    (run,) = record["runs"]
    assert run["dtype"] == "float32"
    assert run["errors"].keys() == {LABELS}
    assert 0 < run["errors"][LABELS] <= 1e-4, "no error at all: something was compared with itself"
    assert list(run["ways"]) == [LABELS, PEFT]
    for entry in run["ways"].values():
        (seconds,) = entry["seconds"]
        assert min(seconds, entry["first_seconds"], run["floor"]["seconds"]) > 0
        assert entry["peak_bytes"] >= entry["weights_bytes"] > 0
    assert all(math.isfinite(number) and number >= 0 for number in numbers(record))


def test_the_printed_table_is_made_of_the_json_alone(finished: tuple[Path, str]) -> None:
    path, printed = finished
    headline, _, rest = printed.partition("\n")
    (run,) = json.loads(path.read_text())["runs"]
    assert headline == (
        "random weights of size tiny, 3 adapters of rank 4, 2 per pass, 5 generic probes of 158 tokens, 1 threads"
    )
    assert rest == labels.table(run) + "\n"


def test_a_finished_run_leaves_no_file_but_its_json(finished: tuple[Path, str]) -> None:
    folder = finished[0].parent
    assert sorted(each.name for each in folder.iterdir()) == ["result.json", "scratch"]
    assert not list((folder / "scratch").iterdir())


@pytest.mark.parametrize("way", [LABELS, PEFT])
def test_deltas_equal_those_of_each_probe_alone_in_float64(way: str, job: Job) -> None:
    config, weights = job.workload.engine_weights()
    model = peft_model(hf_model(config, weights, torch.float64), job.workload.spec)

    def pooled(tensors: dict[str, Tensor]) -> Tensor:
        return torch.stack([hidden_states_at_end(model, tensors, probe)[0] for probe in job.workload.probes]).mean(0)

    lora = {name: tensor.double() for name, tensor in job.workload.lora(config).items()}
    base = pooled({name: torch.zeros_like(tensor[0]) for name, tensor in lora.items()})
    expected = torch.stack([pooled(tensors) - base for tensors in one_by_one(lora)])
    made: Any = labels.WAYS[way](job)
    for n in (3, 3, 2):  # another round is like the first
        for got, delta in zip(made.label(n), expected[:n], strict=True):
            assert relative_error(got, delta) < 1e-5


def test_pefts_model_keeps_one_adapter_alone(job: Job) -> None:
    peft = labels.Peft(job)
    peft.label(3)
    assert list(peft.model.peft_config) == ["first"]


def test_an_adapter_that_fails_is_an_error(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    (Path(job.folders[1]) / "adapter_model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"1 of 3 adapters failed: .*adapter-0001"):
        labels.Labels(job).label(3)


def test_the_floor_multiplies_as_much_as_the_forward(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = "mm into a buffer"  # the counter does not know oneDNN's products
    monkeypatch.setattr(floor, "LAYOUTS", {plain: floor.LAYOUTS[plain]})
    made = labels.ForwardFloor(job)
    made.label(3)  # picks a layout per shape
    with FlopCounterMode(display=False) as counter:
        made.label(3)
    one_pass = 2 * (2 * 155) * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert made.flop == one_pass
    assert counter.get_total_flops() == 2 * one_pass  # both of two adapters


@pytest.mark.parametrize(
    ("spoil", "off"),
    [
        (lambda deltas: deltas * 1.001, r"1\.0e-03"),
        (lambda deltas: deltas.flip(0), r"\d\.\de[+-]0[01]"),
        (lambda deltas: deltas * torch.tensor([[1.0], [1.0], [0.0]]), r"\d\.\de-01"),
        (lambda deltas: deltas * torch.nan, "nan"),
    ],
    ids=["a thousandth", "another order", "one is zero", "NaN"],
)
def test_deltas_that_are_off_make_the_run_fail_and_leave_no_table_or_file(
    spoil: Callable[[Tensor], Tensor],
    off: str,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Spoiled(labels.Labels):
        def label(self, n: int) -> Tensor:
            return spoil(super().label(n))

    monkeypatch.setitem(labels.WAYS, LABELS, Spoiled)
    path = scratch.parent / "result.json"
    assert labels.main([*TINY, *FAST, "--json", str(path)]) == 1
    printed = capsys.readouterr()
    assert re.search(rf"^error: deltas are off by {off}, expected at most 1\.0e-04$", printed.err, re.MULTILINE)
    assert "|" not in printed.out
    assert not path.exists()
    assert not list(scratch.iterdir())


def test_bfloat16_deltas_are_about_as_near_to_float32_as_pefts(tmp_path: Path, scratch: Path) -> None:
    job = job_of(tmp_path / "adapters", dtype=torch.bfloat16)
    errors = labels.agreement(job, scratch)
    assert list(errors) == [LABELS, PEFT]
    least = 1e-4 if cpu_multiplies_bfloat16() else 1e-8  # this library then multiplies in float32, PEFT does not
    assert least < errors[LABELS] <= labels.NARROW_FACTOR * errors[PEFT] < 0.2


@pytest.mark.parametrize("factor", [0.5, 1.4, 1.6, math.nan])
def test_bfloat16_is_compared_with_float32_of_the_same_rounded_numbers(
    factor: float, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = torch.randn(labels.CHECKED, 64, generator=torch.Generator().manual_seed(0)).double()
    asked = []

    def deltas_of(way: str, job: Job, n: int, scratch: Path) -> Tensor:
        asked.append((way, job.workload.dtype, job.workload.rounded_to, n))
        error = 0.0 if job.workload.dtype == torch.float32 else 0.01 * (factor if way == LABELS else 1)
        return reference[:n] * (1 + error)

    monkeypatch.setattr(labels, "deltas_of", deltas_of)
    narrow = dataclasses.replace(job.workload, dtype=torch.bfloat16)
    narrow_job = dataclasses.replace(job, workload=narrow, folders=job.folders * 2)
    if factor < labels.NARROW_FACTOR:
        errors = labels.agreement(narrow_job, tmp_path)
        assert errors == {LABELS: pytest.approx(0.01 * factor), PEFT: pytest.approx(0.01)}
    else:
        with pytest.raises(DisagreementError, match=r"deltas are off by .*, expected at most 1\.5e-02"):
            labels.agreement(narrow_job, tmp_path)
    assert asked == [
        (PEFT, torch.float32, torch.bfloat16, labels.CHECKED),
        (LABELS, torch.bfloat16, None, labels.CHECKED),
        (PEFT, torch.bfloat16, None, labels.CHECKED),
    ]


def test_a_checkpoints_deltas_agree_and_its_probes_are_its_own(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(scratch.parent / "some model", vocab_size=300, max_position_embeddings=512)
    make_checkpoint(folder, chat_template=CHATML)
    clocks(monkeypatch, {LABELS: [1.0] * 2, PEFT: [1.0] * 2, FLOOR: [1.0] * 2})
    path = scratch.parent / "result.json"
    options = ["--model", str(folder), "--probes", "chat", "--json", str(path)]
    assert labels.main([*TINY[2:], *FAST, *options]) == 0, capsys.readouterr().err
    record = json.loads(path.read_text())
    chats = [[{"role": "user", "content": text}] for text in create_mixed_probes()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    assert record["model"] == "some model"
    assert (record["probes"]["count"], record["probes"]["tokens"]) == (15, sum(map(len, expected)))


def test_numbers_are_those_of_the_timings(job: Job, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {LABELS: [9.0, 3, 1, 2], PEFT: [10.0, 8, 4, 6], FLOOR: [11.0, 0.4, 0.2, 0.3]}
    order = clocks(monkeypatch, seconds, others=0.4)
    run = labels.measured(job, 3, scratch)
    ours, pefts = run["ways"][LABELS], run["ways"][PEFT]
    assert (ours["first_seconds"], ours["seconds"], ours["median"]) == (9, [3, 1, 2], 2)
    assert (pefts["first_seconds"], pefts["seconds"], pefts["median"]) == (10, [8, 4, 6], 6)
    assert (ours["labels_per_second"], pefts["labels_per_second"], run["ratio"]) == (1.5, 0.5, 3)
    # Of two passes with room for four, three adapters were used.
    assert run["floor"]["seconds"] == pytest.approx(0.3 * 3 / 4)
    assert ours["share_of_floor"] == pytest.approx(0.1125)
    assert pefts["share_of_floor"] == pytest.approx(0.0375)
    rounds = [order[start : start + 3] for start in range(3, 12, 3)]
    assert {tuple(place) for place in zip(*rounds, strict=True)} == {
        (PEFT, FLOOR, LABELS),
        (FLOOR, LABELS, PEFT),
        (LABELS, PEFT, FLOOR),
    }, "a way always has the same place in a round"
    table = labels.table(run)
    header, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|"))
    assert [dict(zip(header, row, strict=True)) for row in rows] == [
        {
            "float32": way,
            "labels/s": rate,
            "seconds (min to max)": spread,
            "first run": first,
            "peak GB": "0.00",
            "over weights GB": "0.00",
            "floor": share,
        }
        for way, rate, spread, first, share in [
            (LABELS, "1.5", "2 (1 to 3)", "9", "0.11"),
            (PEFT, "0.5", "6 (4 to 8)", "10", "0.04"),
        ]
    ]
    assert "compute_labels is 3.00 times as fast." in table
    assert "other processes kept 0.4 CPUs busy" in table


def test_a_run_does_not_count_as_disturbed_where_it_cannot_be_told(
    job: Job, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks(monkeypatch, {LABELS: [1.0] * 2, PEFT: [1.0] * 2, FLOOR: [1.0] * 2}, others=None)
    assert "Disturbed" not in labels.table(labels.measured(job, 1, scratch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --model --size is required"),
        (["--size", "tiny", "--model", "somewhere"], "not allowed with argument"),
        (["--size", "9b"], "argument --size: invalid choice: '9b'"),
        (["--size", "tiny", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--size", "tiny", "--probes", "none"], "argument --probes: invalid choice: 'none'"),
        (["--size", "tiny", "--adapters", "0"], "--adapters is 0, expected at least 1"),
        (["--size", "tiny", "--adapters-per-pass", "-1"], "--adapters-per-pass is -1, expected at least 1"),
        (["--size", "tiny", "--rank", "0"], "--rank is 0, expected at least 1"),
        (["--size", "tiny", "--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--size", "tiny", "--threads", "0"], "--threads is 0, expected at least 1"),
        (["--size", "tiny", "--json", "nowhere/x.json"], "--json names nowhere/x.json, expected a file in a folder"),
    ],
)
def test_bad_arguments_are_refused(
    options: list[str], message: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        labels.main(options)
    assert message in capsys.readouterr().err
