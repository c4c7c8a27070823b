"""The language model's loss on the rows that have a target, through a frozen head, and its gradient in one pass.

For logits z = h Eᵀ / τ, ``loss = c + m · logsumexp(z) − Σ p z``: cross-entropy where p is one for the right token, and
KL(p ‖ softmax(z)) with c = Σ p log p and the mass m = Σ p where p is a distribution, or its largest probabilities. The
gradient is ``dz = m · softmax(z) − p``, and ``dh = dz E / τ``. Logits of a few rows are computed at a time, and dz
overwrites them: no whole (rows, vocabulary) tensor ever exists, and what is held besides h and dh does not grow with
the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype
from ..memory import to_device
from .sums import index_sum_

ROWS = 256  # at a time: enough for a GEMM
# Bytes of logits that are processed together on a CPU: they stay in a cache from the first pass over them to the last.
_CACHED = 1 << 20


@dataclass(frozen=True)
class Targets:
    """What rows should predict: T targets, each for one row; a row has several where a text continues in several ways.

    Attributes:
        rows: (T,) int64, the row, or the node, of each.
        indices: (T, k) int64, tokens.
        probs: (T, k) float, their probabilities: 1 for the one token that follows, or those of a teacher. Tokens that
            a teacher leaves out do not count.
        weights: (T,) float, at least 0: the factor of each loss.
    """

    rows: Tensor
    indices: Tensor
    probs: Tensor
    weights: Tensor

    @classmethod
    def of_tokens(cls, rows: Tensor, tokens: Tensor, weights: Tensor) -> Targets:
        """Targets from the one token (T,) that follows each row: cross-entropy."""
        return cls(rows, tokens[:, None], torch.ones(len(tokens), 1, dtype=torch.float64), weights)

    @classmethod
    def joined(cls, parts: Sequence[Targets]) -> Targets:
        """One after the other; those with fewer tokens are padded with tokens of probability 0."""
        k = max((part.indices.shape[1] for part in parts), default=1)

        def wide(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, k - tensor.shape[1]))

        return cls(
            torch.cat([part.rows for part in parts]),
            torch.cat([wide(part.indices) for part in parts]),
            torch.cat([wide(part.probs) for part in parts]),
            torch.cat([part.weights for part in parts]),
        )

    def at(self, rows: Tensor) -> Targets:
        """The same for other rows."""
        return replace(self, rows=rows)


@dataclass(frozen=True)
class StateTargets:
    """What rows should predict, given by a teacher's own states: T targets, each for one row.

    Attributes:
        rows: (T,) int64, the row, or the node, of each.
        states: (T, H), the teacher's hidden states after the final norm, from which the same head makes its logits.
        weights: (T,) float, at least 0: the factor of each loss.
    """

    rows: Tensor
    states: Tensor
    weights: Tensor

    @classmethod
    def joined(cls, parts: Sequence[StateTargets]) -> StateTargets:
        """One after the other."""
        each = zip(*((part.rows, part.states, part.weights) for part in parts), strict=True)
        return cls(*(torch.cat(tensors) for tensors in each))

    def at(self, rows: Tensor) -> StateTargets:
        """The same for other rows."""
        return replace(self, rows=rows)

    def to(self, device: torch.device) -> StateTargets:
        return StateTargets(*(to_device(t, device) for t in (self.rows, self.states, self.weights)))


@dataclass(frozen=True)
class Ordered:
    """Targets by ascending row, and all of their loss and its gradient that is known before any logits are.

    Made once where targets are bound: with it, a loss reads no value back from its device.

    Attributes:
        order: (T,), where each is among the targets given.
        rows: (P,), those that have any; row: (T,), which of them each target is for.
        ends: how many targets the first 0, 1, …, P rows have.
        indices, probs, weights: of :class:`Targets`, in this order; mass, entropy: (T,), Σ p and Σ p log p.
        total: (P,), Σ weight · mass of a row's targets: the factor of its softmax in dz.
        named: (T, k), what dz lacks of that softmax at each token, divided by ``total``; summed over all targets that
            name the token for this row.
        label_smoothing: ε: p becomes (1 − ε) p + ε m / V.
    """

    order: Tensor
    rows: Tensor
    row: Tensor
    ends: Sequence[int]
    indices: Tensor
    probs: Tensor
    weights: Tensor
    mass: Tensor
    entropy: Tensor
    total: Tensor
    named: Tensor
    label_smoothing: float

    @classmethod
    def of(cls, targets: Targets, device: torch.device, dtype: torch.dtype, label_smoothing: float = 0.0) -> Ordered:
        """On ``device``, in the accumulation dtype; the rows of ``targets`` are on the CPU."""
        order, rows, row, ends = _by_row(targets.rows)
        order, rows, row = (to_device(one, device) for one in (order, rows, row))
        given = targets.indices, targets.probs, targets.weights
        indices, probs, weights = (to_device(one, device)[order] for one in given)
        probs, weights = probs.to(dtype), weights.to(dtype)
        mass, entropy = probs.sum(1), torch.special.xlogy(probs, probs).sum(1)
        total = index_sum_(weights.new_zeros(len(rows)), 0, row, weights * mass)
        share = (1 - label_smoothing) * weights[:, None] * probs / total[row, None].clamp(min=torch.finfo(dtype).tiny)
        if probs.shape[1] > 1 or len(rows) < len(row):  # or each token is named once
            share = _summed(share, (row[:, None] << 32) + indices)
        return cls(order, rows, row, ends, indices, probs, weights, mass, entropy, total, share, label_smoothing)


def _by_row(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """``order``, ``rows``, ``row`` and ``ends`` of :class:`Ordered`."""
    ascending, order = rows.sort(stable=True)
    present, counts = ascending.unique_consecutive(return_counts=True)
    ends = torch.cat((counts.new_zeros(1), counts.cumsum(0))).tolist()
    return order, present, torch.arange(len(present)).repeat_interleave(counts), ends


def _summed(x: Tensor, keys: Tensor) -> Tensor:
    """Each number's sum with all others of the same key."""
    ascending, order = keys.flatten().sort(stable=True)
    group = torch.nn.functional.pad((ascending[1:] != ascending[:-1]).cumsum(0), (1, 0))
    sums = index_sum_(x.new_zeros(x.numel()), 0, group, x.flatten()[order])
    return torch.empty_like(sums).index_copy_(0, order, sums[group]).view(x.shape)


