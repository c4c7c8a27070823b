"""Time and memory of this engine over the number of adapters, and over the number of tokens.

Three series of points, each point in a process of its own: over the adapters, five generic probes, all adapters in one
pass; the same with so many adapters per pass; and over the probes. Every point is timed in turn with one of the first
series, the anchor, so that their ratio does not see the machine drift. Progress goes to stderr, the tables to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import TOLERANCE, DisagreementError, compare, require
from measure import machine_facts, machine_line, memory_limit
from picture import check_plot, scaling_picture
from probe_sets import probe_ids, tree_tokens
from schedule import Samples, groups_that_fit, time_groups
from sizes import SIZES
from summary import seconds_entry
from throughput import check_counts_and_json, exit_status, model_name, report
from ways import WAYS
from workers import Footprint, Job, Pool, WorkerError, set_threads, use_device
from workload import DTYPES, Workload, config_of, local_folder

ENGINE_WAYS = tuple(way for way in WAYS if way.startswith("engine"))
ANCHOR_ADAPTERS = 8
# A process may grow in its first steps; what it holds after this one is what it should hold for good.
WARM_STEPS = 10

Series = dict[str, dict[str, Workload]]  # {series: {point: what it computes}}


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a point's first step tells: its memory, and how the engine went about it."""

    footprint: Footprint
    checkpoint: str


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="ID_OR_FOLDER", help="a Qwen2 checkpoint")
    model.add_argument("--size", choices=SIZES, help="random weights of this size (default: 0.5b)")
    add = parser.add_argument
    add("--adapters", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="G", help="of the first series")
    add("--per-pass", type=int, default=8, metavar="N", help="adapters per pass of the second series, over G >= N")
    add("--probes", type=int, nargs="+", default=[5, 15, 30, 60], metavar="P", help="of the series over tokens")
    add("--probe-adapters", type=int, default=4, metavar="G", help="adapters of the series over tokens")
    add("--way", choices=ENGINE_WAYS, default="engine")
    add("--rank", type=int, default=16)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--rounds", type=int, default=5)
    add("--steady-steps", type=int, default=0, metavar="N", help="watch the memory of one adapter through N steps")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--memory", type=float, metavar="GIB", help="for all processes (default: 0.9 of what is free)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--plot", type=Path, metavar="FILE.png", help="draw what was measured")
    options = parser.parse_args(argv)
    if options.model is None and options.size is None:
        options.size = "0.5b"
    check_counts_and_json(parser, options, ("per_pass", "probe_adapters", "rank", "rounds", "threads"))
    for name in ("adapters", "probes"):
        counts = getattr(options, name)
        counts.sort()
        if counts[0] < 1:
            parser.error(f"--{name} names {counts[0]}, expected at least 1")
        if len(set(counts)) < len(counts):
            parser.error(f"--{name} names one twice: {' '.join(map(str, counts))}")
    if options.steady_steps and options.steady_steps <= WARM_STEPS:
        parser.error(f"--steady-steps is {options.steady_steps}, expected 0 or at least {WARM_STEPS + 1}")
    check_plot(parser, options.plot)
    return options


