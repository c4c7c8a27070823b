"""Adapters through the engine, pass by pass, each rank its share; what later calls can use is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwen_functional import Lora, PackedTokens, Qwen2Config, Qwen2Weights
from qwen_functional.backends import choose
from qwen_functional.forward import Vjp, forward_vjp
from qwen_functional.lora import LoraPair
from qwen_functional.memory import free_bytes
from qwen_functional.plan import Plan, Plans

from .shares import Shares

_BASES_KEPT = 8


class AdapterPasses(ABC):
    """A value for each of many adapters, and its vjp, ``adapters_per_pass`` at a time.

    Args:
        adapters_per_pass: None for all of this rank's at once.
        mesh: its dimension ``"dp"`` splits the adapters over ranks.
    """

    def __init__(self, adapters_per_pass: int | None, mesh: DeviceMesh | None) -> None:
        self.adapters_per_pass, self.shares = adapters_per_pass, Shares.of(mesh)

    @abstractmethod
    def run(self, lora: Lora, adapters: slice, wanted: Sequence[str] | None) -> tuple[Tensor, Callable]:
        """One pass: the values (g, …) of its adapters, and the vjp to the tensors named in ``wanted``."""

    @abstractmethod
    def base(self, lora: Lora) -> Tensor:
        """What is subtracted from the values (G, …)."""

    @property
    @abstractmethod
    def one(self) -> Tensor:
        """A tensor with the shape, dtype and device of one adapter's value."""

    def slices(self, n_adapters: int) -> list[slice]:
        """The adapters of each pass on this rank."""
        own = self.shares.own(n_adapters)
        step = self.adapters_per_pass or max(1, own.stop - own.start)
        return [slice(start, min(start + step, own.stop)) for start in range(own.start, own.stop, step)]

    def values(self, lora: Lora) -> Tensor:
        """The values (G, …) of all adapters, pass by pass; nothing is kept."""
        parts = [self.run(lora, adapters, wanted=())[0] for adapters in self.slices(lora.n_adapters)]
        return self.whole(parts, lora.n_adapters)

    def whole(self, values: Sequence[Tensor], n_adapters: int) -> Tensor:
        """The values (G, …) of all ranks from those of this rank's passes."""
        own = torch.cat(list(values)) if len(values) > 1 else values[0] if values else None
        one = self.one
        return self.shares.whole(own, (n_adapters, *one.shape), one.dtype, one.device)

    def gathered(self, parts: Sequence[dict[str, Tensor]], lora: Lora, wanted: Sequence[str]) -> dict[str, Tensor]:
        """The gradients {PEFT name: (G, …)} of all ranks from those of this rank's passes, which it consumes."""
        joined = _joined(parts)
        if self.shares.size == 1:
            return joined
        tensors = lora.tensors()
        return self.shares.whole_gradients(joined, {name: tensors[name] for name in wanted})


class Passes(AdapterPasses):
    """Hidden states (G, layers, P, H) under many adapters.

    Args:
        config, weights, tokens: of every pass.
        adapters_per_pass: None for all of this rank's at once.
        mesh: its dimension ``"dp"`` splits the adapters over ranks.
        engine: further arguments of :class:`Plan`; ``layer`` as a sequence.

    Attributes:
        bare: (layers, P, H), the values of the bare model, on every rank.
        checkpoint_used: the checkpointing chosen in the latest pass with gradients, see :attr:`Vjp.checkpoint`.
    """

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        tokens: PackedTokens,
        adapters_per_pass: int | None = None,
        mesh: DeviceMesh | None = None,
        **engine: Any,
    ) -> None:
        super().__init__(adapters_per_pass, mesh)
        self.config, self.weights, self.tokens = config, weights, tokens
        self.checkpoint_used: str | None = None
        # A bound method would make a reference cycle: self, and the mesh's groups, would outlive their last user.
        self.plans = Plans(partial(Plan, config, weights, tokens, **engine))
        self._bases: OrderedDict[tuple, Tensor] = OrderedDict()
        self._ranks_decide = choose(config, weights, Lora({}, 1, batched=False)).ranks_decide
        with torch.inference_mode(False):  # or autograd could not save it later
            self.bare = self._run(None, wanted=())[0][0]

    @property
    def one(self) -> Tensor:
        return self.bare

    def run(self, lora: Lora, adapters: slice, wanted: Sequence[str] | None) -> tuple[Tensor, Vjp]:
        return self._run(lora[adapters], wanted)

    def _run(self, lora: Lora | None, wanted: Sequence[str] | None) -> tuple[Tensor, Vjp]:
        value, vjp = forward_vjp(self.config, self.weights, self.tokens, lora, plan=self.plans(lora, wanted))
        if wanted:
            self.checkpoint_used = vjp.checkpoint
        return value, vjp

    def base(self, lora: Lora) -> Tensor:
        """The bare model's values (G, layers, P, H), computed in passes of the same shapes as the adapters'.

        GEMMs of other shapes may sum in another order; with the same ones the delta of a zero LoRA is exactly zero.
        Below the first adapted block all adapters share one row of tokens, above it they have one each: which modules
        of that block are adapted decides every shape, and nearly all adapters have the same base. Where the order of
        sums depends on LoRA ranks as well, the base has those of the adapters.
        """
        first = min((layer for layer, _ in lora.pairs), default=None)
        least = {key: pair for key, pair in lora.pairs.items() if key[0] == first}
        key = lora.n_adapters, lora.structure if self._ranks_decide else tuple(least)
        if key not in self._bases:
            if self._ranks_decide:
                zero = zero_lora(lora)
            else:
                pairs = {
                    key: LoraPair(torch.zeros_like(pair.A[:, :1]), torch.zeros_like(pair.B[..., :1]), 1.0)
                    for key, pair in least.items()
                }
                zero = Lora(pairs, lora.n_adapters, batched=True)
            with torch.no_grad():
                self._bases[key] = self.values(zero)
            while len(self._bases) > _BASES_KEPT:
                self._bases.popitem(last=False)
        self._bases.move_to_end(key)
        return self._bases[key]


def zero_lora(lora: Lora) -> Lora:
    """A LoRA of zeros with the same structure; each tensor takes the memory of one number."""
    pairs = {key: LoraPair(_zeros(pair.A), _zeros(pair.B), pair.scaling) for key, pair in lora.pairs.items()}
    return Lora(pairs, lora.n_adapters, batched=True)


def _zeros(like: Tensor) -> Tensor:
    return like.new_zeros(()).expand(like.shape)


def prepacked(weights: Qwen2Weights, prepack: bool | str) -> Qwen2Weights:
    """The weights in the form that ``prepack`` of :class:`DifferentiableDeltaCompute` asks for.

    Raises:
        ValueError: weights that cannot be packed.
    """
    if weights.packed is None and prepack == "auto":
        prepack = weights.can_prepack and weights.prepack_nbytes() <= free_bytes(weights.device) // 4
    return weights.prepack() if prepack and weights.packed is None else weights


def check_pass_options(adapters_per_pass: int | None, prepack: bool | str) -> None:
    """Raises ``ValueError`` if one of them is invalid."""
    if prepack not in (True, False, "auto"):
        raise ValueError(f"prepack is {prepack!r}, expected True, False or 'auto'")
    n = adapters_per_pass
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ValueError(f"adapters_per_pass is {n!r}, expected 1 or more, or None")


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients of all passes joined; taken out of the parts one by one, so that memory never holds two copies."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0] if parts else ())}
