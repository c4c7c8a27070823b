"""The same value and gradients from transformers + PEFT + ``torch.func.functional_call``, for comparison only.

The only file that imports transformers and peft, and only when the comparison is requested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from qwen_functional.architecture import PROJECTIONS

from ..delta import DifferentiableDeltaCompute

VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative, float32
HALF_FACTOR = 1.1  # in half precision: times PEFT's own error against float32, in the mean over adapters
_Found = tuple[Tensor, dict[str, Tensor]]  # value and gradients of an adapter


def compare_with_peft(
    delta: DifferentiableDeltaCompute,
    model: str | Path,
    adapters: Sequence[Mapping[str, Tensor]],
    cotangent: Tensor,
) -> tuple[bool, str]:
    """Whether the delta and every gradient of each adapter agree with PEFT's, and the measured errors.

    In float32 the relative error must be within 1e-5 for the hidden states and 1e-4 for each gradient. In half
    precision each adapter's error against PEFT in float32, on the same rounded weights and LoRA tensors, is compared
    with that of PEFT in the same dtype: the geometric mean of their ratios may be at most 1.1. One adapter's gradients
    can be ten times as sensitive to rounding as another's, and would decide a sum over all.

    Raises:
        ValueError: transformers or PEFT is not installed.
    """
    dtype = delta.weights.dtype
    adapters = [{name: tensor.to(dtype).to(tensor.dtype) for name, tensor in one.items()} for one in adapters]
    ours = [_our_value_and_gradients(delta, one, cotangent) for one in adapters]
    exact_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exact = [_peft_value_and_gradients(delta, model, one, cotangent, exact_dtype) for one in adapters]
    count = f"{len(ours[0][1])} of {len(delta.lora_shapes)} gradients"
    if dtype == exact_dtype:
        value_error = _error(*(torch.cat([value for value, _ in side]) for side in (ours, exact)))
        errors = {
            name: max(_error(our[name], their[name]) for (_, our), (_, their) in zip(ours, exact, strict=True))
            for name in exact[0][1]
        }
        worst = max(errors, key=lambda name: errors[name])
        passed = value_error <= VALUE_TOLERANCE and errors[worst] <= GRADIENT_TOLERANCE
        return passed, f"value {value_error:.1e}; {count}, worst {errors[worst]:.1e} ({worst.split('.layers.')[1]})"
    theirs = [_peft_value_and_gradients(delta, model, one, cotangent, dtype) for one in adapters]
    our_errors, their_errors = _errors(ours, exact), _errors(theirs, exact)
    value, gradient = (our_errors / their_errors).log().mean(0).exp().tolist()
    their_value, their_gradient = their_errors.median(0).values.tolist()
    return value <= HALF_FACTOR and gradient <= HALF_FACTOR, (
        f"error against float32, mean of {len(adapters)} adapters: value {value:.2f} times PEFT's ({their_value:.1e}); "
        f"{count}, all together {gradient:.2f} times ({their_gradient:.1e})"
    )


def _errors(found: Sequence[_Found], exact: Sequence[_Found]) -> Tensor:
    """(adapters, 2) float64: relative errors of the value and of all gradients together."""
    pairs = zip(found, exact, strict=True)
    errors = [(_error(value, true), _error(_flat(own), _flat(others))) for (value, own), (true, others) in pairs]
    return torch.tensor(errors, dtype=torch.float64)


def _our_value_and_gradients(
    delta: DifferentiableDeltaCompute, tensors: Mapping[str, Tensor], cotangent: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    value = delta(leaves)
    gradients = torch.autograd.grad(value, list(leaves.values()), cotangent, materialize_grads=True)
    return value.detach() + delta.base_activation, dict(zip(leaves, gradients, strict=True))


def _peft_value_and_gradients(
    delta: DifferentiableDeltaCompute,
    model: str | Path,
    tensors: Mapping[str, Tensor],
    cotangent: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean hidden state (H,) of the adapted model, and the gradients of its product with the cotangent."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"--against-peft needs transformers and peft: {error}") from error
    logging.disable_progress_bar()
    device = delta.weights.device
    base: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=delta.weights.dtype)
    alpha: Any = delta.spec.alpha
    lora = LoraConfig(r=delta.spec.rank, lora_alpha=alpha, target_modules=list(PROJECTIONS))
    peft_model = get_peft_model(base.to(device, dtype), lora, autocast_adapter_dtype=False).eval().requires_grad_(False)
    leaves = {name: tensor.detach().to(dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}
    parameters = {name.replace(".weight", ".default.weight"): leaf for name, leaf in leaves.items()}
    input_ids, mask = _padded(delta, device)
    outputs = functional_call(
        peft_model,
        parameters,
        kwargs={"input_ids": input_ids, "attention_mask": mask, "output_hidden_states": True, "logits_to_keep": 1},
    )
    last = mask.sum(1) - 1
    hidden = outputs.hidden_states[-1][torch.arange(len(last), device=device), last]
    value = hidden.to(cotangent.dtype).mean(0)
    gradients = torch.autograd.grad(value, list(leaves.values()), cotangent)
    return value.detach(), {name: g.float() for name, g in zip(leaves, gradients, strict=True)}


def _padded(delta: DifferentiableDeltaCompute, device: torch.device) -> tuple[Tensor, Tensor]:
    """The probes, read back from the packed row, padded on the right to the longest."""
    tokens = delta.tokens
    input_ids = torch.zeros(len(tokens.lengths), max(tokens.lengths), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, path in enumerate(tokens.paths):
        mask[row, : len(path)] = 1
        input_ids[row, : len(path)] = tokens.input_ids[path]
    return input_ids.to(device), mask.to(device)


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten().float() for name in sorted(gradients)])


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).double().norm() / exact.double().norm())
