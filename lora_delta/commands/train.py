"""``lora-delta train``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from qwen_functional.memory import keep_freed_memory, use_huge_pages

from ..distributed import process_group


def add(subcommands: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    train = subcommands.add_parser(
        "train",
        help="train a generator from prompts to LoRA weights, on teachers' weights and deltas or on texts",
        description="Trains a reference generator on labelled teachers, on texts, or on both, as a TOML file says; the "
        "module lora_delta.generate.run_config has examples. Run again, it resumes from its last checkpoint, under "
        "torchrun on any number of processes.",
    )
    train.add_argument("config", type=Path, metavar="CONFIG.toml")
    train.add_argument("--device", help="default: the file's, else a GPU if there is one, else the CPU")
    train.add_argument("--json", action="store_true", help="print the last step's metrics as JSON")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from ..generate.options import TERMS
    from ..generate.run_config import RunConfig
    from ..generate.runs import train_run

    config = RunConfig.from_toml(options.config)
    if options.device is not None:
        config = dataclasses.replace(config, device=options.device)
    keep_freed_memory()
    if not config.stream:  # streaming is for machines with little memory
        use_huge_pages()
    with process_group(config.device) as ranks:
        history = train_run(config, ranks, progress=not options.quiet)
    if ranks.rank > 0:
        return 0
    last = history[-1] if history else {}  # the log of a finished run may be lost
    if options.json:
        print(json.dumps(last, indent=1))
    else:
        terms = ", ".join(f"{name} {last[name]:.4f}" for name in ("loss", *TERMS) if name in last)
        skipped = sum("skipped" in metrics for metrics in history)
        also = f", {skipped} of them skipped" if skipped else ""
        done = int(last["step"]) + 1 if last else config.training.steps
        ended = f" of {config.training.steps}, held-out loss no longer falling" if done < config.training.steps else ""
        print(f"{done} steps{ended}{also}; last step: {terms or 'no loss'}; the run is in {config.out}")
        found = [(metrics["held_out_lm"], int(metrics["step"])) for metrics in history if "held_out_lm" in metrics]
        if found:
            loss, step = min(found)
            print(f"held-out conditions: best {loss:.4f} nats per token, at step {step + 1}; last {found[-1][0]:.4f}")
    return 0
