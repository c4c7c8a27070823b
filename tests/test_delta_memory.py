"""What a delta costs: bytes held and runs of the engine, counted rather than timed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from reference import one_by_one, random_lora, relative_error, tiny_config
from test_delta import CONFIG, F64, SPEC, gradients, leaves, make_delta, squared
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_delta.passes
from lora_delta import DifferentiableDeltaCompute
from lora_delta.delta_losses import delta_loss
from qwen_functional import LoraSpec, Qwen2Weights, init_weights

# The activations are far larger than the LoRA tensors.
LONG = tiny_config(num_hidden_layers=4, max_position_embeddings=256)
RANK_1 = LoraSpec(rank=1, target_modules=("q_proj", "down_proj"))


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside it and are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._see(tensor, made_here=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, made_here=True)
        return result

    def _see(self, tensor: Tensor, made_here: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            n_bytes = storage.nbytes() if made_here else 0
            self.live += n_bytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, n_bytes)

    def _forget(self, storage: int, n_bytes: int) -> None:
        self._known.remove(storage)
        self.live -= n_bytes


def long_delta(**options: Any) -> DifferentiableDeltaCompute:
    probes = [[*range(60)] * 2, [7] * 9]
    return DifferentiableDeltaCompute(LONG, init_weights(LONG), probes, RANK_1, prepack=False, **options)


def step(delta: DifferentiableDeltaCompute, n_adapters: int) -> tuple[int, int, int, int]:
    """Bytes of a training step (peak, held from forward to backward, left after it), and of the tensors."""
    tensors = leaves(random_lora(LONG, RANK_1, n_adapters, dtype=torch.float32))
    delta({name: tensor.detach() for name, tensor in tensors.items()})  # computes the base
    gradients(squared(delta(tensors)), tensors)  # makes the plans, whose tables stay
    with LiveBytes() as bytes_:
        loss = delta(tensors).square().sum()
        held = bytes_.live
        loss.backward()
        del loss
    left = bytes_.live - sum(tensor.grad.nbytes for tensor in tensors.values() if tensor.grad is not None)
    return bytes_.peak, held, left, sum(tensor.nbytes for tensor in tensors.values())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of adapters in each run of the engine since the fixture was set up."""
    seen: list[int] = []
    engine = lora_delta.passes.forward_vjp

    def counted(config: Any, weights: Any, tokens: Any, lora: Any, **options: Any) -> Any:
        seen.append(0 if lora is None else lora.n_adapters)
        return engine(config, weights, tokens, lora, **options)

    monkeypatch.setattr(lora_delta.passes, "forward_vjp", counted)
    return seen


# --- Passes -----------------------------------------------------------------------------------------------


def test_memory_of_passes_does_not_grow_with_the_number_of_adapters() -> None:
    in_passes = long_delta(adapters_per_pass=8)
    one_pass, held_by_one, _, tensors_of_8 = step(in_passes, 8)
    many_passes, held_by_many, _, tensors_of_64 = step(in_passes, 64)
    # On top of one pass: the gradients, per pass and joined, and the values, but no activations.
    assert many_passes < 1.05 * one_pass + 3 * tensors_of_64
    assert held_by_many < 1.05 * held_by_one + tensors_of_64
    assert 20 * tensors_of_8 < one_pass
    assert step(long_delta(), 32)[0] > 3 * one_pass  # the measurement sees what passes save


def test_nothing_is_held_after_backward_and_every_step_peaks_alike() -> None:
    for options in ({}, {"adapters_per_pass": 2}, {"checkpoint": "block"}):
        delta = long_delta(**options)
        peaks, _, left, _ = zip(*(step(delta, 5) for _ in range(3)), strict=True)
        assert set(left) == {0}
        assert len(set(peaks)) == 1


def test_a_delta_goes_with_its_last_user() -> None:
    """Without garbage collection of cycles: a mesh that outlives the script's main() can abort the process at exit."""
    gc.collect()
    gc.disable()
    try:
        for options in ({}, {"adapters_per_pass": 2}, {"checkpoint": "block"}):
            delta = make_delta(**options)
            tensors = leaves(random_lora(CONFIG, SPEC, 3))
            delta(tensors).square().sum().backward()
            delta.mean_loss(tensors, lambda deltas, _: deltas.square().mean()).backward()
            delta.forward_batch([{name: tensor[0] for name, tensor in tensors.items()}])
            gone = weakref.ref(delta)
            del delta
            assert gone() is None
    finally:
        gc.enable()


