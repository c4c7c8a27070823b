"""The scaling benchmark measures the points that it names, and reports those that fail. No speed is asserted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import harness
import pytest
import report
import scaling
import torch
from agreement import TOLERANCE
from bench import Finished, Pretended, finished_run, results, tiny
from contenders import Engine
from reference import hf_model, peft_model
from torch import Tensor
from workers import Footprint, WorkerError
from workload import named_config, synthetic_probes, tree_tokens

from qwen_functional import LoraSpec, init_weights

TINY = ["--size", "tiny", "--adapters", "1", "2", "--per-pass", "1", "--probes", "2", "16", "--probe-adapters", "1"]
FAST = ["--rounds", "1", "--threads", "1", "--rank", "4"]
DIVIDED = "G = 2 in passes of 1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of the script on the tiny size, and the file that it wrote."""
    return finished_run("scaling.py", tmp_path_factory.mktemp("benchmark"), *TINY, *FAST, "--steady-steps", "12")


@pytest.fixture
def record(finished: Finished) -> dict[str, Any]:
    result, path = finished
    assert result.returncode == 0, result.stderr
    assert [path] == list(path.parent.iterdir()), "a temporary file was left behind"
    return json.loads(path.read_text())


def test_every_point_is_measured(record: dict[str, Any]) -> None:
    assert (record["rank"], record["dtype"], record["way"]) == (4, "bfloat16", "engine")
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


