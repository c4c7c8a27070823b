"""The Triton kernels for the norms, the activation and the gradients against autograd in float64.

Without a GPU, they run in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import relative_error
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
from qwen_functional.backends.kernels import gate, low_rank, norm  # noqa: E402
from qwen_functional.backends.kernels.outer import Job, Tiles, outer  # noqa: E402

gates: Any = gate  # Any, since mypy does not know the types that `given` makes
norms: Any = norm
G, EPS, TOLERANCE = 2, 1e-5, 2e-5
# (rows, width, rank): smaller than a tile, several tiles, a rank near the most that a program holds.
SIZES = {"small": (5, 24, 3), "several tiles": (70, 300, 5), "rank 33": (20, 40, 33)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.float().double()  # exactly what the kernels get


def given(*tensors: Any) -> Any:
    """As the kernels take them, each surrounded by NaN, to expose reads before and after a tensor."""
    return [amid_nan(tensor.detach().float().to(DEVICE)) for tensor in tensors]


def amid_nan(tensor: Tensor) -> Tensor:
    around = 64  # a multiple of the alignment of the kernels' loads
    memory = torch.full((tensor.numel() + 2 * around,), torch.nan, device=tensor.device)
    return memory[around:-around].view(tensor.shape).copy_(tensor)


def padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def in_parts(u: Tensor, n: int, seed: int = 50) -> Tensor:
    """u (G, S, r) as a sum of n partials (n, G·S, RP)."""
    parts = normal(n, *u.shape, seed=seed)
    parts[-1] = u - parts[:-1].sum(0)
    return F.pad(parts.flatten(1, 2), (0, padded(u.shape[2]) - u.shape[2])).float().to(DEVICE)


def whole(us: list[Tensor]) -> Tensor:
    """Several u (G, S, r) as (G·S, n, RP)."""
    pad = padded(max(u.shape[2] for u in us))
    return torch.stack([F.pad(u.flatten(0, 1), (0, pad - u.shape[2])) for u in us], 1).float().to(DEVICE)


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == expected.shape
    assert relative_error(ours.cpu(), expected) < tolerance


def norm_of(z: Tensor, weight: Tensor) -> Tensor:
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("readers", [0, 1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_add_norm_equals_its_formula(size: str, readers: int) -> None:
    rows, width, rank = SIZES[size]
    shapes = (rows, width), (rows, width), (rows, rank), (width, rank)
    x, y, u, B = (normal(G, *shape, seed=i) for i, shape in enumerate(shapes))
    weight, As = normal(width, seed=4), [normal(G, max(1, rank - i), width, seed=5 + i) for i in range(readers)]
    z = x + y + u @ B.mT
    h = norm_of(z, weight)
    pad = padded(rank)
    ours: Any = norms.add_norm(*given(x, y), in_parts(u, 19), *given(B, weight), EPS, given(*As), pad)
    for got, expected in zip(ours[:2], (z, h), strict=True):
        assert_close(got, expected)
    assert_close(ours[2], torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS))
    assert_close(ours[4][:, 0], F.pad(u.flatten(0, 1), (0, pad - rank)))
    if readers:
        inner = [F.pad((h @ A.mT).flatten(0, 1), (0, pad - A.shape[1])) for A in As]
        assert_close(ours[3], torch.stack(inner, 1))
    else:
        assert ours[3] is None
    alone: Any = norms.add_norm(*given(x, y), in_parts(u, 3), *given(B), None, 0.0)
    assert_close(alone[0], z)
    assert_close(alone[4][:, 0], F.pad(u.flatten(0, 1), (0, pad - rank)))
    assert alone[1] is None
    again: Any = norms.add_norm(*given(z), None, None, None, *given(weight), EPS)
    assert_close(again[0], z)
    assert_close(again[1], h)


@pytest.mark.parametrize("readers", [0, 1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_norm_vjp_equals_autograd(size: str, readers: int) -> None:
    rows, width, rank = SIZES[size]
    x = normal(G, rows, width).requires_grad_()
    weight, dh, dres, B = normal(width, seed=1), normal(G, rows, width, seed=2), normal(G, rows, width, seed=3), None
    As = [normal(G, max(1, rank - i), width, seed=5 + i) for i in range(readers)]
    ts = [normal(G, rows, A.shape[1], seed=10 + i) for i, A in enumerate(As)]
    B = normal(G, width, rank, seed=20)
    cotangent = dh + sum((t @ A for t, A in zip(ts, As, strict=True)), torch.zeros(()))
    expected = dres + torch.autograd.grad(norm_of(x, weight), x, cotangent)[0]
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    pad = padded(rank)
    t = whole([F.pad(t, (0, rank - t.shape[2])) for t in ts]) if ts else None
    for next_B in (B, None):
        next_given = None if next_B is None else given(next_B)[0]
        ours: Any = norms.norm_vjp(*given(dh), t, given(*As), *given(x, weight, rstd, dres), next_given, pad)
        dx, dy, t_next = ours
        assert_close(dx, expected)
        assert_close(dy, expected)
        if next_B is not None:
            assert_close(t_next[:, 0, :rank], (expected @ B).flatten(0, 1))


@pytest.mark.parametrize("adapted", ["gate up down", "gate", "up", "down", "up down", ""])
@pytest.mark.parametrize("size", SIZES)
def test_gate_and_its_vjp_equal_autograd(size: str, adapted: str) -> None:
    rows, width, rank = SIZES[size]
    names = adapted.split()
    gate_up, da = normal(G, rows, 2 * width), normal(G, rows, width, seed=1)
    leaves = {
        "gate": normal(G, width, rank, seed=2).requires_grad_(),
        "up": normal(G, width, max(1, rank - 1), seed=3).requires_grad_(),
        "down": normal(G, max(1, rank - 2), width, seed=4).requires_grad_(),
    }
    us = {name: normal(G, rows, leaves[name].shape[2], seed=5 + i) for i, name in enumerate(("gate", "up"))}
    t = normal(G, rows, leaves["down"].shape[1], seed=8)
    base = gate_up.requires_grad_()
    z, v = base.chunk(2, -1)
    z = z + us["gate"] @ leaves["gate"].mT if "gate" in names else z
    v = v + us["up"] @ leaves["up"].mT if "up" in names else v
    a = F.silu(z) * v
    cotangent = da + t @ leaves["down"].detach() if "down" in names else da
    value = (a * cotangent.detach()).sum()
    # For down: dA = tᵀ a, as u = a Aᵀ.
    value = value + 3 * ((a.detach() @ leaves["down"].mT) * t).sum() if "down" in names else value
    wanted = [leaves[name] for name in names]
    expected_base, *expected = torch.autograd.grad(value, [base, *wanted])

    inner = [us[name] for name in ("gate", "up") if name in names]
    u = whole([F.pad(one, (0, rank - one.shape[2])) for one in inner]) if inner else None
    places = (0, 1 if len(inner) == 2 else 0)
    pad, pad_down = padded(rank), padded(leaves["down"].shape[1])
    B_gate, B_up, A = (given(leaves[name])[0] if name in names else None for name in ("gate", "up", "down"))
    ours: Any = gates.gate(*given(gate_up), u, places, B_gate, B_up, A, pad, pad_down)
    got, partials = ours
    assert_close(got, a)
    if "down" in names:
        summed = partials.sum(0)[:, : t.shape[2]]
        assert_close(summed, (a @ leaves["down"].mT).flatten(0, 1))
    for wants in (True, False):
        places_of = [
            torch.full_like(of, float("nan")) if of is not None and wants else None for of in (B_gate, B_up, A)
        ]
        back: Any = gates.gate_vjp(
            *given(da, gate_up), u, whole([t]) if "down" in names else None, places, B_gate, B_up, A, *places_of, 3.0,
            pad, pad_down,
        )  # fmt: skip
        d_gate_up, parts = back
        assert_close(d_gate_up, expected_base)
        if wants:
            for place, gradient in zip([p for p in places_of if p is not None], expected, strict=True):
                assert_close(place, gradient)
        halves = dict(zip(("gate", "up"), expected_base.chunk(2, -1), strict=True))
        for part, name in zip(parts, [n for n in ("gate", "up") if n in names], strict=True):
            inner_of = (halves[name] @ leaves[name]).flatten(0, 1)
            assert_close(part.sum(0)[:, : inner_of.shape[1]], inner_of)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_shrink_equals_its_formula(size: str, transposed: bool) -> None:
    rows, width, rank = SIZES[size]
    x = normal(G, rows, 2 * width)
    columns = [slice(0, width), slice(width, 2 * width), slice(3, width)]
    factors = [normal(G, c.stop - c.start, max(1, rank - i), seed=1 + i) for i, c in enumerate(columns)]
    expected = [x[..., c] @ factor for c, factor in zip(columns, factors, strict=True)]
    if transposed:
        factors = [factor.mT.contiguous() for factor in factors]
    ours = low_rank.shrink(given(x)[0], given(*factors), columns, padded(rank), transposed=transposed)
    assert_close(ours, whole([F.pad(u, (0, rank - u.shape[2])) for u in expected]).cpu())


def test_total_adds_partials_up() -> None:
    us = [normal(G, 70, r, seed=r) for r in (3, 16, 1)]
    ours = low_rank.total([in_parts(u, n) for u, n in zip(us, (40, 1, 16), strict=True)], torch.float32)
    assert_close(ours, whole(us).cpu())


@pytest.mark.parametrize("width", [24, 21])
def test_outer_products_of_several_jobs_equal_those_one_by_one(width: int) -> None:
    xs = [normal(G, rows, 3 * width, seed=rows) for rows in (70, 70, 5)]
    us = [[normal(G, x.shape[1], r, seed=9 + i) for i, r in enumerate(ranks)] for x, ranks in zip(
        xs, ((3,), (16, 2, 7), (40, 1)), strict=True)]  # fmt: skip
    jobs, expected = [], []
    for x, inner in zip(xs, us, strict=True):
        held, flat = given(x)[0], whole(inner)
        for place, u in enumerate(inner):
            first = place * width
            for transposed in (False, True):
                shape = (G, u.shape[2], width) if transposed else (G, width, u.shape[2])
                out = torch.full(shape, float("nan"), dtype=torch.float32, device=DEVICE)
                jobs.append(Job(held, first, width, flat, place, out, transposed, 0.5 + place))
                product = (0.5 + place) * x[..., first : first + width].mT @ u
                expected.append(product.mT if transposed else product)
    assert len(jobs) == 12
    outer(jobs, Tiles.of(jobs))
    for job, wanted in zip(jobs, expected, strict=True):
        assert_close(job.out, wanted)
