"""The command line: ``lora-delta SUBCOMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import check, demo, generate, label, plot, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status. 0: all well, 1: something failed, 2: it could not be run."""
    parser = argparse.ArgumentParser(
        prog="lora-delta", description="The behaviour of LoRA adapters as vectors, differentiable in their weights."
    )
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for command in (demo, check, label, train, generate, plot):
        command.add(subcommands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, ImportError) as error:
        print(f"lora-delta {options.subcommand}: {error}", file=sys.stderr)
        return 2
