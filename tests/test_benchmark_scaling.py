"""The scaling benchmark measures the points that it names, and reports those that fail. No speed is asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import hf_model, peft_model
from safetensors.torch import save_file
from torch import Tensor

from qwen_functional import LoraSpec, init_weights

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import scaling  # noqa: E402
from probe_sets import synthetic_probes, tree_tokens  # noqa: E402
from schedule import Samples  # noqa: E402
from sizes import named_config  # noqa: E402
from ways import Engine  # noqa: E402
from workers import Footprint, Job, Pool, WorkerError  # noqa: E402
from workload import Workload  # noqa: E402

TINY = ["--size", "tiny", "--adapters", "1", "2", "--per-pass", "1", "--probes", "2", "16", "--probe-adapters", "1"]
FAST = ["--rounds", "1", "--threads", "1", "--rank", "4"]
DIVIDED = "G = 2 in passes of 1"

Finished = tuple[subprocess.CompletedProcess[str], Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of the script on the tiny size, and the file that it wrote."""
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "scaling.py")),
            *(*TINY, *FAST, "--steady-steps", "12", "--json", str(path)),
        ],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return result, path


@pytest.fixture
def record(finished: Finished) -> dict[str, Any]:
    result, path = finished
    assert result.returncode == 0, result.stderr
    assert [path] == list(path.parent.iterdir()), "a temporary file was left behind"
    return json.loads(path.read_text())


def test_every_point_is_measured(record: dict[str, Any]) -> None:
    assert (record["rank"], record["dtype"], record["way"], record["threads"]) == (4, "bfloat16", "engine", 1)
    points = {
        series["name"]: [
            tuple(point[key] for key in ("adapters", "per_pass", "probes", "tokens", "tree_tokens"))
            for point in series["points"]
        ]
        for series in record["series"]
    }
    # Of synthetic probes: 32 and 31 tokens that share the first; all 15, and the first of them rotated.
    assert points == {
        "adapters": [(1, None, 5, 158, 155), (2, None, 5, 158, 155)],
        "adapters in passes of 1": [(1, 1, 5, 158, 155), (2, 1, 5, 158, 155)],
        "probes": [(1, None, 2, 63, 62), (1, None, 16, 357 + 32, 352 + 32)],
    }
    assert all(series["left_out"] == {} for series in record["series"])


def test_numbers_of_a_point_belong_together(record: dict[str, Any]) -> None:
    config = named_config("tiny")
    model = peft_model(hf_model(config, init_weights(config, seed=0)), LoraSpec(rank=4))
    elements = sum(tensor.numel() for name, tensor in model.named_parameters() if "lora_" in name)
    points = [point for series in record["series"] for point in series["points"]]
    anchor = next(point for point in points if point["name"] == record["anchor"])
    assert (anchor["adapters"], anchor["per_pass"]) == (2, None)
    for point in points:
        seconds, adapters = point["seconds"], point["adapters"]
        assert seconds["min"] <= seconds["median"] <= seconds["max"]
        assert len(seconds["samples"]) == 1
        assert point["seconds_per_adapter"] == pytest.approx(seconds["median"] / adapters)
        assert point["seconds_per_token"] == pytest.approx(seconds["median"] / adapters / point["tree_tokens"])
        # With one group and one round, both ratios are of the same two steps.
        assert point["timed_beside_anchor"]
        assert point["times_anchor"] == pytest.approx(point["seconds_per_token"] / anchor["seconds_per_token"])
        assert point["gradient_bytes"] == 2 * adapters * elements
        assert point["peak_bytes"] >= point["weights_bytes"] > 0
        assert point["step_bytes"] == point["peak_bytes"] - point["weights_bytes"]
        assert point["checkpoint"] == point["peak_checkpoint"] == "none"
        assert isinstance(point["prepacked"], bool)


def test_steady_memory_is_that_after_the_tenth_step_and_later(record: dict[str, Any]) -> None:
    steady = record["steady"]
    resident = steady["resident_bytes"]
    assert (steady["steps"], steady["adapters"], steady["probes"], steady["warm_steps"]) == (12, 1, 5, 10)
    assert len(resident) == 12
    assert steady["warm_bytes"] == resident[9] > 0
    assert (steady["min_bytes"], steady["max_bytes"]) == (min(resident[10:]), max(resident[10:]))
    for end in ("min", "max"):
        assert steady[f"{end}_percent"] == pytest.approx(100 * (steady[f"{end}_bytes"] / resident[9] - 1))


def test_printed_tables_are_made_of_the_json_alone(finished: Finished, record: dict[str, Any]) -> None:
    assert finished[0].stdout.strip() == scaling.tables(record).strip()


