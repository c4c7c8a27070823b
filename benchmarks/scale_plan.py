"""What a step takes on more devices than one: time, memory, traffic, and which bound holds.

``--measure FILE`` measures the constants of this machine; ``--validate FILE`` compares what they predict with what
steps of one process and of two take; and ``--constants FILE --size 72b --devices 8`` prints the plan. Rates that are
known from elsewhere, such as a data sheet, replace measured ones: ``--gemm-tflops 400``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from constants import measured, mesh_step_of, step_seconds, workload_of
from cost import Constants, MeshStep, meshes
from measure import machine_facts, machine_line
from probe_sets import PROBE_KINDS, synthetic_probes, tree_tokens
from sizes import SIZES, named_config
from throughput import check_counts_and_json, report
from workers import set_threads, use_device
from workload import DTYPES

from lora_delta.files import write_json
from qwen_functional import LoraSpec, pack

WITHIN = 0.2  # of what is measured
RATES = {
    "gemm_tflops": ("gemm", 1e12),
    "low_rank_tflops": ("low_rank", 1e12),
    "memory_gbs": ("memory", 1e9),
    "sum_gbs": ("sum_bytes", 1e9),
    "sum_us": ("sum_latency", 1e-6),
    "disk_gbs": ("disk", 1e9),
}
# (size, adapters, data parallel, tensor parallel, checkpoint): none of them what the constants were measured on.
VALIDATED = (
    ("0.5b", 8, 1, 1, "none"),
    ("0.5b", 2, 1, 1, "none"),
    ("0.5b", 4, 1, 1, "block"),
    ("0.5b", 8, 1, 2, "none"),
    ("0.5b", 8, 2, 1, "none"),
    ("0.5b", 4, 1, 2, "block"),
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--measure", type=Path, metavar="FILE", help="measure the constants of this machine into a file")
    what.add_argument("--validate", type=Path, metavar="FILE", help="compare a file's predictions with steps here")
    what.add_argument("--constants", type=Path, metavar="FILE", help="print a plan with a file's constants")
    add = parser.add_argument
    add("--size", choices=[size for size in SIZES if size != "tiny"], default="72b", help="of Qwen2.5")
    add("--adapters", type=int, default=64, metavar="G")
    add("--devices", type=int, default=8, help="all meshes of so many are shown")
    add("--probes", choices=PROBE_KINDS, default="generic")
    add("--rank", type=int, default=16)
    add("--per-pass", type=int, metavar="N", help="adapters at once on a device (default: all of its own)")
    add("--checkpoint", choices=("none", "block"), default="block")
    add("--stream", action="store_true", help="base weights on disk")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and products (default: %(default)s)")
    add("--processes", type=int, nargs="+", default=[1, 2], help="at once, while measuring (default: 1 2)")
    add("--measure-size", choices=SIZES, default="0.5b", help="to measure on (default: %(default)s)")
    add("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    add("--device", help="default: cuda if there is a GPU for each process at once, else cpu")
    add("--json", type=Path, metavar="FILE", help="write the plan, or the comparison")
    for name in RATES:
        add(f"--{name.replace('_', '-')}", type=float, help="instead of the measured one")
    options = parser.parse_args(argv)
    check_counts_and_json(parser, options, ("adapters", "devices", "rank", "per_pass", "threads"))
    for path in (options.validate, options.constants):
        if path is not None and not path.is_file():
            parser.error(f"{path} is no file, expected one that --measure has written")
    processes = max(dp * tp for _, _, dp, tp, _ in VALIDATED) if options.validate else max(options.processes)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device is None:
        options.device = "cuda" if gpus >= processes else "cpu"
    elif torch.device(options.device).type == "cuda" and gpus < processes and options.constants is None:
        fewer = f", or --processes {gpus}" if options.measure and gpus else ""
        parser.error(f"{processes} processes need a GPU each, found {gpus}: expected --device cpu{fewer}")
    return options


def constants_for(record: Mapping[str, Any], devices: int, options: argparse.Namespace) -> Constants:
    """Those measured with as many processes at once, or the most there are; rates that were given instead."""
    by_count = {int(count): Constants(**values) for count, values in record["constants"].items()}
    count = max((n for n in by_count if n <= devices), default=min(by_count))
    given = {name: getattr(options, name) for name in RATES}
    replaced = {RATES[name][0]: value * RATES[name][1] for name, value in given.items() if value is not None}
    return dataclasses.replace(by_count[count], **replaced)


def measure(options: argparse.Namespace) -> int:
    constants = {}
    for processes in options.processes:
        report(f"measuring with {processes} at once")
        found = measured(
            processes, options.measure_size, DTYPES[options.dtype], options.threads, options.device
        )
        constants[str(processes)] = dataclasses.asdict(found)
        print(f"{processes} at once: {shown(found, alone=processes == 1)}", flush=True)
    facts = machine_facts(options.threads)
    write_json(options.measure, {"machine": facts, "dtype": options.dtype, "constants": constants})
    return 0


def shown(constants: Constants, *, alone: bool = False) -> str:
    """In words; of a process alone without sums, which it has none to share with."""
    sums = f"sums {constants.sum_bytes / 1e9:.2f} GB/s after {constants.sum_latency * 1e6:.0f} µs, "
    return (
        f"products {constants.gemm / 1e9:.1f} GFLOP/s, low-rank {constants.low_rank / 1e9:.1f} GFLOP/s, "
        f"memory {constants.memory / 1e9:.2f} GB/s, {'' if alone else sums}disk {constants.disk / 1e9:.2f} GB/s"
    )


def validate(options: argparse.Namespace) -> int:
    """Exit status 1 where a prediction is off by more than ``WITHIN``."""
    record = json.loads(options.validate.read_text())
    lines = ["| size | adapters | dp | tp | checkpoint | predicted s | measured s | predicted / measured |"]
    lines.append("|" + "---:|" * 8)
    entries: list[dict[str, Any]] = []
    all_within = True
    for size, adapters, data_parallel, tensor_parallel, checkpoint in VALIDATED:
        report(f"G = {adapters}, dp {data_parallel}, tp {tensor_parallel}, {checkpoint}")
        workload = workload_of(size, adapters, DTYPES[record["dtype"]], options.threads, options.device)
        step = mesh_step_of(
            workload, data_parallel=data_parallel, tensor_parallel=tensor_parallel, checkpoint=checkpoint
        )
        constants = constants_for(record, data_parallel * tensor_parallel, options)
        predicted = step.seconds(constants)
        seconds = step_seconds(workload, data_parallel, tensor_parallel, checkpoint, options.threads)
        ratio = predicted["total"] / seconds
        all_within &= abs(ratio - 1) <= WITHIN
        lines.append(
            f"| {size} | {adapters} | {data_parallel} | {tensor_parallel} | {checkpoint} | {predicted['total']:.3g} | "
            f"{seconds:.3g} | {ratio:.2f} |"
        )
        entries.append({"case": VALIDATED[len(entries)], "predicted": predicted, "seconds": seconds})
    print("\n".join(lines))
    print(f"Predictions are {'' if all_within else 'NOT '}within {WITHIN:.0%} of what was measured.")
    if options.json:
        write_json(options.json, {"machine": machine_facts(options.threads), "cases": entries})
    return 0 if all_within else 1


def show_plan(options: argparse.Namespace) -> int:
    record = json.loads(options.constants.read_text())
    config = named_config(options.size)
    probes = synthetic_probes(options.probes, config.vocab_size)
    step = MeshStep(
        config,
        LoraSpec(rank=options.rank, alpha=2 * options.rank),
        options.adapters,
        tree_tokens(probes),
        len(set(pack(probes).last)),
        DTYPES[options.dtype].itemsize,
        checkpoint=options.checkpoint,
        stream=options.stream,
        per_pass=options.per_pass,
    )
    constants = constants_for(record, options.devices, options)
    given = [name.replace("_", "-") for name in RATES if getattr(options, name) is not None]
    print(
        f"Qwen2.5-{options.size.upper()}, {options.adapters} adapters of rank {options.rank}, {step.tokens} tokens "
        f"each, {options.dtype}, checkpoint {options.checkpoint}{', streamed' if options.stream else ''}"
    )
    print(f"Constants of: {machine_line(record['machine'])}" + (f"; given: {', '.join(given)}" if given else ""))
    print(shown(constants, alone=options.devices == 1) + "\n")
    steps = meshes(step, options.devices)
    print(plan_table(steps, constants))
    if options.json:
        entries = [
            {
                "data_parallel": one.data_parallel,
                "tensor_parallel": one.tensor_parallel,
                "seconds": one.seconds(constants),
                "memory_bytes": one.memory(),
                "traffic_bytes": one.traffic(),
                "bound": one.bound(constants),
            }
            for one in steps
        ]
        write_json(options.json, {"constants": dataclasses.asdict(constants), "plans": entries})
    return 0


def plan_table(steps: Sequence[MeshStep], constants: Constants) -> str:
    """A Markdown table, a line for each mesh."""
    parts = ("products", "low-rank", "elementwise", "sums", "reading")
    header = ("dp", "tp", "s per step", *(f"{part} s" for part in parts), "GB a device", "of which weights GB",
              "GB sent a device", "bound")  # fmt: skip
    rows: list[Sequence[str]] = [header, [*["---:"] * (len(header) - 1), "---"]]
    for step in steps:
        seconds, memory = step.seconds(constants), step.memory()
        rows.append(
            (
                f"{step.data_parallel}",
                f"{step.tensor_parallel}",
                f"{seconds['total']:.3g}",
                *(f"{seconds[part]:.3g}" for part in parts),
                f"{sum(memory.values()) / 1e9:.1f}",
                f"{memory['weights'] / 1e9:.1f}",
                f"{step.traffic() / 1e9:.2f}",
                step.bound(constants),
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where predictions are off."""
    options = arguments(argv)
    set_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    use_device(options.device)
    if options.measure:
        return measure(options)
    return validate(options) if options.validate else show_plan(options)


if __name__ == "__main__":
    sys.exit(main())
