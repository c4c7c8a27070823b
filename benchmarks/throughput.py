"""Forward and backward to all LoRA tensors: this engine against its rivals and the GEMM floor, in one run.

``--loss delta`` reads probes that all adapters share; ``lm`` and ``kl`` each adapter's own examples; ``labels`` goes
forwards alone, from adapter folders to deltas. README.md beside this file says what each figure means. Progress goes to
stderr, the tables to stdout; what has been measured is in ``--json``'s file at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from agreement import TOLERANCE
from contenders import DELTA, LABELS, NAMED, Contender
from floor import AdapterProducts, Floor
from harness import Run
from lm_ways import LM, draw_examples, text_ids
from measure import machine_facts, machine_line, memory_limit, set_threads, use_device
from picture import throughput_figure
from report import Record, add_common, checked, exit_status, markdown, model_name, report
from workers import Job, Pool, WorkerError
from workload import DTYPES, PROBE_KINDS, Workload, checkpoint_of, probe_ids, tree_tokens

from lora_delta.peft.adapters import save_peft_adapter

LOSSES: dict[str, dict[str, Callable[[Workload], Contender]]] = {"delta": DELTA, "lm": LM, "kl": LM, "labels": LABELS}
HOOKS = {"delta": "hooks-one", "lm": "hooks", "kl": "hooks", "labels": "peft"}  # the reference in narrow dtypes
ADAPTERS_OF, RANK_OF = {"delta": 8, "lm": 4, "kl": 4, "labels": 16}, {"delta": 16, "lm": 8, "kl": 8, "labels": 16}
FLOOR, PRODUCTS = FLOORS = "floor", "adapters' products"
TOP_K = 16
ACTIVITY = ("GPU busy ms", "GPU idle", "kernels and copies", "launches")  # columns, on a GPU
# transformers' float16 goes through torch's CPU GEMM: hours.
TOO_SLOW = "float16 matrix products of torch run at 1 to 2 GFLOP/s backwards on a CPU"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_common(parser, plot="tokens/s per way, the floor as a line")
    add("--loss", choices=LOSSES, default="delta", help="what a step computes (default: %(default)s)")
    add("--probes", nargs="+", choices=PROBE_KINDS, default=["generic"], help="one table for each")
    add("--adapters", type=int, nargs="+", metavar="G", help="one table for each (default: 8; lm, kl 4; labels 16)")
    add("--rank", type=int, help="(default: 16; lm, kl 8)")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="one table for each")
    add("--compute", choices=("float32", "bfloat16"), help="what the engine multiplies in")
    add("--rounds", type=int, help="timed steps of each way (default: 5, on a GPU 10)")
    ways = "; ".join(f"{loss}: {', '.join(known)}" for loss, known in LOSSES.items() if loss != "kl")
    add("--ways", nargs="+", metavar="WAY", help=f"of {ways}")
    add("--examples", type=int, default=2, help="lm, kl: of each adapter (default: %(default)s)")
    add("--lengths", type=int, nargs=2, default=[100, 700], metavar=("SHORTEST", "LONGEST"), help="lm, kl: in tokens")
    add("--per-pass", type=int, default=8, help="labels: adapters at once (default: %(default)s)")
    seed = "the seed's way (on a GPU also hooks-one)"
    add("--seed-adapters", type=int, default=2, help=f"time {seed} on so many, scaled to G (default: %(default)s)")
    add("--seed-rounds", type=int, help=f"rounds in which {seed} takes part (default: 2, on a GPU 5)")
    add("--seed-probes", type=int, help="probes that the seed's way takes at a time (default: all)")
    one_process = "all ways in this process, one after the other (default: on a GPU)"
    add("--one-process", action=argparse.BooleanOptionalAction, help=one_process)
    add("--peak", type=float, metavar="TFLOPS", help="of the device in this dtype: say what share each way reaches")
    options = parser.parse_args(argv)
    on_gpu, known = torch.device(options.device).type == "cuda", LOSSES[options.loss]
    defaults = {
        "adapters": [ADAPTERS_OF[options.loss]], "rank": RANK_OF[options.loss], "rounds": 10 if on_gpu else 5,
        "seed_rounds": 5 if on_gpu else 2, "one_process": on_gpu, "ways": [way for way in known if way not in NAMED],
    }  # fmt: skip
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    for way in options.ways:
        if way not in known:
            parser.error(f"--ways names {way!r}, expected some of {', '.join(known)}")
    counts = ("adapters", "rank", "rounds", "examples", "per_pass", "seed_adapters", "seed_probes", "seed_rounds")
    return checked(parser, options, counts)


def workloads(options: argparse.Namespace, folder: str, scratch: str) -> list[tuple[Workload, Record]]:
    """What each table is of, and what to say of its texts."""
    found, own = [], options.loss in ("lm", "kl")
    for kind in ["own examples"] if own else options.probes:
        probes = [[0]] if own else probe_ids(folder, kind)
        for adapters in options.adapters:
            shortest, longest = options.lengths
            each = options.examples if own else 0
            examples = draw_examples(adapters, each, shortest, longest, text_ids(folder)) if each else []
            texts = [[*prompt, *completion] for one in examples for prompt, completion in one] or probes
            tokens, longest = sum(map(len, texts)), max(map(len, texts))
            told = {"kind": kind if own else f"{kind} probes", "count": len(texts), "tokens": tokens}
            told |= {"tree_tokens": tokens if own else tree_tokens(probes), "longest": longest}
            for dtype in options.dtype:
                work = Workload(
                    folder, probes, adapters, options.rank, DTYPES[dtype], options.threads, examples=examples,
                    seed_probes=options.seed_probes, top_k=TOP_K if options.loss == "kl" else None,
                    compute=DTYPES[options.compute] if options.compute else None, device=options.device,
                )  # fmt: skip
                if options.loss == "labels":
                    folders = save_adapters(work, Path(tempfile.mkdtemp(dir=scratch)))
                    work = dataclasses.replace(work, adapter_folders=folders, adapters_per_pass=options.per_pass)
                found.append((work, told))
    return found


def save_adapters(workload: Workload, folder: Path) -> tuple[str, ...]:
    """The workload's adapters, each in a folder."""
    config = workload.config()
    tensors = workload.lora(config)
    for index in range(workload.adapters):
        one = {name: tensor[index] for name, tensor in tensors.items()}
        save_peft_adapter(folder / f"adapter-{index:04d}", workload.spec, one, "a/base", config=config)
    return tuple(str(path) for path in sorted(folder.iterdir()))


