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
from schedule import Samples, groups_that_fit, time_groups
from sizes import SIZES
from summary import floor_entry, headline, table, way_entry
from ways import ADAPTERS, DEFAULT_WAYS, FLOOR, FLOORS, WAYS
from workers import CannotRunError, Footprint, Job, Pool, WorkerError, set_threads, use_device
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
    parser.add_argument("--probes", nargs="+", choices=PROBE_KINDS, default=["generic"], help="one table for each")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8], metavar="G", help="one table for each")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--compute", choices=("float32", "bfloat16"), help="what the engine multiplies in")
    parser.add_argument("--rounds", type=int, help="timed steps of each way (default: 5, on a GPU 10)")
    parser.add_argument("--ways", default=",".join(DEFAULT_WAYS), help=f"some of {','.join(WAYS)}")
    add = parser.add_argument
    seed = "the seed's way (on a GPU also hooks-one)"
    add("--seed-adapters", type=int, help=f"time {seed} on so many, scaled to G (default: at most 2)")
    add("--seed-rounds", type=int, help=f"rounds in which {seed} takes part (default: at most 2, on a GPU 5)")
    add("--seed-probes", type=int, help="probes that the seed's way takes at a time (default: all)")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--memory", type=float, metavar="GIB", help="for all processes (default: 0.9 of what is free)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    one_process = "all ways in this process, one after the other (default: on a GPU)"
    add("--one-process", action=argparse.BooleanOptionalAction, help=one_process)
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
    on_gpu = torch.device(options.device).type == "cuda"
    if options.one_process is None:
        options.one_process = on_gpu
    if options.rounds is None:
        options.rounds = 10 if on_gpu else 5
    if options.seed_adapters is None:
        options.seed_adapters = min(max(options.adapters), 2)
    if options.seed_rounds is None:
        options.seed_rounds = min(options.rounds, 5 if on_gpu else 2)
    if min(options.adapters) < 1:
        parser.error(f"--adapters is {min(options.adapters)}, expected at least 1")
    counts = ("rank", "rounds", "seed_adapters", "seed_probes", "seed_rounds", "threads")
    check_counts_and_json(parser, options, counts)
    check_plot(parser, options.plot)
    if options.plot and len(options.adapters) * len(options.probes) > 1:
        parser.error("--plot draws one table, expected one of --adapters and one of --probes")
    if options.seed_adapters > max(options.adapters):
        parser.error(f"--seed-adapters is {options.seed_adapters}, expected at most {max(options.adapters)}")
    return options


def check_counts_and_json(parser: argparse.ArgumentParser, options: argparse.Namespace, counts: Sequence[str]) -> None:
    """Ends the program for a count below 1, or a ``--json`` that cannot be written."""
    for name in counts:
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if options.json and (options.json.is_dir() or not options.json.resolve().parent.is_dir()):
        parser.error(f"--json names {options.json}, expected a file in a folder that exists")


@dataclasses.dataclass
class Checked:
    """What the ways' first steps tell.

    Attributes:
        reference: what they were compared with.
        tolerance: by how much they may differ from it.
        cannot_run: why a way is left out, if it is.
    """

    reference: str
    tolerance: Tolerance
    footprints: dict[str, Footprint] = dataclasses.field(default_factory=dict)
    agreements: dict[str, Agreement] = dataclasses.field(default_factory=dict)
    cannot_run: dict[str, str] = dataclasses.field(default_factory=dict)


