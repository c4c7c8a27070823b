"""What the language model's loss costs beyond what it cannot avoid: its head, and long texts under one adapter.

The head is compared with its two matrix products, ``h Eᵀ`` and ``dz E``, in the same chunks. A long text is compared
with a short one by the time of a token, less that of attention, which grows with the text and is timed alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lm_ways import text_ids
from measure import machine_facts, machine_line, set_threads
from torch import Tensor
from workload import DTYPES, SIZES, checkpoint_of

from lora_delta import DifferentiableLMLoss
from qwen_functional import LoraSpec, Qwen2Config, load_pretrained, pack
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.memory import give_back_freed_memory
from qwen_functional.ops.attention import attention, attention_vjp
from qwen_functional.ops.lm_head import ROWS, Ordered, Targets, lm_head_loss

PARTS = ("head", "long")
COMPLETION = 1 / 3


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", metavar="ID_OR_FOLDER", help="a checkpoint")
    add("--size", choices=SIZES, default="0.5b", help="random weights of this size, without --model")
    add("--dtype", choices=DTYPES, default="float32")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--rows", type=int, nargs="+", default=[256, 1024, 4096], help="of the head (default: %(default)s)")
    add("--tokens", type=int, nargs="+", default=[2000, 20000], help="of the texts (default: %(default)s)")
    add("--rank", type=int, default=8)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    set_threads(options.threads)
    print(machine_line(machine_facts(options.threads)))
    dtype = DTYPES[options.dtype]
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint_of(options.model, options.size, scratch)
        config, weights = load_pretrained(folder, dtype=dtype)
        ids = text_ids(folder)
    if "head" in options.parts:
        E = weights.lm_head
        assert isinstance(E, Tensor)
        print("\n| rows with a target | head, s | its two products, s | times | beyond h and dh, MB |")
        print("|---|---:|---:|---:|---:|")
        for rows in options.rows:
            print(head_row(E, rows, options.rounds), flush=True)
    if "long" in options.parts:
        lm = DifferentiableLMLoss(config, weights, LoraSpec(rank=options.rank), checkpoint="block", prepack=False)
        print("\n| tokens | s | of attention | ms per token, the rest | peak RSS, GB |\n|---|---:|---:|---:|---:|")
        for tokens in options.tokens:
            print(long_row(lm, (ids * (1 + tokens // len(ids)))[:tokens]), flush=True)
    return 0


def head_row(E: Tensor, rows: int, rounds: int) -> str:
    """The head's loss and gradient, and its products, in turn."""
    h = torch.randn(rows, E.shape[1], dtype=E.dtype)
    targets = Targets.of_tokens(torch.arange(rows), torch.randint(len(E), (rows,)), torch.ones(rows))
    ordered = Ordered.of(targets, E.device, accumulation_dtype(E.dtype))

    def products() -> None:
        z, d = E.new_empty(min(rows, ROWS), len(E)), E.new_empty(min(rows, ROWS), E.shape[1])
        for start in range(0, rows, ROWS):
            part = h[start : start + ROWS]
            torch.mm(part, E.T, out=z[: len(part)])
            torch.mm(z[: len(part)], E, out=d[: len(part)])

    def head() -> None:
        lm_head_loss(h, E, ordered)

    times: dict[Callable[[], None], list[float]] = {head: [], products: []}
    for _ in range(rounds + 1):
        for call, own in times.items():
            own.append(_seconds(call))
    first, second = (statistics.median(own[1:]) for own in times.values())
    give_back_freed_memory()
    before = resident()
    peak = _peak_of(head) - before - h.nbytes * (1 + 4 // h.element_size())
    return f"| {rows:,} | {first:.2f} | {second:.2f} | {first / second:.2f} | {peak / 1e6:.0f} |"


def long_row(lm: DifferentiableLMLoss, ids: list[int]) -> str:
    """One text under one adapter, forwards and back."""
    chance = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.02 * torch.randn(shape, generator=chance)).requires_grad_() for name, shape in lm.lora_shapes.items()
    }
    n = len(ids) - int(COMPLETION * len(ids))
    seconds: list[float] = []

    def step() -> None:
        seconds.append(_seconds(lambda: lm(tensors, [[(ids[:n], ids[n:])]]).backward()))

    give_back_freed_memory()
    peak = _peak_of(step)
    of_attention = lm.config.num_hidden_layers * attention_seconds(lm.config, ids[:-1], lm.weights.compute_dtype)
    rest = 1e3 * (seconds[0] - of_attention) / len(ids)
    return f"| {len(ids):,} | {seconds[0]:.1f} | {of_attention:.1f} | {rest:.2f} | {peak / 1e9:.2f} |"


def attention_seconds(config: Qwen2Config, ids: list[int], dtype: torch.dtype) -> float:
    """Of one block that is checkpointed: twice forwards, once back."""
    tiles, n, wide = pack([ids]).tiles(), len(ids), accumulation_dtype(dtype)
    heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    q = torch.randn(1, heads, n, group, config.head_dim, dtype=wide)
    k = torch.randn(1, heads, n, config.head_dim, dtype=wide)
    v, do = torch.randn(k.shape, dtype=dtype), torch.randn(1, n, config.q_size, dtype=dtype)
    start = time.perf_counter()
    attention(q, k, v, tiles, keep=False)
    _, probs = attention(q, k, v, tiles, keep=True)
    attention_vjp(do, q, k, v, probs, tiles)
    return time.perf_counter() - start


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_of(call: Callable[[], None]) -> int:
    """The most that this process had in memory during a call, looked at every five milliseconds."""
    most, done = [resident()], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return most[0]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
