"""A step of training a reference generator, and how much of it is not the engine's.

The teachers are random: their number, and that of the tokens, decide the time, not their values.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import machine_facts, machine_line, set_threads, synchronize
from workload import DTYPES, SIZES, checkpoint_of

from lora_delta import DifferentiableDeltaCompute, DifferentiableLMLoss
from lora_delta.generate.generator import DirectGenerator, LoRAGenerator
from lora_delta.generate.options import TrainingOptions
from lora_delta.generate.schedules import Schedule
from lora_delta.generate.tasks import Task
from lora_delta.generate.terms import TextLosses
from lora_delta.generate.text_lines import Text
from lora_delta.generate.tokens import TokenFormat
from lora_delta.generate.training import train
from qwen_functional import LoraSpec, load_pretrained
from qwen_functional.memory import give_back_freed_memory, keep_freed_memory, use_huge_pages

LOSSES = ("weights+delta", "delta", "weights", "lm")
PROBE_TOKENS, CONDITION_TOKENS, TEACHERS = 31, 64, 16


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", metavar="ID_OR_FOLDER", help="a checkpoint")
    add("--size", choices=SIZES, default="0.5b", help="random weights of this size, without --model")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help=f"of {', '.join(LOSSES)}")
    add("--rank", type=int, default=16)
    add("--chunk-width", type=int, default=128)
    add("--steps", type=int, default=8, help="of each, the first one aside (default: %(default)s)")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    options = parser.parse_args()
    set_threads(options.threads)
    keep_freed_memory()
    use_huge_pages()
    print(machine_line(machine_facts(options.threads)))
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint_of(options.model, options.size, scratch)
        config, weights = load_pretrained(folder, dtype=dtype, device=device)
    spec = LoraSpec(rank=options.rank, alpha=2 * options.rank)
    format = TokenFormat.for_config(config, options.rank, options.chunk_width)
    chance = torch.Generator().manual_seed(0)
    probes = torch.randint(config.vocab_size, (5, PROBE_TOKENS), generator=chance).tolist()
    delta = DifferentiableDeltaCompute(config, weights, probes, spec)
    lm = DifferentiableLMLoss(config, weights, spec)
    first = torch.randn(format.n_tokens, *format.token_shape, generator=chance)
    tasks = [
        Task(
            [torch.randn(CONDITION_TOKENS, config.hidden_size, generator=chance)],
            torch.roll(first, index, 0),
            0.1 * torch.randn(config.hidden_size, generator=chance),
            [Text(((ids(config.vocab_size, 100, chance), ids(config.vocab_size, 50, chance)),)) for _ in range(4)],
        )
        for index in range(TEACHERS)
    ]
    print("\n| losses | generator | parameters | s per step | s in the engine | share of the rest |")
    print("|---|---|---:|---:|---:|---:|")
    for losses in options.losses:
        of_texts = losses == "lm"
        torch.manual_seed(0)
        generator = (
            DirectGenerator(config, spec, config.hidden_size)
            if of_texts
            else LoRAGenerator(format, config.hidden_size)
        ).to(device)
        asked = TrainingOptions(
            steps=options.steps + 1, warmup_steps=1, losses={name: Schedule(1.0) for name in losses.split("+")}
        )
        spent: list[float] = []
        given: dict[str, Any] = {"texts": TextLosses(lm)} if of_texts else {"delta": delta}
        for part in given.values():
            _time(part, "mean" if of_texts else "mean_loss", spent)
        history = train(generator, tasks, asked, format=format, progress=False, **given)
        seconds = statistics.median(metrics["seconds"] for metrics in history[1:])
        within = statistics.median(spent[1:]) if spent else 0.0
        size = sum(parameter.numel() for parameter in generator.parameters())
        kind, rest = "A and B" if of_texts else "tokens", 1 - within / seconds
        print(f"| {losses} | {kind} | {size / 1e6:.0f} M | {seconds:.2f} | {within:.2f} | {rest:.0%} |", flush=True)
        del generator, history
        give_back_freed_memory()  # or the next one would count it as its own reserve
    return 0


def ids(vocab_size: int, n: int, chance: torch.Generator) -> torch.Tensor:
    return torch.randint(vocab_size, (n,), generator=chance)


def _time(engine: Any, name: str, spent: list[float]) -> None:
    """Let the method of this name, in which the engine's work is done, write down its seconds."""
    real: Callable[..., Any] = getattr(engine, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        value = real(*arguments, **named)
        synchronize()
        spent.append(time.perf_counter() - start)
        return value

    object.__setattr__(engine, name, timed)


if __name__ == "__main__":
    sys.exit(main())
