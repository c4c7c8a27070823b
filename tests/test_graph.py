"""Steps in CUDA graphs: captured steps give the bits of others, whatever is called in between. Needs a GPU."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from reference import random_lora, tiny_config
from torch import Tensor

from lora_delta import DifferentiableDeltaCompute
from qwen_functional import Lora, LoraSpec, Qwen2Weights, init_weights, pack
from qwen_functional.backends import graph
from qwen_functional.finite import raise_found
from qwen_functional.forward import forward_vjp
from qwen_functional.plan import Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DEVICE = "cuda"
CONFIG = tiny_config(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
SPEC = LoraSpec(rank=3, alpha=5)
SEQUENCES = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [30, 31, 32], [5, 6]]
OTHERS = [[1, 2, 3], [40, 41], [40, 41, 42, 43, 44], [1, 2, 3, 4]]  # a tree of the same sizes
TOKENS = pack(SEQUENCES)
DTYPES = [torch.float32, torch.bfloat16]
G = 3

Step = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _nothing_is_left_to_be_found() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    with contextlib.suppress(ValueError):
        raise_found()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step with a captured plan, whether it replays the graphs."""
    seen: list[bool] = []
    forward = graph.Captured.forward

    def noted(self: graph.Captured, lora: Lora) -> Any:
        done = forward(self, lora)
        seen.append(done is not None)
        return done

    monkeypatch.setattr(graph.Captured, "forward", noted)
    return seen


# Steps of the engine


def made(dtype: torch.dtype, **options: Any) -> tuple[Qwen2Weights, Plan, Plan]:
    """Weights, a plan that is captured on its second use, and one that never is."""
    weights = init_weights(CONFIG, dtype=dtype, device=DEVICE)
    captured, plain = (Plan(CONFIG, weights, TOKENS, lora(), graph=how, **options) for how in ("auto", False))
    assert captured.backend.captures
    return weights, captured, plain


def lora(seed: int = 0, dtype: torch.dtype = torch.float32) -> Lora:
    return SPEC.bind(CONFIG, random_lora(CONFIG, SPEC, G, seed=seed, dtype=dtype, device=DEVICE))


def cotangent_of(value: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.device)


def step(weights: Qwen2Weights, plan: Plan, adapters: Lora) -> Step:
    value, vjp = forward_vjp(CONFIG, weights, TOKENS, adapters, plan=plan)
    return value, vjp(cotangent_of(value))