def test_steady_memory_is_that_after_the_tenth_step_and_later(finished: Finished, record: dict[str, Any]) -> None:
    steady = record["steady"]
    resident = steady["resident_bytes"]
    assert (steady["adapters"], steady["probes"], steady["warm_steps"], len(resident)) == (1, 5, 10, 12)
    warm, low, high = resident[9], min(resident[10:]), max(resident[10:])
    told = f"{warm / 1e9:.3f} GB resident after step 10, later from {low / 1e9:.3f} ({low / warm - 1:+.2%})"
    assert f"12 steps of G = 1, 5 probes: {told} to {high / 1e9:.3f} " in finished[0].stdout


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
def test_passes_are_of_the_same_value_and_gradients_as_one(per_pass: int, sizes: list[int], tmp_path: Path) -> None:
    workload = tiny(tmp_path, adapters=3)
    ((value, gradients),) = Engine(workload).step(3)
    engine = Engine(dataclasses.replace(workload, adapters_per_pass=per_pass), "block")
    passes = engine.step(3)
    assert [value.shape[0] for value, _ in passes] == sizes
    assert engine.facts()["checkpoint"] == "block"
    torch.testing.assert_close(torch.cat([value for value, _ in passes]), value, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        joined = torch.cat([g[name] for _, g in passes])
        assert float((joined - gradient).norm()) <= 1e-5 * float(gradient.norm()), name
    assert [value.shape[0] for value, _ in engine.step(1)] == [1]


def pretend(monkeypatch: pytest.MonkeyPatch, **given: Any) -> Pretended:
    """No process is started."""
    facts = {"checkpoint": "none", "prepacked": True}
    pool = Pretended(**{"facts": lambda name, when: facts, **given})
    monkeypatch.setattr(harness, "Pool", pool)
    monkeypatch.setattr(scaling, "set_threads", lambda threads: None)
    return pool


@pytest.mark.parametrize(
    ("adapters", "anchor"), [("1 2 4 8 16", "G = 8"), ("4 1 2", "G = 2"), ("3", "G = 3")]
)
def test_the_anchor_is_of_8_adapters_or_else_in_the_middle(
    adapters: str, anchor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pool, path = pretend(monkeypatch), tmp_path / "result.json"
    options = ["--size", "tiny", "--adapters", *adapters.split(), "--probes", "2", *FAST, "--json", str(path)]
    assert scaling.main(options) == 0
    assert json.loads(path.read_text())["anchor"] == pool.asked["check"][0] == anchor


def test_a_point_that_dies_is_left_out_and_the_rest_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = {
        DIVIDED: WorkerError(DIVIDED, "its process died"),
        "16 probes": WorkerError("16 probes", "RuntimeError: can't allocate memory", "Traceback\n  somewhere"),
    }
    pool = pretend(
        monkeypatch, failing=failing, footprint=lambda name: Footprint(100, 300, 200),
        seconds=lambda name: 1.0 if name == "G = 2" else 0.5,
        facts=lambda name, when: {
            "checkpoint": "block" if name == "2 probes" and when == "checked" else "none", "prepacked": True
        },
    )  # fmt: skip
    path = tmp_path / "result.json"
    assert scaling.main([*TINY, *FAST, "--json", str(path)]) == 0
    assert pool.asked["check"] == ["G = 2", "G = 1", "G = 1 in passes of 1", DIVIDED, "2 probes", "16 probes"]
    record = json.loads(path.read_text())
    assert [[point["name"] for point in series["points"]] for series in record["series"]] == [
        ["G = 1", "G = 2"],
        ["G = 1 in passes of 1"],
        ["2 probes"],
    ]
    assert [series["left_out"] for series in record["series"]] == [
        {},
        {DIVIDED: "its process died"},
        {"16 probes": "RuntimeError: can't allocate memory"},
    ]
    assert record["steady"] is None
    printed = capsys.readouterr().out
    for note in (
        f"{DIVIDED} was left out: its process died.",
        "16 probes was left out: RuntimeError: can't allocate memory.",
        "2 probes was timed with checkpoint 'none', beside other processes; its peak is that of 'block'.",
    ):
        assert note in printed
    # 1 adapter, 62 tokens: 0.5 s, half of the anchor's second, for a fifth of its tokens.
    (point,) = record["series"][2]["points"]
    assert point["times_anchor"] == pytest.approx(0.5 * 2 * 155 / 62)
    assert "| 1 | 1 | 2 | 62 | 0.5 (0.5 to 0.5) | 500.0 | 8064.5 | 2.50 | 0.00 |" in printed


def test_a_run_whose_anchor_fails_ends_there_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = pretend(monkeypatch, failing={"G = 2": WorkerError("G = 2", "its process died")})
    path = tmp_path / "result.json"
    assert scaling.main([*TINY, *FAST, "--json", str(path)]) == 1
    assert pool.asked["check"] == ["G = 2"]
    printed = capsys.readouterr()
    assert "error: G = 2: its process died" in printed.err
    assert printed.out == ""
    assert not path.exists()


def test_a_run_holds_only_if_passes_equal_one_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(name: str) -> dict[str, Tensor]:
        scale = 1.001 if name in (DIVIDED, "2 probes") else 1.0  # other probes are compared with nothing
        return {key: tensor * (scale if "lora_B" in key else 1) for key, tensor in results().items()}

    pretend(monkeypatch, written=written)
    assert scaling.main([*TINY, *FAST, "--dtype", "float32"]) == 1
    assert f"error: {DIVIDED}: the gradient of" in capsys.readouterr().err
    assert TOLERANCE[torch.float32].worst < 1e-3


def test_a_point_that_fits_on_its_own_only_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, footprint=lambda name: Footprint(1, 2**31 if name == "16 probes" else 2, 1))
    assert scaling.main([*TINY, *FAST, "--memory", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("does not fit into memory") == 1
    assert "16 probes does not fit into memory beside G = 2: it was timed on its own." in printed


def test_an_interrupted_run_keeps_what_it_has_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps: list[str] = []

    def seconds(name: str) -> float:
        steps.append(name)
        if len(steps) > 2 * 6 + 3:  # a first one each, then a round, then the beginning of the second
            raise KeyboardInterrupt
        return 1.0

    pretend(monkeypatch, seconds=seconds)
    path = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        scaling.main([*TINY, *FAST, "--rounds", "3", "--json", str(path)])
    record = json.loads(path.read_text())
    samples = [point["seconds"]["samples"] for series in record["series"] for point in series["points"]]
    assert samples == [[1.0]] * 6


def test_a_plot_is_drawn_of_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(scaling, "scaling_figure", lambda record: record)
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append((figure, path)))
    pretend(monkeypatch)
    path, plot = tmp_path / "result.json", tmp_path / "plot.png"
    assert scaling.main([*TINY, *FAST, "--json", str(path), "--plot", str(plot)]) == 0
    assert drawn == [(json.loads(path.read_text()), plot)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "tiny", "--model", "somewhere"], "not allowed with argument"),
        (["--adapters", "2", "0"], "--adapters is 0, expected at least 1"),
        (["--adapters", "2", "4", "2"], "--adapters names one twice: 2 4 2"),
        (["--probes", "-1"], "--probes is -1, expected at least 1"),
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
