"""Tokens against the published tokenizer's files, against its formula written out in numpy, and against autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from lora_delta.generate.tokens import FORMATS, DifferentiableDetokenizer, TokenFormat, real_places
from qwen_functional import LoraSpec, Qwen2Config

# The published tokenizer's results on random adapters. For each format: the scales in the frames of whole layers, and
# the mean and standard deviation of each chunk. For two of them, also the first chunk of some projections: the LoRA,
# its tokens, tokens as a generator writes them, and the LoRA that the published code reads from those.
GOLDEN = Path(__file__).parent / "golden"
WHOLE = ("qwen2.5-0.5b", "qwen2.5-1.5b")
# Layers, rank, chunk width, token shape, tokens per layer (q, k, v, o, up, gate, down), tokens; from the paper's code.
PUBLISHED = {
    "qwen2.5-0.5b": (24, 8, 128, (10, 130), [14, 8, 8, 14, 45, 45, 45], 4296),
    "qwen2.5-1.5b": (28, 16, 256, (18, 258), [12, 7, 7, 12, 41, 41, 41], 4508),
    "qwen2.5-vl-3b": (36, 16, 256, (18, 258), [16, 9, 9, 16, 51, 51, 51], 7308),
    "qwen2.5-7b": (28, 16, 512, (18, 514), [14, 8, 8, 14, 44, 44, 44], 4928),
}
# All projections differ in size, so that none passes for another.
SMALL = TokenFormat(
    "small",
    2,
    {
        "q_proj": (8, 4),
        "k_proj": (4, 12),
        "v_proj": (16, 20),
        "o_proj": (20, 8),
        "gate_proj": (24, 4),
        "up_proj": (4, 24),
        "down_proj": (12, 16),
    },
    rank=2,
    chunk_width=4,
)


def golden(name: str) -> tuple[TokenFormat, dict[str, Tensor]]:
    """A published format cut to the projections in its file, each one chunk wide, and the file's tensors."""
    tensors = safetensors.torch.load_file(GOLDEN / f"{name}.safetensors")
    order = tuple(p for p in FORMATS[name].order if any(p in key for key in tensors if key.startswith("lora.")))
    shapes = dict.fromkeys(order, 2 * (FORMATS[name].chunk_width,))
    return replace(FORMATS[name], num_hidden_layers=1, order=order, projection_shapes=shapes), tensors


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach().double() - theirs.double()).norm() / theirs.double().norm())


def random_lora(format: TokenFormat, *batch: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(*batch, *shape, generator=generator, dtype=dtype) * 0.05 + 0.01
        for name, shape in format.shapes.items()
    }


def random_tokens(format: TokenFormat, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*batch, format.n_tokens, *format.token_shape, generator=generator, dtype=dtype)


# --- Against the published tokenizer ------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_a_token_is_the_published_tokenizers(name: str) -> None:
    format, file = golden(name)
    ours, theirs = format.tokenize(under("lora.", file)), file["tokens"]
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert torch.equal(real_places(ours), real_places(theirs))
    for token, published in zip(ours, theirs, strict=True):
        real = real_places(published)
        assert error(token[real], published[real]) < 1e-6


@pytest.mark.parametrize("name", WHOLE)
def test_a_lora_tensor_is_the_published_detokenizers(name: str) -> None:
    format, file = golden(name)
    ours, theirs = DifferentiableDetokenizer(format).detokenize(file["generated_tokens"]), under("detokenized.", file)
    assert {key.removeprefix("base_model.model.") for key in ours} == set(theirs)
    for key, tensor in ours.items():
        published = theirs[key.removeprefix("base_model.model.")]
        assert tensor.shape == published.shape
        assert tensor.dtype == published.dtype
        assert error(tensor, published) < 1e-6


