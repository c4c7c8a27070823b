"""The gated activation with the adapters of gate, up and down, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1056  # eight for each multiprocessor of an H100


@triton.jit
def _low_rank(u, row, seen, stride, offset, B, g, width, I, cols, RP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile (BM, RP) of u, and one (BN, RP) of B (G, I, r)."""
    rank = tl.arange(0, RP)
    own = tl.load(u + row[:, None] * stride + offset + rank[None, :], mask=seen[:, None], other=0.0)
    base = B + g.to(tl.int64) * I * width
    where = cols[:, None] * width + rank[None, :]
    b = tl.load(base + where, mask=(cols < I)[:, None] & (rank < width)[None, :], other=0.0)
    return own, b


@triton.jit
def _gate(  # type: ignore[no-untyped-def]
    gate_up, u, B_gate, B_up, A_down, a_out, partials,
    S, I, r_gate, r_up, r_down, stride_u, at_gate, at_up, tiles_each,
    HAS_GATE: tl.constexpr, HAS_UP: tl.constexpr, HAS_DOWN: tl.constexpr,
    RP: tl.constexpr, RPD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, g = tl.program_id(0), tl.program_id(2)
    local = tl.arange(0, BM)
    seen = tl.program_id(1) * BM + local < S
    row = (g * S + tl.program_id(1) * BM).to(tl.int64)
    dtype = gate_up.dtype.element_ty
    rank = tl.arange(0, RPD)
    gate_up, a_out, u = gate_up + row * (2 * I), a_out + row * I, u + row * stride_u
    A_down += g.to(tl.int64) * r_down * I
    inner = tl.zeros((BM, RPD), tl.float32)
    last = tl.minimum((split + 1) * tiles_each * BN, I)
    for start in tl.range(split * tiles_each * BN, last, BN, num_stages=STAGES):
        cols = start + tl.arange(0, BN)
        there = seen[:, None] & (cols < I)[None, :]
        where = local[:, None] * (2 * I) + cols[None, :]
        z = tl.load(gate_up + where, mask=there, other=0.0).to(tl.float32)
        v = tl.load(gate_up + where + I, mask=there, other=0.0).to(tl.float32)
        if HAS_GATE:
            own, b = _low_rank(u, local, seen, stride_u, at_gate, B_gate, g, r_gate, I, cols, RP)
            z = tl.dot(own, tl.trans(b), z, input_precision="ieee")
        if HAS_UP:
            own, b = _low_rank(u, local, seen, stride_u, at_up, B_up, g, r_up, I, cols, RP)
            v = tl.dot(own, tl.trans(b), v, input_precision="ieee")
        a = (z * tl.sigmoid(z) * v).to(dtype)
        tl.store(a_out + local[:, None] * I + cols[None, :], a, mask=there)
        if HAS_DOWN:
            down = rank[None, :] * I + cols[:, None]
            A = tl.load(A_down + down, mask=(rank < r_down)[None, :] & (cols < I)[:, None], other=0.0)
            inner = tl.dot(a, A, inner, input_precision="ieee")
    if HAS_DOWN:
        partials += (split.to(tl.int64) * tl.num_programs(2) * S + row) * RPD
        tl.store(partials + local[:, None] * RPD + rank[None, :], inner, mask=seen[:, None])


def gate(
    gate_up: Tensor,
    u: Tensor | None,
    places: tuple[int, int],
    B_gate: Tensor | None,
    B_up: Tensor | None,
    A_down: Tensor | None,
    rank_pad: int = 16,
    down_pad: int = 16,
) -> tuple[Tensor, Tensor | None]:
    """``a = silu(z) · v`` for ``z | v = gate_up + u Bᵀ``, and partials of ``a Aᵀ``.

    Args:
        gate_up: (G, S, 2·I), the base product alone.
        u: (G·S, n, RP); ``places``: which of the n are gate's and up's.
        B_gate, B_up: (G, I, r), A_down: (G, r, I); None where that projection has no adapter.

    Returns:
        a (G, S, I), and float32 partials (n_sums, G·S, RP) or None.
    """
    n, rows, width = gate_up.shape[0], gate_up.shape[1], gate_up.shape[2] // 2
    a = gate_up.new_empty(n, rows, width)
    launch = _launch(max(rank_pad, down_pad), gate_up.dtype)
    tiles, blocks = triton.cdiv(width, launch["BN"]), triton.cdiv(rows, launch["BM"])
    splits = max(1, min(tiles, triton.cdiv(PROGRAMS, blocks * n)))
    each = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, each)
    partials = None
    if A_down is not None:
        partials = torch.empty(splits, n * rows, down_pad, dtype=torch.float32, device=a.device)
    _gate[(splits, blocks, n)](
        gate_up, a if u is None else u, *(a if t is None else t for t in (B_gate, B_up, A_down)), a,
        a if partials is None else partials,
        rows, width, *_ranks(B_gate, B_up, A_down), 0 if u is None else u.stride(0),
        places[0] * rank_pad, places[1] * rank_pad, each,
        HAS_GATE=B_gate is not None, HAS_UP=B_up is not None, HAS_DOWN=A_down is not None,
        RP=rank_pad, RPD=down_pad, **launch,
    )  # fmt: skip
    return a, partials


