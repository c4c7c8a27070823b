"""Time and memory of this engine over the number of adapters, and over the number of tokens.

Three series of points, each point in a process of its own: over the adapters, five generic probes, all adapters in one
pass; the same with so many adapters per pass; and over the probes. Every point is timed in turn with one of the first
series, the anchor, so that their ratio does not see the machine drift. Progress goes to stderr, the tables to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence

from agreement import TOLERANCE
from contenders import DELTA
from harness import Run
from measure import machine_facts, machine_line, memory_limit, set_threads, use_device
from picture import scaling_figure
from report import Record, add_common, checked, exit_status, markdown, model_name, report
from workers import Job, Pool
from workload import DTYPES, Workload, checkpoint_of, probe_ids, tree_tokens

ANCHOR_ADAPTERS = 8
WARM_STEPS = 10  # a process may grow in its first steps; what it holds after this one it should hold for good


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_common(parser, plot="what was measured")
    add("--adapters", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="G", help="of the first series")
    add("--per-pass", type=int, default=8, metavar="N", help="adapters per pass of the second series, over G >= N")
    add("--probes", type=int, nargs="+", default=[5, 15, 30, 60], metavar="P", help="of the series over tokens")
    add("--probe-adapters", type=int, default=4, metavar="G", help="adapters of the series over tokens")
    add("--way", choices=[way for way in DELTA if way.startswith("engine")], default="engine")
    add("--rank", type=int, default=16)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--rounds", type=int, default=5)
    add("--steady-steps", type=int, default=0, metavar="N", help="watch the memory of one adapter through N steps")
    options = parser.parse_args(argv)
    if options.steady_steps and options.steady_steps <= WARM_STEPS:
        parser.error(f"--steady-steps is {options.steady_steps}, expected 0 or at least {WARM_STEPS + 1}")
    return checked(parser, options, ("adapters", "per_pass", "probes", "probe_adapters", "rank", "rounds"))


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


def series_of(options: argparse.Namespace, folder: str) -> dict[str, dict[str, Workload]]:
    """{series: {point: what it computes}}."""
    mixed, generic, per_pass = probe_ids(folder, "mixed"), probe_ids(folder, "generic"), options.per_pass
    one = Workload(folder, generic, 1, options.rank, DTYPES[options.dtype], options.threads, device=options.device)
    passes = dataclasses.replace(one, adapters_per_pass=per_pass)
    adapters, many = sorted(options.adapters), dataclasses.replace(one, adapters=options.probe_adapters)
    series = {
        "adapters": {f"G = {n}": dataclasses.replace(one, adapters=n) for n in adapters},
        f"adapters in passes of {per_pass}": {
            f"G = {n} in passes of {per_pass}": dataclasses.replace(passes, adapters=n)
            for n in adapters if n >= per_pass
        },
        "probes": {
            f"{count} probes": dataclasses.replace(many, probes=rotated_probes(mixed, count))
            for count in sorted(options.probes)
        },
    }  # fmt: skip
    return {name: points for name, points in series.items() if points}


def point_of(run: Run, name: str, entry: Record) -> Record:
    """An entry with what belongs to a point."""
    work, anchor = run.jobs[name].workload, run.jobs[run.anchor].workload
    elements = sum(rows * columns for rows, columns in work.spec.shapes(work.config()).values())
    return {
        **entry, "name": name, "adapters": work.adapters, "per_pass": work.adapters_per_pass,
        "probes": len(work.probes), "tokens": sum(map(len, work.probes)), "tree_tokens": tree_tokens(work.probes),
        "peak_checkpoint": run.results[name].checked_facts["checkpoint"],
        "seconds_per_adapter": entry["seconds"]["median"] / work.adapters,
        "seconds_per_token": entry["seconds"]["median"] / work.tree_tokens,
        "times_anchor": entry["times_anchor"] and entry["times_anchor"] * anchor.tree_tokens / work.tree_tokens,
        "gradient_bytes": work.adapters * elements * work.dtype.itemsize,
    }  # fmt: skip


def steady_of(job: Job, steps: int) -> Record:
    """Resident memory through many steps, in a process of its own: what it is once warm, and how far it strays."""
    report(f"taking {steps} steps of one process")
    with Pool({"steady": job}) as pool:
        pool.only("steady")
        resident = pool.call("steady", "steady", steps)
    return {"adapters": 1, "probes": len(job.workload.probes), "warm_steps": WARM_STEPS, "resident_bytes": resident}


def record_of(options: argparse.Namespace, keep: Callable[[Record], None]) -> Record:
    """Measure and print; ``keep`` is given everything so far, ready for json."""
    with tempfile.TemporaryDirectory() as scratch:
        series = series_of(options, checkpoint_of(options.model, options.size, scratch))
        make = DELTA[options.way]
        points = {name: work for own in series.values() for name, work in own.items()}
        jobs = {name: Job(make, work, work.adapters, options.rounds) for name, work in points.items()}
        adapters = sorted(options.adapters)
        anchor = f"G = {ANCHOR_ADAPTERS if ANCHOR_ADAPTERS in adapters else adapters[len(adapters) // 2]}"
        jobs = {anchor: jobs[anchor], **jobs}
        # Passes must agree with one pass: of the fewest adapters that take several.
        divided = next((n for n in adapters if n > options.per_pass), None)
        same = (f"G = {divided}", f"G = {divided} in passes of {options.per_pass}") if divided else (anchor,)
        dtype = DTYPES[options.dtype]
        run = Run(jobs, (anchor,), TOLERANCE[dtype], same, (anchor,), memory=memory_limit(options.memory))
        record: Record = {
            "machine": machine_facts(options.threads), "model": model_name(options), "rank": options.rank,
            "dtype": options.dtype, "way": options.way, "anchor": anchor, "series": [], "steady": None,
        }  # fmt: skip

        def changed(run: Run) -> None:
            found = {name: point_of(run, name, entry) for name, entry in run.entries().items()}
            reasons = {name: own.reason for name, own in run.results.items() if own.reason}
            record["series"] = [
                {
                    "name": name, "points": [found[point] for point in points if point in found],
                    "left_out": {point: reasons[point] for point in points if point in reasons},
                }
                for name, points in series.items()
            ]  # fmt: skip
            keep(record)

        run.changed = changed
        run.measure()
        if options.steady_steps:
            one = dataclasses.replace(jobs[anchor].workload, adapters=1)
            record["steady"] = steady_of(Job(make, one, 1, 1), options.steady_steps)
            keep(record)
    print(tables(record), flush=True)
    return record


def tables(record: Record) -> str:
    """What was run, on what, and a Markdown table for each series, with what a reader must know below it."""
    anchor, steady = record["anchor"], record["steady"]
    lines = [
        f"{record['model']}, rank {record['rank']}, {record['dtype']}, {record['way']}",
        machine_line(record["machine"]),
    ]
    for series in record["series"]:
        lines += ["", f"Over {series['name']}", "", markdown([_row(point, anchor) for point in series["points"]]), ""]
        lines += [
            f"{point['name']} does not fit into memory beside {anchor}: it was timed on its own."
            for point in series["points"] if not point["timed_beside_anchor"]
        ]  # fmt: skip
        lines += [
            f"{point['name']} was timed with checkpoint {point['checkpoint']!r}, beside other processes; "
            f"its peak is that of {point['peak_checkpoint']!r}."
            for point in series["points"] if point["checkpoint"] != point["peak_checkpoint"]
        ]  # fmt: skip
        lines += [f"{name} was left out: {why}." for name, why in series["left_out"].items()]
    if steady:
        n, resident = steady["warm_steps"], steady["resident_bytes"]
        warm, ends = resident[n - 1], (min(resident[n:]), max(resident[n:]))
        low, high = (f"{end / 1e9:.3f} ({end / warm - 1:+.2%})" for end in ends)
        lines.append(
            f"\n{len(resident)} steps of G = {steady['adapters']}, {steady['probes']} probes: {warm / 1e9:.3f} GB "
            f"resident after step {n}, later from {low} to {high}."
        )
    return "\n".join(lines)


def _row(point: Record, anchor: str) -> dict[str, str]:
    seconds = point["seconds"]
    return {
        "G": f"{point['adapters']}", "per pass": f"{point['per_pass'] or point['adapters']}",
        "probes": f"{point['probes']}", "tokens in the tree": f"{point['tree_tokens']}",
        "s per step (min to max)": f"{seconds['median']:.3g} ({seconds['min']:.3g} to {seconds['max']:.3g})",
        "ms per adapter": f"{point['seconds_per_adapter'] * 1e3:.1f}",
        "µs per token": f"{point['seconds_per_token'] * 1e6:.1f}",
        f"per token / {anchor}": f"{point['times_anchor']:.2f}",
        "peak GB": f"{point['peak_bytes'] / 1e9:.2f}", "over weights GB": f"{point['step_bytes'] / 1e9:.2f}",
        "of which gradients GB": f"{point['gradient_bytes'] / 1e9:.2f}", "checkpoint": point["checkpoint"],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 where passes disagree with one pass, or where the anchor fails."""
    options = arguments(argv)
    set_threads(options.threads)
    use_device(options.device)
    return exit_status(options, record_of, scaling_figure)


if __name__ == "__main__":
    sys.exit(main())
