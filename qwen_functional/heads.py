"""What is computed from the hidden states that are read out, with its vjp. The engine's way back starts here.

A head says which tokens it reads, and after which blocks; a plan binds it to the rows that are read for all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .dtypes import accumulation_dtype
from .memory import to_device
from .ops.lm_head import Ordered, Part, StateTargets, Targets, lm_head_divergence, lm_head_loss
from .ops.rmsnorm import rmsnorm, rmsnorm_vjp
from .ops.sums import index_sum_
from .packing import PackedTokens, check_ids

if TYPE_CHECKING:
    from .plan import Plan


class Head(Protocol):
    """A function of hidden states.

    Attributes:
        layer: after which blocks it reads; as for :func:`forward_vjp`.
    """

    @property
    def layer(self) -> int | Sequence[int]: ...

    def reads(self, tokens: PackedTokens, index: int) -> Tensor:
        """The nodes (P,) that it reads of a row: that of adapter ``index``, or the one that all adapters share."""

    def bind(self, plan: Plan, row_of: Tensor) -> Bound:
        """The head bound to a plan; ``row_of`` (P,) or (ΣP,), on the CPU: where each of its reads is among all rows."""


class Bound(Protocol):
    """A head bound to a plan."""

    def __call__(self, states: dict[int, Tensor], keep: bool) -> tuple[Tensor, Any]:
        """The value, and with ``keep`` what the vjp needs.

        ``states``: {layer: (G or 1, R, H)}, the residual stream at the rows that are read, after each block that a head
        reads and after the top one; (1, ΣR, H) where each adapter has texts of its own.
        """

    def vjp(self, cotangent: Tensor, kept: Any) -> dict[int, Tensor]:
        """{layer: cotangent (G, R, H) of the residual stream}."""


@dataclass(frozen=True)
class Hidden:
    """The hidden states themselves: after some blocks, and (−1) after the final norm.

    Its value is (G, P, H), or (G, layers, P, H) for a sequence of layers; where each adapter has texts of its own, (ΣP,
    H) or (layers, ΣP, H), one adapter after the other.

    Args:
        layer, read: as for :func:`forward_vjp`; ``read`` may also be the nodes (P,) to read of each row of tokens.
    """

    layer: int | Sequence[int] = -1
    read: str | Sequence[Tensor] = "last"

    def reads(self, tokens: PackedTokens, index: int) -> Tensor:
        return tokens.reads(self.read) if isinstance(self.read, str) else self.read[index]

    def bind(self, plan: Plan, row_of: Tensor) -> Bound:
        return BoundHidden(self, plan, row_of)


class BoundHidden:
    """Attributes: row_of, as for :meth:`Head.bind`, on the weights' device; it may be overwritten."""

    def __init__(self, head: Hidden, plan: Plan, row_of: Tensor) -> None:
        self.single = isinstance(head.layer, int)
        self.layers: tuple[int, ...] = (head.layer,) if isinstance(head.layer, int) else tuple(head.layer)
        self.row_of = to_device(row_of, plan.weights.device)
        self.top, self.own_texts = plan.top, plan.own_texts
        self.n_adapters = 1 if plan.own_texts else plan.n_adapters
        self.norm, self.eps = plan.weights.norm, plan.config.rms_norm_eps

    def __call__(self, states: dict[int, Tensor], keep: bool) -> tuple[Tensor, Any]:
        top = states[self.top]
        values = [rmsnorm(top, self.norm, self.eps)[0] if layer == -1 else states[layer] for layer in self.layers]
        value = torch.stack([one[:, self.row_of].expand(self.n_adapters, -1, -1) for one in values], dim=1)
        value = value[0] if self.own_texts else value
        return value.squeeze(-3) if self.single else value, top

    def vjp(self, cotangent: Tensor, top: Tensor) -> dict[int, Tensor]:
        cotangent = cotangent.unsqueeze(-3) if self.single else cotangent
        cotangent = cotangent[None] if self.own_texts else cotangent
        cotangent = cotangent.transpose(0, 1)  # layers first: each is then a tensor of its own, as kernels read it
        # Sequences may end at the same node: sum their cotangents.
        shape = (*cotangent.shape[:2], top.shape[1], cotangent.shape[3])
        d_read = torch.zeros(shape, dtype=top.dtype, device=top.device)
        index_sum_(d_read, 2, self.row_of, cotangent.to(d_read))
        below: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            d, at = d_read[index], layer
            if layer == -1:
                rstd = rmsnorm(top, self.norm, self.eps)[1]
                d, at = rmsnorm_vjp(d, top, self.norm, rstd), self.top
            below[at] = below[at] + d if at in below else d
        return below


