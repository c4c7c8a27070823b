"""Every operation and its vjp against the function of transformers or torch, differentiated by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import RMSNormInItsDtype, hf_config, relative_error, tiny_config
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from qwen_functional import pack
from qwen_functional.backends import onednn
from qwen_functional.backends.onednn import PackedWeight, can_pack, packing_pays
from qwen_functional.ops.attention import MAX_KEPT_KEYS, attention, attention_vjp, kept_keys
from qwen_functional.ops.linear import (
    Part,
    linear,
    linear_inner,
    linear_vjp_A,
    linear_vjp_B,
    linear_vjp_inner,
    linear_vjp_input,
)
from qwen_functional.ops.rmsnorm import rmsnorm, rmsnorm_to, rmsnorm_vjp
from qwen_functional.ops.rope import rope, rope_frequencies, rope_into, rope_tables, rope_vjp
from qwen_functional.ops.sums import index_sum_
from qwen_functional.ops.swiglu import swiglu, swiglu_, swiglu_partials_, swiglu_vjp_
from qwen_functional.packing import PackedTokens

EXACT = 1e-13


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autograd(value: Tensor, cotangent: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs, cotangent))


# rmsnorm


def test_rmsnorm_and_its_vjp_equal_transformers() -> None:
    x, dy = normal(2, 5, 24).mul(3).requires_grad_(), normal(2, 5, 24, seed=1)
    norm = RMSNormInItsDtype(24, eps=0.1).double()
    norm.weight.data = normal(24, seed=2)
    expected = norm(x)
    y, rstd = rmsnorm(x.detach(), norm.weight.detach(), 0.1)
    assert relative_error(y, expected) < EXACT
    y, rstd = rmsnorm_to(x.detach(), norm.weight.detach(), 0.1, x.dtype)
    assert relative_error(y, expected) < EXACT
    dx = rmsnorm_vjp(dy, x.detach(), norm.weight.detach(), rstd)
    assert relative_error(dx, autograd(expected, dy, x)[0]) < EXACT


def test_rmsnorm_equals_transformers_in_float32_with_half_weights() -> None:
    x, norm = normal(5, 24).float(), Qwen2RMSNorm(24)
    norm.weight.data = normal(24, seed=2).bfloat16().float()
    assert relative_error(rmsnorm(x, norm.weight.data.bfloat16(), 1e-6)[0], norm(x)) < 1e-6


# rope

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default, another base": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn": YARN,
    "yarn of Qwen2.5": {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
    "yarn, attention factor": {**YARN, "attention_factor": 0.7},
    "yarn, attention factor 0": {**YARN, "attention_factor": 0.0},
    "yarn, betas": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, mscale alone": {**YARN, "mscale": 0.7},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, ramp of no width": {**YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
    "yarn, factor 1": {**YARN, "factor": 1.0},
    "yarn, ramp beyond the last dimension": {
        **YARN, "rope_theta": 5.0, "original_max_position_embeddings": 32768, "beta_fast": 200.0
    },
    "yarn, ramp before the first dimension": {**YARN, "beta_fast": 400.0},
}


@pytest.mark.parametrize("rope_parameters", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("head_dim", [2, 8, 128])
def test_rope_frequencies_equal_transformers(rope_parameters: dict[str, Any], head_dim: int) -> None:
    config = tiny_config(rope_parameters=rope_parameters, head_dim=head_dim)
    theirs = Qwen2RotaryEmbedding(hf_config(config))
    frequencies, factor = rope_frequencies(config)
    assert relative_error(frequencies, theirs.inv_freq) < 1e-7
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("rope_parameters", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rope_tables_equal_transformers(rope_parameters: dict[str, Any], dtype: torch.dtype) -> None:
    config = tiny_config(rope_parameters=rope_parameters, head_dim=8, max_position_embeddings=32768)
    positions = torch.tensor([[0, 1, 2, 3, 31, 32], [7, 500, 32767, 5, 5, 0]])
    cos, sin = Qwen2RotaryEmbedding(hf_config(config))(torch.empty(0, dtype=dtype), positions)
    ours = rope_tables(config, positions, dtype, torch.device("cpu"))
    for table, expected in zip(ours, (cos, sin), strict=True):
        assert table.dtype == dtype
        assert relative_error(torch.cat((table, table), -1), expected) < 1e-7


def test_rope_and_its_vjp_equal_transformers() -> None:
    config = tiny_config(head_dim=8)
    positions = torch.arange(5)
    q, dq = normal(2, 4, 5, 8).requires_grad_(), normal(2, 4, 5, 8, seed=1)
    cos, sin = Qwen2RotaryEmbedding(hf_config(config))(q, positions[None])
    expected = apply_rotary_pos_emb(q, q, cos, sin)[0]
    tables = rope_tables(config, positions, torch.float64, torch.device("cpu"))
    assert relative_error(rope(q.detach(), *tables), expected) < EXACT
    # Write into a strided part of a larger buffer, as a block does.
    buffer = torch.zeros(2, 5, 4 * 8 + 3, dtype=torch.float64)
    out = buffer[..., :32].unflatten(-1, (4, 8)).transpose(1, 2)
    assert relative_error(rope_into(q.detach(), *tables, out=out), expected) < EXACT
    rope_vjp(dq, *tables, out=out)
    assert relative_error(out, autograd(expected, dq, q)[0]) < EXACT
    assert not buffer[..., 32:].any(), "rope wrote outside its output"


# swiglu


def test_swiglu_and_its_vjp_equal_transformers_activation() -> None:
    gate, up = (normal(2, 5, 7, seed=seed).mul(4).requires_grad_() for seed in (0, 2))
    dy = normal(2, 5, 7, seed=1)
    expected = ACT2FN["silu"](gate) * up
    assert relative_error(swiglu(gate.detach(), up.detach()), expected) < EXACT
    gate_value, up_value = gate.detach(), up.detach()
    assert relative_error(swiglu_(gate_value.clone(), up_value), expected) < EXACT
    product, *partials = swiglu_partials_(gate_value.clone(), up_value.clone())
    assert relative_error(product, expected) < EXACT
    found = swiglu_vjp_(dy, *partials)
    for one, other in zip(found, autograd(expected, dy, gate, up), strict=True):
        assert relative_error(one, other) < EXACT


# linear


def stacked(Bs: list[torch.Tensor]) -> list[Part]:
    """Parts that are stacked along outputs and ranks."""
    parts, out, rank = [], 0, 0
    for B in Bs:
        parts.append(Part(B, slice(out, out + B.shape[1]), slice(rank, rank + B.shape[2])))
        out, rank = out + B.shape[1], rank + B.shape[2]
    return parts


@pytest.mark.parametrize("shared_input", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("parts", [((7, 4),), ((4, 1), (2, 2), (1, 1))], ids=["alone", "stacked"])
def test_a_projection_and_its_vjp_equal_merged_weights(
    shared_input: bool, with_bias: bool, parts: tuple[tuple[int, int], ...]
) -> None:
    n_adapters, n_tokens, n_in, out, rank = 3, 5, 6, 7, 4
    x = normal(1 if shared_input else n_adapters, n_tokens, n_in).requires_grad_()
    weight, bias = normal(out, n_in, seed=1), normal(out, seed=2) if with_bias else None
    A = normal(n_adapters, rank, n_in, seed=3).requires_grad_()
    Bs = [normal(n_adapters, rows, r, seed=10 + i).requires_grad_() for i, (rows, r) in enumerate(parts)]
    dy = normal(n_adapters, n_tokens, out, seed=6)
    B = torch.stack([torch.block_diag(*(B[g] for B in Bs)) for g in range(n_adapters)])
    merged = weight + B @ A  # (G, out, in)
    inputs = x.expand(n_adapters, -1, -1)
    expected = torch.stack([F.linear(inputs[g], merged[g], bias) for g in range(n_adapters)])
    expected_dx, expected_dA, *expected_dBs = autograd(expected, dy, x, A, *Bs)

    low_ranks, kept_dy = stacked([B.detach() for B in Bs]), dy.clone()
    u = linear_inner(x.detach(), A.detach())
    assert relative_error(linear(x.detach(), weight, bias, u, low_ranks), expected) < EXACT
    t = torch.empty_like(u)
    for part in low_ranks:
        linear_vjp_inner(dy[..., part.outputs], part.B, out=t[..., part.ranks])
    dx = linear_vjp_input(dy, weight).baddbmm_(t, A.detach())
    assert relative_error(dx.sum(0, keepdim=True) if shared_input else dx, expected_dx) < EXACT
    assert relative_error(linear_vjp_A(t, x.detach()), expected_dA) < EXACT
    for part, expected_dB in zip(low_ranks, expected_dBs, strict=True):
        dB = linear_vjp_B(dy[..., part.outputs], u[..., part.ranks])
        assert relative_error(dB, expected_dB) < EXACT
    assert torch.equal(dy, kept_dy), "the vjp wrote over its cotangent"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_multiplies_as_the_weight_does(dtype: torch.dtype) -> None:
    if not can_pack(dtype, torch.device("cpu")):
        pytest.skip(f"oneDNN does not pack {dtype} on this processor")
    weight, bias, x, dy = (normal(*shape).to(dtype) for shape in ((48, 80), (48,), (2, 5, 80), (2, 5, 48)))
    low_rank = linear_inner(x, normal(2, 3, 80).to(dtype)), stacked([normal(2, 48, 3).to(dtype)])
    packed = PackedWeight(weight)
    eps = torch.finfo(dtype).eps
    assert relative_error(linear(x, packed, bias, *low_rank), linear(x, weight, bias, *low_rank)) < eps
    assert relative_error(linear(x, packed), linear(x, weight)) < eps
    dx = linear_vjp_input(dy, packed)
    assert dx.shape == x.shape
    assert relative_error(dx, linear_vjp_input(dy, weight)) < eps
    total = linear_vjp_input(dy, packed, x.clone())
    assert relative_error(total, linear_vjp_input(dy, weight, x.clone())) < 2 * eps


@pytest.mark.parametrize("name", ["Intel Xeon", "AMD EPYC"])
def test_weights_are_not_packed_where_the_processor_is_as_fast_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"cpu_name": name}, raising=False)
    cpu = torch.device("cpu")
    assert packing_pays(torch.float32, cpu) == (can_pack(torch.float32, cpu) and name == "AMD EPYC")
    assert packing_pays(torch.bfloat16, cpu) == can_pack(torch.bfloat16, cpu)


@pytest.mark.parametrize("threshold", [0, 1 << 40], ids=["one by one", "all at once"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 6, 7), (31, 64, 3), (155, 16, 40)], ids=str)
def test_adapters_products_in_float32_equal_those_in_float64(
    shape: tuple[int, int, int], threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For contiguous and transposed matrices, slices of wider ones, and ones that all adapters share."""
    if not can_pack(torch.float32, torch.device("cpu")):
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(onednn, "ONE_BY_ONE", threshold)
    monkeypatch.setattr(onednn, "_packing_pays_in_float32", lambda: True)  # as on a processor where packing pays
    n, k, m = shape
    lefts = normal(3, n, k), normal(3, k, n).mT, normal(3, n, k + 3)[..., 1 : k + 1], normal(1, n, k).expand(3, n, k)
    rights = normal(3, k, m), normal(3, m, k).mT, normal(3, k, m + 3)[..., 1 : m + 1]
    for left in lefts:
        for right in rights:
            narrow = left.float(), right.float()
            assert relative_error(onednn.product(*narrow), left @ right) < 1e-5
            out = torch.zeros(3, n, m + 4)
            onednn.product(*narrow, out=out[..., 2 : m + 2])
            assert relative_error(out[..., 2 : m + 2], left @ right) < 1e-5
            assert not out[..., [0, 1, -2, -1]].any(), "wrote beside its place"


@pytest.mark.parametrize("pays", [True, False], ids=["AMD", "Intel"])
def test_adapters_are_multiplied_one_by_one_where_that_pays(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, for large matrices, when the right one need not be copied."""
    calls: list[Tensor] = []
    multiply = onednn._multiply
    monkeypatch.setattr(onednn, "ONE_BY_ONE", 7 * (5 + 6))
    monkeypatch.setattr(onednn, "_packing_pays_in_float32", lambda: pays)

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(x)
        return multiply(x, weight)

    monkeypatch.setattr(onednn, "_multiply", counted)

    def one_by_one(left: Tensor, right: Tensor) -> bool:
        calls.clear()
        onednn.product(left, right)
        assert len(calls) in (0, left.shape[0])
        return bool(calls)

    left, right = normal(3, 5, 7).float(), normal(3, 7, 6).float()
    assert one_by_one(left, right) is pays
    assert one_by_one(left, right.mT.contiguous().mT) is pays
    assert one_by_one(left.mT.contiguous().mT, right) is pays
    assert not one_by_one(left[:, 1:], right)  # fewer numbers
    assert not one_by_one(left, right[..., 1:])
    assert not one_by_one(left[..., 1:], right[:, 1:])
    assert not one_by_one(normal(3, 5, 7).float(), normal(3, 7, 9).float()[..., 1:7])  # a slice of a wider matrix
    assert not one_by_one(normal(3, 5, 7), normal(3, 7, 6))


def test_a_bare_projection_equals_torch() -> None:
    x, weight, bias = normal(2, 5, 6), normal(7, 6, seed=1), normal(7, seed=2)
    y = linear(x, weight, bias)
    assert relative_error(y, F.linear(x, weight, bias)) < EXACT
    assert relative_error(linear_vjp_input(y, weight), y @ weight) < EXACT
    assert relative_error(linear_vjp_input(y, weight, x.clone()), x + y @ weight) < EXACT


def test_some_adapters_of_a_stack_are_those_of_the_slice() -> None:
    part, u = stacked([normal(3, 7, 2, seed=1)])[0], normal(3, 5, 2)
    x, weight = normal(3, 5, 6, seed=3), normal(7, 6, seed=4)
    y = linear(x, weight, None, u, [part])
    assert relative_error(linear(x[1:], weight, None, u[1:], [part[slice(1, None)]]), y[1:]) < EXACT


# attention

SEQUENCES: dict[str, list[list[int]]] = {
    "one": [[1, 2, 3, 4, 5, 6, 7]],
    "one token": [[1]],
    "apart": [[1, 2, 3], [4, 5], [6]],
    "a tree": [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3], [1, 6, 7, 8, 9], [2, 2]],
    "longer than a tile": [[i % 7 for i in range(20)], [i % 5 for i in range(15)], [0, 1, 2, 9, 9]],
}


def may_see(tokens: PackedTokens, window: int | None) -> Tensor:
    """(S, S) bool, from the paths to the root: what the tiles should cover."""
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for node in range(len(tokens)):
        ancestor, distance = node, 0
        while ancestor >= 0 and (window is None or distance < window):
            seen[node, ancestor] = True
            ancestor, distance = tokens.parents[ancestor], distance + 1
    return seen


def torch_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """torch's attention on q (G, heads, S, head_dim) and k, v (G, K, S', head_dim), with the heads concatenated."""
    group = q.shape[1] // k.shape[1]
    o = F.scaled_dot_product_attention(q, repeat_kv(k, group), repeat_kv(v, group), seen, scale=1.0)
    return o.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (1, 7), (2, 2)])
@pytest.mark.parametrize("tile_size", [3, 16, None], ids=["3", "16", "read-out"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
def test_attention_and_its_vjp_equal_torch(
    sequences: list[list[int]], window: int | None, kv_heads: int, group: int, tile_size: int | None, kept: bool
) -> None:
    tokens = pack(sequences)
    seen = may_see(tokens, window)
    n_adapters, n_tokens, head_dim = 2, len(tokens), 4
    q = normal(n_adapters, kv_heads * group, n_tokens, head_dim)
    k, v = (normal(n_adapters, kv_heads, n_tokens, head_dim, seed=seed) for seed in (1, 2))
    if tile_size is None:  # only some queries, as in the last block
        nodes = sorted(set(tokens.last))
        tiles, q, seen = [*tokens.readout_tiles(torch.tensor(nodes), window, 8)], q[:, :, nodes], seen[nodes]
    else:
        tiles = tokens.tiles(window, tile_size)
    do = normal(n_adapters, q.shape[2], kv_heads * group * head_dim, seed=3)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    expected = torch_attention(q, k, v, seen)

    grouped = q.detach().unflatten(1, (kv_heads, group)).transpose(2, 3)  # (G, K, S, group, head_dim)
    values = grouped, k.detach(), v.detach()
    o, probs = attention(*values, tiles, keep=kept)
    assert relative_error(o, expected) < EXACT
    assert all((p is not None) == kept for p in probs)
    dq, dk, dv = attention_vjp(do, *values, probs, tiles)
    ours = (dq.transpose(2, 3).flatten(1, 2), dk, dv)
    for gradient, wanted in zip(ours, autograd(expected, do, q, k, v), strict=True):
        # Where each query sees only one key, the gradients of q and k are zero.
        assert (gradient - wanted).norm() < EXACT * max(1.0, wanted.norm().item())


def test_the_probabilities_of_too_many_keys_are_not_kept() -> None:
    tiles = pack([list(range(MAX_KEPT_KEYS + 40))]).tiles()
    q, k = normal(1, 1, MAX_KEPT_KEYS + 40, 1, 4), normal(1, 1, MAX_KEPT_KEYS + 40, 4, seed=1)
    _, probs = attention(q, k, k, tiles, keep=True)
    assert [p is not None for p in probs] == [True] * (len(tiles) - 1) + [False]
    assert sum(p.numel() for p in probs if p is not None) == kept_keys(tiles, MAX_KEPT_KEYS + 40)


def test_a_tile_holds_just_the_keys_that_its_queries_see() -> None:
    tokens = pack(SEQUENCES["longer than a tile"])
    for window in (None, 3):
        seen = may_see(tokens, window)
        for tile in tokens.tiles(window, size=8):
            wanted = seen[tile.queries].any(0).nonzero().flatten()
            assert torch.equal(torch.arange(len(tokens))[tile.keys], wanted)


def test_probabilities_are_kept_in_the_dtype_of_the_values() -> None:
    tokens = pack([[1, 2, 3, 4], [1, 5]])
    q, k = normal(2, 1, len(tokens), 2, 4).float(), normal(2, 1, len(tokens), 4, seed=1).float()
    o, kept = attention(q, k, normal(2, 1, len(tokens), 4, seed=2).bfloat16(), tokens.tiles(), keep=True)
    assert [one.dtype for one in kept if one is not None] == [torch.bfloat16] * len(tokens.tiles())
    assert o.dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [0, 1])
def test_a_sum_by_index_is_torchs_with_the_same_bits_each_time(device: str, dim: int) -> None:
    chance = torch.Generator().manual_seed(0)
    x, source = (torch.randn(shape, generator=chance).to(device).requires_grad_() for shape in ((3, 7), (40, 40)))
    index = torch.randint(x.shape[dim], (40,), generator=chance).to(device)
    part = source[:, :7] if dim == 0 else source[:3]
    found = index_sum_(x.clone(), dim, index, part)
    expected = x.cpu().double().index_add(dim, index.cpu(), part.cpu().double())
    assert relative_error(found.detach(), expected.detach().to(device)) < 1e-6
    ours, theirs = (torch.autograd.grad(value.square().sum(), (x, source)) for value in (found, expected))
    assert all(relative_error(one, other) < 1e-6 for one, other in zip(ours, theirs, strict=True))
    with torch.no_grad():
        assert all(torch.equal(index_sum_(x.clone(), dim, index, part), found) for _ in range(5))
