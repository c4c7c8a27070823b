"""The cost model: what it counts is what the engine does."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import rank_jobs as jobs
import torch
from ranks import Ranks
from reference import random_lora, tiny_config
from watch import Watch

from qwen_functional import LoraSpec, init_weights, pack
from qwen_functional.forward import forward_vjp

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import scale_plan
from cost import Constants, MeshStep, meshes
from sizes import SIZES, named_config

CONFIG, SPEC, N = tiny_config(vocab_size=67, num_hidden_layers=4), LoraSpec(rank=2), 3
PROBES = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [30, 31, 32]]
TOKENS = pack(PROBES)
CONSTANTS = Constants(1e12, 1e11, 1e10, 1e9, 1e-4, 1e9)


def step(**changes: int | str | bool | None) -> MeshStep:
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


def test_reading_takes_place_meanwhile_and_bounds_a_step_where_it_is_slow() -> None:
    slow = dataclasses.replace(CONSTANTS, disk=1e3)
    streamed = step(stream=True)
    assert streamed.seconds(slow)["total"] == streamed.seconds(slow)["reading"]
    assert streamed.bound(slow) == "reading"
    assert streamed.seconds(CONSTANTS)["total"] >= step().seconds(CONSTANTS)["total"]
    assert step().seconds(slow)["reading"] == 0


def test_every_published_size_has_its_number_of_parameters() -> None:
    billions = {"0.5b": 0.494, "1.5b": 1.54, "3b": 3.09, "7b": 7.62, "14b": 14.8, "32b": 32.8, "72b": 72.7}
    for size, parameters in billions.items():
        config = named_config(size)
        blocks = config.num_hidden_layers * MeshStep(config, SPEC, 1, 1, 1).block_bytes() // 2
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


def test_a_process_takes_the_cpu_where_there_is_no_gpu_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def device(*options: str) -> str:
        return scale_plan.arguments(["--measure", "constants.json", *options]).device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device() == device("--processes", "1") == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device() == "cpu"
    assert device("--processes", "1") == "cuda"
    with pytest.raises(SystemExit):
        device("--device", "cuda")
    assert "2 processes need a GPU each, found 1: expected --device cpu, or --processes 1" in capsys.readouterr().err
    file = __file__  # any
    assert scale_plan.arguments(["--validate", file]).device == "cpu"
    assert scale_plan.arguments(["--constants", file, "--device", "cuda"]).device == "cuda"


def test_measuring_and_validating_run_and_say_whether_predictions_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model, where no prediction is good: that the commands run and say so."""
    file = tmp_path / "constants.json"
    on_cpu = ["--device", "cpu"]
    options = ["--processes", "1", "2", "--measure-size", "tiny", *on_cpu]
    assert scale_plan.main(["--measure", str(file), *options]) == 0
    record = json.loads(file.read_text())
    assert set(record["constants"]) == {"1", "2"}
    assert all(value > 0 for one in record["constants"].values() for value in one.values())
    monkeypatch.setattr(scale_plan, "VALIDATED", (("tiny", 2, 1, 1, "none"), ("tiny", 2, 1, 2, "block")))
    monkeypatch.setattr(scale_plan, "WITHIN", 1e9)
    assert scale_plan.main(["--validate", str(file), *on_cpu]) == 0
    assert capsys.readouterr().out.count("| tiny | 2 |") == 2
    monkeypatch.setattr(scale_plan, "WITHIN", 0.0)
    assert scale_plan.main(["--validate", str(file), *on_cpu]) == 1
    assert "NOT within" in capsys.readouterr().out