@dataclass(frozen=True)
class TokenLoss:
    """The language model's loss on known tokens, or on a distribution over the next ones.

    Its value is (G,): for each adapter the sum over its targets of weight times loss, see :class:`Targets`, or
    :class:`StateTargets` for a teacher's states; float32, or float64 for float64 weights. Logits are computed only for
    the rows that have a target, a few at a time, and never kept.

    Args:
        targets: one for each adapter, or a single one where all adapters have the same texts; all of one kind.
        label_smoothing: ε of the loss ``(1 − ε) · cross-entropy + ε · mean over the vocabulary of −log p``; not for
            :class:`StateTargets`.
        temperature: the divisor of the logits.
    """

    targets: Sequence[Targets] | Sequence[StateTargets]
    label_smoothing: float = 0.0
    temperature: float = 1.0
    layer: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing!r}, expected from 0 to below 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature!r}, expected above 0")

    def reads(self, tokens: PackedTokens, index: int) -> Tensor:
        if index >= len(self.targets):
            raise ValueError(f"there are {len(self.targets)} targets, expected one for each row of tokens")
        rows = self.targets[index].rows
        if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= len(tokens):
            what = f"{int(rows.min())} to {int(rows.max())}" if len(rows) else "none"
            raise ValueError(f"targets {index} are for rows {what}, expected some of 0 to {len(tokens) - 1}")
        return rows

    def bind(self, plan: Plan, row_of: Tensor) -> Bound:
        return _BoundTokenLoss(self, plan, row_of)


class _BoundTokenLoss:
    def __init__(self, head: TokenLoss, plan: Plan, row_of: Tensor) -> None:
        weights, self.n_adapters = plan.weights, plan.n_adapters
        if weights.lm_head is None:
            raise ValueError("weights have no lm_head, which a loss needs; expected load_pretrained with lm_head=True")
        self.head, self.weights, self.eps, self.top = head, weights, plan.config.rms_norm_eps, plan.top
        self.backend, self.widen = plan.backend, 1 if plan.own_texts else plan.n_adapters
        self.n_rows, device = sum(len(tables.rows) for tables in plan.tables), weights.device
        targets, adapters, adapter_of_row = _joined(head, plan, row_of, self.n_rows)
        self.adapters, self.adapter_of_row = to_device(adapters, device), to_device(adapter_of_row, device)
        self.targets: Ordered | StateTargets
        if isinstance(targets, Targets):
            self.targets = Ordered.of(targets, device, accumulation_dtype(weights.compute_dtype), head.label_smoothing)
        else:
            self.targets = targets.to(device)

    def __call__(self, states: dict[int, Tensor], keep: bool) -> tuple[Tensor, Any]:
        top, weights = states[self.top], self.weights
        normed, rstd = rmsnorm(top, weights.norm, self.eps)
        h = normed.expand(self.widen, -1, -1).reshape(-1, top.shape[2]).to(weights.compute_dtype)
        matrix = weights.lm_head
        assert matrix is not None
        part, mean, smoothing, temperature = None, None, self.head.label_smoothing, self.head.temperature
        if weights.parallel is not None:
            own = weights.parallel.of_vocabulary(matrix.shape[0])
            if smoothing:
                mean = matrix.to(weights.compute_dtype).mean(0, dtype=accumulation_dtype(h.dtype))
            part = Part(own.start, weights.parallel.sum_, weights.parallel.max_)
            E = matrix[own].to(h.dtype) if isinstance(matrix, Tensor) else matrix.to(h.dtype, own)
        else:
            E = matrix.to(h.dtype)
        if isinstance(self.targets, StateTargets):
            losses, dh = lm_head_divergence(
                h, E, self.targets, temperature=temperature, keep=keep, part=part, divergence=self.backend.divergence_
            )
        else:
            losses, dh = lm_head_loss(
                h, E, self.targets, temperature=temperature, keep=keep, part=part, mean=mean,
                softmax=self.backend.softmax_,
            )  # fmt: skip
        value = torch.zeros(self.n_adapters, dtype=accumulation_dtype(h.dtype), device=h.device)
        index_sum_(value, 0, self.adapters, losses.to(value.dtype))
        return value, (top, rstd, dh) if keep else None

    def vjp(self, cotangent: Tensor, kept: Any) -> dict[int, Tensor]:
        top, rstd, dh = kept
        d = (dh * cotangent.to(dh.dtype)[self.adapter_of_row, None]).view(self.widen, self.n_rows, -1)
        return {self.top: rmsnorm_vjp(d.to(top.dtype), top, self.weights.norm, rstd)}


def _joined(
    head: TokenLoss, plan: Plan, row_of: Tensor, n_rows: int
) -> tuple[Targets | StateTargets, Tensor, Tensor]:
    """The targets of all adapters, the adapter of each, and that of each row, on the CPU."""
    n = plan.n_adapters if plan.own_texts else 1
    if len(head.targets) != n:
        raise ValueError(f"there are {len(head.targets)} targets, expected {n}, one for each row of tokens")
    kind: Any = type(head.targets[0])
    targets, rows = kind.joined(head.targets), row_of
    if plan.own_texts:
        adapters = torch.arange(n).repeat_interleave(torch.tensor([len(one.rows) for one in head.targets]))
    else:  # the same for each adapter
        n = plan.n_adapters
        adapters = torch.arange(n).repeat_interleave(len(rows))
        rows = (rows + n_rows * torch.arange(n)[:, None]).flatten()
        targets, n_rows = kind.joined([targets] * n), n_rows * n
    if kind is Targets:
        check_ids(targets.indices, plan.config.vocab_size)
    elif head.label_smoothing:
        smoothing = head.label_smoothing
        raise ValueError(f"label_smoothing is {smoothing!r}, expected 0 for targets from a teacher's states")
    return targets.at(rows), adapters, torch.zeros(n_rows, dtype=torch.int64).index_copy_(0, rows, adapters)
