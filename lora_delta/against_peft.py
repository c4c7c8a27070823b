"""The same value and gradients by transformers + PEFT + ``torch.func.functional_call``, for comparison only.

The one file that imports transformers and peft, and only when the comparison is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from qwen_functional.lora import PROJECTIONS

from .delta import DifferentiableDeltaCompute

VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative, float32
HALF_FACTOR = 1.1  # in half precision: of PEFT's own error against float32


def compare_with_peft(
    delta: DifferentiableDeltaCompute, model: str | Path, tensors: Mapping[str, Tensor], cotangent: Tensor
) -> tuple[bool, str]:
    """Whether the delta and every gradient agree with PEFT's, and the measured errors.

    In float32 the relative error must be within 1e-5 for the hidden states and 1e-4 for each gradient. In half
    precision our error against PEFT in float32 may be 1.1 times that of PEFT in the same dtype.

    Raises:
        ValueError: transformers or PEFT is not installed.
    """
    dtype = delta.weights.dtype
    exact_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exact = _peft_value_and_gradients(delta, model, tensors, cotangent, exact_dtype)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    ours_delta = delta(leaves)
    gradients = torch.autograd.grad(ours_delta, list(leaves.values()), cotangent)
    ours = ours_delta.detach() + delta.base_activation, dict(zip(leaves, gradients, strict=True))
    count = f"{len(ours[1])} of {len(delta.lora_shapes)} gradients"
    if dtype == exact_dtype:
        value_error = _error(ours[0], exact[0])
        errors = {name: _error(ours[1][name], exact[1][name]) for name in exact[1]}
        worst = max(errors, key=lambda name: errors[name])
        passed = value_error <= VALUE_TOLERANCE and errors[worst] <= GRADIENT_TOLERANCE
        return passed, f"value {value_error:.1e}; {count}, worst {errors[worst]:.1e} ({worst.split('.layers.')[1]})"
    theirs = _peft_value_and_gradients(delta, model, tensors, cotangent, dtype)
    our_errors = _error(ours[0], exact[0]), _error(_flat(ours[1]), _flat(exact[1]))
    their_errors = _error(theirs[0], exact[0]), _error(_flat(theirs[1]), _flat(exact[1]))
    passed = all(a <= HALF_FACTOR * b for a, b in zip(our_errors, their_errors, strict=True))
    return passed, (
        f"error against float32: value {our_errors[0]:.1e} (PEFT {their_errors[0]:.1e}); "
        f"{count}, all together {our_errors[1]:.1e} (PEFT {their_errors[1]:.1e})"
    )


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
    base: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype)
    alpha: Any = delta.spec.alpha
    lora = LoraConfig(r=delta.spec.rank, lora_alpha=alpha, target_modules=list(PROJECTIONS))
    peft_model = get_peft_model(base.to(device), lora, autocast_adapter_dtype=False).eval().requires_grad_(False)
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
    for row, (node, length) in enumerate(zip(tokens.last, tokens.lengths, strict=True)):
        mask[row, :length] = 1
        for position in range(length - 1, -1, -1):
            input_ids[row, position] = tokens.input_ids[node]
            node = tokens.parents[node]
    return input_ids.to(device), mask.to(device)


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten().float() for name in sorted(gradients)])


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).double().norm() / exact.double().norm())
