"""The passes over logits: a program has a whole row, reads it once for its sum and once more to overwrite it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, WARPS = 4096, 8
LOWEST = tl.constexpr(-1e30)  # below all logits, but finite: a difference of infinities would be NaN


@triton.jit
def _logits(z, cols, V, scale):  # type: ignore[no-untyped-def]
    return tl.where(cols < V, tl.load(z + cols, mask=cols < V, other=0.0).to(tl.float32) * scale, LOWEST)


@triton.jit
def _grown(most, total, x):  # type: ignore[no-untyped-def]
    """The largest number so far of each column of a tile, and ``Σ exp(x − most)``, with one tile more."""
    grown = tl.maximum(most, x)
    return grown, total * tl.exp(most - grown) + tl.exp(x - grown)


@triton.jit
def _joined(most, total):  # type: ignore[no-untyped-def]
    """The same of all columns."""
    largest = tl.max(most, axis=0)
    return largest, tl.sum(total * tl.exp(most - largest), axis=0)


@triton.jit
def _softmax(z, most_out, log_sum_out, V, scale, KEEP: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    z += row.to(tl.int64) * V
    most, total = tl.full((BC,), LOWEST, tl.float32), tl.zeros((BC,), tl.float32)
    for start in tl.range(0, V, BC):
        cols = start + tl.arange(0, BC)
        x = _logits(z, cols, V, scale)
        most, total = _grown(most, total, x)
    largest, sum_ = _joined(most, total)
    tl.store(most_out + row, largest)
    tl.store(log_sum_out + row, tl.log(sum_))
    if KEEP:
        tl.debug_barrier()  # no warp overwrites what another is still to read
        for start in tl.range(0, V, BC):
            cols = start + tl.arange(0, BC)
            x = _logits(z, cols, V, scale)
            tl.store(z + cols, tl.exp(x - largest) / sum_, mask=cols < V)


@triton.jit
def _divergence(z, t, losses, V, scale, KEEP: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    z, t = z + row.to(tl.int64) * V, t + row.to(tl.int64) * V
    most_z, total_z = tl.full((BC,), LOWEST, tl.float32), tl.zeros((BC,), tl.float32)
    most_t, total_t = tl.full((BC,), LOWEST, tl.float32), tl.zeros((BC,), tl.float32)
    for start in tl.range(0, V, BC):
        cols = start + tl.arange(0, BC)
        x = _logits(z, cols, V, scale)
        most_z, total_z = _grown(most_z, total_z, x)
        x = _logits(t, cols, V, scale)
        most_t, total_t = _grown(most_t, total_t, x)
    largest_z, sum_z = _joined(most_z, total_z)
    largest_t, sum_t = _joined(most_t, total_t)
    log_sum_z, log_sum_t = tl.log(sum_z), tl.log(sum_t)
    tl.debug_barrier()
    loss = tl.zeros((BC,), tl.float32)
    for start in tl.range(0, V, BC):
        cols = start + tl.arange(0, BC)
        log_q = _logits(z, cols, V, scale) - largest_z - log_sum_z
        log_p = _logits(t, cols, V, scale) - largest_t - log_sum_t
        p = tl.exp(log_p)
        loss += p * (log_p - log_q)
        if KEEP:
            tl.store(z + cols, tl.exp(log_q) - p, mask=cols < V)
    tl.store(losses + row, tl.sum(loss, axis=0))


def softmax_(z: Tensor, scale: float = 1.0, keep: bool = True) -> tuple[Tensor, Tensor]:
    """As :func:`qwen_functional.ops.lm_head.softmax_`, for contiguous logits of at most 32 bits, all of a row's."""
    most, log_sum = (torch.empty(len(z), dtype=torch.float32, device=z.device) for _ in range(2))
    _softmax[(len(z),)](z, most, log_sum, z.shape[1], scale, KEEP=keep, BC=_columns(z), num_warps=WARPS)
    return most, log_sum


def divergence_(z: Tensor, t: Tensor, scale: float = 1.0, keep: bool = True) -> Tensor:
    """As :func:`qwen_functional.ops.lm_head.divergence_`, likewise."""
    losses = torch.empty(len(z), dtype=torch.float32, device=z.device)
    _divergence[(len(z),)](z, t, losses, z.shape[1], scale, KEEP=keep, BC=_columns(z), num_warps=WARPS)
    return losses


def _columns(z: Tensor) -> int:
    return min(COLUMNS, max(16, triton.next_power_of_2(z.shape[1])))
