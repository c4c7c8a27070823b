"""``lora-delta demo``."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from qwen_functional.memory import keep_freed_memory


def add(subcommands: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    demo = subcommands.add_parser(
        "demo",
        help="train generators that write adapters for unseen tasks, in four minutes",
        description="Trains two generators of adapters for small text tasks, by cross-entropy and by deltas, and "
        "judges them on tasks that neither has seen, against controls. No network is needed.",
    )
    demo.add_argument("--out", type=Path, default=Path("lora-delta-demo"), help="folder (default: ./%(default)s)")
    demo.add_argument("--steps", type=int, default=300, help="training steps of each generator (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of all random draws (default: %(default)s)")
    demo.add_argument("--device", help="default: a GPU if there is one, else the CPU")
    demo.add_argument("--json", action="store_true", help="print the record as JSON instead of the table")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from ..demo import run_demo
    from ..distributed import usable_device

    if options.steps < 1:
        raise ValueError(f"--steps is {options.steps}, expected at least 1")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out is {options.out}, which is a file: expected a new folder")
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"--out is {options.out}, which is not empty: expected a new folder")
    device = usable_device(options.device)
    keep_freed_memory()
    plots = all(find_spec(package) for package in ("matplotlib", "sklearn"))
    record = run_demo(
        options.out,
        steps=options.steps,
        seed=options.seed,
        device=device,
        plots=plots,
        progress=not options.quiet,
        say=lambda line: print(line, file=sys.stderr if options.json else sys.stdout, flush=True),
    )
    if not plots:
        print("no plots were drawn: they need pip install 'qwen-functional[plots]'", file=sys.stderr)
    if options.json:
        print(json.dumps(record, indent=1))
    return 0
