"""Losses on what a generator writes, tokens and LoRA tensors; :mod:`lora_delta.delta_losses` has those on deltas.

Pure functions, differentiable to any order in both arguments. Half precision is computed in float32; a loss is a
float32 scalar, or float64 if an input is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen_functional import LoraSpec
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.finite import is_symbolic
from qwen_functional.lora import parse_name, peft_name

from .. import autograd
from ..delta_losses import check_float, checked_pair, nonzero_or


def tokens_mse(tokens: Tensor, target_tokens: Tensor | Sequence[Tensor]) -> Tensor:
    """Mean squared error of Drag-and-Drop tokens, over the elements that are not NaN in the target: NaN is padding.

    What a generator writes into the padding, even NaN, adds no loss and gets a gradient of zero.

    Args:
        tokens: (L, h, w) or (G, L, h, w).
        target_tokens: the same shape, or G tensors (L, h, w).

    Raises:
        ValueError: a target that is NaN throughout, or as :func:`~lora_delta.delta_losses.delta_mse`.
    """
    if isinstance(target_tokens, Tensor):
        tokens, target_tokens = checked_pair("tokens", tokens, target_tokens)
        given = [target_tokens]
    else:
        check_float("tokens", tokens)
        if len(tokens) != len(target_tokens):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, but there are {len(target_tokens)} targets")
        pairs = [checked_pair("tokens", one, other) for one, other in zip(tokens, target_tokens, strict=True)]
        tokens, given = tokens.to(pairs[0][0].dtype), [target for _, target in pairs]
    if any(map(is_symbolic, (tokens, *given))):
        return _plain_tokens_mse(tokens, given)
    loss = autograd.tokens_mse(tokens, given)
    if not tokens.is_cuda and loss.isnan() and all(target.isnan().all() for target in given):  # 0 / 0
        raise ValueError("target_tokens is NaN throughout, expected padding around numbers")
    return loss


def _plain_tokens_mse(tokens: Tensor, targets: Sequence[Tensor]) -> Tensor:
    target = torch.stack(list(targets)).view(tokens.shape)
    kept = ~target.isnan()
    # Safe with NaN: a subtraction does not scale gradients, so the zeros from where() stay zero.
    return torch.where(kept, tokens - target, 0.0).square().sum() / kept.sum()


def tensors_mse(tensors: Mapping[str, Tensor], target_tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of LoRA tensors, over all elements of all tensors.

    Args:
        tensors, target_tensors: {name: (r, in) or (out, r)}, or with G in front; names in any spelling that
            :meth:`LoraSpec.bind` reads.

    Raises:
        ValueError: names that differ or match no module, no tensors, or as
            :func:`~lora_delta.delta_losses.delta_mse`, with the tensor's name.
    """
    pairs = _checked_pairs(tensors, target_tensors, same_shape=True)
    total = torch.stack([(ours - theirs).square().sum() for ours, theirs in pairs.values()]).sum()
    return total / sum(ours.numel() for ours, _ in pairs.values())


def product_mse(
    tensors: Mapping[str, Tensor],
    target_tensors: Mapping[str, Tensor],
    *,
    spec: LoraSpec | None = None,
    target_spec: LoraSpec | None = None,
    normalize: bool = False,
) -> Tensor:
    """Mean squared error of the weight updates ``ΔW = s · B A``, over all their elements.

    Gauge-invariant: ``B M`` and ``M⁻¹ A`` give the same update. No ΔW is formed: work and memory are those of
    (rank × rank) Gram matrices, in float64, so that little precision is lost if two updates are nearly equal, and
    none if their tensors are nearly equal as well.

    Args:
        tensors, target_tensors: {name: (r, in) or (out, r)}, or with G in front; the same modules in both. Their
            ranks may differ.
        spec: gives the scaling, alpha / r, of both updates; by default it is 1.
        target_spec: the target's spec, if it is another.
        normalize: ``Σ ‖ΔW − ΔW_target‖² / Σ ‖ΔW_target‖²``, summed over an adapter's modules, then averaged over
            adapters. If an adapter's target is zero, the divisor is its number of elements.

    Raises:
        ValueError: an A without its B or of another rank, a rank that is not the spec's, or as :func:`tensors_mse`.
    """
    pairs = _checked_pairs(tensors, target_tensors, same_shape=False)
    specs = spec, target_spec if target_spec is not None else spec
    errors, scales, size = [], [], 0
    for layer, projection in {key[:2]: None for key in pairs}:
        (A, target_A), (B, target_B) = _module(pairs, layer, projection)
        given = zip((A, target_A), (B, target_B), specs, strict=True)
        scalings = [_scaling(its_spec, layer, projection, a, b) for a, b, its_spec in given]
        error, scale = _recomputed(_squared_distance, A, B, target_A, target_B, *scalings)
        errors.append(error)
        scales.append(scale)
        size += A.shape[-1] * B.shape[-2]
    error = torch.stack(errors).sum(0)  # () or (G,)
    loss = (error / (nonzero_or(torch.stack(scales).sum(0), size) if normalize else size)).mean()
    return loss.to(next(iter(pairs.values()))[0].dtype)