def chunks_of(stats: Tensor, n: int) -> Tensor:
    """Numbers (chunks, n) with the given means and standard deviations (chunks, 2)."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 2)
    return stats[:, :1] + stats[:, 1:] * ((n - 1) / n) ** 0.5 * signs


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_stand_where_the_published_tokenizer_puts_them(name: str) -> None:
    """For whole layers: chunks with the same mean and spread give the scales that it wrote into each token's frame."""
    file = safetensors.torch.load_file(GOLDEN / f"{name}.safetensors")
    stats = under("stats.", file)
    layers = 1 + max(int(key.split(".")[2]) for key in stats)
    format = replace(FORMATS[name], num_hidden_layers=layers)
    r, c = format.rank, format.chunk_width
    tensors = {}
    for key, own in stats.items():
        matrix = chunks_of(own, r * c).view(-1, r, c).transpose(0, 1).reshape(r, -1)
        tensors[key] = matrix if ".lora_A." in key else matrix.T
    frames = format.tokenize(tensors)[:, -1, -2:]
    assert frames.shape == file["scales"].shape
    assert len(frames.unique(dim=0)) == len(frames)  # no token passes for another
    assert (frames - file["scales"].double()).abs().max() < 1e-6


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_has_the_sizes_of_the_published_one(name: str) -> None:
    layers, rank, chunk_width, token_shape, per_layer, n_tokens = PUBLISHED[name]
    format = FORMATS[name]
    assert (format.num_hidden_layers, format.rank, format.chunk_width) == (layers, rank, chunk_width)
    assert (format.token_shape, format.n_tokens) == (token_shape, n_tokens)
    counts = [n for *_, n in format.groups]
    assert [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)] == per_layer


# --- Against the formula, entry by entry -------------------------------------------------------------------


def slow_tokenize(format: TokenFormat, tensors: dict[str, np.ndarray]) -> np.ndarray:
    r, c = format.rank, format.chunk_width
    tokens = []
    for layer in range(format.num_hidden_layers):
        for projection in ("q", "k", "v", "o", "up", "gate", "down"):
            for side in "AB":
                (matrix,) = (
                    v for k, v in tensors.items() if f"layers.{layer}." in k and f".{projection}_proj.lora_{side}." in k
                )
                matrix = matrix if side == "A" else matrix.T
                for start in range(0, matrix.shape[1], c):
                    chunk = matrix[:, start : start + c]
                    m, s = chunk.mean(), chunk.std(ddof=1)
                    token = np.full((r + 2, c + 2), np.nan)
                    token[:r, :c] = (chunk - m) / s
                    block = [8 * m, np.log(0.9 * s + 0.1) + 1.6]
                    for i in range(r + 2):
                        for j in range(c + 2):
                            if i >= r or j >= c:
                                token[i, j] = block[j % 2]
                    tokens.append(token)
    return np.stack(tokens)


def slow_chunk(token: np.ndarray) -> np.ndarray:
    h, w = token.shape
    below = [token[-2:, j : j + 2] for j in range(0, w, 2)]
    right = [token[i : i + 2, -2:] for i in range(0, h, 2)]
    block = (np.mean(below, axis=0) + np.mean(right, axis=0)) / 2
    m = (block[0, 0] / 8 + block[1, 0] / 8) / 2
    s = ((np.exp(block[0, 1] - 1.6) - 0.1) / 0.9 + (np.exp(block[1, 1] - 1.6) - 0.1) / 0.9) / 2
    return token[:-2, :-2] * s + m


