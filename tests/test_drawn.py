"""Random configs, adapters, tokens and options: the engine's values and gradients against autograd and PEFT in float64.

Autograd goes through ``qwen_functional.forward``, the formula, with one sequence per row. Operations are drawn too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    assert_gradients,
    hf_model,
    peft_model,
    random_lora,
    reference_value_and_grads,
    relative_error,
    tiny_fields,
)
from test_delta import leaves
from torch import Tensor
from torch.nn import functional as F

from qwen_functional import Lora, LoraSpec, Qwen2Config, Qwen2Weights, init_weights, pack
from qwen_functional.architecture import PROJECTIONS
from qwen_functional.backends import cpu
from qwen_functional.forward import forward, forward_vjp
from qwen_functional.ops.attention import attention, attention_vjp
from qwen_functional.ops.linear import (
    Part,
    linear,
    linear_inner,
    linear_vjp_A,
    linear_vjp_B,
    linear_vjp_inner,
    linear_vjp_input,
)
from qwen_functional.ops.rmsnorm import rmsnorm_to, rmsnorm_vjp
from qwen_functional.ops.rope import rope_into, rope_tables, rope_vjp
from qwen_functional.ops.swiglu import swiglu_partials_, swiglu_vjp_

F64, EXACT = torch.float64, 1e-9
drawn = settings(deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- The engine -------------------------------------------------------------------------------------------


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": draw(st.sampled_from([50.0, 1e4, 1e6]))}
    rope["rope_type"] = draw(st.sampled_from(["default", "linear", "yarn"]))
    if rope["rope_type"] != "default":
        rope["factor"] = draw(st.floats(1.0, 8.0))
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = draw(st.sampled_from([4, 16, 64]))
        rope["truncate"] = draw(st.booleans())
        betas = {"beta_fast": st.floats(4, 40), "beta_slow": st.floats(0.05, 2)}
        rope |= draw(st.fixed_dictionaries({}, optional={**betas, "attention_factor": st.floats(0.5, 2)}))
    return rope


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """A ``config.json``."""
    kv_heads, group, n_layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    windows: dict[str, Any] = {}
    if draw(st.booleans()):
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        windows = {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 5))}
        windows["layer_types"] = draw(st.lists(kinds, min_size=n_layers, max_size=n_layers))
    return tiny_fields(
        hidden_size=draw(st.integers(3, 12)),
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=n_layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        initializer_range=0.3,
        rope_parameters=draw(ropes()),
        **windows,
    )


@st.composite
def specs(draw: st.DrawFn, n_layers: int) -> LoraSpec:
    modules = draw(st.lists(st.sampled_from(list(PROJECTIONS)), min_size=1, unique=True))
    layers = st.lists(st.integers(0, n_layers - 1), min_size=1, unique=True)
    patterned = st.sampled_from(modules)
    return LoraSpec(
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from([0.5, 2, 7])),
        target_modules=modules,
        rank_pattern=draw(st.dictionaries(patterned, st.integers(1, 5), max_size=2)),
        alpha_pattern=draw(st.dictionaries(patterned, st.sampled_from([0.3, 5, -2]), max_size=2)),
        use_rslora=draw(st.booleans()),
        layers_to_transform=draw(st.none() | layers),
    )


# Few distinct tokens, so that sequences share prefixes, are equal, or are prefixes of one another.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6)
# How the engine computes.
WAYS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"checkpoint": st.sampled_from(["none", "block", "auto"]), "memory_budget": st.none() | st.integers(0, 100_000)}
)


class Case:
    """A call of the engine, and its results."""

    def __init__(self, data: st.DataObject, device: str, sequences: list[list[int]], *, inner_only: bool) -> None:
        self.fields, self.sequences = data.draw(fields(), "config"), sequences
        self.config = Qwen2Config.from_dict(self.fields)
        n_layers = self.config.num_hidden_layers
        self.spec = data.draw(specs(n_layers), "spec")
        self.n_adapters = data.draw(st.none() | st.integers(1, 4), "adapters")
        seed, modules = data.draw(st.integers(0, 99), "seed"), self.spec.modules(self.config)
        every = list(random_lora(self.config, self.spec, self.n_adapters, seed, device=device).items())
        kept = data.draw(st.sets(st.sampled_from(range(len(modules))), min_size=1), "adapted")
        self.tensors = dict(pair for index in sorted(kept) for pair in every[2 * index : 2 * index + 2])  # A and B
        names = list(self.tensors)
        layers = st.sampled_from([-1, *range(n_layers - 1 if inner_only else n_layers)])
        self.layer = data.draw(layers | st.lists(layers, min_size=1, max_size=3), "layer")
        self.wrt = data.draw(st.none() | st.lists(st.sampled_from(names), unique=True), "wrt")
        self.read = data.draw(st.sampled_from(["last", "all"]), "read") if inner_only else "last"
        self.weights: Qwen2Weights = init_weights(self.config, dtype=F64, device=device)
        with pytest.MonkeyPatch.context() as patched:  # chunks of one adapter, some, or all
            patched.setattr(cpu, "CHUNK_BYTES", data.draw(st.sampled_from([0, 4000, 1 << 20]), "chunk"))
            self.lora = self.spec.bind(self.config, self.tensors)
            self.value, vjp = forward_vjp(
                self.config, self.weights, pack(sequences), self.lora,
                layer=self.layer, read=self.read, wrt=self.wrt, **data.draw(WAYS, "way"),
            )  # fmt: skip
            self.cotangent = normal(1, *self.value.shape).to(device)
            self.gradients = vjp(self.cotangent)

    def assert_is(self, value: Tensor, gradients: dict[str, Tensor], device: str) -> None:
        allowed = tolerance(device, EXACT)
        assert relative_error(self.value, value) < allowed
        wanted = [name for name in self.tensors if self.wrt is None or name in self.wrt]
        if not wanted:
            assert self.gradients == {}
            return
        # With such texts and sizes, gradients may cancel entirely, leaving 5e-14.
        assert_gradients(self.gradients, {name: gradients[name] for name in wanted}, allowed, negligible=1e-3)


@settings(drawn, max_examples=60)
@given(data=st.data(), sequences=SEQUENCES)
def test_the_engine_equals_peft_under_autograd(device: str, data: st.DataObject, sequences: list[list[int]]) -> None:
    case = Case(data, device, sequences, inner_only=False)
    model = peft_model(hf_model(case.config, case.weights, fields=case.fields), case.spec)
    expected = reference_value_and_grads(model, case.tensors, sequences, case.cotangent, case.layer)
    case.assert_is(*expected, device)


@settings(drawn, max_examples=120)
@given(data=st.data(), sequences=SEQUENCES)
def test_the_engine_equals_the_formula_under_autograd(
    device: str, data: st.DataObject, sequences: list[list[int]]
) -> None:
    case = Case(data, device, sequences, inner_only=True)
    tensors = leaves(case.tensors)
    lora: Lora = case.spec.bind(case.config, tensors)
    layers = (case.layer,) if isinstance(case.layer, int) else case.layer
    rows = []
    for sequence in sequences:
        ids = torch.tensor([sequence], device=device).expand(case.n_adapters or 1, -1)
        states = forward(case.config, case.weights, ids, lora=lora, output_hidden_states=True).hidden_states
        assert states is not None
        row = torch.stack([states[-1 if layer == -1 else layer + 1] for layer in layers], 1)  # (G, layers, T, H)
        rows.append(row if case.read == "all" else row[:, :, -1:])
    value = torch.cat(rows, 2)
    value = value[:, 0] if isinstance(case.layer, int) else value
    gradients = [torch.zeros_like(tensor) for tensor in tensors.values()]
    if value.requires_grad:  # else the layer is below all adapters
        gradients = [*torch.autograd.grad(value, list(tensors.values()), case.cotangent, materialize_grads=True)]
    case.assert_is(value.detach(), dict(zip(tensors, gradients, strict=True)), device)


# --- Operations -------------------------------------------------------------------------------------------


def by_autograd(value: Tensor, cotangent: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs, cotangent)


def assert_equal(*pairs: tuple[Tensor, Tensor]) -> None:
    for got, expected in pairs:
        assert got.shape == expected.shape
        assert (got - expected).norm() <= 1e-12 * max(1.0, float(expected.detach().norm()))


@settings(drawn, max_examples=50)
@given(seeds, st.lists(st.integers(1, 4), max_size=2), st.integers(1, 50), st.floats(1e-8, 1), st.floats(-6, 6))
def test_rmsnorm_and_its_vjp_equal_torch(seed: int, lead: list[int], width: int, eps: float, exponent: float) -> None:
    x = (normal(seed, *lead, width) * 10**exponent).requires_grad_()
    weight, dy = normal(seed + 1, width), normal(seed + 2, *lead, width)
    expected = F.rms_norm(x, (width,), weight, eps)
    y, rstd = rmsnorm_to(x.detach(), weight, eps, F64)
    dx = rmsnorm_vjp(dy, x.detach(), weight, rstd)
    scale = 10**exponent  # brings dx near one
    assert_equal((y, expected), (dx * scale, by_autograd(expected, dy, x)[0] * scale))


@settings(drawn, max_examples=30)
@given(seeds, ropes(), st.integers(1, 8), st.integers(1, 4), st.integers(1, 6))
def test_rope_and_its_vjp_equal_a_complex_product(
    seed: int, rope: dict[str, Any], half: int, heads: int, n_tokens: int
) -> None:
    config = Qwen2Config.from_dict(tiny_fields(head_dim=2 * half, rope_parameters=rope))
    positions = torch.arange(n_tokens) * 7 % 64
    cos, sin = rope_tables(config, positions, F64, torch.device("cpu"))
    x, dy = normal(seed, heads, n_tokens, 2 * half).requires_grad_(), normal(seed + 1, heads, n_tokens, 2 * half)
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    expected = torch.cat((turned.real, turned.imag), -1)
    out = rope_into(x.detach(), cos, sin, torch.empty_like(x))
    assert_equal((out, expected), (rope_vjp(dy, cos, sin, torch.empty_like(x)), by_autograd(expected, dy, x)[0]))


@settings(drawn, max_examples=30)
@given(seeds, st.integers(1, 4), st.integers(1, 9), st.floats(-2, 2))
def test_swiglu_and_its_vjp_equal_torch(seed: int, rows: int, width: int, exponent: float) -> None:
    gate, up = ((normal(seed + i, rows, width) * 10**exponent).requires_grad_() for i in (0, 1))
    da = normal(seed + 2, rows, width)
    expected = F.silu(gate) * up
    a, *partials = swiglu_partials_(gate.detach().clone(), up.detach().clone())
    found = swiglu_vjp_(da, *partials)
    assert_equal((a, expected), *zip(found, by_autograd(expected, da, gate, up), strict=True))


@settings(drawn, max_examples=50)
@given(seeds, st.integers(1, 3), st.booleans(), st.booleans(), st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)),
       min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 6))  # fmt: skip
def test_a_projection_and_its_vjp_equal_merged_weights(
    seed: int, n: int, shared: bool, with_bias: bool, parts: list[tuple[int, int]], rows: int, n_in: int
) -> None:
    """For stacked projections, each with its own rank, or none."""
    out, ranks = sum(size for size, _ in parts), [rank for _, rank in parts]
    x, dy = normal(seed, 1 if shared else n, rows, n_in).requires_grad_(), normal(seed + 1, n, rows, out)
    weight, bias = normal(seed + 2, out, n_in), normal(seed + 3, out) if with_bias else None
    A = normal(seed + 4, n, sum(ranks), n_in).requires_grad_()
    Bs = [normal(seed + 5 + i, n, size, rank).requires_grad_() for i, (size, rank) in enumerate(parts)]
    whole = torch.stack([torch.block_diag(*(B[g] for B in Bs)) for g in range(n)])
    expected = torch.einsum("gsi,goi->gso", x.expand(n, -1, -1), weight + whole @ A)
    expected = expected if bias is None else expected + bias
    dx, dA, *dBs = torch.autograd.grad(expected, [x, A, *Bs], dy, materialize_grads=True)

    given_parts, at, rank_at = [], 0, 0
    for B in Bs:
        given_parts.append(Part(B.detach(), slice(at, at + B.shape[1]), slice(rank_at, rank_at + B.shape[2])))
        at, rank_at = at + B.shape[1], rank_at + B.shape[2]
    u = linear_inner(x.detach(), A.detach())
    t = torch.empty_like(u)
    for part in given_parts:
        linear_vjp_inner(dy[..., part.outputs], part.B, out=t[..., part.ranks])
    found = linear_vjp_input(dy, weight).baddbmm_(t, A.detach())
    found = found.sum(0, keepdim=True) if shared else found
    pairs = [(linear(x.detach(), weight, bias, u, given_parts), expected), (found, dx)]
    pairs.append((linear_vjp_A(t, x.detach()), dA))
    pairs += [
        (linear_vjp_B(dy[..., part.outputs], u[..., part.ranks]), dB) for part, dB in zip(given_parts, dBs, strict=True)
    ]
    assert_equal(*pairs)


@settings(drawn, max_examples=60)
@given(seeds, SEQUENCES, st.none() | st.integers(1, 6), st.tuples(st.integers(1, 3), st.integers(1, 3)),
       st.integers(1, 5), st.integers(1, 12), st.booleans())  # fmt: skip
def test_attention_and_its_vjp_equal_torch(
    seed: int, sequences: list[list[int]], window: int | None, heads: tuple[int, int], head_dim: int, tile: int,
    kept: bool,
) -> None:  # fmt: skip
    tokens, (kv_heads, group) = pack(sequences), heads
    n_tokens, n = len(tokens), 2
    shapes = (n, kv_heads, n_tokens, group, head_dim), (n, kv_heads, n_tokens, head_dim)
    q, k, v = (normal(seed + i, *shapes[min(i, 1)]).requires_grad_() for i in range(3))
    do = normal(seed + 3, n, n_tokens, kv_heads * group * head_dim)
    seen = torch.eye(n_tokens, dtype=torch.bool)  # from each node's path to the root
    for node in range(n_tokens):
        ancestor, left = node, n_tokens if window is None else window
        while ancestor >= 0 and left > 0:
            seen[node, ancestor], ancestor, left = True, tokens.parents[ancestor], left - 1
    heads_of_q = q.permute(0, 1, 3, 2, 4).flatten(1, 2)
    keys, values = (y.repeat_interleave(group, 1) for y in (k, v))
    expected = F.scaled_dot_product_attention(heads_of_q, keys, values, seen, scale=1.0).transpose(1, 2).flatten(2)

    inputs, tiles = (q.detach(), k.detach(), v.detach()), tokens.tiles(window, tile)
    o, probs = attention(*inputs, tiles, keep=kept)
    found = attention_vjp(do, *inputs, probs, tiles)
    assert_equal((o, expected), *zip(found, by_autograd(expected, do, q, k, v), strict=True))