def rotated_probes(probes: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """``count`` distinct probes: the given ones, then each rotated by one token, then by two, and so on.

    Rotated ones are as long and hold the same tokens, but begin with others: few prefixes are shared.

    Raises:
        ValueError: there are not so many.
    """
    shifts = range(max(map(len, probes)))
    rotated = ((*probe[shift:], *probe[:shift]) for shift in shifts for probe in probes if shift < len(probe))
    distinct = list(dict.fromkeys(rotated))
    if len(distinct) < count:
        raise ValueError(f"{count} probes are asked for, expected at most {len(distinct)}")
    return [list(probe) for probe in distinct[:count]]


def series_of(options: argparse.Namespace, folder: str | None) -> Series:
    """Every point to measure, by its name; the names are those of the workers."""
    vocabulary = config_of(folder, options.size).vocab_size
    mixed = probe_ids(folder, "mixed", vocabulary)
    generic = Workload(
        folder=folder,
        size=options.size,
        probes=probe_ids(folder, "generic", vocabulary),
        adapters=1,
        rank=options.rank,
        dtype=DTYPES[options.dtype],
        threads=options.threads,
        device=options.device,
    )
    per_pass = options.per_pass
    series = {
        "adapters": {f"G = {n}": dataclasses.replace(generic, adapters=n) for n in options.adapters},
        f"adapters in passes of {per_pass}": {
            passes_name(n, per_pass): dataclasses.replace(generic, adapters=n, adapters_per_pass=per_pass)
            for n in options.adapters
            if n >= per_pass
        },
        "probes": {
            f"{count} probes": dataclasses.replace(
                generic, adapters=options.probe_adapters, probes=rotated_probes(mixed, count)
            )
            for count in options.probes
        },
    }
    return {name: points for name, points in series.items() if points}


def passes_name(adapters: int, per_pass: int) -> str:
    return f"G = {adapters} in passes of {per_pass}"


def anchor_of(adapters: Sequence[int]) -> str:
    """The point of the first series that all are timed in turn with."""
    return f"G = {ANCHOR_ADAPTERS if ANCHOR_ADAPTERS in adapters else adapters[len(adapters) // 2]}"


def check(name: str, pool: Pool, path: str | None) -> Checked:
    """One whole step in a process of its own; value and gradients go to ``path``, if there is one."""
    with pool.running([name]) as workers:
        footprint = workers[name].check(path, pool.jobs[name].workload.adapters)
        return Checked(footprint, workers[name].facts()["checkpoint"])


def checked(pool: Pool, anchor: str, same: Sequence[str]) -> tuple[dict[str, Checked], dict[str, str]]:
    """Let every point do one whole step, the anchor first.

    Args:
        same: two points that must agree, or none.

    Returns:
        What the points told, and why the others are left out.

    Raises:
        WorkerError: the anchor failed.
        DisagreementError: the two do not compute the same.
    """
    told, left_out = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: str(Path(scratch) / f"{index}.safetensors") for index, name in enumerate(same)}
        for name in (anchor, *(name for name in pool.jobs if name != anchor)):
            report(f"checking {name}")
            try:
                told[name] = check(name, pool, paths.get(name))
            except WorkerError as error:
                if name == anchor:
                    raise
                report(f"{name} is left out: {error}")
                left_out[name] = str(error).rstrip().splitlines()[-1]  # of a traceback, what was raised
            else:
                footprint = told[name].footprint
                report(f"  peak {footprint.peak / 1e9:.2f} GB, idle {footprint.idle / 1e9:.2f} GB")
        if same and not left_out.keys() & set(same):
            agreement = compare(*(paths[name] for name in same))
            report(f"{same[0]}: {agreement}")
            dtype = str(pool.jobs[same[0]].workload.dtype).removeprefix("torch.")
            require(same[0], agreement, TOLERANCE[dtype])
    return told, left_out


def point_entry(
    name: str, jobs: Mapping[str, Job], told: Checked, samples: Mapping[str, Samples], anchor: str
) -> dict[str, Any]:
    """Everything about one point; ``jobs`` and ``samples`` are those of all."""
    workload, own, footprint = jobs[name].workload, samples[name], told.footprint
    # Over the rounds that both took part in, where there are any: the ratio does not see the machine drift then.
    times_anchor = own.times_anchor or own.median / samples[anchor].median
    elements = sum(rows * columns for rows, columns in workload.spec.shapes(workload.config()).values())
    return {
        "name": name,
        "adapters": workload.adapters,
        "per_pass": workload.adapters_per_pass,
        "probes": len(workload.probes),
        "tokens": sum(map(len, workload.probes)),
        "tree_tokens": tree_tokens(workload.probes),
        **own.facts,
        "peak_checkpoint": told.checkpoint,
        "seconds": seconds_entry(own),
        "seconds_per_adapter": own.median / workload.adapters,
        "seconds_per_token": own.median / workload.tree_tokens,
        "times_anchor": times_anchor * jobs[anchor].workload.tree_tokens / workload.tree_tokens,
        "timed_beside_anchor": own.times_anchor is not None,
        "weights_bytes": footprint.weights,
        "peak_bytes": footprint.peak,
        "step_bytes": footprint.peak - footprint.weights,
        "gradient_bytes": workload.adapters * elements * workload.dtype.itemsize,
    }


def steady_entry(job: Job, steps: int) -> dict[str, Any]:
    """Resident memory through many steps, in a process of its own: what it is once warm, and how far it strays."""
    report(f"taking {steps} steps of one process")
    with Pool({"steady": job}).running(["steady"]) as workers:
        resident = workers["steady"].steady(steps, job.workload.adapters)
    warm, later = resident[WARM_STEPS - 1], resident[WARM_STEPS:]
    return {
        "steps": steps,
        "adapters": job.workload.adapters,
        "probes": len(job.workload.probes),
        "warm_steps": WARM_STEPS,
        "warm_bytes": warm,
        "min_bytes": min(later),
        "max_bytes": max(later),
        "min_percent": 100 * (min(later) - warm) / warm,
        "max_percent": 100 * (max(later) - warm) / warm,
        "resident_bytes": resident,
    }