def checked(
    ways: Sequence[str], pool: Pool, adapters: Mapping[str, int], then: Callable[[str], None] = lambda way: None
) -> Checked:
    """Let every way do one whole step in a process of its own; raise where they disagree.

    In float32 the ways must agree with the first (the engine, if it is among them). In a narrower dtype, and
    where there is only one, they are compared with float32 hooks on the same rounded numbers, over at most
    two adapters; in bfloat16 these hooks' own error in that dtype widens what is tolerated.

    Args:
        then: called with each way that has agreed, before the next one starts.
    """
    workload = pool.jobs[FLOOR].workload
    products = workload.compute or workload.dtype
    told = Checked("", TOLERANCE[str(products).removeprefix("torch.")])
    kept, reference_path = None, ""
    with tempfile.TemporaryDirectory() as scratch:
        if workload.dtype != torch.float32 or workload.compute is not None or len(ways) < 2:
            kept = min(workload.adapters, 2)
            told.reference, reference_path = "hooks-one in float32", str(Path(scratch) / "reference.safetensors")
            report(f"reference: {told.reference}")
            hooks_in(torch.float32, workload, reference_path, pool.local)
            if products == torch.bfloat16:
                path = str(Path(scratch) / "noise.safetensors")
                hooks_in(products, workload, path, pool.local)
                noise = compare(path, reference_path)
                report(f"hooks-one in bfloat16: {noise}")
                told.tolerance = told.tolerance.beside(noise)
        for way in (*FLOORS, *ways):
            path = str(Path(scratch) / f"{way}.safetensors")
            report(f"checking {way}")
            try:
                footprint = check(way, pool, path, adapters[way], kept)
                report(f"  peak {footprint.peak / 1e9:.2f} GB, idle {footprint.idle / 1e9:.2f} GB")
                if way not in FLOORS and not reference_path:
                    told.reference, reference_path = way, path
                elif way not in FLOORS:
                    told.agreements[way] = compare(path, reference_path)
                    report(f"  {told.agreements[way]}")
                    require(way, told.agreements[way], told.tolerance)
                    Path(path).unlink()
                then(way)
                told.footprints[way] = footprint
            except CannotRunError as error:
                if way in FLOORS:
                    raise
                report(f"{way} is left out: {error.reason}")
                told.cannot_run[way] = error.reason
    return told


def hooks_in(dtype: torch.dtype, workload: Workload, path: str, local: bool) -> None:
    """One step of hooks in ``dtype`` on the workload's rounded numbers, at most two adapters, to a file."""
    job = Job("hooks-one", dataclasses.replace(workload, dtype=dtype, rounded_to=workload.dtype))
    pool = Pool({"hooks-one": job}, local=local)
    try:
        check("hooks-one", pool, path, min(workload.adapters, 2))
    finally:
        pool.stop()


def check(way: str, pool: Pool, path: str, adapters: int, kept: int | None = None) -> Footprint:
    with pool.running([way]) as workers:
        return workers[way].check(path, adapters, kept)