@dataclass(frozen=True)
class Part:
    """The tokens whose logits a process computes, of a vocabulary that several share.

    Attributes:
        first: the first of them; there are as many as rows in the given head.
        sum_, max_: reduce a tensor over the processes, in place, to the same bits on all of them.
    """

    first: int
    sum_: Callable[[Tensor], Tensor]
    max_: Callable[[Tensor], Tensor]


def softmax_(z: Tensor, scale: float = 1.0, keep: bool = True, part: Part | None = None) -> tuple[Tensor, Tensor]:
    """The largest entry m of each row (n,) of z · scale, and ``log Σ exp(z · scale − m)``, in the accumulation dtype.

    With ``keep`` the softmax of (n, V) overwrites z.
    """
    dtype, step, parts = accumulation_dtype(z.dtype), _step(z), []
    if part is not None:
        most = part.max_(z.amax(-1).to(dtype)) * scale
        sums = [(_scaled(few, scale) - own[:, None]).exp_().sum(-1) for few, own in _pairs(z, most)]
        log_sum = part.sum_(torch.cat(sums)).log_()
        for few, own in _pairs(z, most + log_sum) if keep else ():
            few.copy_((_scaled(few, scale) - own[:, None]).exp_())
        return most, log_sum
    for few in z.split(step):
        wide = _scaled(few, scale)
        most = wide.amax(-1)
        if keep:
            softmax = wide.softmax(-1)
            parts.append((most, -softmax.amax(-1).log()))  # the largest probability is one over the sum
            few.copy_(softmax)
        else:
            parts.append((most, (wide - most[:, None]).exp_().sum(-1).log_()))
    return torch.cat([most for most, _ in parts]), torch.cat([log_sum for _, log_sum in parts])


