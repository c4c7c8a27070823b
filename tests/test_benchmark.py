"""The benchmark compares what it says it compares, and fails where ways disagree. No speed is asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_functional import pack

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import probe_sets  # noqa: E402
import summary  # noqa: E402
import throughput  # noqa: E402
from schedule import groups_that_fit  # noqa: E402
from workers import Footprint, Pool  # noqa: E402
from workload import Workload  # noqa: E402

K_PROJ_A = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run of the script on the tiny size, and the file that it wrote."""
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    options = ["--size", "tiny", "--adapters", "2", "--rounds", "1", "--seed-probes", "2", "--json", str(path)]
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), *options],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return result, path


def test_all_ways_agree_and_are_reported(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    result, path = finished
    assert result.returncode == 0, result.stderr
    record = json.loads(path.read_text())
    (run,) = record["runs"]
    assert list(run["ways"]) == ["engine", "engine-block", "seed", "hooks-one", "hooks-batch"]
    assert run["reference"] == "engine"
    for way in ("seed", "hooks-one", "hooks-batch"):
        agreement = run["ways"][way]["agreement"]
        assert agreement["adapters"] == 2
        assert max(agreement["value"], agreement["gradient"], agreement["worst"]) <= 1e-4
    for entry in run["ways"].values():
        assert entry["seconds"]["min"] <= entry["seconds"]["median"] <= entry["seconds"]["max"]
        assert entry["tokens_per_second"] == pytest.approx(2 * 158 / entry["seconds"]["median"])
        assert entry["peak_bytes"] >= entry["weights_bytes"] > 0
    assert run["floor"]["flop"] == 4 * 2 * 155 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    # Three products with each A and three with each B; 2 adapters, 155 tokens, 3 blocks.
    sizes = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 192)
    assert run["adapter_products"]["flop"] == 6 * 2 * 155 * record["rank"] * 3 * sizes
    assert [path] == list(path.parent.iterdir()), "a temporary file was left behind"


