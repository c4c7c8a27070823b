"""The language model's loss on the rows that have a target, through a frozen head, and its gradient in one pass.

For logits z = h Eᵀ / τ, ``loss = c + m · logsumexp(z) − Σ p z``: cross-entropy where p is one for the right token, and
KL(p ‖ softmax(z)) with c = Σ p log p and the mass m = Σ p where p is a distribution, or its largest probabilities. The
gradient is ``dz = m · softmax(z) − p``, and ``dh = dz E / τ``. Logits of a few rows are computed at a time, and dz
overwrites them: no whole (rows, vocabulary) tensor ever exists, and what is held besides h and dh does not grow with
the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype

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

    def to(self, device: torch.device) -> Targets:
        return Targets(*(t.to(device) for t in (self.rows, self.indices, self.probs, self.weights)))


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
        return StateTargets(self.rows.to(device), self.states.to(device), self.weights.to(device))


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


def lm_head_divergence(
    h: Tensor,
    weight: Tensor,
    targets: StateTargets,
    *,
    temperature: float = 1.0,
    keep: bool = True,
    part: Part | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weighted KL(teacher ‖ softmax(h Eᵀ / τ)) of each target over the whole vocabulary; as :func:`lm_head_loss`.

    The logits of both are computed for a few targets at a time, and never kept.
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
        for first in range(0, len(rows), _step(z)):
            few = slice(first, min(first + _step(z), len(rows)))
            log_p, log_q = (_log_softmax(logits[few].to(dtype).div_(temperature), part) for logits in (t, z))
            p = log_p.exp()
            losses[start + few.start : start + few.stop] = (p * (log_p - log_q)).sum(-1)
            if dh is not None:
                z[few] = log_q.exp_().sub_(p)
        if dh is not None:
            d = torch.mm(z, weight).to(dtype) * (weights[chunk] / temperature)[:, None]
            dh.index_add_(0, rows, d)
    if part is not None:
        part.sum_(losses)
        if dh is not None:
            part.sum_(dh)
    return losses * weights, dh


def lm_head_loss(
    h: Tensor,
    weight: Tensor,
    targets: Targets,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    keep: bool = True,
    part: Part | None = None,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weighted loss of each target, and the gradient of their sum.

    Args:
        h: (R, H), in the dtype of the products; targets name its rows.
        weight: (V, H), the head, or this process's rows of it.
        label_smoothing: ε: p becomes (1 − ε) p + ε m / V.
        keep: whether the gradient is wanted.
        part: which rows those are; None for all.
        mean: (H,), the mean of all rows of the head, in the accumulation dtype; by default that of the given rows.

    Returns:
        losses (T,), and dh (R, H), both float32 (float64 for float64); None for dh without ``keep``.
    """
    dtype = accumulation_dtype(h.dtype)
    rows, order = targets.rows.sort(stable=True)
    indices, probs, weights = targets.indices[order], targets.probs[order].to(dtype), targets.weights[order].to(dtype)
    mass, entropy = probs.sum(1), torch.special.xlogy(probs, probs).sum(1)
    kept = 1 - label_smoothing
    mean = None if not label_smoothing else weight.mean(0, dtype=dtype) if mean is None else mean
    first, n_own = 0 if part is None else part.first, len(weight)
    present, counts = rows.unique_consecutive(return_counts=True)
    local = torch.arange(len(present), device=rows.device).repeat_interleave(counts)
    of_row = torch.zeros(len(present), dtype=dtype, device=h.device).index_add_(0, local, weights * mass)
    losses = torch.empty(len(rows), dtype=dtype, device=h.device)
    dh = torch.zeros(h.shape, dtype=dtype, device=h.device) if keep else None
    ends = torch.cat((counts.new_zeros(1), counts.cumsum(0))).tolist()
    buffer = h.new_empty(min(ROWS, len(present)), len(weight))
    for start in range(0, len(present), ROWS):
        chunk = slice(start, min(start + ROWS, len(present)))
        own = slice(ends[chunk.start], ends[chunk.stop])  # the chunk's targets
        at, tokens = local[own] - start, indices[own] - first
        is_own = None if part is None else (tokens >= 0) & (tokens < n_own)
        read = h[present[chunk]]
        z = torch.mm(read, weight.T, out=buffer[: len(read)])
        if temperature != 1:
            z.mul_(1 / temperature)
        if is_own is None or part is None:
            asked = z[at[:, None], tokens].to(dtype)
        else:
            asked = part.sum_(torch.where(is_own, z[at[:, None], tokens.clamp(0, n_own - 1)].to(dtype), 0.0))
        most, log_sum = _softmax_(z, part) if keep else _log_sum(z, part)
        asked -= most[at][:, None]  # relative to the largest: where the model is sure, rounding then matters little
        loss = entropy[own] + mass[own] * log_sum[at] - kept * (probs[own] * asked).sum(1)
        if mean is not None:
            loss -= label_smoothing * mass[own] * ((read.to(dtype) @ mean) / temperature - most)[at]
        losses[own] = loss * weights[own]
        if dh is None:
            continue
        # Each row's dz divided by its weight of softmax. A target's own entry is softmax − p in full precision: where
        # the two are nearly equal, nothing would be left in a narrow dtype.
        share = weights[own, None] * probs[own] * kept / of_row[chunk][at][:, None].clamp(min=torch.finfo(dtype).tiny)
        named = (at[:, None] * n_own + tokens).flatten()
        probs_of = (asked - log_sum[at][:, None]).exp_().flatten()
        if is_own is not None:
            own_ones = is_own.flatten()
            named, share, probs_of = named[own_ones], share.flatten()[own_ones], probs_of[own_ones]
        where, place = named.unique(return_inverse=True)
        taken = torch.zeros(len(where), dtype=dtype, device=h.device).index_add_(0, place, share.flatten())
        softmax = torch.empty_like(taken)
        softmax[place] = probs_of  # the same value where a token is named twice
        z.view(-1)[where] = (softmax - taken).to(z.dtype)
        d = torch.mm(z, weight).to(dtype)
        if part is not None:
            part.sum_(d)
        if mean is not None:
            d -= label_smoothing * mean
        dh[present[chunk]] = d * (of_row[chunk] / temperature)[:, None]
    back = torch.empty_like(losses)
    back[order] = losses
    return back, dh


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
        most, log_sum = _log_sum(z)
        losses.append(log_sum - (asked.to(most.dtype) - most))
        right.append(asked.to(most.dtype) >= most)
    return torch.cat(losses), torch.cat(right)