def test_a_token_is_that_of_the_formula_entry_by_entry() -> None:
    tensors = random_lora(SMALL)
    expected = slow_tokenize(SMALL, {name: tensor.numpy() for name, tensor in tensors.items()})
    np.testing.assert_allclose(SMALL.tokenize(tensors).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_noisy_token_is_read_by_the_formula() -> None:
    tokens = random_tokens(SMALL)
    chunks = iter([slow_chunk(token) for token in tokens.numpy()])
    tensors = SMALL.detokenize(tokens)
    for layer in range(2):
        for projection in ("q", "k", "v", "o", "up", "gate", "down"):
            for side in "AB":
                (ours,) = (
                    t for k, t in tensors.items() if f"layers.{layer}." in k and f".{projection}_proj.lora_{side}." in k
                )
                wide = ours if side == "A" else ours.T
                expected = np.concatenate([next(chunks) for _ in range(wide.shape[1] // 4)], axis=1)
                np.testing.assert_allclose(wide.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert next(chunks, None) is None


# --- There and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("format", [SMALL, replace(FORMATS["qwen2.5-0.5b"], num_hidden_layers=1)], ids=lambda f: f.name)
def test_a_lora_comes_back_from_its_tokens(format: TokenFormat, batch: tuple[int, ...]) -> None:
    tensors = random_lora(format, *batch, dtype=torch.float32)
    back = format.detokenize(format.tokenize(tensors))
    assert list(back) == list(tensors)
    for name, tensor in back.items():
        assert tensor.is_contiguous()
        assert error(tensor, tensors[name]) < 1e-6


def test_a_fresh_lora_with_zero_B_comes_back() -> None:
    tensors = {n: t * ("lora_A" in n) for n, t in random_lora(SMALL).items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    tokens = SMALL.tokenize(leaves)
    for name, tensor in SMALL.detokenize(tokens).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-9, atol=1e-15)
    tokens.square().sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values() if leaf.grad is not None)


def test_one_of_a_batch_is_the_same_alone() -> None:
    tokens, tensors = random_tokens(SMALL, 3), random_lora(SMALL, 3)
    together, stack = SMALL.detokenize(tokens), SMALL.tokenize(tensors)
    for g in range(3):
        alone = SMALL.detokenize(tokens[g])
        torch.testing.assert_close({n: t[g] for n, t in together.items()}, alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            stack[g], SMALL.tokenize({n: t[g] for n, t in tensors.items()}), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_its_own_rounding(dtype: torch.dtype) -> None:
    tokens = random_tokens(SMALL, dtype=torch.float32).to(dtype)
    exact = SMALL.detokenize(tokens.float())
    for name, tensor in SMALL.detokenize(tokens).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact[name].to(dtype))
    tensors = {name: tensor.to(dtype) for name, tensor in random_lora(SMALL).items()}
    stack = SMALL.tokenize(tensors)
    assert stack.dtype == dtype
    assert torch.equal(stack, SMALL.tokenize({n: t.float() for n, t in tensors.items()}).to(dtype))


def test_other_spellings_of_the_names_are_read() -> None:
    tensors = random_lora(SMALL)
    expected = SMALL.tokenize(tensors)
    for spelled in (
        {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()},
        {name.removeprefix("base_model.model."): t for name, t in reversed(tensors.items())},
    ):
        assert torch.equal(SMALL.tokenize(spelled), expected)


def test_names_and_shapes_are_those_of_a_lora_spec() -> None:
    config = Qwen2Config(hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2)
    format = TokenFormat.for_config(config, rank=6, chunk_width=4)
    expected = LoraSpec(rank=6).shapes(config)
    assert list(format.shapes.items()) == list(expected.items())
    assert format.names() == list(format.detokenize(random_tokens(format))) == list(expected)
    assert TokenFormat.for_shapes((format.n_tokens, 8, 6), expected) == format
    some = LoraSpec(rank=6, target_modules=("v_proj", "q_proj")).shapes(config)
    assert replace(format, order=("q_proj", "v_proj")).shapes == some


# --- Gradients -----------------------------------------------------------------------------------------------


def test_gradients_of_tokens_are_those_of_the_values() -> None:
    format = replace(SMALL, num_hidden_layers=1, order=("q_proj", "v_proj"))
    tokens = random_tokens(format, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tuple(format.detokenize(t).values()), tokens)
    assert torch.autograd.gradgradcheck(lambda t: tuple(format.detokenize(t).values()), tokens[:1], fast_mode=True)


def test_gradients_of_tensors_are_those_of_the_values() -> None:
    format = replace(SMALL, num_hidden_layers=1, order=("up_proj", "k_proj"))
    tensors = random_lora(format, 2)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(lambda *t: format.tokenize(dict(zip(tensors, t, strict=True))), leaves)


def test_vmap_gives_the_batch() -> None:
    tokens = random_tokens(SMALL, 3)
    mapped, batched = torch.func.vmap(SMALL.detokenize)(tokens), SMALL.detokenize(tokens)
    torch.testing.assert_close(mapped, batched)
    torch.testing.assert_close(torch.func.vmap(SMALL.tokenize)(batched), SMALL.tokenize(batched))


# --- What is refused -----------------------------------------------------------------------------------------


def changed(tokens: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    tokens = tokens.clone()
    tokens[place] = value
    return tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], r"shape \(\d+, 4, 6\), expected \(\d+, 4, 6\) or \(G, \d+, 4, 6\) in format 'small'"),
        (lambda t: t[..., :-1], r"shape \(\d+, 4, 5\)"),
        (lambda t: t[None, None], "tokens have shape"),
        (lambda t: t[None][:0], "tokens have shape"),
        (lambda t: t.int(), "torch.int32"),
        (lambda t: t.numpy(), "ndarray"),
        # Tokens of layer 0: q has 1 + 2, k 3 + 1, v 5 + 4. So 4 is k's second chunk of A.
        (lambda t: changed(t, (4, 0, 0), float("nan")), r"token 4, chunk 1 of '.*layers.0.self_attn.k_proj.lora_A"),
        (lambda t: changed(t, (0, -1, 0), float("nan")), r"token 0, chunk 0 of '.*layers.0.self_attn.q_proj.lora_A"),
        (lambda t: changed(t, (0, 0, -1), float("-inf")), "token 0"),
        (lambda t: changed(t, (2, -2, -1), 3e3), r"token 2, chunk 1 of '.*q_proj.lora_B.*finite"),
    ],
)
def test_bad_tokens_are_refused(change: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.detokenize(change(random_tokens(SMALL)))


def renamed(tensors: dict[str, Any], index: int, name: str) -> dict[str, Any]:
    return {name if i == index else key: value for i, (key, value) in enumerate(tensors.items())}


NAME = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "layers.1" not in k},
            r"14 LoRA tensors are missing.*layers\.1\..*28",
        ),
        (lambda t: renamed(t, 0, "model.layers.2.self_attn.q_proj.lora_A.weight"), "not in format 'small'"),
        (lambda t: {**t, "lm_head.weight": t[NAME]}, "'lm_head.weight' is not in format"),
        (lambda t: {**t, NAME.removeprefix("base_model.model."): t[NAME]}, "given twice"),
        (lambda t: {**t, NAME: t[NAME].mT}, r"k_proj.lora_B.weight' has shape \(2, 4\), expected \(4, 2\)"),
        (lambda t: {**t, NAME: t[NAME][None]}, r"shape \(1, 4, 2\).*same G"),
        (lambda t: {k: v[None, None] for k, v in t.items()}, "has shape"),
        (lambda t: {**t, NAME: t[NAME].int()}, "torch.int32"),
        (lambda t: {**t, NAME: t[NAME].tolist()}, "is of list"),
        (lambda t: {**t, NAME: t[NAME].to("meta")}, "is on meta, expected cpu"),
        (lambda t: list(t.values()), "tensors is a list"),
        (lambda t: {**t, NAME: t[NAME] * float("inf")}, "NaN, infinity.*" + NAME),
    ],
)
def test_bad_tensors_are_refused(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.tokenize(change(random_lora(SMALL)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 3}, "rank is 3, expected an even number"),
        ({"chunk_width": 1}, "chunk_width is 1, expected an even number"),
        ({"chunk_width": 8}, "chunk_width is 8, expected a divisor of all features; q_proj has 4"),
        ({"rank": 0}, "rank is 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"std_floor": 0}, "std_floor is 0"),
        ({"log_offset": float("nan")}, "log_offset is nan"),
        ({"order": ()}, "order is"),
        ({"order": ("q_proj", "q_proj")}, "each once"),
        ({"order": ("q_proj", "lm_head")}, "order names 'lm_head'"),
    ],
)
def test_a_format_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)


def test_an_unknown_format_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'qwen3'.*qwen2.5-0.5b.*qwen2.5-1.5b.*qwen2.5-vl-3b.*qwen2.5-7b"):
        DifferentiableDetokenizer("qwen3")