def divergence_(z: Tensor, t: Tensor, scale: float = 1.0, keep: bool = True, part: Part | None = None) -> Tensor:
    """KL(p ‖ q) (n,) of the softmaxes p of ``t · scale`` and q of ``z · scale``: this process's part of the sum.

    With ``keep``, q − p overwrites z.
    """
    sums = None
    if part is not None:
        sums = [most + log_sum for most, log_sum in (softmax_(logits, scale, False, part) for logits in (t, z))]
    losses = []
    for start in range(0, len(z), _step(z)):
        few = slice(start, start + _step(z))
        wide = _scaled(t[few], scale), _scaled(z[few], scale)
        if sums is None:
            log_p, log_q = (logits.log_softmax(-1) for logits in wide)
        else:
            log_p, log_q = (logits - own[few, None] for logits, own in zip(wide, sums, strict=True))
        p = log_p.exp()
        losses.append((p * (log_p - log_q)).sum(-1))
        if keep:
            z[few] = log_q.exp_().sub_(p)
    return torch.cat(losses)


Softmax = Callable[..., tuple[Tensor, Tensor]]  # as softmax_
Divergence = Callable[..., Tensor]  # as divergence_


def _scaled(z: Tensor, scale: float) -> Tensor:
    """In the accumulation dtype; z itself where nothing changes."""
    wide = z.to(accumulation_dtype(z.dtype))
    return wide if scale == 1 else wide * scale