def test_rotated_probes_are_distinct_and_share_few_prefixes() -> None:
    mixed = synthetic_probes("mixed", 1000)
    assert scaling.rotated_probes(mixed, 15) == mixed
    assert scaling.rotated_probes(mixed, 4) == mixed[:4]
    for count in (16, 30, 60, 151, 357):
        probes = scaling.rotated_probes(mixed, count)
        assert len(probes) == len({tuple(probe) for probe in probes}) == count
        assert tree_tokens(probes) > 0.98 * sum(map(len, probes))
    assert scaling.rotated_probes(mixed, 32)[31] == [*mixed[1][2:], *mixed[1][:2]]
    with pytest.raises(ValueError, match="358 probes are asked for, expected at most 357"):
        scaling.rotated_probes(mixed, 358)


def test_rotations_that_come_out_alike_are_taken_once() -> None:
    assert scaling.rotated_probes([[1, 2, 1, 2], [2, 1], [3]], 4) == [[1, 2, 1, 2], [2, 1], [3], [2, 1, 2, 1]]


@pytest.mark.parametrize(("per_pass", "sizes"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (5, [3])])
def test_passes_are_of_the_same_value_and_gradients_as_one(per_pass: int, sizes: list[int]) -> None:
    workload = Workload(None, "tiny", synthetic_probes("generic", 1000), 3, 4, torch.float32, 1)
    ((value, gradients),) = Engine(workload, "auto", prepack=False).step(3)
    engine = Engine(dataclasses.replace(workload, adapters_per_pass=per_pass), "block", prepack=False)
    passes = engine.step(3)
    assert [value.shape[0] for value, _ in passes] == sizes
    assert engine.facts()["checkpoint"] == "block"
    torch.testing.assert_close(torch.cat([value for value, _ in passes]), value, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        joined = torch.cat([g[name] for _, g in passes])
        assert float((joined - gradient).norm()) <= 1e-5 * float(gradient.norm()), name
    assert [value.shape[0] for value, _ in engine.step(1)] == [1]


def test_the_anchor_is_of_8_adapters_or_else_in_the_middle() -> None:
    assert scaling.anchor_of([1, 2, 4, 8, 16]) == "G = 8"
    assert scaling.anchor_of([1, 2, 4]) == "G = 2"
    assert scaling.anchor_of([3]) == "G = 3"


def results(scale: float = 1.0) -> dict[str, Tensor]:
    """What a worker writes."""
    return {"value": torch.ones(2, 5, 64), "a.lora_A.weight": torch.full((2, 4, 64), scale)}


def checks(monkeypatch: pytest.MonkeyPatch, of: Callable[[str], scaling.Checked], scale: float = 1.0) -> list[str]:
    """No process is started; the points in the order in which they are checked.

    Args:
        of: what a point tells.
        scale: of the gradients of the point in passes, where those of one pass are 1.
    """
    asked = []

    def check(name: str, pool: Pool, path: str | None) -> scaling.Checked:
        asked.append(name)
        told = of(name)
        assert (path is not None) == (name in (DIVIDED, "G = 2"))
        if path is not None:
            save_file(results(scale if name == DIVIDED else 1.0), path)
        return told

    def time_groups(groups: list[list[str]], pool: Pool, anchor: str, adapters: Any, rounds: Any, _: Any) -> Any:
        assert anchor in groups[0]
        facts = {"checkpoint": "none", "prepacked": True}
        return {
            name: Samples([0.5 * adapters[name]], [1.0] if len(group) > 1 else [], [0.4], facts)
            for group in groups
            for name in group
        }

    monkeypatch.setattr(scaling, "check", check)
    monkeypatch.setattr(scaling, "time_groups", time_groups)
    monkeypatch.setattr(scaling, "set_threads", lambda threads: None)
    return asked


def test_a_point_that_dies_is_left_out_and_the_rest_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(name: str) -> scaling.Checked:
        if name == DIVIDED:
            raise WorkerError(f"the process of {name} died with exit code -9")
        if name == "16 probes":
            raise WorkerError(f"{name} failed:\nTraceback\n  somewhere\nRuntimeError: can't allocate memory\n")
        return scaling.Checked(Footprint(100, 300, 200), "block" if name == "2 probes" else "none")

    asked = checks(monkeypatch, of)
    path = tmp_path / "result.json"
    assert scaling.main([*TINY, *FAST, "--json", str(path)]) == 0
    assert asked == ["G = 2", "G = 1", "G = 1 in passes of 1", DIVIDED, "2 probes", "16 probes"]
    record = json.loads(path.read_text())
    assert [[point["name"] for point in series["points"]] for series in record["series"]] == [
        ["G = 1", "G = 2"],
        ["G = 1 in passes of 1"],
        ["2 probes"],
    ]
    assert [series["left_out"] for series in record["series"]] == [
        {},
        {DIVIDED: f"the process of {DIVIDED} died with exit code -9"},
        {"16 probes": "RuntimeError: can't allocate memory"},
    ]
    assert record["steady"] is None
    printed = capsys.readouterr().out
    for note in (
        f"{DIVIDED} was left out: the process of {DIVIDED} died with exit code -9.",
        "16 probes was left out: RuntimeError: can't allocate memory.",
        "2 probes was timed with checkpoint 'none', beside other processes; its peak is that of 'block'.",
        "other processes kept 0.4 CPUs busy",
    ):
        assert note in printed
    # 1 adapter, 62 tokens: 0.5 s, half of the anchor's second, for a fifth of its tokens.
    (point,) = record["series"][2]["points"]
    assert point["times_anchor"] == pytest.approx(0.5 * 2 * 155 / 62)
    assert "| 1 | 1 | 2 | 62 | 0.5 (0.5 to 0.5) | 500.0 | 8064.5 | 2.50 | 0.00 |" in printed


def test_a_run_whose_anchor_fails_ends_there_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(name: str) -> scaling.Checked:
        raise WorkerError(f"the process of {name} died")

    asked = checks(monkeypatch, of)
    path = tmp_path / "result.json"
    assert scaling.main([*TINY, *FAST, "--json", str(path)]) == 1
    assert asked == ["G = 2"]
    printed = capsys.readouterr()
    assert "error: the process of G = 2 died" in printed.err
    assert printed.out == ""
    assert not path.exists()


def test_passes_that_disagree_with_one_pass_make_the_run_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks(monkeypatch, lambda name: scaling.Checked(Footprint(1, 1, 1), "none"), scale=1.001)
    assert scaling.main([*TINY, *FAST, "--dtype", "float32"]) == 1
    assert f"error: {DIVIDED}: the gradient of a.lora_A.weight is off by 1.0e-03" in capsys.readouterr().err
    assert compare.TOLERANCE["float32"].worst < 1e-3


def test_a_point_that_fits_on_its_own_only_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(name: str) -> scaling.Checked:
        return scaling.Checked(Footprint(1, 2**31 if name == "16 probes" else 2, 1), "none")

    checks(monkeypatch, of)
    assert scaling.main([*TINY, *FAST, "--memory", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("does not fit into memory") == 1
    assert "16 probes does not fit into memory beside G = 2: it was timed on its own." in printed


def test_a_plot_is_drawn_of_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn, checked = [], []
    monkeypatch.setattr(scaling, "check_plot", lambda parser, path: checked.append(path))
    monkeypatch.setattr(scaling, "scaling_picture", lambda record, path: drawn.append((record, path)))
    checks(monkeypatch, lambda name: scaling.Checked(Footprint(1, 1, 1), "none"))
    path, plot = tmp_path / "result.json", tmp_path / "plot.png"
    assert scaling.main([*TINY, *FAST, "--json", str(path), "--plot", str(plot)]) == 0
    assert checked == [plot]
    assert drawn == [(json.loads(path.read_text()), plot)]


def test_a_kept_pool_starts_anew_after_a_failure() -> None:
    """A worker that failed answers nothing more."""
    workload = Workload(None, "tiny", [[1, 2, 3]], 1, 2, torch.float32, 1)
    pool = Pool({"small": Job("engine-plain", workload)}, keep=True)
    try:
        with pytest.raises(WorkerError, match=r"^small failed:\n"), pool.running(["small"]) as workers:
            workers["small"].check("/nowhere/file", 1)
        with pool.running(["small"]) as workers:
            assert len(workers["small"].steady(2, 1)) == 2
    finally:
        pool.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "tiny", "--model", "somewhere"], "not allowed with argument"),
        (["--adapters", "2", "0"], "--adapters names 0, expected at least 1"),
        (["--adapters", "2", "4", "2"], "--adapters names one twice: 2 2 4"),
        (["--probes", "-1"], "--probes names -1, expected at least 1"),
        (["--probes", "5", "5"], "--probes names one twice: 5 5"),
        (["--per-pass", "0"], "--per-pass is 0, expected at least 1"),
        (["--probe-adapters", "0"], "--probe-adapters is 0, expected at least 1"),
        (["--way", "seed"], "argument --way: invalid choice: 'seed'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--steady-steps", "10"], "--steady-steps is 10, expected 0 or at least 11"),
        (["--steady-steps", "-1"], "--steady-steps is -1, expected 0 or at least 11"),
        (["--json", "nowhere/x.json"], "--json names nowhere/x.json, expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scaling.main(options)
    assert message in capsys.readouterr().err
