"""``lora-delta check``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap

from qwen_functional.dtypes import DTYPES

from ..check import CheckResult, run_check
from ..distributed import usable_device


def add(subcommands: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    check = subcommands.add_parser(
        "check",
        help="check that gradients flow from a delta to LoRA tensors and to a generator",
        description="Checks gradient flow, delta sensitivity, constant memory and mixed precision on a base model. "
        "Exit status 1 if anything fails.",
    )
    check.add_argument("--model", help="hub id or folder of a Qwen2 or Qwen3 (default: the embedded one)")
    check.add_argument("--dtype", choices=DTYPES, default="float32", help="base weights (default: %(default)s)")
    check.add_argument("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    check.add_argument("--device", help="default: a GPU if there is one, else the CPU")
    check.add_argument("--steps", type=int, default=20, help="steps of the memory check (default: %(default)s)")
    check.add_argument(
        "--against-peft",
        action="store_true",
        help="also compare value and gradients with PEFT + functional_call (needs transformers and peft)",
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    results: list[CheckResult] = []
    device = usable_device(options.device)
    if not options.json:
        print(f"{options.model or 'embedded checkpoint'}, {options.dtype}, rank {options.rank}", flush=True)
    for result in run_check(
        options.model,
        dtype=DTYPES[options.dtype],
        rank=options.rank,
        device=device,
        steps=options.steps,
        against_peft=options.against_peft,
    ):
        results.append(result)
        if not options.json:
            print(_line(result), flush=True)
    failed = [result.name for result in results if not result.passed]
    if options.json:
        report = {"passed": not failed, "checks": [dataclasses.asdict(result) for result in results]}
        print(json.dumps(report, indent=2))
    else:
        verdict = f"{len(failed)} of {len(results)} failed: {', '.join(failed)}"
        print(verdict if failed else f"all {len(results)} passed")
    return 1 if failed else 0


def _line(result: CheckResult) -> str:
    head = f"{'pass' if result.passed else 'FAIL'}  {result.name:<36}{result.seconds:6.1f} s  "
    return textwrap.fill(
        result.detail,
        max(80, shutil.get_terminal_size().columns),
        initial_indent=head,
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )
