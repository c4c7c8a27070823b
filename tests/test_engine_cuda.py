"""The engine on fake CUDA tensors: shapes, dtypes and devices of every operation, without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import CONFIGS, tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qwen_functional.plan as plan_module
from qwen_functional import LoraSpec, PackedTokens, heads, pack, pack_each
from qwen_functional.backends.plain import Plain
from qwen_functional.finite import raise_found
from qwen_functional.forward import forward, forward_vjp
from qwen_functional.heads import Head, Hidden, TokenLoss
from qwen_functional.ops import lm_head
from qwen_functional.ops.lm_head import StateTargets, Targets
from qwen_functional.plan import Plan
from qwen_functional.weights import empty_weights

CUDA = torch.device("cuda", 0)
CONFIG = tiny_config(**CONFIGS["windows"])
SPEC = LoraSpec(rank=2)
TOKENS = pack([[5, 6, 7, 8, 9], [5, 6, 7, 20], [30, 31, 32], [5, 6], [5, 6]])
TOKENS.end  # noqa: B018  (cached now, from real tensors)
OWN = pack_each([[[5, 6, 7, 8], [5, 6, 20]], [[30, 31, 32], [30, 31, 32]], [[7, 7, 7]]])
ROWS, WEIGHTS = torch.tensor([1, 2, 1]), torch.tensor([0.5, 2.0, 1.0])
TWO_EACH = Targets(ROWS, torch.tensor([[7, 8], [9, 7], [8, 7]]), torch.full((3, 2), 0.5), WEIGHTS)
STATES = StateTargets(ROWS, torch.ones(3, CONFIG.hidden_size), WEIGHTS)
BUDGET = 1 << 20  # free GPU memory cannot be queried


class FloatsOnTheCpu(TorchDispatchMode):
    """Collects the shapes of floating-point tensors that are made on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.device.type == "cpu":
                self.shapes.add(tuple(tensor.shape))
        return result


aten = torch.ops.aten
READING = (aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero)


