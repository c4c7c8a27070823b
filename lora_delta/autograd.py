"""Where autograd meets hand-written gradients: values of many adapters, mean losses on them, and on tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from qwen_functional import Lora, LoraSpec, Qwen2Config
from qwen_functional.compiled import opaque
from qwen_functional.finite import require_no_transform
from qwen_functional.lora import LoraPair

from .passes import AdapterPasses

_PART = 1 << 18  # numbers


def values(passes: AdapterPasses, lora: Lora) -> Tensor:
    """The values (G, …) of all adapters, differentiable in their tensors where gradients are on."""
    # Under no_grad, needs_input_grad would still name tensors that require gradients, and a pass keep states for them.
    return _Values.apply(passes, lora, *_flat(lora)) if torch.is_grad_enabled() else passes.values(lora)


def mean_loss(passes: AdapterPasses, lora: Lora, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """The mean over adapters of ``loss(values − base, adapters)``; each pass runs backward before the next one."""
    return _MeanLoss.apply(passes, lora, loss, torch.is_grad_enabled(), *_flat(lora))


def tokens_mse(tokens: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """The mean squared difference where the targets are not NaN, in parts that fit into a processor's cache.

    With temporaries of the tokens' size it would take most of a training step's memory and time.

    Args:
        tokens: (L, h, w), or G of them.
        targets: one of the tokens' shape, or G of (L, h, w); NaN is padding.
    """
    return _TokensMSE.apply(tokens, *targets)


def require_no_dual(tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for a dual number of forward-mode differentiation, which the engine does not support."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"LoRA tensor {name!r} is a dual number, expected a plain tensor for reverse mode")


def bound(
    spec: LoraSpec, config: Qwen2Config, tensors: Mapping[str, Tensor], device: torch.device, *, validate: bool
) -> Lora:
    """LoRA tensors as the engine takes them.

    Raises:
        ValueError: as :meth:`LoraSpec.bind`; tensors on another device than the base model, inside a transform of
            ``torch.func``, or of forward-mode differentiation.
    """
    lora = spec.bind(config, tensors, validate=validate)
    require_no_transform(lora.tensors())
    require_no_dual(lora.tensors())
    pair = next(iter(lora.pairs.values()), None)
    if pair is not None and pair.A.device != device:
        raise ValueError(f"LoRA tensors are on {pair.A.device}, expected {device} like the base model; see its device")
    return lora


class _Values(torch.autograd.Function):
    """(A, B, A, B, …), each (G, …), to values (G, …)."""

    @staticmethod
    def forward(ctx: Any, passes: AdapterPasses, lora: Lora, *flat: Tensor) -> Tensor:
        ctx.passes, ctx.lora, ctx.vjp = passes, _refilled(lora, flat), None
        ctx.wanted = [name for name, need in zip(lora.names(), ctx.needs_input_grad[2:], strict=True) if need]
        ctx.save_for_backward(*flat)
        if not ctx.wanted:
            return passes.values(ctx.lora)
        slices = passes.slices(lora.n_adapters)
        parts = [passes.run(ctx.lora, adapters, wanted=())[0] for adapters in slices[:-1]]
        if slices:  # there is memory for one pass: the last one keeps its states
            value, ctx.vjp = passes.run(ctx.lora, slices[-1], ctx.wanted)
            parts.append(value)
        return passes.whole(parts, lora.n_adapters)

    @staticmethod
    @opaque
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _Values._gradients(ctx, _marked(cotangent))

    @staticmethod
    @once_differentiable
    def _gradients(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # saved_tensors raises if a tensor was changed in place since the forward.
        passes, lora = ctx.passes, _refilled(ctx.lora, ctx.saved_tensors)
        parts: list[dict[str, Tensor]] = []
        for adapters in reversed(passes.slices(lora.n_adapters)):
            vjp, ctx.vjp = ctx.vjp, None
            if vjp is None:  # several passes, or a second backward through the same graph
                _, vjp = passes.run(lora, adapters, ctx.wanted)
            parts.insert(0, vjp(cotangent[adapters]))
        gradients = passes.gathered(parts, lora, ctx.wanted)
        return (None, None, *(gradients.get(name) for name in lora.names()))


class _MeanLoss(torch.autograd.Function):
    """The loss, with its gradients computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        passes: AdapterPasses,
        lora: Lora,
        loss: Callable[[Tensor, slice], Tensor],
        wants_gradients: bool,
        *flat: Tensor,
    ) -> Tensor:
        ctx.names, lora = lora.names(), _refilled(lora, flat)
        needs = zip(ctx.names, ctx.needs_input_grad[4:], strict=True)
        wanted = [name for name, need in needs if need and wants_gradients]
        base, means, parts = passes.base(lora), [], []
        for adapters in passes.slices(lora.n_adapters):
            value, vjp = passes.run(lora, adapters, wanted)
            share = value.shape[0] / lora.n_adapters
            with torch.set_grad_enabled(bool(wanted)):
                value = value.requires_grad_(bool(wanted))
                mean = loss(value - base[adapters], adapters) * share
                if mean.numel() != 1:
                    raise ValueError(f"loss has shape {tuple(mean.shape)}, expected a scalar")
                if wanted:
                    (cotangent,) = torch.autograd.grad(mean.sum(), value)
                    parts.append(vjp(cotangent))
            means.append(mean.detach())
        ctx.gradients = passes.gathered(parts, lora, wanted)
        own = torch.stack(means).sum() if means else base.new_zeros(())
        return passes.shares.sum_(own)

    @staticmethod
    @opaque
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _MeanLoss._gradients(ctx, _marked(cotangent))

    @staticmethod
    @once_differentiable
    def _gradients(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("mean_loss has already run backward, expected one backward per call")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = {name: gradient.mul_(cotangent) for name, gradient in gradients.items()}
        return (None, None, None, None, *(scaled.get(name) for name in ctx.names))


class _TokensMSE(torch.autograd.Function):
    """See :func:`tokens_mse`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *targets: Tensor) -> Tensor:
        total, count = tokens.new_zeros((), dtype=torch.float64), tokens.new_zeros((), dtype=torch.float64)
        ctx.padded = []
        for ours, theirs in zip(_parts(tokens), _parts(*targets), strict=True):
            error = (ours - theirs).flatten()
            square = torch.dot(error, error)
            # On a GPU, looking at the value would synchronize.
            ctx.padded.append(tokens.is_cuda or not bool(square.isfinite()))
            if ctx.padded[-1]:
                error, kept = _known(ours, theirs)
                total += error.square_().sum()
                count += kept.sum()
            else:
                total += square
                count += error.numel()
        ctx.save_for_backward(tokens, count, *targets)
        return (total / count).to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        tokens, count, *targets = ctx.saved_tensors
        scale = (2 * cotangent / count).to(tokens.dtype)
        if torch.is_grad_enabled():  # for gradients of higher order
            target = torch.stack(list(targets)).view(tokens.shape)
            gradient = _known(tokens, target)[0] * scale
        else:
            gradient = torch.empty_like(tokens)  # of the same strides
            parts = zip(_parts(gradient), _parts(tokens), _parts(*targets), ctx.padded, strict=True)
            for out, ours, theirs, padded in parts:
                error = _known(ours, theirs)[0] if padded else ours - theirs
                torch.mul(error, scale, out=out)
        back = gradient.reshape(len(targets), *targets[0].shape).unbind(0)
        wanted = zip(back, ctx.needs_input_grad[1:], strict=True)
        return gradient, *(-one if need else None for one, need in wanted)


def _known(tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The difference, 0 where the target is NaN, and where the target is a number."""
    kept = ~target.isnan()
    return torch.where(kept, tokens - target, 0.0), kept


def _parts(*stacks: Tensor) -> Iterator[Tensor]:
    """Views of stacks (…, L, h, w), one after the other, each small enough for a processor's cache."""
    for tokens in stacks:
        for stack in tokens.flatten(0, -4) if tokens.dim() > 3 else (tokens,):
            yield from stack.split(max(1, _PART // max(1, stack[0].numel()))) if stack.dim() > 1 else (stack,)


def _marked(cotangent: Tensor) -> Tensor:
    """``once_differentiable`` refuses second derivatives only where the cotangent requires a gradient.

    With create_graph it must require one, or those of a loss that is linear in the delta would count as zero.
    """
    if torch.is_grad_enabled() and not cotangent.requires_grad:
        return cotangent.detach().requires_grad_()
    return cotangent


def _flat(lora: Lora) -> list[Tensor]:
    return [tensor for pair in lora.pairs.values() for tensor in (pair.A, pair.B)]


def _refilled(lora: Lora, flat: Sequence[Tensor]) -> Lora:
    """The same adapters with other tensors in their places, as a batch."""
    pairs = {
        key: LoraPair(A, B, pair.scaling)
        for (key, pair), A, B in zip(lora.pairs.items(), flat[::2], flat[1::2], strict=True)
    }
    return Lora(pairs, lora.n_adapters, batched=True)
