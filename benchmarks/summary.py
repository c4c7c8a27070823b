"""From samples to what is reported: the entries of the JSON file, and the table that is made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compare import Agreement
from measure import machine_line
from schedule import Samples
from ways import FLOOR, WAYS
from workers import Footprint
from workload import Workload

ACTIVITY = ("GPU busy ms", "GPU idle", "kernels and copies", "launches")  # columns, on a GPU


def seconds_entry(samples: Samples) -> dict[str, Any]:
    return {
        "median": samples.median,
        "min": min(samples.seconds),
        "max": max(samples.seconds),
        "samples": samples.seconds,
        "others": samples.others,
    }


def floor_entry(samples: Samples) -> dict[str, Any]:
    facts = samples.facts
    return {**facts, "seconds": seconds_entry(samples), "gflops": facts["flop"] / samples.median / 1e9}


def way_entry(
    way: str,
    workload: Workload,
    footprint: Footprint,
    samples: Mapping[str, Samples],
    agreement: Agreement | None,
    adapters: int,
    anchor: str,
) -> dict[str, Any]:
    """Everything about one way; ``adapters`` is how many its step was timed on."""
    own, floor = samples[way], samples[FLOOR]
    # Over the rounds that both took part in, where there are any: the ratio does not see the machine drift then.
    times_anchor = own.times_anchor or own.median / samples[anchor].median
    share = floor.times_anchor if way == anchor else None
    return {
        "description": WAYS[way],
        **own.facts,
        "seconds": seconds_entry(own),
        "adapters_timed": adapters,
        "tokens_per_second": workload.tokens / own.median,
        "adapters_per_second": workload.adapters / own.median,
        "times_anchor": times_anchor,
        "timed_beside_anchor": own.times_anchor is not None,
        "share_of_floor": share or floor.median / own.median,
        "weights_bytes": footprint.weights,
        "peak_bytes": footprint.peak,
        "step_bytes": footprint.peak - footprint.weights,
        "agreement": dataclasses.asdict(agreement) if agreement else None,
    }


def headline(record: Mapping[str, Any]) -> str:
    """What was run, on what."""
    probes, seed = record["probes"], ""
    if record["seed_probes"] is not None:
        seed = f"the seed's way takes {record['seed_probes']} probes at a time\n"
    return (
        f"{record['model']}, rank {record['rank']}, G = {record['adapters']}, "
        f"{probes['count']} {probes['kind']} probes: {probes['tokens']} tokens, "
        f"{probes['tree_tokens']} in the prefix tree, longest {probes['longest']}\n"
        f"{seed}"
        f"{machine_line(record['machine'])}"
    )


def table(run: Mapping[str, Any]) -> str:
    """One dtype's results as a Markdown table, with what a reader must know below it."""
    anchor, on_gpu = run["anchor"], run["on_gpu"]
    unit = "ms" if on_gpu else "s"
    header = (
        run["dtype"], f"{unit} per step (min to max)", "tokens/s", "adapters/s", "peak GB", "over weights GB",
        f"time / {anchor}", "share of floor", *(ACTIVITY if on_gpu else ()),
        "error of value", "error of gradients (worst tensor)",
    )  # fmt: skip
    rows = [header, ("---", *["---:"] * (len(header) - 1))]
    for way, entry in run["ways"].items():
        agreement = entry["agreement"]
        rows.append(
            (
                way + ("*" if entry["adapters_timed"] < run["adapters"] else ""),
                _time(entry["seconds"], unit),
                f"{entry['tokens_per_second']:.0f}",
                f"{entry['adapters_per_second']:.3g}",
                f"{entry['peak_bytes'] / 1e9:.2f}",
                f"{entry['step_bytes'] / 1e9:.2f}",
                f"{entry['times_anchor']:.2f}",
                f"{entry['share_of_floor']:.2f}",
                *(_activity(entry) if on_gpu else ()),
                f"{agreement['value']:.1e}" if agreement else "",
                f"{agreement['gradient']:.1e} ({agreement['worst']:.1e})" if agreement else "",
            )
        )
    floor, products = run["floor"], run["adapter_products"]
    rows += [(way, reason, *[""] * (len(header) - 2)) for way, reason in run["cannot_run"].items()]
    activity = _activity(floor) if on_gpu else ()
    rows.append(("floor", _time(floor["seconds"], unit), *[""] * 5, "1.00", *activity, "", ""))
    lines = ["", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines += [
        f"\\* timed on {entry['adapters_timed']} adapters in {len(entry['seconds']['samples'])} rounds, "
        f"scaled to {run['adapters']}: it shares nothing between adapters."
        for entry in run["ways"].values()
        if entry["adapters_timed"] < run["adapters"]
    ]
    lines += [
        f"{way} does not fit into memory beside {anchor}: it was timed on its own."
        for way, entry in run["ways"].items()
        if not entry["timed_beside_anchor"] and not run["one_process"]
    ]
    timed = (*run["ways"].values(), floor, products)
    others = max((o for entry in timed for o in entry["seconds"]["others"]), default=0.0)
    if others > 0.1:
        lines.append(f"Disturbed: during one of the steps other processes kept {others:.1f} CPUs busy.")
    lines.append(
        f"Floor: {floor['flop'] / 1e12:.3g} TFLOP in {floor['dtype']} at {floor['gflops']:.0f} GFLOP/s "
        f"({floor['counts']}; {floor['tokens']} tokens)."
    )
    both = floor["seconds"]["median"] + products["seconds"]["median"]
    lines.append(
        f"The adapters' own products alone, {products['flop'] / 1e12:.3g} TFLOP at {products['gflops']:.0f} GFLOP/s: "
        f"{_time(products['seconds'], unit)} {unit}. With nothing beside them a step reaches "
        f"{floor['seconds']['median'] / both:.2f} of the floor."
    )
    rates = {way: floor["flop"] / entry["seconds"]["median"] / 1e12 for way, entry in run["ways"].items()}
    peak = run["peak_tflops"]
    shown = (f"{way} {rate:.3g}" + (f" ({rate / peak:.0%} of the peak)" if peak else "") for way, rate in rates.items())
    lines.append(f"TFLOP/s of the floor's products: {', '.join(shown)}.")
    lines += [
        f"{way} ran with checkpoint={entry['checkpoint']!r}, "
        f"{'prepacked weights' if entry['prepacked'] else 'weights as torch stores them'}, in {entry['compute']}."
        for way, entry in run["ways"].items()
        if "checkpoint" in entry
    ]
    tolerated = ", ".join(f"{what} {limit:.2g}" for what, limit in run["tolerance"].items())
    lines.append(f"Errors are relative to {run['reference']}; tolerated: {tolerated}.")
    lines += [f"{way} was left out: {why}." for way, why in run["skipped"].items()]
    return "\n".join(lines)


def _time(entry: Mapping[str, Any], unit: str) -> str:
    median, least, most = ((1e3 if unit == "ms" else 1) * entry[key] for key in ("median", "min", "max"))
    return f"{median:.3g} ({least:.3g} to {most:.3g})"


def _activity(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of :data:`ACTIVITY`."""
    activity = entry.get("activity")
    if activity is None:
        return ("",) * len(ACTIVITY)
    idle = max(0.0, 1 - activity["busy"] / entry["seconds"]["median"])
    return f"{1e3 * activity['busy']:.3g}", f"{idle:.0%}", f"{activity['kernels']}", f"{activity['launches']}"
