"""The delta as a submodule, and in the transforms of ``torch.func``: the result is right, or there is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import random_lora
from test_delta import CONFIG, F64, SPEC, leaves, make_delta
from torch import Tensor, nn
from torch.autograd import forward_ad

from qwen_functional import pack
from qwen_functional.forward import forward_vjp

Delta = Any


@pytest.fixture(scope="module")
def delta() -> Delta:
    return make_delta()


# --- Moved ------------------------------------------------------------------------------------------------

ELSEWHERE: dict[str, Callable[[Delta], Any]] = {
    "to": lambda delta: delta.to("meta"),
    "to a device and a dtype": lambda delta: delta.to("meta", F64),
    "to a tensor's": lambda delta: delta.to(torch.empty(0, device="meta", dtype=F64)),
    "to_empty": lambda delta: delta.to_empty(device="meta"),
    "within a module": lambda delta: nn.Sequential(nn.Linear(2, 2), delta).to("meta"),
    "deep within": lambda delta: nn.ModuleDict({"a": nn.Sequential(delta)}).to(device="meta"),
}
IN_ANOTHER_DTYPE: dict[str, Callable[[Delta], Any]] = {
    "half": lambda delta: delta.half(),
    "bfloat16": lambda delta: delta.bfloat16(),
    "float": lambda delta: delta.float(),
    "type": lambda delta: delta.type(torch.float32),
    "to": lambda delta: delta.to(torch.float32),
    "to a device and a dtype": lambda delta: delta.to("cpu", torch.float32),
    "to a tensor's": lambda delta: delta.to(torch.zeros(())),
}
AS_IT_IS: dict[str, Callable[[Delta], Any]] = {
    "to": lambda delta: delta.to("cpu"),
    "cpu": lambda delta: delta.cpu(),
    "double": lambda delta: delta.double(),
    "to a device and a dtype": lambda delta: delta.to(device="cpu", dtype=F64),
    "share_memory": lambda delta: delta.share_memory(),
    "eval": lambda delta: delta.eval(),
    "requires_grad_": lambda delta: delta.requires_grad_(False),
}


@pytest.mark.parametrize("move", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_delta_refuses_another_device(delta: Delta, move: Callable[[Delta], Any]) -> None:
    with pytest.raises(ValueError, match=r"^DifferentiableDeltaCompute is on cpu and is not moved to meta; load it on"):
        move(delta)


@pytest.mark.parametrize("change", IN_ANOTHER_DTYPE.values(), ids=IN_ANOTHER_DTYPE)
def test_a_delta_refuses_another_dtype(delta: Delta, change: Callable[[Delta], Any]) -> None:
    with pytest.raises(ValueError, match=r"^DifferentiableDeltaCompute has dtype torch.float64, which is not changed"):
        change(delta)


@pytest.mark.parametrize("stay", AS_IT_IS.values(), ids=AS_IT_IS)
def test_a_delta_stays_itself_where_nothing_changes(delta: Delta, stay: Callable[[Delta], Any]) -> None:
    assert stay(delta) is delta


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16), lambda m: m.float()])
def test_a_module_that_holds_a_delta_changes_its_own_dtype_alone(delta: Delta, change: Callable[[Any], Any]) -> None:
    tensors = random_lora(CONFIG, SPEC, 2)
    expected = delta(tensors)
    holder = change(nn.ModuleDict({"generator": nn.Linear(2, 2).double(), "delta": delta}))
    assert holder["generator"].weight.dtype != F64
    assert holder.state_dict().keys() == {"generator.weight", "generator.bias"}
    assert delta.dtype == F64
    assert torch.equal(holder["delta"](tensors), expected)


# --- Transformed ------------------------------------------------------------------------------------------


def dual(call: Callable[[Any], Tensor], tensors: dict[str, Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return call({name: forward_ad.make_dual(tensor, tensor) for name, tensor in tensors.items()})


TRANSFORMS: dict[str, Callable[[Callable[[Any], Tensor], dict[str, Tensor]], Any]] = {
    "grad": lambda call, tensors: torch.func.grad(lambda t: call(t).sum())(tensors),
    "jacrev": lambda call, tensors: torch.func.jacrev(call)(tensors),
    "vmap": lambda call, tensors: torch.func.vmap(call)(tensors),
    "jvp": lambda call, tensors: torch.func.jvp(call, (tensors,), (tensors,)),
    "forward_ad": dual,
}


@pytest.mark.parametrize("tracked", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_of_a_call_is_refused(delta: Delta, transform: Callable[..., Any], tracked: bool) -> None:
    tensors = random_lora(CONFIG, SPEC, 3)
    calls: dict[str, Callable[[Any], Tensor]] = {
        "delta": delta,
        "mean_loss": lambda t: delta.mean_loss(t, lambda deltas, _: deltas.mean()),
        "engine": lambda t: forward_vjp(CONFIG, delta.weights, pack([[1, 2]]), SPEC.bind(CONFIG, t))[0],
    }
    for name, call in calls.items():
        if transform is TRANSFORMS["vmap"] and name == "mean_loss":
            continue  # it only takes a batch
        lower_dual = name == "engine" and transform is dual  # torch's own error: this layer knows no autograd
        expected = NotImplementedError if lower_dual else ValueError
        with pytest.raises(expected, match=r"is inside a transform of torch\.func|is a dual number|forward AD"):
            transform(call if tracked else torch.no_grad()(call), tensors)


def test_a_transform_of_the_vjp_is_refused(delta: Delta) -> None:
    lora = SPEC.bind(CONFIG, random_lora(CONFIG, SPEC, 2))
    value, vjp = forward_vjp(CONFIG, delta.weights, pack([[1, 2]]), lora)
    with pytest.raises(ValueError, match=r"tensor 'cotangent' is inside a transform of torch\.func"):
        torch.func.vmap(vjp)(torch.ones(3, *value.shape, dtype=F64))


def test_many_cotangents_at_once_are_refused(delta: Delta) -> None:
    tensors = leaves(random_lora(CONFIG, SPEC, 2))
    value = delta(tensors)
    cotangents = torch.ones(2, *value.shape, dtype=F64)
    with pytest.raises(RuntimeError, match="vmap"):  # torch's own error, which does not name the tensor
        torch.autograd.grad(value, list(tensors.values()), cotangents, is_grads_batched=True)
