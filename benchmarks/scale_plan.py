"""What a step takes on more devices than one: time, memory, traffic, and which bound holds.

``--measure FILE`` measures the constants of this machine, in one process and in two at once, and compares what they
predict with what other steps take; ``--constants FILE --size 72b --devices 8`` prints a plan. Rates that are known from
elsewhere, such as a data sheet, replace measured ones: ``--gemm-tflops 400``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cost import Constants, MeshStep, meshes
from floor import AdapterProducts, Floor
from measure import machine_facts, machine_line, set_threads, synchronize, use_device
from report import Record, checked, markdown, report
from workload import DTYPES, PROBE_KINDS, SIZES, Workload, checkpoint_of, named_config, synthetic_probes, tree_tokens

import qwen_functional.forward
from lora_delta.files import write_json
from qwen_functional import LoraSpec, Qwen2Config, pack
from qwen_functional.memory import keep_freed_memory

WITHIN = 0.2  # of what is measured
RATES = {
    "gemm_tflops": ("gemm", 1e12), "low_rank_tflops": ("low_rank", 1e12), "memory_gbs": ("memory", 1e9),
    "sum_gbs": ("sum_bytes", 1e9), "sum_us": ("sum_latency", 1e-6),
}  # fmt: skip
MEASURED_ON, ROUNDS, SUM_ELEMENTS = 4, 5, 1 << 21  # adapters, and elements of a large sum
# (adapters, data parallel, tensor parallel, checkpoint): none of them what the constants are measured on.
PREDICTED = ((8, 1, 1, "none"), (2, 1, 1, "none"), (4, 1, 1, "block"),
             (8, 1, 2, "none"), (8, 2, 1, "none"), (4, 1, 2, "block"))  # fmt: skip
PROCESSES = (1, 2)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--measure", type=Path, metavar="FILE", help="measure this machine's constants into a file")
    what.add_argument("--constants", type=Path, metavar="FILE", help="print a plan with a file's constants")
    add = parser.add_argument
    add("--size", choices=SIZES, help="of Qwen2.5 (default: to measure on 0.5b, to plan for 72b)")
    add("--adapters", type=int, default=64, metavar="G")
    add("--devices", type=int, default=8, help="all meshes of so many are shown")
    add("--probes", choices=PROBE_KINDS, default="generic")
    add("--rank", type=int, default=16)
    add("--per-pass", type=int, metavar="N", help="adapters at once on a device (default: all of its own)")
    add("--checkpoint", choices=("none", "block"), default="block")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and products (default: %(default)s)")
    add("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    add("--device", help="default: cuda where there is a GPU, else cpu")
    add("--json", type=Path, metavar="FILE", help="write the plan")
    for name in RATES:
        add(f"--{name.replace('_', '-')}", type=float, help="instead of the measured one")
    options = parser.parse_args(argv)
    options.size = options.size or ("72b" if options.constants else "0.5b")
    if options.constants and not options.constants.is_file():
        parser.error(f"{options.constants} is no file, expected one that --measure has written")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return checked(parser, options, ("adapters", "devices", "rank", "per_pass"))


def step_of(config: Qwen2Config, probes: list[list[int]], rank: int, **step: Any) -> MeshStep:
    spec = LoraSpec(rank=rank, alpha=2 * rank)
    return MeshStep(config, spec, tokens=tree_tokens(probes), read=len(set(pack(probes).last)), **step)


class Step:
    """The engine's step on a rank of a mesh with ``tp`` ranks; of ``dp`` ones each has its own part of the adapters."""

    def __init__(self, workload: Workload, data_parallel: int, tensor_parallel: int, checkpoint: str) -> None:
        self.config, weights = workload.engine_weights()
        self.checkpoint, first = checkpoint, 0
        if data_parallel * tensor_parallel > 1:
            sizes, names = (data_parallel, tensor_parallel), ("dp", "tp")
            mesh = dist.device_mesh.init_device_mesh(torch.device(workload.device).type, sizes, mesh_dim_names=names)
            first = mesh["dp"].get_local_rank()
            weights = weights.shard(self.config, mesh)
        self.weights = weights.prepack() if weights.can_prepack else weights
        each = -(-workload.adapters // data_parallel)
        own = slice(first * each, first * each + each)
        self.lora = {name: tensor[own].clone() for name, tensor in workload.lora(self.config).items()}
        self.cotangent = workload.cotangent(self.config)[own]
        self.spec, self.tokens = workload.spec, pack(workload.probes)

    def __call__(self) -> None:
        with torch.inference_mode():
            given = self.config, self.weights, self.tokens, self.spec.bind(self.config, self.lora)
            _, vjp = qwen_functional.forward.forward_vjp(*given, checkpoint=self.checkpoint)
            vjp(self.cotangent)


def in_ranks(ranks: int, workload: Workload, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of the workload returns in each of so many processes, which form a group."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(ranks) as pool:
        address = f"file://{Path(folder) / 'store'}"
        jobs = [(rank, ranks, address, workload, function, arguments) for rank in range(ranks)]
        return pool.starmap(_in_group, jobs, chunksize=1)


def _in_group(
    rank: int, ranks: int, address: str, workload: Workload, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(workload.threads)
    keep_freed_memory()
    if workload.on_gpu:
        torch.cuda.set_device(rank)
    backend = "nccl" if workload.on_gpu else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks)
    try:
        return function(workload, *arguments)
    finally:
        dist.destroy_process_group()


def _step_seconds(workload: Workload, data_parallel: int, tensor_parallel: int, checkpoint: str) -> float:
    step = Step(workload, data_parallel, tensor_parallel, checkpoint)
    step()
    return _median(step)


def _constants(workload: Workload, counted: MeshStep) -> Constants:
    """``memory`` is what is left of a step when its products are taken off."""
    rates = []
    for kind in (Floor, AdapterProducts):
        products = kind(workload)
        products.step(workload.adapters)
        rates.append(products.flop / _median(partial(products.step, workload.adapters)))
    gemm, low_rank = rates
    seconds = _step_seconds(workload, 1, 1, "none")
    rest = seconds - counted.gemm_flop() / gemm - counted.low_rank_flop() / low_rank
    memory = counted.memory_bytes() / max(rest, 0.01 * seconds)
    small, large = (torch.ones(n, dtype=torch.float32, device=workload.device) for n in (1, SUM_ELEMENTS))
    latency, whole = _median(lambda: dist.all_reduce(small), 50), _median(lambda: dist.all_reduce(large), 20)
    return Constants(gemm, low_rank, memory, large.nbytes / max(whole - latency, 1e-9), latency)


def _median(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of a call, which all processes begin together."""
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(options: argparse.Namespace, folder: str) -> int:
    """The constants where so many processes work at once, of the slowest of them; then what they predict, beside what
    it takes. Exit status 1 where a prediction is off by more than ``WITHIN``."""
    probes = synthetic_probes("generic", named_config(options.size).vocab_size)

    def work_of(adapters: int, **mesh: Any) -> tuple[Workload, MeshStep]:
        dtype = DTYPES[options.dtype]
        work = Workload(folder, probes, adapters, options.rank, dtype, options.threads, device=options.device)
        itemsize = work.compute_dtype.itemsize
        return work, step_of(work.config(), probes, options.rank, adapters=adapters, itemsize=itemsize, **mesh)

    record: Record = {"machine": machine_facts(options.threads), "dtype": options.dtype, "constants": {}, "cases": []}
    most = torch.cuda.device_count() if work_of(1)[0].on_gpu else max(PROCESSES)  # a process needs a GPU of its own
    for processes in (n for n in PROCESSES if n <= most):
        report(f"measuring with {processes} at once")
        work, step = work_of(MEASURED_ON)
        found = in_ranks(processes, work, _constants, step)
        record["constants"][str(processes)] = slowest = {
            name: (max if name == "sum_latency" else min)(getattr(one, name) for one in found)
            for name, _ in RATES.values()
        }
        print(f"{processes} at once: {shown(Constants(**slowest), alone=processes == 1)}", flush=True)
        write_json(options.measure, record)
    rows, all_within = [], True
    for adapters, dp, tp, checkpoint in (case for case in PREDICTED if case[1] * case[2] <= most):
        report(f"G = {adapters}, dp {dp}, tp {tp}, {checkpoint}")
        work, step = work_of(adapters, data_parallel=dp, tensor_parallel=tp, checkpoint=checkpoint)
        predicted = step.seconds(constants_for(record, dp * tp, options))["total"]
        seconds = max(in_ranks(dp * tp, work, _step_seconds, dp, tp, checkpoint))
        all_within &= abs(predicted / seconds - 1) <= WITHIN
        rows.append({
            "adapters": f"{adapters}", "dp": f"{dp}", "tp": f"{tp}", "checkpoint": checkpoint,
            "predicted s": f"{predicted:.3g}", "measured s": f"{seconds:.3g}", "ratio": f"{predicted / seconds:.2f}",
        })  # fmt: skip
        record["cases"].append({"case": (adapters, dp, tp, checkpoint), "predicted": predicted, "seconds": seconds})
        write_json(options.measure, record)
    print(f"\n{markdown(rows)}\n\nPredictions are {'' if all_within else 'NOT '}within {WITHIN:.0%} of the measured.")
    return 0 if all_within else 1


def constants_for(record: Mapping[str, Any], devices: int, options: argparse.Namespace) -> Constants:
    """Those measured with as many processes at once, or the most there are; rates that were given instead."""
    by_count = {int(count): Constants(**values) for count, values in record["constants"].items()}
    count = max((n for n in by_count if n <= devices), default=min(by_count))
    given = {name: getattr(options, name) for name in RATES}
    replaced = {RATES[name][0]: value * RATES[name][1] for name, value in given.items() if value is not None}
    return dataclasses.replace(by_count[count], **replaced)


def shown(constants: Constants, *, alone: bool = False) -> str:
    """In words; of a process alone without sums, which it has none to share with."""
    sums = f", sums {constants.sum_bytes / 1e9:.2f} GB/s after {constants.sum_latency * 1e6:.0f} µs"
    return (
        f"products {constants.gemm / 1e9:.1f} GFLOP/s, low-rank {constants.low_rank / 1e9:.1f} GFLOP/s, "
        f"memory {constants.memory / 1e9:.2f} GB/s{'' if alone else sums}"
    )


def show_plan(options: argparse.Namespace) -> int:
    record, config = json.loads(options.constants.read_text()), named_config(options.size)
    step = step_of(
        config, synthetic_probes(options.probes, config.vocab_size), options.rank, adapters=options.adapters,
        itemsize=DTYPES[options.dtype].itemsize, checkpoint=options.checkpoint, per_pass=options.per_pass,
    )  # fmt: skip
    constants, plans = constants_for(record, options.devices, options), meshes(step, options.devices)
    given = [name.replace("_", "-") for name in RATES if getattr(options, name) is not None]
    print(
        f"Qwen2.5-{options.size.upper()}, {options.adapters} adapters of rank {options.rank}, {step.tokens} tokens "
        f"each, {options.dtype}, checkpoint {options.checkpoint}\n"
        f"Constants of: {machine_line(record['machine'])}{'; given: ' * bool(given)}{', '.join(given)}\n"
        f"{shown(constants, alone=options.devices == 1)}\n\n{markdown([_row(plan, constants) for plan in plans])}"
    )
    if options.json:
        told = [{**_told(plan, constants), "memory_bytes": plan.memory()} for plan in plans]
        write_json(options.json, {"constants": dataclasses.asdict(constants), "plans": told})
    return 0


def _told(plan: MeshStep, constants: Constants) -> Record:
    mesh = {"data_parallel": plan.data_parallel, "tensor_parallel": plan.tensor_parallel}
    return {**mesh, "seconds": plan.seconds(constants), "traffic_bytes": plan.traffic(), "bound": plan.bound(constants)}


def _row(plan: MeshStep, constants: Constants) -> dict[str, str]:
    seconds, memory = plan.seconds(constants), plan.memory()
    return {
        "dp": f"{plan.data_parallel}", "tp": f"{plan.tensor_parallel}", "s per step": f"{seconds.pop('total'):.3g}",
        **{f"{part} s": f"{value:.3g}" for part, value in seconds.items()},
        "GB a device": f"{sum(memory.values()) / 1e9:.1f}", "of which weights GB": f"{memory['weights'] / 1e9:.1f}",
        "GB sent a device": f"{plan.traffic() / 1e9:.2f}", "bound": plan.bound(constants),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where predictions are off."""
    options = arguments(argv)
    set_threads(options.threads)
    use_device(options.device)
    if options.constants:
        return show_plan(options)
    with tempfile.TemporaryDirectory() as scratch:
        return measure(options, checkpoint_of(None, options.size, scratch))


if __name__ == "__main__":
    sys.exit(main())