def test_printed_table_is_made_of_the_json_alone(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    result, path = finished
    assert result.returncode == 0, result.stderr
    record = json.loads(path.read_text())
    assert result.stdout.strip() == "\n".join((summary.headline(record), summary.table(record["runs"][0]))).strip()


def _results(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "value": torch.randn(2, 5, 64, generator=generator),
        K_PROJ_A: torch.randn(2, 4, 64, generator=generator) * 1e-3,
        K_PROJ_A.replace("lora_A", "lora_B"): torch.randn(2, 32, 4, generator=generator),
    }


@pytest.mark.parametrize(("name", "named"), [("value", "the value"), (K_PROJ_A, K_PROJ_A)])
def test_one_perturbed_tensor_makes_the_run_fail(
    name: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small gradient that is off by a thousandth among large ones that are right is still found."""

    def check(way: str, pool: Pool, path: str, adapters: int) -> Footprint:
        results = _results()
        if way == "hooks-one":
            results[name][1] *= 1.001
        save_file(results, path)
        return Footprint(1, 1, 1)

    def time_groups(*arguments: Any) -> None:
        raise AssertionError("ways that disagree were timed")

    monkeypatch.setattr(throughput, "check", check)
    monkeypatch.setattr(throughput, "time_groups", time_groups)
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    assert throughput.main(["--size", "tiny", "--adapters", "2"]) == 1
    error = capsys.readouterr().err
    assert f"error: hooks-one: {'the gradient of ' * (name != 'value')}{named} is off by" in error


def test_agreement_is_the_relative_frobenius_error(tmp_path: Path) -> None:
    reference, other = _results(), _results()
    other["value"] *= 1.01
    other[K_PROJ_A] *= -1
    save_file(reference, tmp_path / "reference")
    save_file(other, tmp_path / "other")
    agreement = compare.compare(str(tmp_path / "other"), str(tmp_path / "reference"))
    assert agreement.value == pytest.approx(0.01, rel=1e-4)
    assert (agreement.worst, agreement.worst_name) == (pytest.approx(2.0), K_PROJ_A)
    assert agreement.gradient < 0.01
    assert agreement.adapters == 2


def test_only_the_adapters_that_both_have_are_compared(tmp_path: Path) -> None:
    save_file(_results(), tmp_path / "reference")
    save_file({name: t[:1].contiguous() for name, t in _results().items()}, tmp_path / "other")
    agreement = compare.compare(str(tmp_path / "other"), str(tmp_path / "reference"))
    assert agreement == compare.Agreement(0.0, 0.0, 0.0, agreement.worst_name, 1)


def test_nan_and_missing_gradients_disagree(tmp_path: Path) -> None:
    results = _results()
    save_file(results, tmp_path / "reference")
    results[K_PROJ_A][0, 0, 0] = float("nan")
    save_file(results, tmp_path / "other")
    agreement = compare.compare(str(tmp_path / "other"), str(tmp_path / "reference"))
    with pytest.raises(compare.DisagreementError, match=r"k_proj\.lora_A"):
        compare.require("other", agreement, compare.TOLERANCE["float32"])
    del results[K_PROJ_A]
    save_file(results, tmp_path / "other")
    with pytest.raises(compare.DisagreementError, match=r"only one of the two has .*k_proj\.lora_A"):
        compare.compare(str(tmp_path / "other"), str(tmp_path / "reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_tolerate_rounding_but_no_lost_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    reference, tolerance = _results(), compare.TOLERANCE[str(dtype).removeprefix("torch.")]
    save_file(reference, tmp_path / "reference")
    save_file({name: t.to(dtype).float() for name, t in reference.items()}, tmp_path / "rounded")
    compare.require("rounded", compare.compare(str(tmp_path / "rounded"), str(tmp_path / "reference")), tolerance)
    reference[K_PROJ_A] *= 2
    save_file(reference, tmp_path / "scaled twice")
    agreement = compare.compare(str(tmp_path / "scaled twice"), str(tmp_path / "reference"))
    with pytest.raises(compare.DisagreementError, match=r"k_proj\.lora_A"):
        compare.require("scaled twice", agreement, tolerance)


def test_what_is_tolerated_follows_the_noise_of_hooks_and_no_more() -> None:
    tolerance = compare.TOLERANCE["bfloat16"].beside(compare.Agreement(0.05, 0.01, 0.8, K_PROJ_A, 2))
    assert tolerance == compare.Tolerance(0.1, 0.1, 1.6)
    compare.require("a way", compare.Agreement(0.09, 0.09, 1.5, K_PROJ_A, 2), tolerance)
    for errors in ((0.11, 0.09, 1.5), (0.09, 0.11, 1.5), (0.09, 0.09, 1.7)):
        with pytest.raises(compare.DisagreementError):
            compare.require("a way", compare.Agreement(*errors, K_PROJ_A, 2), tolerance)


def test_ways_are_grouped_by_the_memory_that_they_need() -> None:
    footprints = {
        "engine": Footprint(2, peak=4, idle=3),
        "seed": Footprint(2, peak=18, idle=4),
        "hooks-one": Footprint(2, peak=6, idle=3),
        "floor": Footprint(0, peak=5, idle=4),
    }
    together = ["engine", "seed", "hooks-one", "floor"]
    assert groups_that_fit(footprints, "engine", None) == [together]
    assert groups_that_fit(footprints, "engine", 28) == [together]
    assert groups_that_fit(footprints, "engine", 22) == [["engine", "seed"], ["engine", "hooks-one", "floor"]]
    assert groups_that_fit(footprints, "engine", 20) == [["seed"], ["engine", "hooks-one", "floor"]]
    assert groups_that_fit({"engine": footprints["engine"]}, "engine", 20) == [["engine"]]


@pytest.mark.parametrize(
    ("kind", "count", "longest", "tokens", "tree"),
    [("generic", 5, 33, 158, 155), ("mixed", 15, 35, 357, 352), ("chat", 15, 64, 792, 451)],
)
def test_synthetic_probes_are_as_long_as_the_real_ones(
    kind: str, count: int, longest: int, tokens: int, tree: int
) -> None:
    for vocab_size in (1000, 151936):
        probes = probe_sets.synthetic_probes(kind, vocab_size)
        lengths = [len(probe) for probe in probes]
        assert (len(probes), max(lengths), sum(lengths)) == (count, longest, tokens)
        assert len(pack(probes)) == probe_sets.tree_tokens(probes) == tree
        assert all(0 <= token < vocab_size for probe in probes for token in probe)


def test_rounded_workload_holds_the_narrow_numbers() -> None:
    narrow = Workload(None, "tiny", [[1, 2]], 2, 4, torch.bfloat16, 1)
    wide = dataclasses.replace(narrow, dtype=torch.float32, rounded_to=torch.bfloat16)
    config = narrow.config()
    for name, tensor in wide.lora(config).items():
        assert torch.equal(tensor, narrow.lora(config)[name].float())
    expected = dict(narrow.hf_model(with_lm_head=False).named_parameters())
    for name, parameter in wide.hf_model(with_lm_head=False).named_parameters():
        assert torch.equal(parameter, expected[name].float())
