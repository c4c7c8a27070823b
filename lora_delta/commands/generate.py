"""``lora-delta generate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qwen_functional.memory import keep_freed_memory

_PER_BATCH = 16


def add(subcommands: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    generate = subcommands.add_parser(
        "generate",
        help="write PEFT adapters from prompts with a trained generator",
        description="Writes one PEFT adapter folder for each line of FILE: a prompt, or JSON "
        '{"name": "...", "prompts": ["...", "..."]}, whose name becomes the folder\'s.',
    )
    generate.add_argument("--run", type=Path, required=True, dest="folder", help="folder written by lora-delta train")
    generate.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text or JSON lines")
    generate.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the adapter folders go")
    generate.add_argument("--last", action="store_true", help="the last generator, not the best on held-out conditions")
    generate.add_argument("--base-model", help="base model that the adapters name (default: the run's)")
    generate.add_argument("--device", help="default: a GPU if there is one, else the CPU")
    generate.add_argument("--json", action="store_true", help="print the folders as JSON")
    generate.add_argument("--quiet", action="store_true", help="no progress bar")
    generate.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    from ..files import folder_lock
    from ..generate.conditions import Condition
    from ..generate.prompts import FolderNames, read_prompts
    from ..generate.runs import load_run
    from ..peft.adapters import save_peft_adapter
    from ..progress import progress_bar

    prompts = read_prompts(options.prompts, "name", FolderNames())
    for name in prompts:
        if (options.out / name).is_symlink():
            raise ValueError(f"{options.out / name} is a link, expected a folder, or none yet")
    keep_freed_memory()
    run = load_run(options.folder, options.device, last=options.last)
    written = []
    entries = list(prompts.items())
    bar = progress_bar(total=len(entries), desc="generate", unit=" adapters", disable=options.quiet)
    with folder_lock(options.out), bar:
        for start in range(0, len(entries), _PER_BATCH):
            batch = entries[start : start + _PER_BATCH]
            condition = Condition.collate([torch.cat(run.encoder(texts)) for _, texts in batch]).to(run.weights.device)
            tensors = run.write(condition.states, condition.mask)
            for index, (name, _) in enumerate(batch):
                one = {key: tensor[index].cpu().contiguous() for key, tensor in tensors.items()}
                try:
                    save_peft_adapter(options.out / name, run.spec, one, base_model=options.base_model or run.base)
                except ValueError as error:
                    raise ValueError(f"adapter {name!r}: {error}") from error
                written.append(str(options.out / name))
                bar.update()
    what = "adapter" if len(written) == 1 else "adapters"
    print(json.dumps(written, indent=1) if options.json else f"wrote {len(written)} {what} to {options.out}")
    return 0