def assert_same_bits(ours: Step, expected: Step) -> None:
    assert torch.equal(ours[0], expected[0])
    assert list(ours[1]) == list(expected[1])
    for name, gradient in ours[1].items():
        assert gradient.dtype == expected[1][name].dtype
        assert torch.equal(gradient, expected[1][name]), name


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint": "none"},
        {"checkpoint": "block", "layer": (0, -1)},
        {"read": "all"},
        {"wrt": ["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]},
        {"wrt": ()},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_step_gives_the_bits_of_one_that_is_not(
    dtype: torch.dtype, options: dict[str, Any], replays: list[bool]
) -> None:
    weights, plan, plain = made(dtype, **options)
    for seed in range(4):
        ours, expected = (step(weights, one, lora(seed)) for one in (plan, plain))
        assert_same_bits(ours, expected)
        assert ours[0].isfinite().all()
    assert plan.captured is not None
    assert plain.captured is None
    assert replays == [True] * 3


def test_gradients_have_the_dtype_of_their_tensors_when_captured() -> None:
    weights = init_weights(CONFIG, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float64):
        plan, plain = (Plan(CONFIG, weights, TOKENS, lora(dtype=dtype), graph=how) for how in ("auto", False))
        for seed in range(3):
            ours, expected = (step(weights, one, lora(seed, dtype)) for one in (plan, plain))
            assert_same_bits(ours, expected)
        assert {gradient.dtype for gradient in ours[1].values()} == {dtype}


@pytest.mark.parametrize("steps_before", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_forwards_and_then_two_backwards_give_the_gradients_of_each(
    dtype: torch.dtype, steps_before: int, replays: list[bool]
) -> None:
    weights, plan, plain = made(dtype)
    for seed in range(steps_before):
        step(weights, plan, lora(seed))
    expected = [step(weights, plain, lora(seed)) for seed in (7, 8)]
    for order in ((0, 1), (1, 0)):
        replays.clear()
        both = [forward_vjp(CONFIG, weights, TOKENS, lora(seed), plan=plan) for seed in (7, 8)]
        gradients = {index: both[index][1](cotangent_of(both[index][0])) for index in order}
        for index, (value, _) in enumerate(both):
            assert_same_bits((value, gradients[index]), expected[index])
        assert replays.count(True) == 1  # the other would overwrite what the first keeps
    replays.clear()
    assert_same_bits(step(weights, plan, lora(7)), expected[0])
    assert replays == [True]


def test_a_forward_whose_way_back_is_never_gone_stands_in_no_ones_way(replays: list[bool]) -> None:
    weights, plan, plain = made(torch.float32)
    expected = step(weights, plain, lora(5))
    for seed in range(4):
        forward_vjp(CONFIG, weights, TOKENS, lora(seed), plan=plan)  # drop what it returns
    assert_same_bits(step(weights, plan, lora(5)), expected)
    assert replays[-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_returned_stays_as_it_is(dtype: torch.dtype) -> None:
    weights, plan, _ = made(dtype)
    kept: list[tuple[Step, Step]] = []
    for seed in range(5):
        value, gradients = step(weights, plan, lora(seed))
        copies = value.clone(), {name: gradient.clone() for name, gradient in gradients.items()}
        kept.append(((value, gradients), copies))
        for tensor in (value, *gradients.values()):
            assert tensor.untyped_storage().nbytes() < 1 << 20  # and no view of something large
    for returned, copies in kept:
        assert_same_bits(returned, copies)
    # Writing into them does not change a later step, either.
    expected = step(weights, plan, lora(0))
    for value, gradients in (step(weights, plan, lora(0)), expected):
        for tensor in (value, *gradients.values()):
            tensor.fill_(float("nan"))
    assert_same_bits(step(weights, plan, lora(0)), kept[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_filled_plan_needs_no_new_capture_and_reads_no_memory_that_was_freed(
    dtype: torch.dtype, replays: list[bool]
) -> None:
    weights, plan, _ = made(dtype)
    for _ in range(2):
        step(weights, plan, lora())
    captured = plan.captured
    for sequences in (OTHERS, SEQUENCES, OTHERS):
        tokens = pack(sequences)
        plan.fill(tokens)
        torch.cuda.synchronize()
        junk = [torch.zeros(16, dtype=torch.int32, device=DEVICE) for _ in range(1_000)]  # may reuse freed tables
        plain = Plan(CONFIG, weights, tokens, lora(), graph=False)
        assert_same_bits(step(weights, plan, lora(3)), step(weights, plain, lora(3)))
        del junk
    assert plan.captured is captured
    assert all(replays)


def test_a_step_inside_of_another_capture_is_part_of_it() -> None:
    weights, plan, plain = made(torch.float32)
    adapters, other = lora(0), lora(1)
    expected = [step(weights, plain, one) for one in (adapters, other)]
    cotangent = cotangent_of(expected[0][0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(weights, plan, adapters)
    torch.cuda.current_stream().wait_stream(side)
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer):
        value, vjp = forward_vjp(CONFIG, weights, TOKENS, adapters, plan=plan)
        gradients = vjp(cotangent)
    outer.replay()
    assert_same_bits((value, gradients), expected[0])
    for name, tensor in adapters.tensors().items():
        tensor.copy_(other.tensors()[name])
    outer.replay()
    assert_same_bits((value, gradients), expected[1])
    assert_same_bits(step(weights, plan, other), expected[1])  # its own graphs still work


def test_a_profiler_changes_nothing() -> None:
    weights, plan, plain = made(torch.float32)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):
        steps = [step(weights, plan, lora(seed)) for seed in range(4)]
        torch.cuda.synchronize()
    assert plan.captured is not None
    for seed, ours in enumerate(steps):
        assert_same_bits(ours, step(weights, plain, lora(seed)))


# Deltas under autograd


def make_delta(dtype: torch.dtype, spec: LoraSpec = SPEC, **options: Any) -> DifferentiableDeltaCompute:
    weights = init_weights(CONFIG, dtype=dtype, device=DEVICE)
    return DifferentiableDeltaCompute(CONFIG, weights, SEQUENCES, spec, **options)


def two_deltas(dtype: torch.dtype, **options: Any) -> tuple[DifferentiableDeltaCompute, DifferentiableDeltaCompute]:
    """A delta whose steps are captured, and one whose steps are not."""
    return make_delta(dtype, **options), make_delta(dtype, graph=False, **options)


def leaves(seed: int = 0, n_adapters: int = G, spec: LoraSpec = SPEC) -> dict[str, Tensor]:
    tensors = random_lora(CONFIG, spec, n_adapters, seed=seed, dtype=torch.float32, device=DEVICE)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def gradients_of(loss: Tensor, tensors: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()), **options), strict=True))


def trained(delta: DifferentiableDeltaCompute, tensors: Mapping[str, Tensor]) -> Step:
    value = delta(tensors)
    return value.detach(), gradients_of(value.square().sum(), tensors)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_evaluation_between_forward_and_backward_changes_neither(
    dtype: torch.dtype, context: Callable[[], Any], replays: list[bool]
) -> None:
    delta, plain = two_deltas(dtype)
    for seed in range(5):
        tensors, others = leaves(seed), leaves(seed + 10)
        value = delta(tensors)
        with context():
            evaluated = delta(others)
        gradients = gradients_of(value.square().sum(), tensors)
        assert_same_bits((value.detach(), gradients), trained(plain, tensors))
        assert torch.equal(evaluated, plain(others).detach())
    assert replays
    assert all(replays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_backward_through_a_retained_graph_gives_the_gradients_of_the_first(dtype: torch.dtype) -> None:
    delta, plain = two_deltas(dtype)
    for seed in range(4):
        tensors = leaves(seed)
        expected = trained(plain, tensors)
        value = delta(tensors)
        loss = value.square().sum()
        for retain in (True, True, False):
            assert_same_bits((value.detach(), gradients_of(loss, tensors, retain_graph=retain)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_deltas_of_one_loss_have_the_gradients_of_both(dtype: torch.dtype) -> None:
    delta, plain = two_deltas(dtype)
    for seed in range(4):
        one, other = leaves(seed), leaves(seed + 10)
        both = []
        for compute in (delta, plain):
            value = compute(one) * compute(other)
            first, second = (gradients_of(value.sum(), tensors, retain_graph=True) for tensors in (one, other))
            both.append((value.detach(), {**first, **{f"other {name}": g for name, g in second.items()}}))
        assert_same_bits(*both)


@pytest.mark.parametrize("adapters_per_pass", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_passes_give_the_bits_of_those_that_are_not(dtype: torch.dtype, adapters_per_pass: int) -> None:
    delta, plain = two_deltas(dtype, adapters_per_pass=adapters_per_pass)
    for seed in range(4):
        tensors = leaves(seed, n_adapters=5)
        assert_same_bits(trained(delta, tensors), trained(plain, tensors))
        means = []
        for compute in (delta, plain):
            loss = compute.mean_loss(tensors, lambda deltas, _: deltas.square().mean())
            means.append((loss.detach(), gradients_of(loss, tensors)))
        assert_same_bits(*means)


@pytest.mark.parametrize("rank", [3, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_lora_of_zeros_has_a_delta_of_exactly_zero(
    dtype: torch.dtype, rank: int, replays: list[bool]
) -> None:
    spec = LoraSpec(rank=rank, rank_pattern={"k_proj": 2})
    delta = make_delta(dtype, spec)
    for seed in range(4):
        tensors = leaves(seed, spec=spec)
        zeros = {n: (t.detach() * ("lora_A" in n)).requires_grad_() for n, t in tensors.items()}
        value = delta(zeros)
        assert torch.equal(value, torch.zeros_like(value)), f"up to {value.abs().max():.1e}"
        gradients_of(value.sum(), zeros)
        with torch.no_grad():
            assert not delta(zeros).any()
            assert delta(tensors).any()
    assert replays
    assert all(replays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_into_one_output_of_a_generator_serve_as_lora_tensors(dtype: torch.dtype) -> None:
    delta, plain = two_deltas(dtype)
    shapes = delta.lora_shapes
    sizes = [rows * columns for rows, columns in shapes.values()]
    for seed in range(4):
        drawn = torch.randn(G, sum(sizes), generator=torch.Generator().manual_seed(seed)) * 0.1
        flat = drawn.to(DEVICE).requires_grad_()
        parts = flat.split(sizes, dim=1)
        views = {n: part.view(G, *shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        assert not any(view.is_contiguous() for view in views.values())
        value = delta(views)
        (gradient,) = torch.autograd.grad(value.square().sum(), flat)
        own = {name: view.detach().clone().requires_grad_() for name, view in views.items()}
        expected, of_each = trained(plain, own)
        assert torch.equal(value.detach(), expected)
        assert torch.equal(gradient, torch.cat([of_each[name].flatten(1) for name in shapes], 1))


def test_a_training_step_inside_of_another_capture_is_part_of_it() -> None:
    delta, plain = two_deltas(torch.float32)
    tensors, others = leaves(0), leaves(1)
    expected = [trained(plain, one) for one in (tensors, others)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            trained(delta, tensors)
    torch.cuda.current_stream().wait_stream(side)
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer):
        value, gradients = trained(delta, tensors)
    outer.replay()
    assert_same_bits((value, gradients), expected[0])
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(others[name])
    outer.replay()
    assert_same_bits((value, gradients), expected[1])
    assert_same_bits(trained(delta, others), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_release_gives_the_memory_of_graphs_back(dtype: torch.dtype) -> None:
    delta, tensors = make_delta(dtype), leaves()

    def train() -> None:
        for _ in range(3):
            trained(delta, tensors)
        torch.cuda.synchronize()

    train()  # allocates what stays: the base, and workspaces of the streams
    delta.release()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        train()
        assert torch.cuda.memory_allocated() > before
        delta.release()
        assert torch.cuda.memory_allocated() == before
    assert_same_bits(trained(delta, tensors), trained(make_delta(dtype, graph=False), tensors))


# What is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named_by_the_next_call_after_the_gpu_has_seen_it(bad: float) -> None:
    delta, tensors = make_delta(torch.float32), {name: tensor.detach() for name, tensor in leaves().items()}
    name = list(tensors)[5]
    broken = {**tensors, name: tensors[name].clone()}
    broken[name][1, 0, 0] = bad
    for _ in range(3):
        expected = delta(tensors)
        torch.cuda.synchronize()
        delta(broken)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=re.escape(f"LoRA tensor {name!r} is not finite")):
            delta(tensors)
        assert torch.equal(delta(tensors), expected)  # reported only once


def test_a_vjp_names_a_tensor_that_is_not_finite() -> None:
    weights, plan, _ = made(torch.float32)
    for _ in range(3):
        adapters = lora()
        name, tensor = list(adapters.tensors().items())[4]
        tensor[0, 0, 0] = float("nan")
        broken = SPEC.bind(CONFIG, adapters.tensors())
        value, vjp = forward_vjp(CONFIG, weights, TOKENS, broken, plan=plan)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=re.escape(f"LoRA tensor {name!r} is not finite")):
            vjp(torch.ones_like(value))


def test_a_delta_on_a_gpu_refuses_tensors_on_the_cpu() -> None:
    delta, tensors = make_delta(torch.float32), leaves()
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    first = next(iter(tensors))
    for _ in range(3):
        with pytest.raises(ValueError, match="LoRA tensors are on cpu, expected cuda:0"):
            delta(on_cpu)
        with pytest.raises(ValueError, match=f"is on (cpu|cuda:0), expected (cpu|cuda:0) as '{re.escape(first)}'"):
            delta({**tensors, first: on_cpu[first]})
        trained(delta, tensors)


def test_a_captured_plan_refuses_a_lora_on_the_cpu() -> None:
    weights, plan, _ = made(torch.float32)
    for _ in range(3):
        step(weights, plan, lora())
    on_cpu = SPEC.bind(CONFIG, random_lora(CONFIG, SPEC, G, dtype=torch.float32))
    with pytest.raises(ValueError, match="plan was made for other"):
        forward_vjp(CONFIG, weights, TOKENS, on_cpu, plan=plan)
