"""The delta as a node in a larger autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from devices import tolerance
from reference import one_by_one, random_lora, relative_error, tiny_config
from test_delta import CONFIG, F64, SPEC, gradients, leaves, make_delta, peft_delta, squared
from torch import Tensor, nn

from lora_delta import DifferentiableDeltaCompute
from lora_delta.passes import Passes
from qwen_functional import LoraSpec, init_weights

HALVES = [torch.bfloat16, torch.float16]


class Generator(nn.Module):
    """A small network from a task vector to all LoRA tensors of each task."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        sizes = [rows * cols for rows, cols in self.shapes.values()]
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, sum(sizes))).to(dtype)
        self.sizes = sizes

    def forward(self, tasks: Tensor) -> dict[str, Tensor]:
        parts = self.body(tasks).split(self.sizes, dim=-1)
        return {n: p.unflatten(-1, s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(wrt, vjp) of each run of the engine since the fixture was set up."""
    seen: list[Any] = []
    engine = Passes.run

    def recorded(passes: Passes, lora: Any, adapters: slice, wanted: Any) -> Any:
        value, vjp = engine(passes, lora, adapters, wanted)
        seen.append((wanted, vjp))
        return value, vjp

    monkeypatch.setattr(Passes, "run", recorded)
    return seen


# --- Where the tensors come from --------------------------------------------------------------------------


def test_a_generators_gradients_equal_those_through_peft(device: str) -> None:
    torch.manual_seed(0)
    generator, tasks = Generator(SPEC.shapes(CONFIG)).to(device), torch.randn(3, 4, dtype=F64).to(device)
    parameters = dict(generator.named_parameters())
    got = gradients(squared(make_delta(device=device)(generator(tasks))), parameters)
    want = gradients(squared(peft_delta(CONFIG, SPEC, generator(tasks))[:, 0].mean(1)), parameters)
    one_task = [generator(task) for task in tasks]
    listed = gradients(squared(make_delta(device=device).forward_batch(one_task)), parameters)
    for name in parameters:
        assert relative_error(got[name], want[name]) <= tolerance(device, 1e-9), name
        assert relative_error(listed[name], want[name]) <= tolerance(device, 1e-9), name


def test_views_expanded_and_shared_tensors_get_the_gradients_of_peft(device: str) -> None:
    spec = LoraSpec(rank=2, target_modules=("q_proj", "k_proj", "down_proj"), layers_to_transform=[0, 2])
    start = random_lora(CONFIG, spec, device=device)
    names = list(start)
    ours, theirs = leaves(start), leaves(start)

    def disguised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        q, k = (n for n in names if "layers.2" in n and "lora_A" in n and "self_attn" in n)
        made = {n: t.mT.contiguous().mT.expand(3, *t.shape) for n, t in tensors.items()}  # not contiguous
        return {**made, k: made[q]}  # one leaf in two places

    want = gradients(squared(peft_delta(CONFIG, spec, disguised(theirs))), theirs, allow_unused=True)
    delta = make_delta(spec=spec, layer=(-1,), pooling="none", device=device)
    got = gradients(squared(delta(disguised(ours))), ours, allow_unused=True)
    for name in names:
        if want[name] is None:
            assert got[name] is None
        else:
            assert relative_error(got[name], want[name]) <= tolerance(device, 1e-9), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_gradients_are_in_the_tensors_own_dtype(base: torch.dtype, dtype: torch.dtype, device: str) -> None:
    delta = make_delta(dtype=base, device=device)
    compute = delta.weights.compute_dtype
    tensors = leaves(random_lora(CONFIG, SPEC, 2, dtype=dtype, device=device))
    exact = leaves({name: tensor.to(compute) for name, tensor in tensors.items()})
    value, of_exact = delta(tensors), delta(exact)
    assert torch.equal(value, of_exact)
    assert value.dtype == (F64 if base == F64 else torch.float32)
    got, want = gradients(squared(value), tensors), gradients(squared(of_exact), exact)
    # A GPU's kernels round float32 sums to the tensor's dtype at once, so gradients of narrow tensors are coarser.
    eps = max(torch.finfo(one).eps for one in ((dtype,) if device == "cpu" else (dtype, compute)))
    for name, gradient in got.items():
        assert (gradient.dtype, gradient.shape) == (dtype, tensors[name].shape)
        assert relative_error(gradient, want[name]) <= 4 * eps + 1e-6, name


def test_tensors_of_several_dtypes_in_a_dict_get_gradients_of_their_own(device: str) -> None:
    tensors = random_lora(CONFIG, SPEC, 2, dtype=torch.float32, device=device)
    mixed = leaves({n: t.bfloat16() if "lora_A" in n else t for n, t in tensors.items()})
    loss = squared(make_delta(dtype=torch.bfloat16, device=device).forward_batch([*one_by_one(mixed)]))
    assert {n: g.dtype for n, g in gradients(loss, mixed).items()} == {n: t.dtype for n, t in mixed.items()}


# --- Which tensors need gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("adapters_per_pass", [None, 2])
@pytest.mark.parametrize(
    ("wanted", "n_blocks"),
    [
        (lambda n: "layers.2." in n and "lora_B" in n, 1),
        (lambda n: "layers.1.mlp.down_proj.lora_A" in n, 2),
        (lambda n: "layers.0.self_attn.v_proj" in n or "layers.2.mlp.up_proj.lora_B" in n, 3),
        (lambda n: "lora_A" in n, 3),
    ],
)
def test_tensors_that_need_no_gradient_cost_no_work(
    calls: list[Any], wanted: Callable[[str], bool], n_blocks: int, adapters_per_pass: int | None
) -> None:
    delta = make_delta(adapters_per_pass=adapters_per_pass)
    every = leaves(random_lora(CONFIG, SPEC, 3))
    some = {n: t.detach().requires_grad_(wanted(n)) for n, t in every.items()}
    want = gradients(squared(delta(every)), every)
    delta(some)  # computes the base
    calls.clear()
    squared(delta(some)).backward()
    names = [name for name in some if wanted(name)]
    asked = [(list(wrt), vjp.n_blocks) for wrt, vjp in calls if wrt]
    assert asked == [(names, n_blocks)] * (1 if adapters_per_pass is None else 2)
    for name, tensor in some.items():
        if wanted(name):
            assert tensor.grad is not None
            assert relative_error(tensor.grad, want[name]) <= 1e-12, name
        else:
            assert tensor.grad is None, name


def test_an_adapter_that_is_not_in_the_loss_has_a_gradient_of_zero(device: str) -> None:
    tensors = leaves(random_lora(CONFIG, SPEC, 3, device=device))
    for gradient in gradients(make_delta(device=device)(tensors)[1].sum(), tensors).values():
        assert gradient[1].abs().max() > 0
        assert not gradient[[0, 2]].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_work_for_a_gradient_is_done_where_none_can_be_asked_for(
    calls: list[Any], mode: Callable[[], Any], frozen: bool
) -> None:
    delta, tensors = make_delta(), leaves(random_lora(CONFIG, SPEC, 3))
    expected = delta(tensors).detach()
    calls.clear()
    if frozen:
        value = delta({name: tensor.detach() for name, tensor in tensors.items()})
    else:
        with mode():
            value = delta(tensors)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    assert [(list(wrt), vjp.n_kept) for wrt, vjp in calls] == [([], 0)]


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_an_object_made_and_used_in_inference_mode_can_train_later(pooling: str, device: str) -> None:
    tensors = leaves(random_lora(CONFIG, SPEC, 3, device=device))
    expected = make_delta(pooling=pooling, device=device)
    with torch.inference_mode():
        delta = make_delta(pooling=pooling, device=device)
        delta(tensors)
    loss = lambda d: (d(tensors) * d.base_activation).sum()  # noqa: E731
    got, want = gradients(loss(delta), tensors), gradients(loss(expected), tensors)
    assert all(torch.equal(got[name], want[name]) for name in want)


# --- The graph --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adapters_per_pass": 2}, {"checkpoint": "block"}], ids=str)
def test_a_second_backward_through_a_retained_graph_gives_the_gradients_of_the_first(
    options: dict[str, Any], device: str
) -> None:
    tensors = leaves(random_lora(CONFIG, SPEC, 3, device=device))
    value = make_delta(**options, device=device)(tensors)
    first = gradients(squared(value), tensors, retain_graph=True)
    second = gradients(squared(value), tensors)
    other = gradients(squared(value.detach() + make_delta(**options, device=device)(tensors) * 0.5), tensors)
    assert all(torch.equal(first[name], second[name]) for name in tensors)
    assert not any(torch.equal(first[name], other[name]) for name in tensors)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        squared(value).backward()


@pytest.mark.parametrize("linear", [True, False])
def test_a_second_derivative_is_refused(linear: bool) -> None:
    tensors = leaves(random_lora(CONFIG, SPEC, 2))
    value = make_delta()(tensors)
    loss = value.sum() if linear else squared(value)
    first = gradients(loss, tensors, create_graph=True)
    penalty = torch.stack([gradient.square().sum() for gradient in first.values()]).sum()
    with pytest.raises(RuntimeError, match="twice"):
        (loss + penalty).backward()


@pytest.mark.parametrize("n_adapters", [None, 3])
@pytest.mark.parametrize("adapters_per_pass", [None, 2])
def test_a_tensor_changed_between_forward_and_backward_is_noticed(
    n_adapters: int | None, adapters_per_pass: int | None, device: str
) -> None:
    tensors = leaves(random_lora(CONFIG, SPEC, n_adapters, device=device))
    loss = squared(make_delta(adapters_per_pass=adapters_per_pass, device=device)(tensors))
    with torch.no_grad():
        tensors[next(reversed(tensors))].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_accumulated_gradients_are_the_sum(device: str) -> None:
    delta, other = make_delta(device=device), make_delta(probes=[[2, 3], [4, 5, 6]], device=device)
    tensors = leaves(random_lora(CONFIG, SPEC, 2, device=device))
    sum_of_both = gradients(squared(delta(tensors)) + squared(other(tensors)), tensors)
    for module in (delta, other):
        squared(module(tensors)).backward()
    for name, tensor in tensors.items():
        assert tensor.grad is not None
        assert relative_error(tensor.grad, sum_of_both[name]) <= 1e-12


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_neither_a_delta_nor_its_gradients(base: torch.dtype, half: torch.dtype, device: str) -> None:
    delta = make_delta(dtype=base, device=device)
    tensors = leaves(random_lora(CONFIG, SPEC, 3, dtype=torch.float32, device=device))
    value = delta(tensors)
    expected = [value, *gradients(squared(value), tensors).values()]
    fresh = make_delta(dtype=base, device=device)
    with torch.autocast(device, dtype=half):
        value = fresh(tensors)
        listed = fresh.forward_batch(one_by_one(tensors))
        got = [value, *gradients(squared(value), tensors).values()]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(listed, expected[0])


def test_a_generator_under_autocast_gets_gradients(device: str) -> None:
    generator = Generator(SPEC.shapes(CONFIG), torch.float32).to(device)
    delta = make_delta(dtype=torch.bfloat16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        tensors = generator(torch.randn(2, 4).to(device))
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        loss = squared(delta(tensors))
    loss.backward()
    for parameter in generator.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0


def test_training_a_generator_lowers_the_loss(device: str) -> None:
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=2)
    spec = LoraSpec(rank=2, alpha=4)
    probes = [[1, 2, 3], [4, 5]]
    weights = init_weights(config, device=device)
    delta = DifferentiableDeltaCompute(config, weights, probes, spec, adapters_per_pass=3)
    generator, tasks = Generator(spec.shapes(config), torch.float32).to(device), torch.eye(4).to(device)
    with torch.no_grad():
        target = delta(random_lora(config, spec, 4, seed=1, dtype=torch.float32, device=device))
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (delta(generator(tasks)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


@pytest.mark.parametrize("tracked", [True, False], ids=["with gradients", "without"])
def test_a_mean_loss_asks_the_engine_for_the_gradients_that_autograd_takes(calls: list[Any], tracked: bool) -> None:
    tensors = random_lora(CONFIG, SPEC, 2)
    some = [name for name in tensors if ".q_proj." in name]
    for name in some:
        tensors[name].requires_grad_()
    with torch.set_grad_enabled(tracked):
        make_delta().mean_loss(tensors, lambda deltas, _: deltas.square().mean())
    assert list(calls[-1][0]) == (some if tracked else [])
