"""Learned reconstruction against the published detokenizer, a dense linear map, and training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_tokens import SMALL, error, golden, random_lora, random_tokens, under
from torch import Tensor, nn

from lora_delta.generate.reconstruct import SimpleLoRAReconstructor
from lora_delta.generate.tokens import FORMATS, TokenFormat
from qwen_functional import LoraSpec, Qwen2Config

# Parameters of the base models, embeddings counted once; from their model cards.
BASE_PARAMETERS = {"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304}
TINY = replace(SMALL, num_hidden_layers=1, order=("q_proj", "k_proj"))


def trained(format: TokenFormat, **options: Any) -> SimpleLoRAReconstructor:
    """A module in float64 as after some training: no parameter has its initial value."""
    torch.manual_seed(0)
    module = SimpleLoRAReconstructor.from_format(format, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def test_a_new_module_is_the_published_detokenizer() -> None:
    format, file = golden("qwen2.5-0.5b")
    tensors = SimpleLoRAReconstructor.from_format(format)(file["generated_tokens"])
    for name, tensor in under("detokenized.", file).items():
        assert error(tensors["base_model.model." + name], tensor) < 1e-6


@pytest.mark.parametrize("name", BASE_PARAMETERS)
def test_the_module_has_at_most_a_hundredth_of_the_base_models_parameters(name: str) -> None:
    module = SimpleLoRAReconstructor.from_format(name)
    assert sum(parameter.numel() for parameter in module.parameters()) <= BASE_PARAMETERS[name] / 100


def correction(module: SimpleLoRAReconstructor, tokens: Tensor) -> Tensor:
    """(…, L, r · c): what the module adds to each chunk."""
    return torch.cat([part.flatten(-2) for part in module.correction(module.format.split(tokens))], -2).flatten(-3, -2)


def test_the_correction_is_a_linear_layer_over_all_tokens() -> None:
    module = trained(TINY, width=3, mixing=2)
    shape = (TINY.n_tokens, *TINY.token_shape)
    zero = torch.zeros(shape, dtype=torch.float64)
    columns = torch.eye(zero.numel(), dtype=torch.float64).view(-1, *shape)
    constant = correction(module, zero)
    dense = nn.Linear(zero.numel(), constant.numel()).double()
    with torch.no_grad():
        dense.weight.copy_((correction(module, columns) - constant).flatten(1).T)
        dense.bias.copy_(constant.flatten())
        tokens = random_tokens(TINY, 2)
        expected = dense(tokens.flatten(1)).view(2, *constant.shape)
    torch.testing.assert_close(correction(module, tokens), expected, rtol=1e-10, atol=1e-12)
    blocks = dense.weight.view(TINY.n_tokens, -1, TINY.n_tokens, shape[1] * shape[2])
    assert (blocks.abs().amax((1, 3)) > 0).all(), "a chunk does not see some token"


def test_without_mixing_a_chunk_sees_its_own_token_alone() -> None:
    module = trained(TINY, mixing=0)
    tokens = random_tokens(TINY)
    changed = tokens.clone()
    changed[3] += 1
    moved = (correction(module, changed) != correction(module, tokens)).any(1)
    assert moved.tolist() == [i == 3 for i in range(TINY.n_tokens)]


def test_gradients_reach_every_parameter_and_the_tokens() -> None:
    module = trained(SMALL)
    tokens = random_tokens(SMALL, 2).requires_grad_()
    torch.stack([tensor.square().sum() for tensor in module(tokens).values()]).sum().backward()
    for name, parameter in [*module.named_parameters(), ("tokens", tokens)]:
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).all(), name


def test_gradients_are_those_of_finite_differences() -> None:
    module = trained(TINY, width=2, mixing=2)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def values(tokens: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.functional_call(module, dict(zip(names, flat, strict=True)), (tokens,)).values())

    assert torch.autograd.gradcheck(values, (random_tokens(TINY).requires_grad_(), *parameters))


def test_one_of_a_batch_is_the_same_alone() -> None:
    module, tokens = trained(SMALL), random_tokens(SMALL, 3)
    together = module(tokens)
    assert {name: tuple(tensor.shape[1:]) for name, tensor in together.items()} == SMALL.shapes
    for g in range(3):
        torch.testing.assert_close({n: t[g] for n, t in together.items()}, module(tokens[g]))


def test_training_beats_the_fixed_detokenizer() -> None:
    """Tokens as another generator might write them: chunks reversed, half as large, one layer shifted."""
    torch.manual_seed(0)
    targets = random_lora(SMALL, 16, dtype=torch.float32)
    tokens = SMALL.tokenize(targets)
    c = SMALL.chunk_width
    tokens = torch.cat([0.5 * tokens[..., :c].flip(-1), tokens[..., c:]], -1)
    tokens[:, : SMALL.n_tokens // 2] += 0.1
    module = SimpleLoRAReconstructor.from_format(SMALL, width=8, mixing=4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        written = module(tokens)
        loss = torch.stack([(written[name] - target).square().mean() for name, target in targets.items()]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    fixed = SMALL.detokenize(tokens)
    first = torch.stack([(fixed[name] - target).square().mean() for name, target in targets.items()]).mean()
    assert losses[0] == pytest.approx(first.item(), rel=1e-4)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_taken(dtype: torch.dtype) -> None:
    module, tokens = trained(SMALL).float(), random_tokens(SMALL).to(dtype)
    exact = module(tokens.float())
    for name, tensor in module(tokens).items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, exact[name].to(dtype))


def test_the_shapes_of_a_lora_spec_make_a_module() -> None:
    config = Qwen2Config(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    shapes = LoraSpec(rank=4, target_modules=("q_proj", "down_proj")).shapes(config)
    module = SimpleLoRAReconstructor((2 * (4 + 5), 6, 6), shapes)
    written = module(torch.randn(18, 6, 6))
    assert [(name, tuple(tensor.shape)) for name, tensor in written.items()] == list(shapes.items())


@pytest.mark.parametrize(
    ("token_shape", "change", "message"),
    [
        ((SMALL.n_tokens - 1, 4, 6), {}, f"expected {SMALL.n_tokens} tokens"),
        ((SMALL.n_tokens, 6, 6), {}, r"has \(2, 4\) for .*q_proj.lora_A.*expected \(4, 4\).*rank 4"),
        ((SMALL.n_tokens, 4, 6), {"lm_head.weight": (4, 2)}, "'lm_head.weight', expected None"),
        ((SMALL.n_tokens, 4, 5), {}, "chunk_width is 3"),
    ],
)
def test_shapes_that_are_no_token_format_are_refused(
    token_shape: tuple[int, int, int], change: dict[str, tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SimpleLoRAReconstructor(token_shape, {**SMALL.shapes, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 0}, "width is 0"), ({"mixing": -1}, "mixing is -1"), ({"format": "qwen2.5-7b"}, "not those of format")],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimpleLoRAReconstructor((SMALL.n_tokens, *SMALL.token_shape), SMALL.shapes, **options)


def test_tokens_with_nan_are_refused() -> None:
    tokens = random_tokens(SMALL)
    tokens[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="token 1"):
        trained(SMALL)(tokens)


def test_a_real_format_trains() -> None:
    format = FORMATS["qwen2.5-0.5b"]
    module, tokens = SimpleLoRAReconstructor.from_format(format), torch.randn(1, 4296, 10, 130, requires_grad=True)
    torch.stack([tensor.square().mean() for tensor in module(tokens).values()]).sum().backward()
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()


def test_at_first_the_ways_down_keep_the_size_of_a_token_and_nothing_is_corrected() -> None:
    torch.manual_seed(0)
    module = SimpleLoRAReconstructor((SMALL.n_tokens, *SMALL.token_shape), SMALL.shapes, width=64)
    for name, parameter in module.named_parameters():
        if name.endswith("down"):
            assert 0.9 < parameter.std() * parameter.shape[-2] ** 0.5 < 1.1, name
    assert not correction(module, random_tokens(SMALL, 2).float()).any()
