"""The benchmark compares what it says it compares, and fails where ways disagree. No speed is asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_functional import init_weights, pack

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import probe_sets  # noqa: E402
import summary  # noqa: E402
import throughput  # noqa: E402
import workers  # noqa: E402
from measure import Activity, activity  # noqa: E402
from schedule import groups_that_fit  # noqa: E402
from workers import Footprint, Job, Pool  # noqa: E402
from workload import Pass, Workload  # noqa: E402

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

    def check(way: str, pool: Pool, path: str, adapters: int, kept: int | None) -> Footprint:
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
    # On a GPU each way is timed before the next one is checked.
    assert throughput.main(["--size", "tiny", "--adapters", "2", "--device", "cpu"]) == 1
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


def test_weights_are_drawn_on_the_device_and_are_the_same_in_every_way(device: str) -> None:
    workload = Workload(None, "tiny", [[1, 2]], 2, 4, torch.float32, 1, device=device)
    config, weights = workload.engine_weights()
    views = weights.named_views(config)
    for prefix, with_lm_head in (("", True), ("model.", False)):
        model = workload.hf_model(with_lm_head)
        parameters = dict(model.named_parameters())
        assert parameters.keys() == {name.removeprefix(prefix) for name in views}
        for name, view in views.items():
            assert torch.equal(parameters[name.removeprefix(prefix)], view), name
        assert {tensor.device for tensor in (*parameters.values(), *model.buffers())} == {weights.device}
    for one, other in zip(workload.lora(config).values(), workload.lora(config).values(), strict=True):
        assert torch.equal(one, other)
        assert one.device == workload.cotangent(config).device == weights.device
    if device == "cpu":
        for name, tensor in init_weights(config, seed=0).named_views(config).items():
            assert torch.equal(views[name], tensor), name


def test_an_untied_head_is_that_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload(None, "tiny", [[1, 2]], 2, 4, torch.float32, 1)
    untied = dataclasses.replace(workload.config(), tie_word_embeddings=False)
    monkeypatch.setattr(Workload, "config", lambda self: untied)
    head, expected = workload.hf_model(with_lm_head=True).lm_head.weight, workload.engine_weights()[1].lm_head
    assert isinstance(expected, Tensor)
    assert torch.equal(head, expected)
    assert workload.hf_model(with_lm_head=False).embed_tokens.weight.shape == head.shape


def small_workload(device: str = "cpu") -> Workload:
    return Workload(None, "tiny", probe_sets.synthetic_probes("generic", 1000), 2, 4, torch.float32, 1, device=device)


def assert_same_step(step: list[Pass], expected: list[Pass]) -> None:
    ((value, gradients),), ((expected_value, expected_gradients),) = step, expected
    torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert not gradient.requires_grad
        assert float((gradient - expected_gradients[name]).norm()) <= 1e-4 * float(gradient.norm()), name


def test_the_engine_is_called_as_training_calls_it_and_gives_what_its_vjp_does(device: str) -> None:
    engine = workers.make_way("engine", small_workload(device))
    alone = workers.make_way("engine-vjp", small_workload(device))
    for _ in range(3):  # on a GPU the second makes a CUDA graph, the third takes it
        assert_same_step(engine.step(2), alone.step(2))
    torch.testing.assert_close(engine.step(1)[0][0], alone.step(1)[0][0], rtol=1e-5, atol=1e-5)
    assert engine.facts() == alone.facts()  # type: ignore[attr-defined]


def test_what_is_compiled_computes_what_the_hooks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiled(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    way = workers.make_way("hooks-batch-compiled", small_workload())
    assert_same_step(way.step(2), workers.make_way("hooks-batch", small_workload()).step(2))
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}]
    with pytest.raises(ValueError, match="adapters is 1, expected the 2"):
        way.step(1)


def in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: str, *options: str) -> Any:
    """The record of a run of every way in this process, on the tiny size."""
    path = tmp_path / "result.json"
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    common = ["--size", "tiny", "--rank", "4", "--rounds", "1", "--device", "cpu", "--one-process"]
    assert throughput.main([*common, "--ways", ways, "--json", str(path), *options]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize(("full", "anchor"), [("hooks-batch", "engine"), ("engine", "hooks-one")])
def test_a_way_that_runs_out_of_memory_is_a_row_that_says_so(
    full: str, anchor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_way, held = workers.make_way, []

    class Full:
        def weights(self) -> list[Tensor]:
            return []

        def step(self, adapters: int) -> list[Pass]:
            tensor = torch.zeros(1)
            held.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    monkeypatch.setattr(workers, "make_way", lambda way, w: Full() if way == full else make_way(way, w))
    ways = "engine,hooks-one,hooks-batch"
    record = in_this_process(tmp_path, monkeypatch, ways, "--adapters", "1", "2", "--probes", "generic")
    assert [one["adapters"] for one in record["records"]] == [1, 2]
    for one in record["records"]:
        (run,) = one["runs"]
        assert run["cannot_run"] == {full: "out of memory"}
        assert list(run["ways"]) == [way for way in ways.split(",") if way != full]
        assert run["anchor"] == run["reference"] == anchor
        floor, seconds = (entry["seconds"]["median"] for entry in (run["floor"], run["ways"][anchor]))
        for entry in run["ways"].values():
            assert entry["times_anchor"] == pytest.approx(entry["seconds"]["median"] / seconds)
            assert entry["share_of_floor"] == pytest.approx(floor / entry["seconds"]["median"])
    out = capsys.readouterr().out
    assert out.count(f"| {full} | out of memory |  |") == 2
    assert "does not fit into memory beside" not in out
    assert out.strip() == "\n".join(
        text for one in record["records"] for text in (summary.headline(one), summary.table(one["runs"][0]))
    )
    assert held
    assert not any(reference() is not None for reference in held), "what filled the memory is still held"


def test_a_way_that_does_not_compile_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(function: Any, **options: Any) -> Any:
        def fails(*arguments: Any) -> Any:
            raise RuntimeError("no kernel for this\nand a long explanation")

        return fails

    monkeypatch.setattr(torch, "compile", compiled)
    record = in_this_process(tmp_path, monkeypatch, "engine,hooks-batch-compiled", "--adapters", "2")
    assert record["runs"][0]["cannot_run"] == {"hooks-batch-compiled": "RuntimeError: no kernel for this"}
    assert "| hooks-batch-compiled | RuntimeError: no kernel for this |  |" in capsys.readouterr().out


def test_out_of_memory_is_told_by_a_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    connection = SimpleNamespace(send=sent.append, close=lambda: None)

    def server(job: Job) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(workers, "_Server", server)
    monkeypatch.setattr(workers, "keep_freed_memory", lambda: True)
    workers._serve(connection, Job("engine", small_workload()))  # type: ignore[arg-type]
    ((failed, (reason, trace)),) = sent
    assert failed
    assert reason == "out of memory"
    assert "Traceback" in trace


def event(name: str, start: int, length: int, device: str = "CUDA", annotation: bool = False) -> SimpleNamespace:
    """One of torch's profiler, in nanoseconds."""
    return SimpleNamespace(
        name=lambda: name,
        device_type=lambda: getattr(torch.autograd.DeviceType, device),
        is_user_annotation=lambda: annotation,
        start_ns=lambda: start,
        duration_ns=lambda: length,
    )


