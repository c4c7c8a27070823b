"""Loss and gradients of each adapter's own examples: this engine against hooks, repeated LoRAs and PEFT, in one run.

All ways must agree before they are timed. Progress goes to stderr, the table to stdout.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from compare import TOLERANCE, compare, require
from lm_ways import LM_WAYS, TextWorkload, draw_examples, text_ids
from measure import machine_facts, machine_line, memory_limit
from schedule import groups_that_fit, time_groups
from sizes import SIZES
from workers import CannotRunError, Footprint, Job, Pool, set_threads, use_device
from workload import DTYPES, config_of, local_folder

from lora_delta.files import write_json

REFERENCE, NOISE = "hooks in float32", "hooks in this dtype"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", metavar="ID_OR_FOLDER", help="a checkpoint")
    add("--size", choices=SIZES, default="0.5b", help="random weights of this size, without --model")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    add("--adapters", type=int, default=4, metavar="G")
    add("--examples", type=int, default=2, help="of each adapter (default: %(default)s)")
    add("--lengths", type=int, nargs=2, default=[100, 700], metavar=("SHORTEST", "LONGEST"), help="in tokens")
    add("--rank", type=int, default=8)
    add("--rounds", type=int, default=3)
    add("--ways", nargs="+", choices=LM_WAYS, default=list(LM_WAYS), metavar="WAY", help=f"of {', '.join(LM_WAYS)}")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    set_threads(options.threads)
    use_device(options.device)
    folder = local_folder(options.model) if options.model else None
    ids = list(range(config_of(None, options.size).vocab_size)) if folder is None else text_ids(folder)
    shortest, longest = options.lengths
    examples = draw_examples(options.adapters, options.examples, shortest, longest, ids)
    machine, runs = machine_facts(options.threads), []
    print(machine_line(machine))
    for dtype in options.dtype:
        workload = TextWorkload(
            folder, None if folder else options.size, [[0]], options.adapters, options.rank, DTYPES[dtype],
            options.threads, device=options.device, examples=examples,
        )  # fmt: skip
        runs.append(run(workload, dtype, options))
    if options.json:
        write_json(options.json, {"machine": machine, "runs": runs})
    return 0


def run(workload: TextWorkload, dtype: str, options: argparse.Namespace) -> dict:
    """Each way alone once, for its memory and to agree with hooks in float32 on the same rounded numbers; then rounds
    of all that can, in turn. In a narrow dtype what is tolerated follows the errors that hooks make in it.
    """
    exact = replace(workload, dtype=torch.float32, rounded_to=workload.dtype)
    jobs = {way: Job(way, workload) for way in options.ways}
    pool = Pool({**jobs, REFERENCE: Job("hooks", exact), NOISE: Job("hooks", workload)}, local=workload.on_gpu)
    footprints: dict[str, Footprint] = {}
    reasons: dict[str, str] = {}
    tolerance = TOLERANCE[dtype]
    with tempfile.TemporaryDirectory() as scratch:
        names = [REFERENCE, *([] if dtype == "float32" else [NOISE]), *options.ways]
        for way in names:
            path = str(Path(scratch) / way.replace(" ", "-"))
            try:
                with pool.running([way]) as workers:
                    footprint = workers[way].check(path, workload.adapters)
            except CannotRunError as error:
                reasons[way] = error.reason
                continue
            if way == REFERENCE:
                first = path
                continue
            agreement = compare(path, first)
            over = (footprint.peak - footprint.weights) / 1e9
            print(f"{way}: {agreement}; {over:.2f} GB over its weights", file=sys.stderr)
            if way == NOISE:
                tolerance = tolerance.beside(agreement)
            else:
                footprints[way] = footprint
                require(way, agreement, tolerance)
    anchor, rounds = options.ways[0], dict.fromkeys(footprints, options.rounds)
    groups = groups_that_fit(footprints, anchor, memory_limit(None))
    adapters = dict.fromkeys(footprints, workload.adapters)
    samples = time_groups(groups, pool, anchor, adapters, rounds, lambda line: print(line, file=sys.stderr))
    print(f"\n{dtype}, {workload.adapters} adapters, rank {workload.rank}, {workload.tokens:,} tokens of examples\n")
    print(f"| way | s | tokens/s | times {anchor} | peak over weights, GB |\n|---|---:|---:|---:|---:|")
    entries: dict[str, dict] = {}
    for way in options.ways:
        if way in reasons:
            print(f"| {way} | {reasons[way]} | | | |")
            continue
        own, over = samples[way], footprints[way].peak - footprints[way].weights
        times = "" if own.times_anchor is None else f"{own.times_anchor:.2f}"
        print(f"| {way} | {own.median:.3g} | {workload.tokens / own.median:,.0f} | {times} | {over / 1e9:.2f} |")
        entries[way] = {"seconds": own.seconds, "anchor_seconds": own.anchor_seconds, "over_weights_bytes": over}
    return {"dtype": dtype, "tokens": workload.tokens, "ways": entries, "cannot_run": reasons}


if __name__ == "__main__":
    sys.exit(main())
