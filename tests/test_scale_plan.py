"""The cost model: what it counts is what the engine does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import rank_jobs as jobs
import scale_plan
import torch
from cost import Constants, MeshStep, meshes
from ranks import Ranks
from reference import random_lora, tiny_config
from watch import Watch
from workload import SIZES, named_config

from qwen_functional import LoraSpec, init_weights, pack
from qwen_functional.forward import forward_vjp

CONFIG, SPEC, N = tiny_config(vocab_size=67, num_hidden_layers=4), LoraSpec(rank=2), 3
PROBES = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [30, 31, 32]]
TOKENS = pack(PROBES)
CONSTANTS = Constants(1e12, 1e11, 1e10, 1e9, 1e-4)


def step(**changes: int | str | None) -> MeshStep:
    made = MeshStep(CONFIG, SPEC, N, len(TOKENS), len(set(TOKENS.last)), itemsize=4)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_the_engine_multiplies_what_is_counted(checkpoint: str) -> None:
    lora = SPEC.bind(CONFIG, random_lora(CONFIG, SPEC, N, dtype=torch.float32))
    with Watch() as watch:
        value, vjp = forward_vjp(CONFIG, init_weights(CONFIG), TOKENS, lora, checkpoint=checkpoint)
        vjp(torch.ones_like(value))
    assert step(checkpoint=checkpoint).gemm_flop() == 2 * watch.work()


def test_passes_are_counted_with_the_work_of_all_and_the_memory_of_one() -> None:
    for name in ("gemm_flop", "low_rank_flop", "memory_bytes"):
        whole, halves = (getattr(step(adapters=8, per_pass=n), name)() for n in (None, 4))
        assert halves == pytest.approx(whole, rel=0.1), name
    assert step(adapters=8, per_pass=4).memory()["kept"] == step(adapters=4).memory()["kept"]
    assert step(adapters=8, per_pass=4).memory()["adapters"] == step(adapters=8).memory()["adapters"]


def test_no_more_bytes_are_summed_over_ranks_than_are_counted(two_ranks: Ranks) -> None:
    case = jobs.Case(CONFIG, SPEC, random_lora(CONFIG, SPEC, N, dtype=torch.float32), PROBES, torch.float32)
    counted, summed = step(tensor_parallel=2).sums(), two_ranks.call(jobs.summed_bytes, case)[0]
    assert len(summed) == len(counted)
    # The last block sums fewer rows than are counted, and the gradients are float32 here as there.
    assert summed[-1] == counted[-1]
    assert 0.9 * sum(counted) < sum(summed) <= sum(counted)


def test_a_rank_is_thought_to_hold_the_part_that_it_holds(two_ranks: Ranks) -> None:
    case = jobs.Case(CONFIG, SPEC, {}, PROBES, torch.float32)
    held = two_ranks.call(jobs.held_bytes, case)[0]
    head = CONFIG.vocab_size * CONFIG.hidden_size * 4  # not tied here, and not needed
    assert step(tensor_parallel=2).memory()["weights"] == pytest.approx(held - head, rel=0.05)  # norms, biases


def test_ranks_share_the_work() -> None:
    one, two = step(adapters=8), step(adapters=8, data_parallel=2)
    assert two.gemm_flop() == pytest.approx(one.gemm_flop() / 2, rel=0.1)
    assert two.traffic() == 0
    split = step(adapters=8, tensor_parallel=2)
    assert split.gemm_flop() == pytest.approx(one.gemm_flop() / 2)
    assert one.low_rank_flop() / 2 < split.low_rank_flop() < one.low_rank_flop()
    assert split.traffic() > 0
    with pytest.raises(ValueError, match=r"tensor parallelism over 4 ranks, expected \[1, 2\]"):
        step(tensor_parallel=4)
    assert [(p.data_parallel, p.tensor_parallel) for p in meshes(step(), 4)] == [(4, 1), (2, 2)]


def test_a_step_is_bound_by_what_takes_the_most() -> None:
    split = step(tensor_parallel=2)
    assert step().bound(dataclasses.replace(CONSTANTS, gemm=1.0)) == "products"
    assert split.bound(dataclasses.replace(CONSTANTS, sum_bytes=1e-3)) == "sums"
    seconds = split.seconds(CONSTANTS)
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    # A sum of two ranks takes the time of its bytes once, and each its latency.
    assert seconds["sums"] == pytest.approx(sum(split.sums()) / 1e9 + 1e-4 * len(split.sums()))


def test_every_published_size_has_its_number_of_parameters() -> None:
    billions = {"0.5b": 0.494, "1.5b": 1.54, "3b": 3.09, "7b": 7.62, "14b": 14.8, "32b": 32.8, "72b": 72.7}
    for size, parameters in billions.items():
        config = named_config(size)
        blocks = config.num_hidden_layers * MeshStep(config, SPEC, 1, 1, 1).cost(1).base_elements()
        embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
        assert (blocks + embeddings) / 1e9 == pytest.approx(parameters, rel=0.01), size
    assert billions.keys() == SIZES.keys() - {"tiny"}


def test_the_plan_is_that_of_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"cpu": "a CPU", "gpu": None, "cpu_capability": "X", "threads": 1, "cpus": 2, "torch": "2"}
    constants = {str(n): dataclasses.asdict(dataclasses.replace(CONSTANTS, gemm=n * 1e12)) for n in (1, 2)}
    file, out = tmp_path / "constants.json", tmp_path / "plan.json"
    file.write_text(json.dumps({"machine": machine, "dtype": "float32", "constants": constants}))
    options = ["--constants", str(file), "--size", "72b", "--adapters", "8", "--json", str(out)]
    assert scale_plan.main([*options, "--devices", "8", "--sum-gbs", "50"]) == 0
    printed = capsys.readouterr().out
    assert "given: sum-gbs" in printed
    record = json.loads(out.read_text())
    assert record["constants"] == {**constants["2"], "sum_bytes": 50e9}  # the most processes that were measured
    assert [(p["data_parallel"], p["tensor_parallel"]) for p in record["plans"]] == [(8, 1), (4, 2), (2, 4), (1, 8)]
    weights = [p["memory_bytes"]["weights"] for p in record["plans"]]
    assert weights == sorted(weights, reverse=True)
    assert scale_plan.main([*options, "--devices", "1"]) == 0
    assert json.loads(out.read_text())["constants"]["gemm"] == 1e12
    with pytest.raises(SystemExit):
        scale_plan.main(["--constants", str(tmp_path / "nothing.json")])
    assert "is no file, expected one that --measure has written" in capsys.readouterr().err


def test_measuring_takes_as_many_processes_as_there_are_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def in_ranks(ranks: int, *_: object) -> list[object]:
        asked.append(ranks)
        return [CONSTANTS] * ranks if len(asked) == 1 else [1.0] * ranks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(scale_plan, "in_ranks", in_ranks)
    options = scale_plan.arguments(["--measure", str(tmp_path / "constants.json"), "--size", "tiny"])
    assert options.device == "cuda"
    assert scale_plan.measure(options, scale_plan.checkpoint_of(None, "tiny", str(tmp_path))) in (0, 1)
    assert asked == [1] * 4, "one to measure on, and the three cases of one process"


def test_measuring_runs_and_says_whether_predictions_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model, where no prediction is good: that the command runs and says so."""
    file = tmp_path / "constants.json"
    monkeypatch.setattr(scale_plan, "set_threads", lambda threads: None)
    monkeypatch.setattr(scale_plan, "PREDICTED", ((2, 1, 1, "none"), (2, 1, 2, "block")))
    for within, status in ((1e9, 0), (0.0, 1)):
        monkeypatch.setattr(scale_plan, "WITHIN", within)
        assert scale_plan.main(["--measure", str(file), "--size", "tiny", "--device", "cpu"]) == status
        record = json.loads(file.read_text())
        assert set(record["constants"]) == {"1", "2"}
        assert all(value > 0 for one in record["constants"].values() for value in one.values())
        assert [one["case"] for one in record["cases"]] == [[2, 1, 1, "none"], [2, 1, 2, "block"]]
        printed = capsys.readouterr().out
        assert printed.count("\n| 2 |") == 2
        assert ("NOT within" in printed) == bool(status)