def test_activity_counts_what_runs_and_what_starts_it_and_no_moment_twice() -> None:
    on_host = ("cudaGraphLaunch", "cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "cudaMemsetAsync")
    waits = ("cudaDeviceSynchronize", "cudaStreamIsCapturing", "cudaFuncGetAttributes", "cudaMalloc")
    events = [
        *(event(name, 0, 5, "CPU") for name in (*on_host, *waits)),
        event("sgemm", 300, 100),
        event("Memcpy HtoD", 350, 100),  # beside the former
        event("Memset", 320, 10),
        event("sgemm", 1000, 50),
        event("a step", 0, 5000, annotation=True),
    ]
    assert Activity.of(events) == Activity(kernels=4, launches=5, busy=200e-9)
    if not torch.cuda.is_initialized():
        assert activity(lambda: None) is None


def test_on_a_gpu_the_table_tells_what_it_did(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    (run,) = json.loads(finished[1].read_text())["runs"]
    run["on_gpu"] = True
    run["floor"]["activity"] = None  # could not be profiled
    for entry in run["ways"].values():
        entry["activity"] = {"kernels": 7349, "launches": 12, "busy": entry["seconds"]["median"] / 4}
    header, rule, *rows = (line for line in summary.table(run).splitlines() if line.startswith("|"))
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names[1] == "ms per step (min to max)"
    assert all(line.count("|") == header.count("|") for line in (rule, *rows))
    engine = dict(zip(names, (cell.strip() for cell in rows[0].strip("|").split("|")), strict=True))
    seconds = run["ways"]["engine"]["seconds"]["median"]
    assert engine[names[1]].startswith(f"{1e3 * seconds:.3g} (")
    assert [engine[name] for name in summary.ACTIVITY] == [f"{250 * seconds:.3g}", "75%", "7349", "12"]


def test_options_of_several_tables_have_defaults_by_device_and_bad_ones_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = throughput.arguments(["--adapters", "8", "1", "--probes", "mixed", "chat", "--device", "cuda"])
    assert (options.adapters, options.probes) == ([8, 1], ["mixed", "chat"])
    assert (options.one_process, options.rounds, options.seed_rounds, options.seed_adapters) == (True, 10, 5, 2)
    options = throughput.arguments(["--device", "cpu"])
    assert (options.one_process, options.rounds, options.seed_rounds, options.seed_adapters) == (False, 5, 2, 2)
    for wrong, message in (
        (["--adapters", "2", "0"], "--adapters is 0, expected at least 1"),
        (["--adapters", "1", "2", "--plot", str(tmp_path / "a.png")], "--plot draws one table"),
        (["--adapters", "1", "2", "--seed-adapters", "3"], "--seed-adapters is 3, expected at most 2"),
    ):
        with pytest.raises(SystemExit):
            throughput.arguments(wrong)
        assert message in capsys.readouterr().err