def record_of(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; everything, ready for json."""
    folder = local_folder(options.model) if options.model else None
    series = series_of(options, folder)
    anchor = anchor_of(options.adapters)
    # With one pass in both there would be nothing to compare.
    divided = next((n for n in options.adapters if n > options.per_pass), None)
    same = [passes_name(divided, options.per_pass), f"G = {divided}"] if divided else []
    jobs = {name: Job(options.way, workload) for points in series.values() for name, workload in points.items()}
    pool = Pool(jobs, keep=jobs[anchor].workload.is_small)
    try:
        told, left_out = checked(pool, anchor, same)
        footprints = {name: point.footprint for name, point in told.items()}
        groups = groups_that_fit(footprints, anchor, memory_limit(options.memory))
        adapters = {name: jobs[name].workload.adapters for name in told}
        samples = time_groups(groups, pool, anchor, adapters, dict.fromkeys(told, options.rounds), report)
    finally:
        pool.stop()
    one = dataclasses.replace(jobs[anchor].workload, adapters=1)
    record = {
        "machine": machine_facts(options.threads),
        "model": model_name(options),
        "rank": options.rank,
        "dtype": options.dtype,
        "way": options.way,
        "threads": options.threads,
        "anchor": anchor,
        "series": [
            {
                "name": name,
                "points": [
                    point_entry(point, jobs, told[point], samples, anchor) for point in points if point in told
                ],
                "left_out": {point: why for point, why in left_out.items() if point in points},
            }
            for name, points in series.items()
        ],
        "steady": steady_entry(Job(options.way, one), options.steady_steps) if options.steady_steps else None,
    }
    print(tables(record), flush=True)
    return record


def tables(record: Mapping[str, Any]) -> str:
    """What was run, on what, and a Markdown table for each series, with what a reader must know below it."""
    steady = record["steady"]
    lines = [
        f"{record['model']}, rank {record['rank']}, {record['dtype']}, {record['way']}: {WAYS[record['way']]}",
        machine_line(record["machine"]),
    ]
    for series in record["series"]:
        lines += ["", f"Over {series['name']}", "", *table(series["points"], record["anchor"])]
        below = notes(series, record["anchor"])
        lines += ["", *below] if below else []
    if steady:
        lines += [
            "",
            f"{steady['steps']} steps of G = {steady['adapters']}, {steady['probes']} probes: "
            f"{steady['warm_bytes'] / 1e9:.3f} GB resident after step {steady['warm_steps']}, later from "
            f"{steady['min_bytes'] / 1e9:.3f} ({steady['min_percent']:+.2f} %) to "
            f"{steady['max_bytes'] / 1e9:.3f} ({steady['max_percent']:+.2f} %).",
        ]
    return "\n".join(lines)


def table(points: Sequence[Mapping[str, Any]], anchor: str) -> list[str]:
    """The lines of one series."""
    header = (
        "G", "per pass", "probes", "tokens in the tree", "s per step (min to max)", "ms per adapter", "µs per token",
        f"per token / {anchor}", "peak GB", "over weights GB", "of which gradients GB", "checkpoint",
    )  # fmt: skip
    rows: list[Sequence[str]] = [header, [*["---:"] * (len(header) - 1), "---"]]
    for point in points:
        seconds = point["seconds"]
        rows.append(
            (
                f"{point['adapters']}",
                f"{point['per_pass'] or point['adapters']}",
                f"{point['probes']}",
                f"{point['tree_tokens']}",
                f"{seconds['median']:.3g} ({seconds['min']:.3g} to {seconds['max']:.3g})",
                f"{point['seconds_per_adapter'] * 1e3:.1f}",
                f"{point['seconds_per_token'] * 1e6:.1f}",
                f"{point['times_anchor']:.2f}",
                f"{point['peak_bytes'] / 1e9:.2f}",
                f"{point['step_bytes'] / 1e9:.2f}",
                f"{point['gradient_bytes'] / 1e9:.2f}",
                point["checkpoint"],
            )
        )
    return ["| " + " | ".join(row) + " |" for row in rows]


def notes(series: Mapping[str, Any], anchor: str) -> list[str]:
    """What one series' figures do not say of themselves."""
    points = series["points"]
    lines = [
        f"{point['name']} does not fit into memory beside {anchor}: it was timed on its own."
        for point in points
        if not point["timed_beside_anchor"]
    ]
    lines += [
        f"{point['name']} was timed with checkpoint {point['checkpoint']!r}, beside other processes; "
        f"its peak is that of {point['peak_checkpoint']!r}."
        for point in points
        if point["checkpoint"] != point["peak_checkpoint"]
    ]
    others = max((o for point in points for o in point["seconds"]["others"]), default=0.0)
    if others > 0.1:
        lines.append(f"Disturbed: during one of the steps other processes kept {others:.1f} CPUs busy.")
    return [*lines, *(f"{name} was left out: {why}." for name, why in series["left_out"].items())]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 where passes disagree with one pass, or where the anchor fails."""
    options = arguments(argv)
    set_threads(options.threads)
    use_device(options.device)
    errors = (DisagreementError, WorkerError, ValueError, OSError)
    return exit_status(options, record_of, errors, scaling_picture if options.plot else None)


if __name__ == "__main__":
    sys.exit(main())