def _softmax_(z: Tensor, part: Part | None = None) -> tuple[Tensor, Tensor]:
    """The softmax of (n, V), in place, and what :func:`_log_sum` gives; computed in the accumulation dtype."""
    if part is not None:
        most, log_sum = _log_sum(z, part)
        for start in range(0, len(z), _step(z)):
            few = slice(start, start + _step(z))
            z[few] = (z[few].to(most.dtype) - (most + log_sum)[few, None]).exp_().to(z.dtype)
        return most, log_sum
    parts, step = [], _step(z)
    for few in z.split(step):
        wide = few.to(accumulation_dtype(z.dtype))
        softmax = wide.softmax(-1)
        parts.append((wide.amax(-1), -softmax.amax(-1).log()))  # the largest probability is one over the sum
        few.copy_(softmax)
    return torch.cat([most for most, _ in parts]), torch.cat([log_sum for _, log_sum in parts])


def _log_sum(z: Tensor, part: Part | None = None) -> tuple[Tensor, Tensor]:
    """The largest entry m of each row (n,), and ``log Σ exp(z − m)``."""
    step, parts = _step(z), []
    if part is not None:
        most = part.max_(z.amax(-1).to(accumulation_dtype(z.dtype)))
        sums = [
            (z[start : start + step].to(most.dtype) - most[start : start + step, None]).exp_().sum(-1)
            for start in range(0, len(z), step)
        ]
        return most, part.sum_(torch.cat(sums)).log()
    for start in range(0, len(z), step):
        wide = z[start : start + step].to(accumulation_dtype(z.dtype))
        most = wide.amax(-1)
        parts.append((most, (wide - most[:, None]).exp_().sum(-1).log()))
    return torch.cat([most for most, _ in parts]), torch.cat([log_sum for _, log_sum in parts])


def _log_softmax(z: Tensor, part: Part | None) -> Tensor:
    """The log-softmax of (n, V), in its dtype."""
    if part is None:
        return z.log_softmax(-1)
    most = part.max_(z.amax(-1))
    z -= most[:, None]
    return z.sub_(part.sum_(z.exp().sum(-1)).log_()[:, None])


def _step(z: Tensor) -> int:
    return max(1, math.ceil(_CACHED / z.shape[1] / 4)) if z.device.type == "cpu" else len(z)
