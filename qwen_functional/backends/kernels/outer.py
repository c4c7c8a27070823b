"""Gradients of A and B that are sums over an adapter's rows, all those of a block in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, ROWS = 128, 32
MAX_JOBS = 12
FIELDS = 9


@dataclass(frozen=True)
class Job:
    """``out = scale · xᵀ u`` of each adapter.

    x (G, N, width): columns of wider rows, from ``first`` on. u (G·N, n, RP), of which ``part`` is used.
    out (G, width, r), or (G, r, width) where ``transposed``.
    """

    x: Tensor
    first: int
    width: int
    u: Tensor
    part: int
    out: Tensor
    transposed: bool
    scale: float = 1.0


@triton.jit
def _outer(  # type: ignore[no-untyped-def]
    table, scales, x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11,
    u0, u1, u2, u3, u4, u5, u6, u7, u8, u9, u10, u11,
    o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, o10, o11,
    RP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, FIELDS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    entry = table + tl.program_id(0) * FIELDS
    job = tl.load(entry)
    start, width, ld, first, ld_u, at_u, r, n_rows = (
        tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4),
        tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8),
    )  # fmt: skip
    if ALIGNED:  # the compiler knows nothing about what is read from memory
        ld, first, start = tl.multiple_of(ld, 8), tl.multiple_of(first, 8), tl.multiple_of(start, 8)
        width = tl.multiple_of(width, 8)
    scale = tl.load(scales + job)
    x, u, out = x0, u0, o0
    if job == 1:
        x, u, out = x1, u1, o1
    if job == 2:
        x, u, out = x2, u2, o2
    if job == 3:
        x, u, out = x3, u3, o3
    if job == 4:
        x, u, out = x4, u4, o4
    if job == 5:
        x, u, out = x5, u5, o5
    if job == 6:
        x, u, out = x6, u6, o6
    if job == 7:
        x, u, out = x7, u7, o7
    if job == 8:
        x, u, out = x8, u8, o8
    if job == 9:
        x, u, out = x9, u9, o9
    if job == 10:
        x, u, out = x10, u10, o10
    if job == 11:
        x, u, out = x11, u11, o11
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    transposed = r < 0
    r = tl.abs(r)
    cols = start + tl.arange(0, BC)
    rank = tl.arange(0, RP)
    total = tl.zeros((BC, RP), tl.float32)
    x += g * n_rows * ld + first + start
    u += g * n_rows * ld_u + at_u
    local, column = tl.arange(0, BM), tl.arange(0, BC)
    for top in range(0, n_rows, BM):
        seen = top + local < n_rows
        there = seen[:, None] & (cols < width)[None, :]
        part = tl.load(x + local[:, None] * ld.to(tl.int32) + column[None, :], mask=there, other=0.0)
        there = seen[:, None] & (rank < r)[None, :]
        inner = tl.load(u + local[:, None] * ld_u.to(tl.int32) + rank[None, :], mask=there, other=0.0)
        x += BM * ld
        u += BM * ld_u
        total = tl.dot(tl.trans(part), inner, total, input_precision="ieee")
    total = total * scale
    there = (cols < width)[:, None] & (rank < r)[None, :]
    base = out + g * width * r
    if transposed:
        tl.store(base + rank[None, :] * width + cols[:, None], total.to(out.dtype.element_ty), mask=there)
    else:
        tl.store(base + cols[:, None] * r + rank[None, :], total.to(out.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class Tiles:
    """Which program does what, on the device; made once for jobs of the same sizes."""

    table: Tensor
    scales: Tensor

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Tiles:
        rows, device = [], jobs[0].x.device
        for index, job in enumerate(jobs):
            r = job.out.shape[1] if job.transposed else job.out.shape[2]
            pad, n_rows = job.u.shape[2], job.x.shape[1]
            for start in range(0, job.width, COLUMNS):
                rows.append(
                    (index, start, job.width, job.x.stride(1), job.first, job.u.stride(0), job.part * pad,
                     -r if job.transposed else r, n_rows)
                )  # fmt: skip
        table = torch.tensor(rows, dtype=torch.int64)
        scales = torch.tensor([job.scale for job in jobs], dtype=torch.float32)
        return cls(table.to(device), scales.to(device))


def signature(jobs: Sequence[Job]) -> tuple:
    """What :class:`Tiles` depend on."""
    return tuple(
        (j.first, j.width, tuple(j.x.shape), j.x.stride(), tuple(j.u.shape), j.part, tuple(j.out.shape), j.transposed,
         j.scale)
        for j in jobs
    )  # fmt: skip


def outer(jobs: Sequence[Job], tiles: Tiles) -> None:
    """Do the jobs, at most ``MAX_JOBS``: ``scale · xᵀ u``, summed over each adapter's rows, always in the same order.

    All x and u have the same dtype, as do all outs; an x has consecutive columns, and rows (G·N) at a constant stride.
    """
    blank = [jobs[0]] * (MAX_JOBS - len(jobs))
    every = [*jobs, *blank]
    aligned = all((job.x.stride(1) | job.first | job.width) % 8 == 0 for job in jobs)
    pad = max(job.u.shape[2] for job in jobs)
    _outer[(tiles.table.shape[0], jobs[0].x.shape[0])](
        tiles.table, tiles.scales, *(j.x for j in every), *(j.u for j in every), *(j.out for j in every),
        RP=pad, BM=ROWS, BC=COLUMNS, FIELDS=FIELDS, ALIGNED=aligned, num_warps=4,
    )  # fmt: skip
