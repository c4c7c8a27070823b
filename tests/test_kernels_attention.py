"""The Triton kernels of attention against autograd in float64; without a GPU, they run in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
from qwen_functional.backends.kernels import attention as kernels  # noqa: E402
from qwen_functional.backends.kernels import rotate as rotation  # noqa: E402
from qwen_functional.backends.kernels.attention_vjp import attend_vjp  # noqa: E402

# The parent of each node, depth first; −1 starts a tree.
CHAIN = list(range(-1, 20))
BRANCHES = [-1, 0, 1, 2, 3, 4, 5, 6, 5, 8, 9, 10, 11, 4, 13, 14, 1, 16, 17, 18, 19, 20, 16, 22, 23, 24, 25, 26, 27, 28]
BRANCHES += [1, 30, 31, 32, 33, 34, 35, 36]
TREES = [-1, 0, 1, 2, 1, 4, 5, -1, -1, 8, 9, 10, 11, 12, 13, 14, 15, 16, 10, 18, 19, 20, -1, 22, 22, 24, 24, 26]
SMALL = [-1, 0, 0, 2, 2]
FORK = [*range(-1, 70), 20, *range(71, 100)]
READ_OUT = [3, 7, 8, 12, 15, 20, 21, 27]
SPREAD = [0, *range(5, 36, 2), 37]


@dataclass
class Case:
    """One call of attention and its vjp; ``rank`` is that of o_proj, 0 for no adapter there."""

    parents: list[int]
    nodes: list[int] | None = None
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    window: int | None = None
    rank: int = 3
    rank_pad: int = 16
    blocks: int | None = 16


CASES = {
    "branches": Case(BRANCHES),
    "one block": Case(SMALL, blocks=None),
    "default blocks": Case(BRANCHES, blocks=None, rank=2),
    "trees": Case(TREES, head_dim=24),
    "group 1": Case(TREES, heads=2, kv_heads=2),
    "group 3": Case(BRANCHES, heads=3, kv_heads=1, head_dim=24),
    "window": Case(BRANCHES, window=4),
    "window of a chain": Case(CHAIN, window=1, heads=2, kv_heads=1),
    "read-out": Case(TREES, nodes=READ_OUT),
    "read-out, several blocks": Case(BRANCHES, nodes=SPREAD, window=9, heads=2, kv_heads=1),
    "one query": Case(BRANCHES, nodes=[29], heads=2, kv_heads=1),
    "no adapters": Case(TREES, rank=0),
    "some adapters": Case(TREES, rank=0),
    "other adapters": Case(TREES, rank=7),
    "rank 32": Case(SMALL, rank=32, rank_pad=32),
    "sizes of a real model": Case(FORK, heads=3, kv_heads=1, head_dim=128, rank=16, blocks=None),
    "rank 64": Case(SMALL, rank=64, rank_pad=64),
}


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _interpret_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass float32 to the interpreter's tl.dot, which multiplies the bits of bfloat16 as integers."""
    if DEVICE != "cpu":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def tree(parents: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """From the parents: ``end`` and positions (S,), int32, and ancestry (S, S): whether i sees j."""
    n = len(parents)
    sees = torch.zeros(n, n, dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            sees[i] = sees[parent]
        sees[i, i] = True
    end = torch.tensor([max(i for i in range(n) if sees[i, j]) + 1 for j in range(n)], dtype=torch.int32)
    return end, sees.sum(1, dtype=torch.int32) - 1, sees


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate y (..., N, heads, D)."""
    y1, y2 = y.chunk(2, -1)
    cos, sin = cos[:, None].double(), sin[:, None].double()
    return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], -1)


def padded(x: Tensor, rank_pad: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, rank_pad - x.shape[-1]))


def check(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    assert (got.cpu().double() - expected).abs().max().item() <= tolerance * scale


def run(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    G, D, heads, kv_heads = 2, case.head_dim, case.heads, case.kv_heads
    end, positions, sees = tree(case.parents)
    S = len(case.parents)
    nodes = torch.arange(S) if case.nodes is None else torch.tensor(case.nodes)
    NQ, scale = len(nodes), D**-0.5
    if case.window is not None:
        sees = sees & (positions[:, None] - positions[None, :] < case.window)

    def rounded(*shape: int) -> Tensor:
        return random(*shape).to(dtype).double()

    angle = random(S, D // 2).float()
    cos, sin = angle.cos(), angle.sin()
    rank_o = case.rank
    A = rounded(G, rank_o, heads * D) if rank_o else None
    do, t = rounded(G, NQ, heads * D), rounded(G, NQ, rank_o)

    # The reference. Rotating by the negative angle is the vjp of rotating.
    y = [rounded(G, n, h * D).requires_grad_() for n, h in ((NQ, heads), (S, kv_heads), (S, kv_heads))]
    y_q, y_k, y_v = (part.view(G, -1, part.shape[-1] // D, D).transpose(1, 2) for part in y)
    y_k, y_v = (part.repeat_interleave(heads // kv_heads, 1) for part in (y_k, y_v))
    scores = (scale * y_q @ y_k.mT).masked_fill(~sees[nodes], float("-inf"))
    o = (scores.softmax(-1) @ y_v).transpose(1, 2).flatten(2)
    grads = list(torch.autograd.grad(o, y, do if A is None else do + t @ A))
    grads[0] = rotate(grads[0].view(G, NQ, heads, D), cos[nodes], -sin[nodes]).flatten(2)
    grads[1] = rotate(grads[1].view(G, S, kv_heads, D), cos, -sin).flatten(2)

    # The kernels, on slices of wider buffers.
    def given(x: Tensor) -> Tensor:
        return x.detach().to(DEVICE, dtype).contiguous()

    q_got, k_got, v_got = (given(part) for part in y)
    q_got = torch.cat([q_got, torch.full_like(q_got, torch.nan)], -1)[..., : heads * D]
    k_got, v_got = torch.cat([k_got, v_got], -1).split(kv_heads * D, -1)
    nodes_got, end, positions = (part.int().to(DEVICE) for part in (nodes, end, positions))
    see = (nodes_got, end, positions, case.window, scale)
    A_given = None if A is None else given(A)
    o_got, lse, partials = kernels.attend(q_got, k_got, v_got, *see, D, A_given, case.rank_pad)
    assert o_got.dtype == dtype
    check(o_got, o.detach(), tolerance)
    if A is None:
        assert partials is None
    else:
        assert partials is not None
        assert partials.shape == (heads, G * NQ, case.rank_pad)
        check(partials.sum(0).view(G, NQ, -1), padded(o.detach() @ A.mT, case.rank_pad), tolerance)

    dq_wide = torch.full((G, NQ, heads * D + 2), 7.0, dtype=dtype, device=DEVICE)
    dkv = torch.full((G, S, 2 * kv_heads * D + 2), 7.0, dtype=dtype, device=DEVICE)
    dq = dq_wide[..., :-2]
    dk, dv = dkv[..., :-2].split(kv_heads * D, -1)
    do_got = given(do)
    t_given = None if A is None else given(padded(t, case.rank_pad)).view(G * NQ, -1)
    rope_q, rope_k = ((cos[nodes].to(DEVICE), sin[nodes].to(DEVICE)), (cos.to(DEVICE), sin.to(DEVICE)))
    attend_vjp(
        do_got, t_given, A_given, q_got, k_got, v_got, o_got, lse, *see, rope_q, rope_k, dq, dk, dv, case.rank_pad
    )
    check(do_got, do if A is None else do + t @ A, tolerance)
    for got, expected in zip((dq, dk, dv), grads, strict=True):
        check(got, expected, tolerance)
    assert (dq_wide[..., -2:] == 7).all()
    assert (dkv[..., -2:] == 7).all()


@pytest.mark.parametrize("name", CASES)
def test_attention_and_its_vjp_in_float32_equal_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_Q", CASES[name].blocks)
    monkeypatch.setattr(kernels, "BLOCK_K", CASES[name].blocks)
    run(CASES[name], torch.float32, 3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["trees", "sizes of a real model"])
def test_attention_and_its_vjp_in_16_bits_equal_autograd_within_their_rounding(dtype: torch.dtype, name: str) -> None:
    run(CASES[name], dtype, 3e-2 if dtype == torch.bfloat16 else 4e-3)


def test_attention_and_its_vjp_in_unequal_blocks_equal_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_Q", 32)
    monkeypatch.setattr(kernels, "BLOCK_K", 16)
    run(CASES["branches"], torch.float32, 1e-5)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "ranks", "rank_pad", "with_bias"),
    [
        (16, torch.float32, (4, 1, 16), 16, True),
        (24, torch.float32, (0, 30, 17), 32, True),
        (16, torch.float32, (64, 0, 0), 64, False),
        (80, torch.float32, (0, 0, 0), 16, True),
        (24, torch.bfloat16, (4, 2, 3), 16, True),
    ],
)
def test_rotation_with_bias_and_adapters_equals_its_formula(
    head_dim: int,
    dtype: torch.dtype,
    ranks: tuple[int, int, int],
    rank_pad: int,
    with_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rotation, "BLOCK", 16)
    torch.manual_seed(0)
    G, N, heads, kv_heads = 2, 21, 3, 2
    width = (heads + 2 * kv_heads) * head_dim
    y, bias, u = (random(*shape).to(dtype) for shape in ((G, N, width), (width,), (G * N, 4, rank_pad)))
    for index, rank in zip((2, 0, 3), ranks, strict=True):
        u[:, index, rank:] = 0
    angle = random(N, head_dim // 2).float()
    cos, sin = angle.cos(), angle.sin()
    B = [random(G, h * head_dim, r).to(dtype) if r else None for h, r in zip((heads, 2, 2), ranks, strict=True)]

    expected = y.double() + (bias.double() if with_bias else 0)
    parts: list[rotation.Part] = []
    for first, n, index, b in zip((0, 3, 5), (3, 2, 2), (2, 0, 3), B, strict=True):
        parts.append((first, n, None if b is None else b.to(DEVICE), index))
        if b is not None:
            inner = u.view(G, N, 4, rank_pad)[:, :, index, : b.shape[-1]].double()
            expected[..., first * head_dim : (first + n) * head_dim] += inner @ b.double().mT
    heads_of = expected.view(G, N, -1, head_dim)
    heads_of[:, :, :5] = rotate(heads_of[:, :, :5], cos, sin)

    wide = torch.full((G, N + 1, width + 3), 7.0, dtype=dtype, device=DEVICE)
    view = wide[:, :N, :width]
    view.copy_(y)
    rotation.rotate_(
        view, bias.to(DEVICE) if with_bias else None, cos.to(DEVICE), sin.to(DEVICE), 5, parts,
        u.to(DEVICE) if any(ranks) else None,
    )  # fmt: skip
    check(view, expected, 1e-5 if dtype == torch.float32 else 1e-2)
    assert (wide[:, N] == 7).all()
    assert (wide[..., width:] == 7).all()


@pytest.mark.parametrize(("size", "finite"), [(1e16, True), (1e25, False)])
def test_scores_far_below_zero_weigh_as_they_do_and_infinite_ones_are_nan(size: float, finite: bool) -> None:
    """A token that sees only itself has weight one, however low its score."""
    q = torch.full((1, 2, 16), size, device=DEVICE)
    v = torch.arange(32.0, device=DEVICE).view(1, 2, 16)
    ends, positions = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32)  # two trees
    nodes, ends, positions = torch.arange(2, dtype=torch.int32).to(DEVICE), ends.to(DEVICE), positions.to(DEVICE)
    o, lse, _ = kernels.attend(q, -q, v, nodes, ends, positions, None, 0.25, 16)
    assert torch.equal(o, v) if finite else o.isnan().all()
    assert lse.isfinite().all() == finite


@pytest.mark.parametrize("head_dim", [8, 24])
def test_norms_of_heads_and_their_vjp_equal_autograd_also_where_squares_overflow(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "BLOCK", 16)
    torch.manual_seed(0)
    G, N, heads, kv_heads, eps = 2, 21, 3, 2, 1e-3
    y = random(G, N, heads + 2 * kv_heads, head_dim)
    y[1, 3] *= 1e25
    y = y.float().double().requires_grad_()
    norms, angle = random(2, head_dim).float(), random(N, head_dim // 2).float()
    weight = norms.double()[[0] * heads + [1] * kv_heads]
    rotated = y[:, :, : heads + kv_heads]
    normed = rotated * torch.rsqrt(rotated.square().mean(-1, keepdim=True) + eps) * weight
    expected = torch.cat([rotate(normed, angle.cos(), angle.sin()), y[:, :, heads + kv_heads :]], 2)
    ours = y.detach().flatten(2).float().to(DEVICE)
    cos, sin, on_device = angle.cos().to(DEVICE), angle.sin().to(DEVICE), norms.to(DEVICE)
    read = rotation.rotate_(ours, None, cos, sin, heads + kv_heads, norms=on_device, n_queries=heads, eps=eps)
    assert read is not None
    values = heads + kv_heads
    check(ours[..., : values * head_dim], expected.flatten(2)[..., : values * head_dim].detach(), 1e-5)
    dy = random(*normed.shape)
    (wanted,) = torch.autograd.grad(normed, y, dy)
    back = torch.cat([dy, random(G, N, kv_heads, head_dim)], 2).flatten(2).float().to(DEVICE)
    others = back[..., values * head_dim :].clone()
    rotation.norm_heads_vjp_(back, read, on_device, heads, eps)
    check(back[..., : values * head_dim], wanted.flatten(2)[..., : values * head_dim], 1e-5)
    assert torch.equal(back[..., values * head_dim :], others)
    assert back[1, 3].any()