def measured(options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """Everything about one dtype, ready for json."""
    ways, skipped = options.ways, {}
    if workload.dtype == torch.float16 and not workload.on_gpu:
        skipped = {way: TOO_SLOW for way in ways if not way.startswith("engine")}
        ways = [way for way in ways if way not in skipped]
        for way, why in skipped.items():
            report(f"{way} is left out: {why}")
    adapters = dict.fromkeys((*ways, *FLOORS), workload.adapters)
    rounds = dict.fromkeys((*ways, *FLOORS), options.rounds)
    # A GPU's steps are so even that a few adapters tell as much as all of them, one after the other.
    for way in ("seed", "hooks-one") if workload.on_gpu else ("seed",):
        if way in ways:
            adapters[way], rounds[way] = min(options.seed_adapters, workload.adapters), options.seed_rounds
    pool = Pool({way: Job(way, workload) for way in adapters}, workload.is_small, options.one_process)
    samples: dict[str, Samples] = {}

    def timed(groups: Sequence[Sequence[str]], anchor: str) -> None:
        samples.update(time_groups(groups, pool, anchor, adapters, rounds, report))

    try:
        if options.one_process:
            told = checked(ways, pool, adapters, lambda way: timed([[way]], "none"))
        else:
            told = checked(ways, pool, adapters)
        ways = [way for way in ways if way not in told.cannot_run]
        anchor, groups = ways[0] if ways else FLOOR, [[way] for way in samples]
        if not options.one_process:
            groups = groups_that_fit(told.footprints, anchor, memory_limit(options.memory))
            timed(groups, anchor)
    finally:
        pool.stop()
    dtype = str(workload.dtype).removeprefix("torch.")
    return {
        "dtype": dtype,
        "adapters": workload.adapters,
        "on_gpu": workload.on_gpu,
        "one_process": options.one_process,
        "reference": told.reference,
        "tolerance": dataclasses.asdict(told.tolerance),
        "anchor": anchor,
        "timed_together": groups,
        "floor": floor_entry(samples[FLOOR]),
        "adapter_products": floor_entry(samples[ADAPTERS]),
        "peak_tflops": options.peak,
        "ways": {
            way: way_entry(
                way, workload, told.footprints[way], samples, told.agreements.get(way), adapters[way], anchor
            )
            for way in ways
        },
        "cannot_run": told.cannot_run,
        "skipped": skipped,
    }


def add_activity(run: dict[str, Any], workload: Workload, local: bool) -> None:
    """What a step of each way makes the GPU do; a way that is timed on fewer adapters does it that much more often."""
    entries = {FLOOR: run["floor"], **run["ways"]}
    pool = Pool({way: Job(way, workload) for way in entries}, local=local)
    try:
        for way, entry in entries.items():
            report(f"profiling {way}")
            adapters = entry.get("adapters_timed", workload.adapters)
            times, entry["activity"] = workload.adapters / adapters, None
            try:
                with pool.running([way]) as workers:
                    activity = workers[way].activity(adapters)
            except WorkerError as error:
                report(f"{way} was not profiled: {error}")
                continue
            if activity is not None:
                scaled = dataclasses.replace(activity, busy=activity.busy * times)
                for count in ("kernels", "launches"):
                    scaled = dataclasses.replace(scaled, **{count: round(getattr(activity, count) * times)})
                entry["activity"] = dataclasses.asdict(scaled)
                report(f"  {scaled}")
    finally:
        pool.stop()


def model_name(options: argparse.Namespace) -> str:
    """The hub id, or the folder's name without its place on this machine."""
    if options.model is None:
        return f"random weights of size {options.size}"
    folder = Path(options.model)
    return folder.resolve().name if folder.is_dir() else options.model


def record_of(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print, table by table; everything, ready for json. Several tables' records are in a list."""
    folder = local_folder(options.model) if options.model else None
    records, runs = [], []
    for kind in options.probes:
        probes = probe_ids(folder, kind, config_of(folder, options.size).vocab_size)
        for adapters in options.adapters:
            workload = Workload(
                folder=folder,
                size=options.size,
                probes=probes,
                adapters=adapters,
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
                    "kind": kind,
                    "count": len(probes),
                    "tokens": sum(map(len, probes)),
                    "tree_tokens": tree_tokens(probes),
                    "longest": max(map(len, probes)),
                },
                "adapters": adapters,
                "rank": options.rank,
                "seed_probes": options.seed_probes,
                "runs": [],
            }
            records.append(record)
            show = report if workload.on_gpu else printed
            show(headline(record))
            for dtype in options.dtype:
                of_dtype = dataclasses.replace(workload, dtype=DTYPES[dtype])
                record["runs"].append(measured(options, of_dtype))
                runs.append((record["runs"][-1], of_dtype))
                show(table(record["runs"][-1]))
    if runs[0][1].on_gpu:  # to stdout with what is known only when everything has been timed
        for run, workload in runs:
            add_activity(run, workload, options.one_process)
        for record in records:
            printed(headline(record))
            for run in record["runs"]:
                printed(table(run))
    return records[0] if len(records) == 1 else {"records": records}


def printed(text: str) -> None:
    print(text, flush=True)


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