def test_a_call_without_gradients_holds_its_value_alone() -> None:
    delta = long_delta()
    tensors = leaves(random_lora(LONG, RANK_1, 3, dtype=torch.float32))
    delta({name: tensor.detach() for name, tensor in tensors.items()})
    for mode in (torch.no_grad(), torch.inference_mode()):
        with LiveBytes() as bytes_, mode:
            value = delta(tensors)
        assert bytes_.live == value.nbytes


@pytest.mark.parametrize("adapters_per_pass", [1, 2, 3, 6, 7, 64])
def test_passes_change_neither_values_nor_gradients(adapters_per_pass: int) -> None:
    tensors = leaves(random_lora(CONFIG, SPEC, 7))
    whole, parts = make_delta()(tensors), make_delta(adapters_per_pass=adapters_per_pass)(tensors)
    assert relative_error(parts, whole) <= 1e-12
    got, want = gradients(squared(parts), tensors), gradients(squared(whole), tensors)
    for name in want:
        assert relative_error(got[name], want[name]) <= 1e-12, name
    listed = make_delta(adapters_per_pass=adapters_per_pass).forward_batch(one_by_one(tensors))
    assert torch.equal(listed, parts)


# --- Runs of the engine -----------------------------------------------------------------------------------


def test_the_base_activation_is_not_computed_again(runs: list[int]) -> None:
    delta, tensors = make_delta(), random_lora(CONFIG, SPEC, 3)
    assert runs == [0]
    assert torch.equal(delta.base_activation, delta.base_activation)
    assert runs == [0]
    for _ in range(3):
        delta(tensors)
        delta.forward_batch(one_by_one(tensors))
    assert runs == [0, 3, 3, *[3] * 5]  # the base, then the values


@pytest.mark.parametrize(
    ("n_adapters", "adapters_per_pass", "forwards", "backwards"),
    [(7, None, [7], []), (7, 7, [7], []), (7, 3, [3, 3, 1], [3, 3]), (2, 1, [1, 1], [1])],
)
def test_the_engine_runs_once_for_each_pass_and_again_where_a_pass_kept_nothing(
    runs: list[int], n_adapters: int, adapters_per_pass: int | None, forwards: list[int], backwards: list[int]
) -> None:
    delta = make_delta(adapters_per_pass=adapters_per_pass)
    tensors = leaves(random_lora(CONFIG, SPEC, n_adapters))
    delta({name: tensor.detach() for name, tensor in tensors.items()})
    runs.clear()
    loss = squared(delta(tensors))
    assert runs == forwards
    loss.backward()
    assert runs == forwards + backwards  # recomputed except for the last pass, which was kept


@pytest.mark.parametrize("adapters_per_pass", [None, 7, 3, 1])
def test_a_mean_loss_runs_each_pass_once_and_equals_the_loss_of_all_deltas(
    runs: list[int], adapters_per_pass: int | None
) -> None:
    tensors, target = leaves(random_lora(CONFIG, SPEC, 7)), torch.randn(7, CONFIG.hidden_size, dtype=F64)
    delta = make_delta(adapters_per_pass=adapters_per_pass)

    def loss(deltas: Tensor, adapters: slice) -> Tensor:
        return delta_loss(deltas, target[adapters])

    want = loss(delta(tensors), slice(0, 7))
    wanted = gradients(3 * want, tensors)
    runs.clear()
    got = delta.mean_loss(tensors, loss)
    found = gradients(3 * got, tensors)
    each = adapters_per_pass or 7
    assert runs == [min(each, 7 - start) for start in range(0, 7, each)]
    assert relative_error(got, want) <= 1e-12
    for name in wanted:
        assert relative_error(found[name], wanted[name]) <= 1e-12, name
    with torch.no_grad():
        assert torch.equal(delta.mean_loss(tensors, loss), got)


