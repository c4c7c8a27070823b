"""``lora-delta teach``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_functional.memory import keep_freed_memory

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_functional import Qwen2Config, Qwen2Weights

    from ..generate.run_config import RunConfig
    from ..generate.texts import TextSet

_TEXTS_AT_ONCE = 32


def add(subcommands: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    teach = subcommands.add_parser(
        "teach",
        help="store what the bare model predicts on a run's texts with their conditions in its context",
        description="Writes the K likeliest next tokens and their log-probabilities at each token of the completions "
        "of CONFIG.toml's data, as the bare model gives them after the context that [teacher] describes. With "
        "stored = FILE there, lora-delta train reads them for its loss 'kl' instead of running the model in each step. "
        "With --deltas it writes the targets of the loss 'delta' on own texts, for stored_deltas = FILE: the hidden "
        "states of the bare model, and those of the prompted one or of teachers' adapters.",
    )
    teach.add_argument("config", type=Path, metavar="CONFIG.toml")
    teach.add_argument("--k", type=int, default=64, help="tokens kept at each position (default: 64)")
    teach.add_argument("--deltas", action="store_true", help="write the targets of deltas instead")
    teach.add_argument("--out", type=Path, required=True, metavar="FILE")
    teach.add_argument("--device", help="default: the file's, else a GPU if there is one, else the CPU")
    teach.add_argument("--quiet", action="store_true", help="no progress bar")
    teach.set_defaults(run=_teach)


def _teach(options: argparse.Namespace) -> int:
    from ..distributed import Ranks
    from ..files import clear_unfinished, folder_lock
    from ..generate.bases import load_base
    from ..generate.prompts import read_prompts
    from ..generate.run_config import RunConfig
    from ..generate.runs import text_sets

    config = dataclasses.replace(RunConfig.from_toml(options.config), evaluation=None)
    if options.out.is_dir():
        raise ValueError(f"{options.out} is a folder, expected a file, or none yet")
    if options.deltas and "delta" not in config.training.text_terms:
        raise ValueError(f"{options.config} has no loss 'delta' with texts = 'own', whose targets --deltas writes")
    keep_freed_memory()
    device = options.device or config.device
    prompts = None if config.prompts is None else read_prompts(config.prompts)
    lm_head = not options.deltas
    folder, base, weights = load_base(config.base, config.dtype, device, stream=config.stream, lm_head=lm_head)
    with_context = not options.deltas or config.training.delta_from_context
    write = _write_deltas if options.deltas else _write_top_k
    with folder_lock(config.out):
        if options.out.parent.is_dir():
            clear_unfinished(options.out.parent, options.out.name)
        texts, _ = text_sets(
            config, folder, base, prompts, Ranks(), with_context=with_context, progress=not options.quiet
        )
        n_rows = write(options, config, base, weights, texts)
    what = "positions" if options.deltas else "tokens"
    print(f"wrote targets for {n_rows:,} {what} in {texts.n_texts:,} texts to {options.out}")
    return 0


def _blocks(texts: TextSet, options: argparse.Namespace) -> Iterator[range]:
    """Lines that are computed together."""
    from ..progress import progress_bar

    for start in progress_bar(range(0, texts.n_texts, _TEXTS_AT_ONCE), "teach", disable=options.quiet):
        yield range(start, min(start + _TEXTS_AT_ONCE, texts.n_texts))


def _write_top_k(
    options: argparse.Namespace, config: RunConfig, base: Qwen2Config, weights: Qwen2Weights, texts: TextSet
) -> int:
    from ..generate.terms import contexts_of, pairs_of
    from ..lm_loss import DifferentiableLMLoss
    from ..own_texts import in_context
    from ..teachers import save_top_k

    lm, said = DifferentiableLMLoss(base, weights), []
    for block in _blocks(texts, options):
        lines = [[texts.text(line) for line in block]]
        asked = in_context(pairs_of(lines), contexts_of(lines), "completion")
        said += lm.top_k(asked, options.k, temperature=config.teacher.temperature)[0]
    save_top_k(options.out, said, base.vocab_size)
    return sum(map(len, said))


def _write_deltas(
    options: argparse.Namespace, config: RunConfig, base: Qwen2Config, weights: Qwen2Weights, texts: TextSet
) -> int:
    import torch

    from ..generate.bases import check_labelled, common_spec
    from ..generate.runs import stored_deltas_facts
    from ..generate.terms import contexts_of, numbers_of, pairs_of
    from ..labelling.settings import model_fingerprint
    from ..labelling.table import DeltaLabels
    from ..peft.adapters import load_peft_adapter
    from ..stored_deltas import deltas_written
    from ..text_delta import DifferentiableTextDelta

    asked, labels, spec = config.training.delta, None, None
    if not config.training.delta_from_context:
        if config.labels is None:
            raise ValueError(f"{options.config} has no labels, from which the teachers' targets are read")
        labels = DeltaLabels(config.labels)
        check_labelled(labels, texts.conditions, f"{config.data}")
        spec = common_spec(labels, texts.conditions, None, base)
    delta = DifferentiableTextDelta(base, weights, spec, layer=asked.layers, positions=asked.positions)

    @functools.lru_cache(_TEXTS_AT_ONCE)
    def teacher(condition: int) -> dict[str, Tensor]:
        assert labels is not None
        return load_peft_adapter(labels.source(texts.conditions[condition]), config=base)[1]

    n_rows, of = 0, texts.conditions_of_lines().tolist()
    with deltas_written(options.out, stored_deltas_facts(config, texts, model_fingerprint(base, weights))) as writer:
        for block in _blocks(texts, options):
            own: dict[int, list[int]] = {}
            for line in block:
                own.setdefault(0 if labels is None else of[line], []).append(line)
            lines = [[texts.text(line) for line in each] for each in own.values()]
            examples = pairs_of(lines)
            if labels is None:
                target = delta.target(examples, contexts=contexts_of(lines))
            else:
                each = [teacher(condition) for condition in own]
                tensors = {name: torch.stack([one[name] for one in each]).to(delta.device) for name in each[0]}
                target = delta.target(examples, tensors=tensors)
            counts = delta.texts(examples).all_counts(asked.positions)
            found: dict[int, tuple[Tensor, Tensor]] = {}
            for numbers, rows, *states in zip(numbers_of(lines), counts, target.base, target.wanted, strict=True):
                found |= dict(zip(numbers, zip(*(one.split(rows, 1) for one in states), strict=True), strict=True))
            for number in sorted(found):
                writer.write(*found[number])
            n_rows += sum(map(sum, counts))
    return n_rows