def _pairs(z: Tensor, of_row: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """A few rows at a time, with a number for each."""
    return zip(z.split(_step(z)), of_row.split(_step(z)), strict=True)


def _step(z: Tensor) -> int:
    return max(1, math.ceil(_CACHED / z.shape[1] / 4)) if z.device.type == "cpu" else len(z)


def lm_head_divergence(
    h: Tensor,
    weight: Tensor,
    targets: StateTargets,
    *,
    temperature: float = 1.0,
    keep: bool = True,
    part: Part | None = None,
    divergence: Divergence = divergence_,
) -> tuple[Tensor, Tensor | None]:
    """The weighted KL(teacher ‖ softmax(h Eᵀ / τ)) of each target over the whole vocabulary; as :func:`lm_head_loss`.

    The logits of both are computed for a few targets at a time, and never kept.

    Args:
        divergence: a backend's own form of :func:`divergence_`.
    """
    dtype = accumulation_dtype(h.dtype)
    weights = targets.weights.to(dtype)
    losses = torch.empty(len(targets.rows), dtype=dtype, device=h.device)
    dh = torch.zeros(h.shape, dtype=dtype, device=h.device) if keep else None
    size = min(max(1, ROWS // 2), len(losses))
    own, theirs = (h.new_empty(size, len(weight)) for _ in range(2))
    for start in range(0, len(losses), size):
        chunk = slice(start, min(start + size, len(losses)))
        rows = targets.rows[chunk]
        z = torch.mm(h[rows], weight.T, out=own[: len(rows)])
        t = torch.mm(targets.states[chunk].to(h.dtype), weight.T, out=theirs[: len(rows)])
        losses[chunk] = divergence(z, t, 1 / temperature, keep, part)
        if dh is not None:
            d = torch.mm(z, weight).to(dtype) * (weights[chunk] / temperature)[:, None]
            index_sum_(dh, 0, rows, d)
    if part is not None:
        part.sum_(losses)
        if dh is not None:
            part.sum_(dh)
    return losses * weights, dh


def lm_head_loss(
    h: Tensor,
    weight: Tensor,
    targets: Ordered,
    *,
    temperature: float = 1.0,
    keep: bool = True,
    part: Part | None = None,
    mean: Tensor | None = None,
    softmax: Softmax = softmax_,
) -> tuple[Tensor, Tensor | None]:
    """The weighted loss of each target, and the gradient of their sum.

    Args:
        h: (R, H), in the dtype of the products; targets name its rows.
        weight: (V, H), the head, or this process's rows of it.
        keep: whether the gradient is wanted.
        part: which rows those are; None for all.
        mean: (H,), the mean of all rows of the head, in the accumulation dtype; by default that of the given rows.
        softmax: a backend's own form of :func:`softmax_`.

    Returns:
        losses (T,), and dh (R, H), both float32 (float64 for float64); None for dh without ``keep``.
    """
    dtype = accumulation_dtype(h.dtype)
    smoothing = targets.label_smoothing
    mean = None if not smoothing else weight.mean(0, dtype=dtype) if mean is None else mean
    first, n_own = 0 if part is None else part.first, len(weight)
    losses = torch.empty(len(targets.row), dtype=dtype, device=h.device)
    dh = torch.zeros(h.shape, dtype=dtype, device=h.device) if keep else None
    n_rows = min(ROWS, len(targets.rows))
    buffer = h.new_empty(n_rows + (part is not None), n_own)  # the last row is for what other processes write
    for start in range(0, len(targets.rows), ROWS):
        chunk = slice(start, min(start + ROWS, len(targets.rows)))
        own = slice(targets.ends[chunk.start], targets.ends[chunk.stop])  # the chunk's targets
        at, tokens = targets.row[own] - start, targets.indices[own] - first
        probs, mass = targets.probs[own], targets.mass[own]
        read = h[targets.rows[chunk]]
        z = torch.mm(read, weight.T, out=buffer[: len(read)])
        named = at[:, None] * n_own + tokens
        if part is None:
            asked = buffer.view(-1)[named].to(dtype)
        else:
            is_own = (tokens >= 0) & (tokens < n_own)
            named = torch.where(is_own, named, n_rows * n_own)
            asked = part.sum_(torch.where(is_own, buffer.view(-1)[named].to(dtype), 0.0))
        most, log_sum = softmax(z, 1 / temperature, keep, part)
        # Relative to the largest: where the model is sure, rounding then matters little.
        asked = asked / temperature - most[at][:, None]
        loss = targets.entropy[own] + mass * log_sum[at] - (1 - smoothing) * (probs * asked).sum(1)
        if mean is not None:
            loss -= smoothing * mass * ((read.to(dtype) @ mean) / temperature - most)[at]
        losses[own] = loss * targets.weights[own]
        if dh is None:
            continue
        # Each row's dz divided by its total. A target's own entry is softmax − p in full precision: where the two are
        # nearly equal, nothing would be left in a narrow dtype. Targets of one token write the same number.
        gap = (asked - log_sum[at][:, None]).exp_() - targets.named[own]
        buffer.view(-1).index_put_((named.flatten(),), gap.flatten().to(z.dtype))
        d = torch.mm(z, weight).to(dtype)
        if part is not None:
            part.sum_(d)
        if mean is not None:
            d -= smoothing * mean
        dh.index_copy_(0, targets.rows[chunk], d * (targets.total[chunk] / temperature)[:, None])
    return torch.empty_like(losses).index_copy_(0, targets.order, losses), dh


def lm_head_scores(h: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``−log p`` of a token for each row, and whether no other is likelier; a few rows' logits are computed at a time.

    Args:
        h: (R, H). weight: (V, H). tokens: (R,) int64.

    Returns:
        (R,) float32, or float64 for float64; and (R,) bool.
    """
    losses, right = [], []
    for start in range(0, len(h), ROWS):
        z = torch.mm(h[start : start + ROWS], weight.T)
        asked = z.gather(1, tokens[start : start + ROWS, None])[:, 0]
        most, log_sum = softmax_(z, keep=False)
        losses.append(log_sum - (asked.to(most.dtype) - most))
        right.append(asked.to(most.dtype) >= most)
    return torch.cat(losses), torch.cat(right)
