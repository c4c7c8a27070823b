"""``lora-delta label``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from qwen_functional.dtypes import DTYPES
from qwen_functional.files import parse_json, read_lines
from qwen_functional.memory import keep_freed_memory

from ..delta import POOLINGS, DifferentiableDeltaCompute
from ..distributed import process_group
from ..labelling.labels import LabelReport, compute_labels
from ..peft.adapters import find_adapters
from ..probes.texts import create_generic_probes


def add(subcommands: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    label = subcommands.add_parser(
        "label",
        help="write the deltas of many adapters to a folder",
        description="Computes the deltas of LoRA adapters, many at a time, and adds them to a folder of labels. "
        "Adapters that already have a label there are not computed again, and a killed job resumes when it is started "
        "again. Under torchrun all processes share the work. Exit status 1 if an adapter could not be labelled.",
    )
    label.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="a PEFT adapter's folder, a folder of them, a glob, a .txt file with one per line, or a hub id",
    )
    label.add_argument("--model", required=True, help="hub id or folder of the base model, a Qwen2 or Qwen3 checkpoint")
    label.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="label folder, new or to resume")
    label.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="base weights (default: %(default)s)")
    label.add_argument("--device", help="default: a GPU if there is one, else the CPU")
    label.add_argument("--probes", type=Path, metavar="FILE", help="texts, one per line (default: five generic ones)")
    label.add_argument("--chat", action="store_true", help="put each probe into the model's chat template")
    label.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="further variables for that template, such as '{\"enable_thinking\": false}' for Qwen3 without thinking",
    )
    label.add_argument("--max-length", type=int, default=256, help="most tokens of a probe (default: %(default)s)")
    label.add_argument(
        "--layer",
        action="append",
        metavar="N[,N…]",
        help="block to read, from 0; -1 (the default) is after the last one and the final norm. Several, separated by "
        "commas or given by repetition, give a row each: --layer=-1,12",
    )
    label.add_argument(
        "--pooling", choices=POOLINGS, default="mean", help="pool the probes; none keeps each (default: %(default)s)"
    )
    label.add_argument("--adapters-per-pass", type=int, metavar="G", help="default: 8, or 32 on a GPU")
    label.add_argument(
        "--stream", choices=("disk", "host"), help="leave the base model there, if it does not fit on the device"
    )
    label.add_argument("--json", action="store_true", help="print the summary as JSON")
    label.add_argument("--quiet", action="store_true", help="no progress bar")
    label.set_defaults(run=_label)


def _label(options: argparse.Namespace) -> int:
    keep_freed_memory()
    find_adapters(options.adapters)  # fail before anything large is read
    probes = create_generic_probes() if options.probes is None else _probes(options.probes)
    given = options.chat_template_kwargs
    variables = None if given is None else parse_json(given, "--chat-template-kwargs", "a JSON object")
    with process_group(options.device) as ranks:
        delta = DifferentiableDeltaCompute.from_pretrained(
            options.model,
            probes,
            dtype=DTYPES[options.dtype],
            device=ranks.device,
            stream=options.stream or False,
            max_length=options.max_length,
            chat=options.chat,
            chat_template_kwargs=variables,
            layer=_layers(options.layer),
            pooling=options.pooling,
            adapters_per_pass=options.adapters_per_pass,
        )
        speaks = ranks.rank == 0
        if delta.truncated_probes and speaks:
            cut = ", ".join(map(str, delta.truncated_probes))
            print(f"cut to {options.max_length} tokens: probes {cut}, counted from 0", file=sys.stderr)
        try:
            report = compute_labels(
                delta,
                options.adapters,
                options.out,
                model=options.model,
                progress=not options.quiet,
            )
        except KeyboardInterrupt as error:
            error.add_note(f"finished labels are in {options.out}, and the same command resumes from there")
            raise
        if speaks:
            facts = json.dumps(_facts(report, options.out), indent=1) if options.json else _summary(report, options.out)
            print(facts, flush=True)
    return 1 if report.failed else 0


def _probes(path: Path) -> list[str]:
    probes = [line for line in read_lines(path, "a text file with one probe per line") if line.strip()]
    if not probes:
        raise ValueError(f"--probes is {path}, which holds no text, expected one probe per line")
    return probes


def _layers(given: list[str] | None) -> int | tuple[int, ...]:
    try:
        layers = tuple(int(layer) for text in given or ["-1"] for layer in text.split(","))
    except ValueError:
        raise ValueError(f"--layer is {','.join(given or [])!r}, expected numbers such as 12 or -1,12") from None
    return layers[0] if len(layers) == 1 else layers


def _facts(report: LabelReport, out: Path) -> dict[str, object]:
    failed = [dataclasses.asdict(failure) for failure in report.failed]
    rate = len(report.computed) / report.seconds if report.seconds else None
    counts = {"labels": report.labels, "computed": len(report.computed), "reused": len(report.reused)}
    more = {"zero": list(report.zero), "failed": failed}
    return {"out": str(out), **counts, **more, "seconds": report.seconds, "labels_per_second": rate}


def _summary(report: LabelReport, out: Path) -> str:
    computed, failed = len(report.computed), len(report.failed)
    rate = f" in {report.seconds:.1f} s, {computed / report.seconds:.2f} per second" if computed else ""
    head = f"{out} holds {report.labels} labels: {computed} computed{rate}; {len(report.reused)} were there already"
    lines = [f"  {failure.name}: {failure.reason}" for failure in report.failed]
    return "\n".join([head, *([f"{failed} failed:", *lines] if failed else [])])