def test_a_mean_loss_holds_no_more_than_one_pass() -> None:
    delta = long_delta(adapters_per_pass=8)

    def peak(n_adapters: int) -> tuple[int, int]:
        tensors = leaves(random_lora(LONG, RANK_1, n_adapters, dtype=torch.float32))
        delta({name: tensor.detach() for name, tensor in tensors.items()})
        with LiveBytes() as bytes_:
            delta.mean_loss(tensors, lambda deltas, _: deltas.square().sum(-1).mean()).backward()
        return bytes_.peak, sum(tensor.nbytes for tensor in tensors.values())

    (one_pass, _), (many_passes, tensors_of_64) = peak(8), peak(64)
    assert many_passes < 1.05 * one_pass + 2 * tensors_of_64


def test_a_mean_loss_refuses_one_adapter_a_vector_and_a_second_backward() -> None:
    delta, tensors = make_delta(), leaves(random_lora(CONFIG, SPEC, 2))
    with pytest.raises(ValueError, match=r"one adapter without a leading G, expected a batch \(G, …\)"):
        delta.mean_loss(one_by_one(tensors)[0], lambda deltas, _: deltas.mean())
    with pytest.raises(ValueError, match=r"loss has shape \(2,\), expected a scalar"):
        delta.mean_loss(tensors, lambda deltas, _: deltas.mean(-1))
    loss = delta.mean_loss(tensors, lambda deltas, _: deltas.mean())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has already run backward"):
        loss.backward()
    first = next(iter(tensors.values()))
    loss = delta.mean_loss(tensors, lambda deltas, _: deltas.mean())
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


# --- Checkpointing ----------------------------------------------------------------------------------------


def test_checkpointed_blocks_hold_less_than_kept_ones() -> None:
    held = {checkpoint: step(long_delta(checkpoint=checkpoint), 4)[1] for checkpoint in ("none", "block")}
    # A block's input (H), against q, k, v, o, gate, up and the residuals as well.
    assert held["block"] < 0.25 * held["none"]


def test_checkpoint_used_is_what_was_chosen() -> None:
    tensors = leaves(random_lora(LONG, RANK_1, 3, dtype=torch.float32))
    used: dict[str, str | None] = {}
    for options in (
        {"checkpoint": "none"},
        {"checkpoint": "block"},
        {"checkpoint": "block", "adapters_per_pass": 2},
        {"checkpoint": "none", "memory_budget": 0},
        {"memory_budget": 0},
        {"memory_budget": 1 << 40},
        {},
    ):
        delta = long_delta(**options)
        assert delta.checkpoint_used is None
        with torch.no_grad():
            delta(tensors)
        assert delta.checkpoint_used is None
        delta(tensors).sum().backward()
        used[str(options)] = delta.checkpoint_used
        delta({name: tensor.detach() for name, tensor in tensors.items()})
        assert delta.checkpoint_used == used[str(options)]
    assert list(used.values()) == ["none", "block", "block", "none", "block", "none", "none"]


def test_a_memory_budget_is_used_and_not_exceeded() -> None:
    least, most = (step(long_delta(checkpoint=checkpoint), 4)[1] for checkpoint in ("block", "none"))
    used = []
    for percent in range(10, 131, 10):
        budget = most * percent // 100
        delta = long_delta(memory_budget=budget)
        assert step(delta, 4)[1] <= max(budget, least)
        used.append(delta.checkpoint_used)
    # The budget counts all rows of every block, although the last block keeps few.
    assert list(dict.fromkeys(used)) == ["block", *(f"{n} of 4 blocks kept" for n in (1, 2, 3)), "none"]


def test_blocks_kept_or_computed_again_give_the_same_bits() -> None:
    tensors = leaves(random_lora(LONG, RANK_1, 3, dtype=torch.float32))
    results = []
    for options in ({"checkpoint": "none"}, {"checkpoint": "block"}, {"memory_budget": 1_000_000}):
        value = long_delta(**options)(tensors)
        results.append([value, *gradients(squared(value), tensors).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_base_weights_are_not_changed() -> None:
    weights = init_weights(CONFIG, dtype=F64)
    before: Qwen2Weights = init_weights(CONFIG, dtype=F64)
    delta = DifferentiableDeltaCompute(CONFIG, weights, [[1, 2, 3], [1, 4]], SPEC, prepack=False)
    squared(delta(leaves(random_lora(CONFIG, SPEC, 3)))).backward()
    for name, view in weights.named_views(CONFIG).items():
        assert torch.equal(view, before.named_views(CONFIG)[name]), name
        assert not view.requires_grad
        assert view.grad is None
