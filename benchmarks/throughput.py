"""Forward and backward to all LoRA tensors: this engine against its rivals and the GEMM floor, in one run.

See README.md beside this file for what each figure means. Progress goes to stderr, the tables to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import TOLERANCE, Agreement, DisagreementError, Tolerance, compare, require
from measure import machine_facts, memory_limit
from picture import check_plot, throughput_picture
from probe_sets import PROBE_KINDS, probe_ids, tree_tokens
from schedule import groups_that_fit, time_groups
from sizes import SIZES
from summary import floor_entry, headline, table, way_entry
from ways import ADAPTERS, DEFAULT_WAYS, FLOOR, FLOORS, WAYS
from workers import Footprint, Job, Pool, WorkerError, set_threads, use_device
from workload import DTYPES, Workload, config_of, local_folder

from lora_delta.files import write_json

# transformers' float16 goes through torch's CPU GEMM, at 1 to 2 GFLOP/s backwards: hours.
TOO_SLOW = "float16 matrix products of torch run at 1 to 2 GFLOP/s backwards on a CPU"


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="ID_OR_FOLDER", help="a Qwen2 checkpoint")
    model.add_argument("--size", choices=SIZES, help="random weights of this size (default: 0.5b)")
    parser.add_argument("--probes", choices=PROBE_KINDS, default="generic")
    parser.add_argument("--adapters", type=int, default=8, metavar="G")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--compute", choices=("float32", "bfloat16"), help="what the engine multiplies in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=",".join(DEFAULT_WAYS), help=f"some of {','.join(WAYS)}")
    add = parser.add_argument
    add("--seed-adapters", type=int, help="time the seed's way on so many, scaled to G (default: at most 2)")
    add("--seed-rounds", type=int, help="rounds in which the seed's way takes part (default: at most 2)")
    add("--seed-probes", type=int, help="probes that the seed's way takes at a time (default: all)")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--memory", type=float, metavar="GIB", help="for all processes (default: 0.9 of what is free)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--peak", type=float, metavar="TFLOPS", help="of the device in this dtype: say what share each way reaches")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--plot", type=Path, metavar="FILE.png", help="draw tokens/s per way, the floor as a line")
    options = parser.parse_args(argv)
    options.ways = options.ways.split(",")
    for way in options.ways:
        if way not in WAYS:
            parser.error(f"--ways names {way!r}, expected some of {','.join(WAYS)}")
    if len(set(options.ways)) < len(options.ways):
        parser.error(f"--ways names one twice: {','.join(options.ways)}")
    options.ways.sort(key=list(WAYS).index)
    if options.model is None and options.size is None:
        options.size = "0.5b"
    if options.seed_adapters is None:
        options.seed_adapters = min(options.adapters, 2)
    if options.seed_rounds is None:
        options.seed_rounds = min(options.rounds, 2)
    counts = ("adapters", "rank", "rounds", "seed_adapters", "seed_probes", "seed_rounds", "threads")
    check_counts_and_json(parser, options, counts)
    check_plot(parser, options.plot)
    if options.seed_adapters > options.adapters:
        parser.error(f"--seed-adapters is {options.seed_adapters}, expected at most {options.adapters}")
    return options


def check_counts_and_json(parser: argparse.ArgumentParser, options: argparse.Namespace, counts: Sequence[str]) -> None:
    """Ends the program for a count below 1, or a ``--json`` that cannot be written."""
    for name in counts:
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if options.json and (options.json.is_dir() or not options.json.resolve().parent.is_dir()):
        parser.error(f"--json names {options.json}, expected a file in a folder that exists")


def checked(
    ways: Sequence[str], pool: Pool, adapters: Mapping[str, int]
) -> tuple[dict[str, Footprint], dict[str, Agreement], str, Tolerance]:
    """Let every way do one whole step in a process of its own; raise where they disagree.

    In float32 the ways must agree with the first (the engine, if it is among them). In a narrower dtype, and
    where there is only one, they are compared with float32 hooks on the same rounded numbers, over at most
    two adapters; in bfloat16 these hooks' own error in that dtype widens what is tolerated.

    Returns the ways' footprints, their agreements, what the reference was, and what was tolerated.
    """
    workload, footprints, agreements = pool.jobs[FLOOR].workload, {}, {}
    products = workload.compute or workload.dtype
    tolerance = TOLERANCE[str(products).removeprefix("torch.")]
    with tempfile.TemporaryDirectory() as scratch:
        if workload.dtype == torch.float32 and workload.compute is None and len(ways) > 1:
            reference, reference_path = ways[0], str(Path(scratch) / f"{ways[0]}.safetensors")
        else:
            reference, reference_path = "hooks-one in float32", str(Path(scratch) / "reference.safetensors")
            report(f"reference: {reference}")
            hooks_in(torch.float32, workload, reference_path)
            if products == torch.bfloat16:
                path = str(Path(scratch) / "noise.safetensors")
                hooks_in(products, workload, path)
                noise = compare(path, reference_path)
                report(f"hooks-one in bfloat16: {noise}")
                tolerance = tolerance.beside(noise)
        for way in (*ways, *FLOORS):
            path = str(Path(scratch) / f"{way}.safetensors")
            report(f"checking {way}")
            footprints[way] = check(way, pool, path, adapters[way])
            report(f"  peak {footprints[way].peak / 1e9:.2f} GB, idle {footprints[way].idle / 1e9:.2f} GB")
            if way not in FLOORS and path != reference_path:
                agreements[way] = compare(path, reference_path)
                report(f"  {agreements[way]}")
                require(way, agreements[way], tolerance)
                Path(path).unlink()
    return footprints, agreements, reference, tolerance


def hooks_in(dtype: torch.dtype, workload: Workload, path: str) -> None:
    """One step of hooks in ``dtype`` on the workload's rounded numbers, at most two adapters, to a file."""
    job = Job("hooks-one", dataclasses.replace(workload, dtype=dtype, rounded_to=workload.dtype))
    check("hooks-one", Pool({"hooks-one": job}), path, min(workload.adapters, 2))