class Transfers(TorchDispatchMode):
    """Collects the operations that copy values from the device to the host (back), or from the host to it (there).

    Of the latter, ``waiting`` are those that wait until the device has done all that was asked of it before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.back: list[str] = []
        self.there: list[str] = []
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.overloadpacket, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        by_mask = name in (aten.index, aten.index_put, aten.index_put_) and any(t.dtype == torch.bool for t in given)
        if (name in READING or by_mask) and any(t.device.type == "cuda" for t in given):  # e.g. how many are true
            self.back.append(str(func))
        if name in (aten.lift_fresh, aten.lift_fresh_copy):  # torch.tensor of numbers
            self.there.append(str(func))
        result = func(*args, **(kwargs or {}))
        if any(t.device.type == "cpu" for t in given):
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if any(t.device.type == "cuda" for t in [*given, *made]):
                into_host = given and name in (aten.copy_,) and given[0].device.type == "cpu"
                (self.back if into_host else self.there).append(str(func))
                if not into_host and not (kwargs or {}).get("non_blocking"):
                    self.waiting.append(str(func))
        elif any(t.device.type == "cpu" for t in tree_leaves(result) if isinstance(t, Tensor)) and given:
            self.back.append(str(func))
        return result


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FloatsOnTheCpu]:
    """Allows tensors on a GPU that does not exist. Two devices in one operation are an error."""
    # Where torch is built without CUDA, these Python methods look for a GPU before they reach the fake one.
    for name, aten in (
        ("__getitem__", _getitem),
        ("__setitem__", lambda x, index, value: torch.ops.aten.copy_(_getitem(x, index), value)),
        ("__invert__", torch.bitwise_not),
        ("copy_", torch.ops.aten.copy_),
    ):
        monkeypatch.setattr(Tensor, name, _on_cuda(aten, getattr(Tensor, name)))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    else:  # read what checks in other tests have found: it is real, and unreadable among fake tensors
        torch.cuda.synchronize()
        with contextlib.suppress(ValueError):
            raise_found()
    # No kernel can run, so use torch's own operations, in the form for any device.
    monkeypatch.setattr("qwen_functional.backends.cuda.can_fuse", lambda *_: False)
    # The tokens are real tensors on the CPU, and are read there.
    for name in ("check_fits", "reads", "tiles", "readout_tiles"):
        monkeypatch.setattr(PackedTokens, name, _with_real_tensors(getattr(PackedTokens, name)))
    for of, name in ((plan_module, "_places"), (TokenLoss, "reads"), (heads, "_joined"), (lm_head, "_by_row")):
        monkeypatch.setattr(of, name, _with_real_tensors(getattr(of, name)))
    with FakeTensorMode(allow_non_fake_inputs=True), FloatsOnTheCpu() as floats:
        yield floats


def _on_cuda(aten: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *args: (aten if x.device.type == "cuda" else method)(x, *args)


def _with_real_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    def unfaked(*args: Any) -> Any:
        with unset_fake_temporarily():
            return method(*args)

    return unfaked


def _getitem(x: Tensor, index: Any) -> Tensor:
    items, dim = index if isinstance(index, tuple) else (index,), 0
    for place, item in enumerate(items):
        if item is Ellipsis:
            dim = x.dim() - sum(later is not None for later in items[place + 1 :])
        elif isinstance(item, int):
            x = x.select(dim, item)
        else:
            if item is None:
                x = x.unsqueeze(dim)
            elif isinstance(item, slice):
                x = torch.ops.aten.slice(x, dim, item.start, item.stop, item.step or 1)
            else:
                x = torch.ops.aten.index(x, [None] * dim + [item])
            dim += 1
    return x


def lora_on_cuda(n_adapters: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    lead = () if n_adapters is None else (n_adapters,)
    return {name: torch.empty(*lead, *shape, dtype=dtype, device="cuda") for name, shape in SPEC.shapes(CONFIG).items()}


@pytest.mark.parametrize(
    ("dtype", "n_adapters", "options"),
    [
        (torch.bfloat16, 3, {"checkpoint": "none"}),
        (torch.bfloat16, 3, {"checkpoint": "block"}),
        (torch.bfloat16, None, {"layer": (0, 2, -1)}),
        (torch.float16, 3, {}),
        (torch.float32, 3, {}),
        (torch.float64, None, {"layer": (1,)}),
    ],
    ids=str,
)
def test_all_tensors_of_forward_vjp_are_on_the_weights_device(
    fake_cuda: FloatsOnTheCpu, dtype: torch.dtype, n_adapters: int | None, options: dict[str, Any]
) -> None:
    weights = empty_weights(CONFIG, dtype, "cuda")
    tensors = lora_on_cuda(n_adapters, torch.float32)
    lora = SPEC.bind(CONFIG, tensors)
    for wrt in (None, [name for name in tensors if "k_proj" in name or "mlp" in name]):
        value, vjp = forward_vjp(CONFIG, weights, TOKENS, lora, wrt=wrt, memory_budget=BUDGET, **options)
        lead = (n_adapters or 1, len(options["layer"])) if "layer" in options else (n_adapters or 1,)
        assert value.device == CUDA
        assert tuple(value.shape) == (*lead, 5, CONFIG.hidden_size)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        gradients = vjp(torch.empty_like(value))
        assert list(gradients) == (wrt or list(tensors))
        for name, gradient in gradients.items():
            assert gradient.device == CUDA
            assert (gradient.shape, gradient.dtype) == (tensors[name].shape, tensors[name].dtype)
    # Only short lists come from the CPU: rope's frequencies and the scales of the ranks.
    assert all(len(shape) < 2 for shape in fake_cuda.shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tensors_of_forward_are_on_the_weights_device(fake_cuda: FloatsOnTheCpu, dtype: torch.dtype) -> None:
    weights = empty_weights(CONFIG, dtype, "cuda")
    lora = SPEC.bind(CONFIG, lora_on_cuda(2, torch.float32))
    ids = torch.empty(3, 5, dtype=torch.int64, device="cuda")
    for inputs in ({}, {"attention_mask": torch.empty_like(ids)}, {"position_ids": torch.empty_like(ids)}):
        index = torch.empty(3, dtype=torch.int64, device="cuda")
        output = forward(CONFIG, weights, ids, **inputs, lora=lora, adapter_index=index, output_hidden_states=True)
        assert output.hidden_states is not None
        for tensor in (output.logits, output.last_hidden_state, *output.hidden_states):
            assert (tensor.device, tensor.dtype) == (CUDA, dtype)
    assert all(len(shape) < 2 for shape in fake_cuda.shapes)


def test_two_devices_in_one_operation_are_an_error(fake_cuda: FloatsOnTheCpu) -> None:
    """Otherwise the tests above would find nothing."""
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(2, 2, device="cuda") @ torch.empty(2, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_adapters", [None, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint": "none"},
        {"checkpoint": "block"},
        {"layer": (0, 2, -1), "read": "all"},
        {"layer": 1, "wrt": ["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"]},
    ],
    ids=str,
)
def test_a_step_by_a_plan_leaves_all_values_where_they_are(
    fake_cuda: FloatsOnTheCpu, options: dict[str, Any], n_adapters: int | None, dtype: torch.dtype
) -> None:
    weights = empty_weights(CONFIG, dtype, "cuda")
    tensors = lora_on_cuda(n_adapters, torch.float32)
    plan = Plan(CONFIG, weights, TOKENS, SPEC.bind(CONFIG, tensors), memory_budget=BUDGET, **options)
    assert type(plan.backend) is Plain
    for _ in range(2):
        with Transfers() as transfers:
            value, vjp = forward_vjp(CONFIG, weights, TOKENS, SPEC.bind(CONFIG, tensors), plan=plan)
            gradients = vjp(torch.empty_like(value))
        assert gradients
        assert {tensor.device for tensor in (value, *gradients.values())} == {CUDA}
        assert (transfers.back, transfers.there) == ([], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [TOKENS, OWN], ids=["shared texts", "own texts"])
@pytest.mark.parametrize(
    "head",
    [
        TokenLoss([Targets.of_tokens(ROWS[:2], torch.tensor([7, 8]), WEIGHTS[:2])]),
        TokenLoss([TWO_EACH], label_smoothing=0.1, temperature=2.0),
        TokenLoss([STATES], temperature=2.0),
    ],
    ids=["cross-entropy", "several targets for a row", "teacher's states"],
)
def test_a_step_with_a_loss_by_a_plan_leaves_all_values_where_they_are(
    fake_cuda: FloatsOnTheCpu, head: TokenLoss, tokens: Any, dtype: torch.dtype
) -> None:
    weights, lora = empty_weights(CONFIG, dtype, "cuda"), SPEC.bind(CONFIG, lora_on_cuda(3, torch.float32))
    own = replace(head, targets=[*head.targets] * (3 if tokens is OWN else 1))
    both: list[Head] = [own, Hidden()]
    plan = Plan(CONFIG, weights, tokens, lora, memory_budget=BUDGET, heads=both)
    with Transfers() as transfers:
        values, vjp = forward_vjp(CONFIG, weights, tokens, lora, plan=plan, heads=both)
        gradients = vjp([torch.empty_like(value) for value in values])
    assert values[0].shape == (3,)
    assert {tensor.device for tensor in (*values, *gradients.values())} == {CUDA}
    assert (transfers.back, transfers.there) == ([], [])


@pytest.mark.parametrize("tokens", [TOKENS, OWN], ids=["shared texts", "own texts"])
def test_a_plan_for_other_texts_is_made_without_waiting_for_the_device(fake_cuda: FloatsOnTheCpu, tokens: Any) -> None:
    """Else a GPU would be idle in each step with texts of its own, from the end of the one before it."""
    n = 3 if tokens is OWN else 1
    every: list[Head] = [Hidden(), TokenLoss([TWO_EACH] * n, label_smoothing=0.1), TokenLoss([STATES] * n)]
    weights, lora = empty_weights(CONFIG, torch.bfloat16, "cuda"), SPEC.bind(CONFIG, lora_on_cuda(3, torch.float32))
    with Transfers() as transfers:
        Plan(CONFIG, weights, tokens, lora, memory_budget=BUDGET, heads=every)
    assert (transfers.back, transfers.waiting) == ([], [])
    assert transfers.there


def test_what_is_moved_between_host_and_device_is_seen(fake_cuda: FloatsOnTheCpu) -> None:
    """Otherwise the test above would find nothing."""
    there, host = torch.empty(3, device=CUDA), torch.empty(3)

    def seen(move: Callable[[], object]) -> Transfers | None:
        with Transfers() as transfers:
            try:
                move()
            except RuntimeError:  # a fake tensor has no value, and without CUDA some methods look for it
                return None
        return transfers

    for back in (
        lambda: there[0].item(),
        lambda: torch.ops.aten._local_scalar_dense(there[0]),
        there.tolist,
        there.nonzero,
        there.cpu,
        lambda: bool(there.sum() > 0),
        lambda: torch.ops.aten.copy_(host, there),
        lambda: there.to("cpu", non_blocking=True),
        lambda: torch.ops.aten.index(there, [there > 0]),
    ):
        moved = seen(back)
        assert moved is None or (moved.back and not moved.there)
    for brought in (
        lambda: host.to(CUDA),
        lambda: torch.ops.aten.copy_(there, host),
        lambda: torch.tensor([0.5, 1.0], device=CUDA),
        lambda: there * torch.tensor(0.5),
        lambda: torch.ops.aten.index(there, [torch.arange(2)]),
    ):
        moved = seen(brought)
        assert moved is None or (moved.there and not moved.back and moved.waiting)
    unhurried = seen(lambda: host.to(CUDA, non_blocking=True))
    assert unhurried is not None
    assert (bool(unhurried.there), unhurried.waiting) == (True, [])
    moved = seen(lambda: host.to(CUDA))
    assert moved is not None
    assert moved.there
    nothing = seen(lambda: there * 2 + torch.arange(3, device=CUDA))
    assert nothing is not None
    assert not nothing.back + nothing.there