def run_of(workload: Workload, options: argparse.Namespace) -> Run:
    """The floors and the ways.

    In float32 the first way is the reference of the others; where one is off by more than the tolerance, hooks' own
    error against float64 widens it. In a narrower dtype, and where there is only one way, the reference is hooks in
    float32 on the same rounded numbers; in bfloat16 their own error in that dtype widens the tolerance.
    """
    known, hooks, backwards = LOSSES[options.loss], HOOKS[options.loss], options.loss != "labels"
    slow = workload.dtype == torch.float16 and not workload.on_gpu
    ways = [way for way in options.ways if not slow or way.startswith("engine")]
    jobs, noise, products = {}, {}, workload.compute or workload.dtype
    if products != torch.float32 or workload.dtype != torch.float32 or len(ways) < 2:
        exact = dataclasses.replace(workload, rounded_to=workload.dtype, dtype=torch.float32, compute=None)
        jobs[f"{hooks} in float32"] = job = Job(known[hooks], exact, min(2, workload.adapters), 0)
        if products == torch.bfloat16:
            jobs[f"{hooks} in bfloat16"] = dataclasses.replace(job, workload=dataclasses.replace(exact, dtype=products))
    else:
        rounded = Job(known[hooks], workload, min(2, workload.adapters), 0)
        exact = dataclasses.replace(workload, rounded_to=workload.dtype, dtype=torch.float64)
        noise = {
            f"{hooks} in float64": dataclasses.replace(rounded, workload=exact), f"{hooks} in float32": rounded,
        }  # fmt: skip
    jobs[FLOOR] = Job(partial(Floor, backwards=backwards), workload, workload.adapters, options.rounds)
    if backwards:
        jobs[PRODUCTS] = dataclasses.replace(jobs[FLOOR], make=AdapterProducts)
    # A GPU's steps are so even that a few adapters tell as much as all of them, one after the other.
    few = ("seed", "hooks-one") if workload.on_gpu else ("seed",)
    for way in ways:
        jobs[way] = Job(known[way], workload, workload.adapters, options.rounds)
        if way in few:
            adapters, rounds = min(options.seed_adapters, workload.adapters), min(options.rounds, options.seed_rounds)
            jobs[way] = dataclasses.replace(jobs[way], adapters=adapters, rounds=rounds)
    limit = memory_limit(options.memory)
    return Run(
        jobs, (*ways, FLOOR), TOLERANCE[products], essential=FLOORS, local=options.one_process, memory=limit,
        noise=noise,
    )  # fmt: skip


