"""What the command lines have in common: options, how bad ones end the program, tables, and how a run ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from workload import SIZES

from lora_delta.files import write_json
from lora_delta.plots.figures import check_png, require_matplotlib, save_figure

Record = dict[str, Any]


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def add_common(parser: argparse.ArgumentParser, plot: str) -> None:
    """The model, the machine, and what is written; ``plot`` says what a picture shows."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="ID_OR_FOLDER", help="a Qwen2 checkpoint")
    model.add_argument("--size", choices=SIZES, help="random weights of this size (default: 0.5b)")
    add = parser.add_argument
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--memory", type=float, metavar="GIB", help="for all processes (default: 0.9 of what is free)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured, after every round")
    add("--plot", type=Path, metavar="FILE.png", help=f"draw {plot}")


def checked(parser: argparse.ArgumentParser, options: argparse.Namespace, counts: Sequence[str]) -> argparse.Namespace:
    """The options; ends the program for a count below 1, one named twice, or a file that cannot be written."""
    for name in (*counts, "threads"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [] if value is None else [value]
        if min(values, default=1) < 1:
            parser.error(f"{option} is {min(values)}, expected at least 1")
        if len(set(values)) < len(values):
            parser.error(f"{option} names one twice: {' '.join(map(str, values))}")
    plot = getattr(options, "plot", None)
    try:
        if plot:
            check_png(plot)
            require_matplotlib()
    except (ValueError, ImportError) as error:
        parser.error(f"--plot: {error}")
    for option, path in (("--json", options.json), ("--plot", plot)):
        if path and (path.is_dir() or not path.resolve().parent.is_dir()):
            parser.error(f"{option} names {path}, expected a file in a folder that exists")
    return options


def model_name(options: argparse.Namespace) -> str:
    """The hub id, or the folder's name without its place on this machine."""
    if options.model is None:
        return f"random weights of size {options.size or '0.5b'}"
    folder = Path(options.model)
    return folder.resolve().name if folder.is_dir() else options.model


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table; the first row has all columns, the first of which is of names."""
    columns = list(rows[0])
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def exit_status(
    options: argparse.Namespace,
    record_of: Callable[[argparse.Namespace, Callable[[Record], None]], Record],
    figure_of: Callable[[Record], Any],
) -> int:
    """0, with the record in ``--json``'s file and drawn to ``--plot``'s; or 1, with what was wrong on stderr."""
    try:
        record = record_of(options, lambda part: write_json(options.json, part) if options.json else None)
    except (RuntimeError, ValueError, OSError) as error:
        report(f"error: {error}")
        return 1
    if options.plot:
        save_figure(figure_of(record), options.plot)
    return 0
