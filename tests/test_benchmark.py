"""The benchmark compares what it says it compares, and fails where ways disagree. No speed is asserted."""

from __future__ import annotations

import json
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import contenders
import harness
import pytest
import throughput
import torch
import workload
from agreement import TOLERANCE
from bench import K_PROJ_A, Finished, Pretended, finished_run, results, tiny
from harness import Run, groups_that_fit
from measure import Activity, activity
from reference import relative_error
from torch import Tensor
from workers import Footprint, Job, Pool, WorkerError

from qwen_functional import pack

WAYS = ["engine", "engine-block", "seed", "hooks-one", "hooks-batch"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of the script on the tiny size, and the file that it wrote."""
    options = ["--size", "tiny", "--adapters", "2", "--rounds", "1", "--seed-probes", "2"]
    return finished_run("throughput.py", tmp_path_factory.mktemp("benchmark"), *options)


def test_all_ways_agree_and_are_reported(finished: Finished) -> None:
    result, path = finished
    assert result.returncode == 0, result.stderr
    record = json.loads(path.read_text())
    (run,) = record["runs"]
    assert list(run["ways"]) == WAYS
    assert run["reference"] == "engine"
    for way in ("seed", "hooks-one", "hooks-batch"):
        errors = run["ways"][way]["agreement"]
        assert errors["adapters"] == 2
        assert max(errors["value"], errors["gradient"], errors["worst"]) <= 1e-4
    for entry in run["ways"].values():
        assert entry["seconds"]["min"] <= entry["seconds"]["median"] <= entry["seconds"]["max"]
        assert entry["tokens_per_second"] == pytest.approx(2 * 158 / entry["seconds"]["median"])
        assert entry["peak_bytes"] >= entry["weights_bytes"] > 0
    assert run["floor"]["flop"] == 4 * 2 * 155 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    # Three products with each A and three with each B; 2 adapters, 155 tokens, 3 blocks.
    sizes = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 192)
    assert run["adapter_products"]["flop"] == 6 * 2 * 155 * record["rank"] * 3 * sizes
    assert [path] == list(path.parent.iterdir()), "a temporary file was left behind"


def test_printed_table_is_made_of_the_json_alone(finished: Finished) -> None:
    result, path = finished
    assert result.returncode == 0, result.stderr
    (run,) = json.loads(path.read_text())["runs"]
    model, machine, rest = result.stdout.split("\n", 2)
    assert model == "random weights of size tiny, rank 16, delta"
    assert "2 threads on" in machine or "1 threads on" in machine
    assert rest == throughput.table(run) + "\n"


@pytest.mark.parametrize(("name", "named"), [("value", "the value"), (K_PROJ_A, K_PROJ_A)])
def test_one_perturbed_tensor_makes_the_run_fail(
    name: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small gradient that is off by a thousandth among large ones that are right is still found."""

    def written(way: str) -> dict[str, Tensor]:
        tensors = results()
        if way == "hooks-one":
            tensors[name][1] *= 1.001
        return tensors

    pool = Pretended(written)
    monkeypatch.setattr(harness, "Pool", pool)
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    # On a GPU each way is timed before the next one is checked.
    assert throughput.main(["--size", "tiny", "--adapters", "2", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert f"error: hooks-one: {'the gradient of ' * (name != 'value')}{named} is off by" in error
    assert not pool.asked["step"], "ways that disagree were timed"


@pytest.mark.parametrize(("error", "holds"), [(1.9, True), (2.1, False)])
def test_in_bfloat16_ways_may_err_twice_as_much_as_hooks_do(
    error: float, holds: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = {"hooks-one in float32": 0.0, "hooks-one in bfloat16": 0.1, "engine": 0.1 * error}

    def written(way: str) -> dict[str, Tensor] | None:
        off = noise.get(way)
        return None if off is None else {name: tensor * (1 + off) for name, tensor in results().items()}

    floors = {"flop": 1, "dtype": "bfloat16"}
    pool = Pretended(written, facts=lambda name, when: floors if name in throughput.FLOORS else {})
    monkeypatch.setattr(harness, "Pool", pool)
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    options = ["--size", "tiny", "--dtype", "bfloat16", "--ways", "engine", "--adapters", "2", "--rounds", "2"]
    assert throughput.main([*options, "--device", "cpu"]) == (0 if holds else 1)
    assert pool.asked["check"][:2] == ["hooks-one in float32", "hooks-one in bfloat16"]
    printed = capsys.readouterr()
    if holds:
        told = "Errors are relative to hooks-one in float32; tolerated: value 0.2, gradient 0.2, worst 0.9."
        assert told in printed.out
        assert sorted(set(pool.asked["step"])) == ["adapters' products", "engine", "floor"], "a reference was timed"
    else:
        assert "engine: the value is off by 2.1e-01, expected at most 2.0e-01" in printed.err


@pytest.mark.parametrize(
    ("error", "failing", "tolerated"),
    [(0.09, [], "0.0001"), (19, [], "0.002"), (21, [], None), (19, ["hooks-one in float64"], None)],
)
def test_in_float32_ways_may_err_twice_as_much_as_hooks_do_against_float64(
    error: float, failing: list[str], tolerated: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    off = {"engine": 0.0, "hooks-batch": error * 1e-4, "hooks-one in float64": 0.0, "hooks-one in float32": 1e-3}

    def written(way: str) -> dict[str, Tensor] | None:
        return {name: tensor * (1 + off[way]) for name, tensor in results().items()} if way in off else None

    floors = {"flop": 1, "dtype": "float32"}
    pool = Pretended(
        written, facts=lambda name, when: floors if name in throughput.FLOORS else {},
        failing={name: WorkerError(name, "out of memory") for name in failing},
    )  # fmt: skip
    monkeypatch.setattr(harness, "Pool", pool)
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    options = ["--size", "tiny", "--ways", "engine", "hooks-batch", "--adapters", "2", "--rounds", "2"]
    assert throughput.main([*options, "--device", "cpu"]) == (1 if tolerated is None else 0)
    noise = [] if tolerated == "0.0001" else ["hooks-one in float64", "hooks-one in float32"]
    assert pool.asked["check"] == [*throughput.FLOORS, "engine", "hooks-batch", *noise[: 1 if failing else 2]]
    printed = capsys.readouterr()
    if tolerated is None:
        limit = "1.0e-04" if failing else "2.0e-03"
        assert f"hooks-batch: the value is off by {error * 1e-4:.1e}, expected at most {limit}" in printed.err
    else:
        each = f"value {tolerated}, gradient {tolerated}, worst {tolerated}"
        assert f"Errors are relative to engine; tolerated: {each}." in printed.out


@pytest.mark.parametrize("loss", throughput.LOSSES)
def test_the_noise_of_every_loss_is_that_of_float32(loss: str, tmp_path: Path) -> None:
    given = ["--loss", loss, "--size", "tiny", "--adapters", "3", "--lengths", "6", "20", "--device", "cpu"]
    options = throughput.arguments([*given, "--threads", "1"])
    ((work, _),) = throughput.workloads(options, str(tiny(tmp_path).folder), str(tmp_path))
    found = []
    for name, job in throughput.run_of(work, options).noise.items():
        assert name.endswith(str(job.workload.dtype).removeprefix("torch."))
        passes: Any = job.make(job.workload).step(job.adapters)
        assert sum(len(value) for value, _ in passes) == 2
        found.append(torch.cat([part.flatten().double() for value, own in passes for part in (value, *own.values())]))
    assert 1e-9 < relative_error(found[1], found[0]) < 1e-5


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


def test_figures_are_those_of_the_timings(tmp_path: Path) -> None:
    """Nine steps in three rounds, whose order turns; one takes part in two rounds on half of the adapters."""
    taken = {"a": iter([9.0, 3, 1, 2]), "b": iter([10.0, 8, 4, 6]), "c": iter([11.0, 1.5, 2.5])}
    pool = Pretended(lambda name: None, lambda name: Footprint(80, 200, 100), lambda name: next(taken[name]))
    work = tiny(tmp_path)
    jobs = {name: Job(contenders.HooksOne, work, 1 if name == "c" else 2, 2 if name == "c" else 3) for name in "abc"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "Pool", pool)
        seen: list[list[str]] = []
        run = Run(jobs, ("a",), TOLERANCE[torch.float32], changed=lambda run: seen.append(list(run.entries())))
        a, b, c = run.measure().entries().values()
    assert pool.asked["step"][3:] == ["a", "b", "c", "b", "c", "a", "a", "b"]  # after a first one each
    assert (a["seconds"]["samples"], a["seconds"]["median"]) == ([3, 1, 2], 2)
    assert (b["seconds"]["median"], b["times_anchor"]) == (6, 3)
    assert c["seconds"]["samples"] == [3, 5], "not scaled up to all adapters"
    assert c["times_anchor"] == 4 / 2
    assert (a["tokens_per_second"], a["adapters_per_second"]) == (2 * 158 / 2, 2 / 2)
    assert (a["weights_bytes"], a["peak_bytes"], a["step_bytes"]) == (80, 200, 120)
    assert seen[-1] == ["a", "b", "c"]
    assert [] in seen, "nothing was kept before the end"


@pytest.mark.parametrize(
    ("kind", "count", "longest", "tokens", "tree"),
    [("generic", 5, 33, 158, 155), ("mixed", 15, 35, 357, 352), ("chat", 15, 64, 792, 451)],
)
def test_synthetic_probes_are_as_long_as_the_real_ones(
    kind: str, count: int, longest: int, tokens: int, tree: int
) -> None:
    for vocab_size in (1000, 151936):
        probes = workload.synthetic_probes(kind, vocab_size)
        lengths = [len(probe) for probe in probes]
        assert (len(probes), max(lengths), sum(lengths)) == (count, longest, tokens)
        assert len(pack(probes)) == workload.tree_tokens(probes) == tree
        assert all(0 <= token < vocab_size for probe in probes for token in probe)


def in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: list[str], *options: str) -> Any:
    """The record of a run of every way in this process, on the tiny size."""
    path = tmp_path / "result.json"
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    common = ["--size", "tiny", "--rank", "4", "--rounds", "1", "--device", "cpu", "--one-process", "--threads", "1"]
    assert throughput.main([*common, "--ways", *ways, "--json", str(path), *options]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize(("full", "anchor"), [("hooks-batch", "engine"), ("engine", "hooks-one")])
def test_a_way_that_runs_out_of_memory_is_a_row_that_says_so(
    full: str, anchor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = []

    class Full:
        def weights(self) -> list[Tensor]:
            return []

        def step(self, adapters: int) -> Any:
            tensor = torch.zeros(1)
            held.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    monkeypatch.setitem(contenders.DELTA, full, lambda work: Full())
    ways = ["engine", "hooks-one", "hooks-batch"]
    record = in_this_process(tmp_path, monkeypatch, ways, "--adapters", "1", "2", "--probes", "generic")
    assert [run["adapters"] for run in record["runs"]] == [1, 2]
    for run in record["runs"]:
        assert run["cannot_run"] == {full: "out of memory"}
        assert list(run["ways"]) == [way for way in ways if way != full]
        assert run["anchor"] == run["reference"] == anchor
        bound, seconds = (entry["seconds"]["median"] for entry in (run["floor"], run["ways"][anchor]))
        for entry in run["ways"].values():
            assert entry["times_anchor"] == pytest.approx(entry["seconds"]["median"] / seconds)
            assert entry["share_of_floor"] == pytest.approx(bound / entry["seconds"]["median"])
    out = capsys.readouterr().out
    assert out.count(f"| {full} | out of memory |  |") == 2
    assert "does not fit into memory beside" not in out
    assert out.split("\n", 2)[2] == "".join(throughput.table(run) + "\n" for run in record["runs"])
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
    record = in_this_process(tmp_path, monkeypatch, ["engine", "hooks-batch-compiled"], "--adapters", "2")
    assert record["runs"][0]["cannot_run"] == {"hooks-batch-compiled": "RuntimeError: no kernel for this"}
    assert "| hooks-batch-compiled | RuntimeError: no kernel for this |  |" in capsys.readouterr().out


class Broken:
    """A contender whose step fails; it goes to a process by its name."""

    def __init__(self, work: workload.Workload, error: str) -> None:
        self.error = error

    def weights(self) -> list[Tensor]:
        return []

    def step(self, adapters: int) -> Any:
        if self.error == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.error == "dies":
            import os

            os._exit(9)
        raise ValueError("something else\nover lines")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("memory", "out of memory"),
        ("dies", "its process died, as one does that the system has no memory for"),
        ("other", "ValueError: something else"),
    ],
)
def test_a_process_tells_how_it_failed_and_the_next_one_starts_afresh(error: str, reason: str, tmp_path: Path) -> None:
    work = tiny(tmp_path)
    jobs = {"broken": Job(partial(Broken, error=error), work, 1, 1)}
    with Pool(jobs) as pool:
        pool.only("broken")
        with pytest.raises(WorkerError) as failed:
            pool.call("broken", "step")
        assert failed.value.reason == reason
        assert str(failed.value).startswith(f"broken: {reason}")
        assert ("Traceback" in str(failed.value)) == (error == "other")
        pool.only("broken")
        assert pool.call("broken", "facts") == {}


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
        event("Memcpy HtoD", 350, 100),  # at the same time as the former
        event("Memset", 320, 10),
        event("sgemm", 1000, 50),
        event("a step", 0, 5000, annotation=True),
    ]
    assert Activity.of(events) == Activity(kernels=4, launches=5, busy=200e-9)
    if not torch.cuda.is_initialized():
        assert activity(lambda: None) is None


def test_on_a_gpu_the_table_tells_what_it_did(finished: Finished) -> None:
    (run,) = json.loads(finished[1].read_text())["runs"]
    run["on_gpu"] = True
    run["floor"]["activity"] = None  # could not be profiled
    for entry in run["ways"].values():
        entry["activity"] = {"kernels": 7349, "launches": 12, "busy": entry["seconds"]["median"] / 4}
    header, rule, *rows = (line for line in throughput.table(run).splitlines() if line.startswith("|"))
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names[1] == "ms per step (min to max)"
    assert all(line.count("|") == header.count("|") for line in (rule, *rows))
    engine = dict(zip(names, (cell.strip() for cell in rows[0].strip("|").split("|")), strict=True))
    seconds = run["ways"]["engine"]["seconds"]["median"]
    assert engine[names[1]].startswith(f"{1e3 * seconds:.3g} (")
    assert [engine[name] for name in throughput.ACTIVITY] == [f"{250 * seconds:.3g}", "75%", "7349", "12"]


def test_options_have_defaults_by_loss_and_device() -> None:
    options = throughput.arguments(["--adapters", "8", "1", "--probes", "mixed", "chat", "--device", "cuda"])
    assert (options.adapters, options.probes) == ([8, 1], ["mixed", "chat"])
    assert (options.one_process, options.rounds, options.seed_rounds, options.seed_adapters) == (True, 10, 5, 2)
    options = throughput.arguments(["--device", "cpu"])
    assert (options.one_process, options.rounds, options.seed_rounds, options.seed_adapters) == (False, 5, 2, 2)
    assert (options.adapters, options.rank, options.ways) == ([8], 16, WAYS)
    options = throughput.arguments(["--loss", "lm", "--device", "cpu"])
    assert (options.adapters, options.rank, options.ways[0], len(options.ways)) == ([4], 8, "engine", 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--adapters", "2", "0"], "--adapters is 0, expected at least 1"),
        (["--adapters", "2", "2"], "--adapters names one twice: 2 2"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--seed-rounds", "0"], "--seed-rounds is 0, expected at least 1"),
        (["--threads", "0"], "--threads is 0, expected at least 1"),
        (["--ways", "engine", "magic"], "--ways names 'magic', expected some of engine, "),
        (["--loss", "lm", "--ways", "seed"], "--ways names 'seed', expected some of engine, engine-block, hooks"),
        (["--size", "tiny", "--model", "somewhere"], "not allowed with argument"),
        (["--json", "nowhere/x.json"], "--json names nowhere/x.json, expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        throughput.arguments(wrong)
    assert message in capsys.readouterr().err