def record_of(options: argparse.Namespace, keep: Callable[[Record], None]) -> Record:
    """Measure and print, table by table; ``keep`` is given everything so far, ready for json."""
    record: Record = {
        "machine": machine_facts(options.threads), "model": model_name(options), "loss": options.loss,
        "rank": options.rank, "seed_probes": options.seed_probes, "runs": [],
    }  # fmt: skip
    print(f"{record['model']}, rank {record['rank']}, {options.loss}\n{machine_line(record['machine'])}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for workload, texts in workloads(options, checkpoint_of(options.model, options.size, scratch), scratch):
            run = run_of(workload, options)
            record["runs"].append({})

            def changed(run: Run, texts: Record = texts) -> None:
                record["runs"][-1] = entry_of(run, texts, options)
                keep(record)

            run.changed = changed
            runs.append(run.measure())
            print(table(record["runs"][-1]), file=sys.stderr if workload.on_gpu else sys.stdout, flush=True)
        if runs[0].jobs[FLOOR].workload.on_gpu:  # to stdout with what is known only when everything has been timed
            for run, entry in zip(runs, record["runs"], strict=True):
                add_activity(run, entry)
                print(table(entry), flush=True)
            keep(record)
    return record


def entry_of(run: Run, texts: Record, options: argparse.Namespace) -> Record:
    """Everything about one table so far, ready for json."""
    workload, entries = run.jobs[FLOOR].workload, run.entries()
    floor, products = (entries.pop(name, None) for name in FLOORS)
    for name, own in entries.items():
        # Of the anchor over all of its rounds with the floor; of another in the same run.
        beside = run.results[FLOOR].times_anchor if name == run.anchor else None
        own["share_of_floor"] = beside or (floor["seconds"]["median"] / own["seconds"]["median"] if floor else None)
    return {
        "dtype": str(workload.dtype).removeprefix("torch."), "adapters": workload.adapters, "texts": texts,
        "on_gpu": workload.on_gpu, "one_process": run.local, "anchor": run.anchor, "reference": run.reference,
        "tolerance": run.tolerance._asdict(), "peak_tflops": options.peak, "floor": floor,
        "adapter_products": products, "ways": entries,
        "skipped": {way: TOO_SLOW for way in options.ways if way not in run.jobs},
        "cannot_run": {name: own.reason for name, own in run.results.items() if own.reason},
    }  # fmt: skip


def add_activity(run: Run, entry: Record) -> None:
    """What a step of each way makes the GPU do; a way that is timed on fewer adapters does it that much more often."""
    with Pool(run.jobs, run.local) as pool:
        for name, own in {FLOOR: entry["floor"], **entry["ways"]}.items():
            report(f"profiling {name}")
            times, own["activity"] = run.jobs[name].workload.adapters / run.jobs[name].adapters, None
            try:
                pool.only(name)
                found = pool.call(name, "activity")
            except WorkerError as error:
                report(f"{name} was not profiled: {error}")
                continue
            if found is not None:
                counts = {count: round(getattr(found, count) * times) for count in ("kernels", "launches")}
                own["activity"] = {**counts, "busy": found.busy * times}


def table(run: Record) -> str:
    """One table as Markdown, with what a reader must know above and below it."""
    on_gpu, texts, anchor, floor, ways = run["on_gpu"], run["texts"], run["anchor"], run["floor"], run["ways"]
    unit = "ms" if on_gpu else "s"
    rows = []
    for way, own in ways.items():
        off, activity = own["agreement"], _activity(own) if on_gpu else {}
        rows.append({
            run["dtype"]: way + "*" * (own["adapters_timed"] < run["adapters"]),
            f"{unit} per step (min to max)": _time(own, unit), "tokens/s": f"{own['tokens_per_second']:.0f}",
            "adapters/s": f"{own['adapters_per_second']:.3g}", "peak GB": f"{own['peak_bytes'] / 1e9:.2f}",
            "over weights GB": f"{own['step_bytes'] / 1e9:.2f}", f"time / {anchor}": f"{own['times_anchor']:.2f}",
            "share of floor": f"{own['share_of_floor']:.2f}", **activity,
            "error of value": f"{off['value']:.1e}" if off else "",
            "error of gradients (worst tensor)": f"{off['gradient']:.1e} ({off['worst']:.1e})" if off else "",
        })  # fmt: skip
    rows += [{run["dtype"]: way, f"{unit} per step (min to max)": why} for way, why in run["cannot_run"].items()]
    rows.append({
        run["dtype"]: "floor", f"{unit} per step (min to max)": _time(floor, unit), "share of floor": "1.00",
        **(_activity(floor) if on_gpu else {}),
    })  # fmt: skip
    lines = [
        f"\nG = {run['adapters']}, {texts['count']} {texts['kind']}: {texts['tokens']} tokens, "
        f"{texts['tree_tokens']} in the prefix tree, longest {texts['longest']}", "", markdown(rows), "",
    ]  # fmt: skip
    lines += [
        f"\\* timed on {own['adapters_timed']} adapters in {len(own['seconds']['samples'])} rounds, scaled to "
        f"{run['adapters']}: it shares nothing between adapters."
        for own in ways.values() if own["adapters_timed"] < run["adapters"]
    ]  # fmt: skip
    alone = [way for way, own in ways.items() if not own["timed_beside_anchor"] and not run["one_process"]]
    lines += [f"{way} does not fit into memory beside {anchor}: it was timed on its own." for way in alone]
    seconds, products = floor["seconds"]["median"], run["adapter_products"]
    lines.append(f"Floor: {floor['flop'] / 1e12:.3g} TFLOP in {floor['dtype']} at {_rate(floor):.0f} GFLOP/s.")
    if products:
        lines.append(
            f"The adapters' own products alone, {products['flop'] / 1e12:.3g} TFLOP at {_rate(products):.0f} GFLOP/s: "
            f"{_time(products, unit)} {unit}. With nothing beside them a step reaches "
            f"{seconds / (seconds + products['seconds']['median']):.2f} of the floor."
        )
    rates = {way: floor["flop"] / own["seconds"]["median"] / 1e12 for way, own in ways.items()}
    peak = run["peak_tflops"]
    shown = (f"{way} {rate:.3g}" + (f" ({rate / peak:.0%} of the peak)" if peak else "") for way, rate in rates.items())
    lines.append(f"TFLOP/s of the floor's products: {', '.join(shown)}.")
    lines += [
        f"{way} ran with checkpoint={own['checkpoint']!r}, "
        f"{'prepacked weights' if own['prepacked'] else 'weights as torch stores them'}, in {own['compute']}."
        for way, own in ways.items() if "checkpoint" in own
    ]  # fmt: skip
    tolerated = ", ".join(f"{what} {run['tolerance'][what]:.2g}" for what in ("value", "gradient", "worst"))
    lines.append(f"Errors are relative to {run['reference']}; tolerated: {tolerated}.")
    lines += [f"{way} was left out: {why}." for way, why in run["skipped"].items()]
    return "\n".join(lines)


def _rate(own: Record) -> float:
    return own["flop"] / own["seconds"]["median"] / 1e9


def _time(own: Record, unit: str) -> str:
    median, least, most = ((1e3 if unit == "ms" else 1) * own["seconds"][key] for key in ("median", "min", "max"))
    return f"{median:.3g} ({least:.3g} to {most:.3g})"


def _activity(own: Record) -> dict[str, str]:
    found = own.get("activity")
    if found is None:
        return dict.fromkeys(ACTIVITY, "")
    idle = max(0.0, 1 - found["busy"] / own["seconds"]["median"])
    values = f"{1e3 * found['busy']:.3g}", f"{idle:.0%}", f"{found['kernels']}", f"{found['launches']}"
    return dict(zip(ACTIVITY, values, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 where ways disagree or one of them fails."""
    options = arguments(argv)
    set_threads(options.threads)
    use_device(options.device)
    return exit_status(options, record_of, throughput_figure)


if __name__ == "__main__":
    sys.exit(main())