def check(way: str, pool: Pool, path: str, adapters: int) -> Footprint:
    with pool.running([way]) as workers:
        return workers[way].check(path, adapters)


def measured(options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """Everything about one dtype, ready for json."""
    ways, skipped = options.ways, {}
    if workload.dtype == torch.float16 and workload.device == "cpu":
        skipped = {way: TOO_SLOW for way in ways if not way.startswith("engine")}
        ways = [way for way in ways if way not in skipped]
        for way, why in skipped.items():
            report(f"{way} is left out: {why}")
    adapters = dict.fromkeys((*ways, *FLOORS), workload.adapters)
    rounds = dict.fromkeys((*ways, *FLOORS), options.rounds)
    if "seed" in ways:
        adapters["seed"], rounds["seed"] = options.seed_adapters, options.seed_rounds
    anchor = ways[0] if ways else FLOOR
    pool = Pool({way: Job(way, workload) for way in adapters}, keep=workload.is_small)
    try:
        footprints, agreements, reference, tolerance = checked(ways, pool, adapters)
        groups = groups_that_fit(footprints, anchor, memory_limit(options.memory))
        samples = time_groups(groups, pool, anchor, adapters, rounds, report)
    finally:
        pool.stop()
    dtype = str(workload.dtype).removeprefix("torch.")
    return {
        "dtype": dtype,
        "adapters": workload.adapters,
        "reference": reference,
        "tolerance": dataclasses.asdict(tolerance),
        "anchor": anchor,
        "timed_together": groups,
        "floor": floor_entry(samples[FLOOR]),
        "adapter_products": floor_entry(samples[ADAPTERS]),
        "peak_tflops": options.peak,
        "ways": {
            way: way_entry(
                way, workload, footprints[way], samples, agreements.get(way), adapters[way], anchor
            )
            for way in ways
        },
        "skipped": skipped,
    }


def model_name(options: argparse.Namespace) -> str:
    """The hub id, or the folder's name without its place on this machine."""
    if options.model is None:
        return f"random weights of size {options.size}"
    folder = Path(options.model)
    return folder.resolve().name if folder.is_dir() else options.model


def record_of(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print, dtype by dtype; everything, ready for json."""
    folder = local_folder(options.model) if options.model else None
    probes = probe_ids(folder, options.probes, config_of(folder, options.size).vocab_size)
    workload = Workload(
        folder=folder,
        size=options.size,
        probes=probes,
        adapters=options.adapters,
        rank=options.rank,
        dtype=torch.float32,
        threads=options.threads,
        seed_probes=options.seed_probes,
        compute=DTYPES[options.compute] if options.compute else None,
        device=options.device,
    )
    record: dict[str, Any] = {
        "machine": machine_facts(options.threads),
        "model": model_name(options),
        "probes": {
            "kind": options.probes,
            "count": len(probes),
            "tokens": sum(map(len, probes)),
            "tree_tokens": tree_tokens(probes),
            "longest": max(map(len, probes)),
        },
        "adapters": options.adapters,
        "rank": options.rank,
        "seed_probes": options.seed_probes,
        "runs": [],
    }
    print(headline(record), flush=True)
    for dtype in options.dtype:
        record["runs"].append(measured(options, dataclasses.replace(workload, dtype=DTYPES[dtype])))
        print(table(record["runs"][-1]), flush=True)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 where ways disagree or one of them fails."""
    options = arguments(argv)
    set_threads(options.threads)
    use_device(options.device)
    errors = (DisagreementError, WorkerError, ValueError, OSError)
    return exit_status(options, record_of, errors, throughput_picture if options.plot else None)


def exit_status(
    options: argparse.Namespace,
    record_of: Callable[[argparse.Namespace], dict[str, Any]],
    errors: tuple[type[Exception], ...],
    draw: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> int:
    """0, with the record in ``--json``'s file and drawn to ``--plot``'s; or 1, with one of ``errors`` on stderr."""
    try:
        record = record_of(options)
    except errors as error:
        report(f"error: {error}")
        return 1
    if options.json:
        write_json(options.json, record)
    if draw:
        draw(record, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