def tensors_l1(tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean absolute value of LoRA tensors, over all entries of all of them: a regularizer.

    Args:
        tensors: {name: (r, in) or (out, r)}, or with G in front.

    Raises:
        ValueError: no tensors, a name that matches no module, or a tensor that is empty or not floating point.
    """
    given = _checked(tensors).values()
    return torch.stack([one.abs().sum() for one in given]).sum() / sum(one.numel() for one in given)


def tensors_l2(tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean square of LoRA tensors; otherwise as :func:`tensors_l1`."""
    given = _checked(tensors).values()
    return torch.stack([one.square().sum() for one in given]).sum() / sum(one.numel() for one in given)


def product_l2(tensors: Mapping[str, Tensor], *, spec: LoraSpec | None = None) -> Tensor:
    """Mean square of the weight updates ``ΔW = s · B A``, over all their elements and adapters: a regularizer.

    No ΔW is formed: the work is that of (rank × rank) Gram matrices, in float64, as in :func:`product_mse`.

    Args:
        tensors: {name: (r, in) or (out, r)}, or with G in front.
        spec: gives the scaling, alpha / r, of the updates; by default it is 1.

    Raises:
        ValueError: an A without its B or of another rank, or as :func:`tensors_l1`.
    """
    given, squares, size = _checked(tensors), [], 0
    for layer, projection in {key[:2]: None for key in given}:
        A, B = _module(given, layer, projection)
        scaling = _scaling(spec, layer, projection, A, B)
        squares.append(_recomputed(_squared, A, B, scaling))
        size += A.shape[-1] * B.shape[-2]
    return (torch.stack(squares).sum(0) / size).mean().to(next(iter(given.values())).dtype)


def _squared(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return _product_norm2(scaling * B.double(), A.double())


def _module(by_place: Mapping[tuple[int, str, str], Any], layer: int, projection: str) -> tuple[Any, Any]:
    """The entries of a module's A and B."""
    for side in "AB":
        if (layer, projection, side) not in by_place:
            name = peft_name(layer, projection, side)
            raise ValueError(f"LoRA tensor {name!r} is missing, expected both A and B of each module")
    return by_place[layer, projection, "A"], by_place[layer, projection, "B"]


def _scaling(spec: LoraSpec | None, layer: int, projection: str, A: Tensor, B: Tensor) -> float:
    """A module's scaling under a spec; its tensors must have the spec's rank."""
    rank, scaling = spec.rank_and_scaling(layer, projection) if spec else (A.shape[-2], 1.0)
    if A.shape[-2] != rank or B.shape[-1] != rank:
        name, shapes = peft_name(layer, projection, "A"), f"{tuple(A.shape)} and {tuple(B.shape)}"
        raise ValueError(f"LoRA tensors {name!r} and its B have shapes {shapes}, expected rank {rank}")
    return scaling


def _squared_distance(
    A: Tensor, B: Tensor, target_A: Tensor, target_B: Tensor, scaling: float, target_scaling: float
) -> tuple[Tensor, Tensor]:
    """``‖s B A − s' B' A'‖²`` and ``‖s' B' A'‖²``, each () or (G,), in float64."""
    A, B, target_A, target_B = A.double(), scaling * B.double(), target_A.double(), target_scaling * target_B.double()
    if A.shape == target_A.shape:
        # B A − B' A' = ½ (B − B') (A + A') + ½ (B + B') (A − A'): subtracting the tensors before multiplying avoids
        # cancellation where they are nearly equal, and gives exactly 0 where they are equal.
        left, right = torch.cat((B - target_B, B + target_B), -1), torch.cat((A + target_A, A - target_A), -2) / 2
    else:
        left, right = torch.cat((B, -target_B), -1), torch.cat((A, target_A), -2)
    return _product_norm2(left, right).clamp(min=0), _product_norm2(target_B, target_A)


def _product_norm2(left: Tensor, right: Tensor) -> Tensor:
    """``‖L R‖² = tr(LᵀL · R Rᵀ)``: (…, out, R), (…, R, in) to (…)."""
    return ((left.mT @ left) * (right @ right.mT)).sum((-2, -1))


def _recomputed(function: Callable[..., Any], *arguments: Tensor | float) -> Any:
    """The function's value; its float64 copies are recomputed for the gradient, not kept.

    Except inside torch.func transforms, which do not support hooks on saved tensors.
    """
    if any(isinstance(argument, Tensor) and is_symbolic(argument) for argument in arguments):
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _checked(tensors: Mapping[str, Tensor]) -> dict[tuple[int, str, str], Tensor]:
    """{(layer, projection, side): tensor}, each in the dtype of a loss."""
    given = _by_place(tensors)
    if not given:
        raise ValueError("tensors is empty, expected LoRA tensors")
    for place, tensor in given.items():
        name = f"LoRA tensor {peft_name(*place)!r}"
        check_float(name, tensor)
        if not tensor.numel() or tensor.dim() not in (2, 3):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected two or three dimensions, none empty")
    return {place: tensor.to(accumulation_dtype(tensor.dtype)) for place, tensor in given.items()}


def _checked_pairs(
    tensors: Mapping[str, Tensor], target_tensors: Mapping[str, Tensor], same_shape: bool
) -> dict[tuple[int, str, str], tuple[Tensor, Tensor]]:
    """{(layer, projection, side): (tensor, target)} after all checks; shapes may differ only in rank."""
    ours, theirs = (_by_place(given) for given in (tensors, target_tensors))
    for place in ours | theirs:
        if place not in ours or place not in theirs:
            have, lack = ("tensors", "target_tensors") if place in ours else ("target_tensors", "tensors")
            raise ValueError(f"LoRA tensor {peft_name(*place)!r} is in {have} and not in {lack}, expected both")
    if not ours:
        raise ValueError("tensors is empty, expected LoRA tensors")
    pairs = {}
    for place in ours:
        name = f"LoRA tensor {peft_name(*place)!r}"
        a, b = pairs[place] = checked_pair(name, ours[place], theirs[place], same_shape)
        free = -2 if place[2] == "A" else -1  # the rank's dimension
        if a.dim() not in (2, 3) or a.dim() != b.dim() or _without(a, free) != _without(b, free):
            shapes = f"{tuple(a.shape)}, its target {tuple(b.shape)}"
            raise ValueError(f"{name} has shape {shapes}: expected two or three dimensions that differ only in rank")
    first = next(iter(pairs.values()))[0].shape
    for place, (a, _) in pairs.items():
        if a.shape[:-2] != first[:-2]:
            shape = tuple(a.shape)
            raise ValueError(f"LoRA tensor {peft_name(*place)!r} has shape {shape}, expected G as in {tuple(first)}")
    return pairs


def _without(tensor: Tensor, dimension: int) -> list[int]:
    shape = list(tensor.shape)
    del shape[dimension]
    return shape


def _by_place(tensors: Mapping[str, Tensor]) -> dict[tuple[int, str, str], Tensor]:
    places: dict[tuple[int, str, str], Tensor] = {}
    for name, tensor in tensors.items():
        place = parse_name(name) if isinstance(name, str) else None
        if place is None:
            example = peft_name(0, "q_proj", "A")
            raise ValueError(f"LoRA tensor {name!r} fits nothing; expected names such as {example!r}")
        if place in places:
            raise ValueError(f"LoRA tensor {name!r} is given twice, in two spellings")
        places[place] = tensor
    return places
