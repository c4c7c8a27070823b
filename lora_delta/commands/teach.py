"""``lora-delta teach``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from qwen_functional.memory import keep_freed_memory

_TEXTS_AT_ONCE = 32


def add(subcommands: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    teach = subcommands.add_parser(
        "teach",
        help="write down what the bare model says of a run's texts when it has read their conditions",
        description="Writes the K likeliest next tokens, and their log-probabilities, at each token of the completions "
        "of CONFIG.toml's data, as the bare model gives them behind the context that [teacher] describes. With "
        "stored = FILE there, lora-delta train reads them for its loss 'kl' instead of asking the model in each step.",
    )
    teach.add_argument("config", type=Path, metavar="CONFIG.toml")
    teach.add_argument("--k", type=int, default=64, help="tokens that are kept at each place (default: 64)")
    teach.add_argument("--out", type=Path, required=True, metavar="FILE")
    teach.add_argument("--device", help="default: the file's, else a GPU where there is one, else the CPU")
    teach.add_argument("--quiet", action="store_true", help="no progress bar")
    teach.set_defaults(run=_teach)


def _teach(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..distributed import Ranks
    from ..files import folder_lock
    from ..generate.prompts import read_prompts
    from ..generate.run_config import RunConfig
    from ..generate.runs import load_base, text_sets
    from ..generate.terms import contexts_of, pairs_of
    from ..lm_loss import DifferentiableLMLoss
    from ..own_texts import in_context
    from ..teachers import save_top_k

    config = dataclasses.replace(RunConfig.from_toml(options.config), evaluation=None)
    if options.out.is_dir():
        raise ValueError(f"{options.out} is a folder, expected a file, or none yet")
    keep_freed_memory()
    device = options.device or config.device
    prompts = None if config.prompts is None else read_prompts(config.prompts)
    folder, base, weights = load_base(config.base, config.dtype, device, stream=config.stream, lm_head=True)
    with folder_lock(config.out):
        texts, _ = text_sets(
            config, folder, base, prompts, Ranks(), with_context=True, progress=not options.quiet
        )
    lm = DifferentiableLMLoss(base, weights)
    said = []
    for start in tqdm(range(0, texts.n_texts, _TEXTS_AT_ONCE), "teach", disable=options.quiet):
        lines = [[texts.text(line) for line in range(start, min(start + _TEXTS_AT_ONCE, texts.n_texts))]]
        asked = in_context(pairs_of(lines), contexts_of(lines), "completion")
        said += lm.top_k(asked, options.k, temperature=config.teacher.temperature)[0]
    save_top_k(options.out, said, base.vocab_size)
    print(f"wrote what is said of {sum(map(len, said)):,} tokens in {texts.n_texts:,} texts to {options.out}")
    return 0