@triton.jit
def _store_rank(  # type: ignore[no-untyped-def]
    out, value, g, width, I, cols, scale, TRANSPOSED: tl.constexpr, RP: tl.constexpr
):
    """Store a gradient (BN, RP) in its place in dB (G, I, r), or in dA (G, r, I) where transposed."""
    rank = tl.arange(0, RP)
    base = out + g.to(tl.int64) * I * width
    where = rank[None, :] * I + cols[:, None] if TRANSPOSED else cols[:, None] * width + rank[None, :]
    tl.store(base + where, (value * scale).to(out.dtype.element_ty), mask=(cols < I)[:, None] & (rank < width)[None, :])


@triton.jit
def _gate_vjp(  # type: ignore[no-untyped-def]
    da_in, gate_up, u, t_down, B_gate, B_up, A_down, parts_gate, parts_up, dB_gate, dB_up, dA_down,
    S, I, r_gate, r_up, r_down, stride_u, at_gate, at_up, scaling_down,
    HAS_GATE: tl.constexpr, HAS_UP: tl.constexpr, HAS_DOWN: tl.constexpr,
    WANT_GATE: tl.constexpr, WANT_UP: tl.constexpr, WANT_DOWN: tl.constexpr,
    RP: tl.constexpr, RPD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, g = tl.program_id(0), tl.program_id(1)
    column, local = tl.arange(0, BN), tl.arange(0, BM)
    cols = tile * BN + column
    row = g.to(tl.int64) * S
    dtype = gate_up.dtype.element_ty
    rank, rank_d = tl.arange(0, RP), tl.arange(0, RPD)
    inside = cols < I
    if HAS_GATE:
        b_gate = tl.load(
            B_gate + g.to(tl.int64) * I * r_gate + cols[:, None] * r_gate + rank[None, :],
            mask=inside[:, None] & (rank < r_gate)[None, :], other=0.0,
        )  # fmt: skip
    if HAS_UP:
        b_up = tl.load(
            B_up + g.to(tl.int64) * I * r_up + cols[:, None] * r_up + rank[None, :],
            mask=inside[:, None] & (rank < r_up)[None, :], other=0.0,
        )  # fmt: skip
    if HAS_DOWN:
        A = tl.load(
            A_down + g.to(tl.int64) * I * r_down + rank_d[:, None] * I + cols[None, :],
            mask=inside[None, :] & (rank_d < r_down)[:, None], other=0.0,
        )  # fmt: skip
    sum_gate = tl.zeros((BN, RP), tl.float32)
    sum_up = tl.zeros((BN, RP), tl.float32)
    sum_down = tl.zeros((BN, RPD), tl.float32)
    narrow, wide = local[:, None] * I + cols[None, :], local[:, None] * (2 * I) + cols[None, :]
    da_in += row * I
    gate_up += row * (2 * I)
    u += row * stride_u
    t_down += row * RPD
    part = (tile.to(tl.int64) * tl.num_programs(1) * S + row) * RP
    parts_gate += part
    parts_up += part
    for start in tl.range(0, S, BM, num_stages=STAGES):
        seen = start + local < S
        there = seen[:, None] & inside[None, :]
        da = tl.load(da_in + narrow, mask=there, other=0.0).to(tl.float32)
        z = tl.load(gate_up + wide, mask=there, other=0.0).to(tl.float32)
        v = tl.load(gate_up + I + wide, mask=there, other=0.0).to(tl.float32)
        if HAS_DOWN:
            t = tl.load(t_down + local[:, None] * RPD + rank_d[None, :], mask=seen[:, None], other=0.0)
            da = tl.dot(t, A, da, input_precision="ieee")
        if HAS_GATE:
            at = u + at_gate + local[:, None] * stride_u + rank[None, :]
            u_gate = tl.load(at, mask=seen[:, None], other=0.0)
            z = tl.dot(u_gate, tl.trans(b_gate), z, input_precision="ieee")
        if HAS_UP:
            at = u + at_up + local[:, None] * stride_u + rank[None, :]
            u_up = tl.load(at, mask=seen[:, None], other=0.0)
            v = tl.dot(u_up, tl.trans(b_up), v, input_precision="ieee")
        s = tl.sigmoid(z)
        silu = z * s
        if WANT_DOWN:
            sum_down = tl.dot(tl.trans((silu * v).to(dtype)), t, sum_down, input_precision="ieee")
        d_up = (da * silu).to(dtype)
        tl.store(gate_up + I + wide, d_up, mask=there)
        if HAS_UP:
            inner = tl.dot(d_up, b_up, input_precision="ieee")
            tl.store(parts_up + local[:, None] * RP + rank[None, :], inner.to(dtype), mask=seen[:, None])
            if WANT_UP:
                sum_up = tl.dot(tl.trans(d_up), u_up, sum_up, input_precision="ieee")
        d_gate = (da * v * (s + silu * (1 - s))).to(dtype)
        tl.store(gate_up + wide, d_gate, mask=there)
        if HAS_GATE:
            inner = tl.dot(d_gate, b_gate, input_precision="ieee")
            tl.store(parts_gate + local[:, None] * RP + rank[None, :], inner.to(dtype), mask=seen[:, None])
            if WANT_GATE:
                sum_gate = tl.dot(tl.trans(d_gate), u_gate, sum_gate, input_precision="ieee")
        da_in += BM * I
        gate_up += 2 * BM * I
        u += BM * stride_u
        t_down += BM * RPD
        parts_gate += BM * RP
        parts_up += BM * RP
    if WANT_GATE:
        _store_rank(dB_gate, sum_gate, g, r_gate, I, cols, 1.0, False, RP)
    if WANT_UP:
        _store_rank(dB_up, sum_up, g, r_up, I, cols, 1.0, False, RP)
    if WANT_DOWN:
        _store_rank(dA_down, sum_down, g, r_down, I, cols, scaling_down, True, RPD)


def gate_vjp(
    da: Tensor,
    gate_up: Tensor,
    u: Tensor | None,
    t_down: Tensor | None,
    places: tuple[int, int],
    B_gate: Tensor | None,
    B_up: Tensor | None,
    A_down: Tensor | None,
    dB_gate: Tensor | None,
    dB_up: Tensor | None,
    dA_down: Tensor | None,
    scaling_down: float,
    rank_pad: int = 16,
    down_pad: int = 16,
) -> tuple[Tensor, list[Tensor]]:
    """``d_gate = da' · v · σ(z)(1 + z (1 − σ(z)))``, ``d_up = da' · silu(z)`` for ``da' = da + t A``; z, v as in gate.

    They overwrite gate_up: a program writes only what it alone has read. Also ``dB = dyᵀ u`` of gate and up and
    ``dA = scaling · tᵀ a`` of down, written to the given tensors where they are wanted, and partials of ``t = dy B`` of
    gate and up.

    Args:
        da: (G, S, I), the base product alone; t_down (G·S, 1, RP) its t. The rest as for :func:`gate`.

    Returns:
        d_gate | d_up (G, S, 2·I), in the memory of gate_up, and partials (n_sums, G·S, RP) of those of gate and up that
        have adapters, in the compute dtype: they are many, so that rounding errors average out.
    """
    n, rows, width = da.shape
    launch = _launch(max(rank_pad, down_pad), da.dtype)
    tiles = triton.cdiv(width, launch["BN"])
    parts = {
        name: torch.empty(tiles, n * rows, rank_pad, dtype=da.dtype, device=da.device)
        for name, B in (("gate", B_gate), ("up", B_up))
        if B is not None
    }
    _gate_vjp[(tiles, n)](
        da, gate_up, *(da if t is None else t for t in (u, t_down, B_gate, B_up, A_down)),
        parts.get("gate", da), parts.get("up", da), *(da if t is None else t for t in (dB_gate, dB_up, dA_down)),
        rows, width, *_ranks(B_gate, B_up, A_down), 0 if u is None else u.stride(0),
        places[0] * rank_pad, places[1] * rank_pad, scaling_down,
        HAS_GATE=B_gate is not None, HAS_UP=B_up is not None, HAS_DOWN=A_down is not None,
        WANT_GATE=dB_gate is not None, WANT_UP=dB_up is not None, WANT_DOWN=dA_down is not None,
        RP=rank_pad, RPD=down_pad, **launch,
    )  # fmt: skip
    return gate_up, list(parts.values())


def _launch(rank_pad: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and columns of a tile, stages and warps: what spills the least registers and fits into shared memory."""
    if dtype.itemsize == 4:
        rows, columns, stages, warps = 32, 32, 2, 8
    else:
        rows, columns, stages, warps = {16: (64, 64, 3, 4), 32: (64, 32, 3, 4)}.get(rank_pad, (32, 32, 2, 4))
    return {"BM": rows, "BN": columns, "STAGES": stages, "num_warps": warps}


def _ranks(B_gate: Tensor | None, B_up: Tensor | None, A_down: Tensor | None) -> tuple[int, int, int]:
    return (
        0 if B_gate is None else B_gate.shape[2],
        0 if B_up is None else B_up.shape[2],
        0 if A_down is None else A_down.shape[1],
    )
