"""The delta of a LoRA: how it moves a frozen model's hidden states, differentiable in the LoRA tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from qwen_functional import Lora, LoraSpec, PackedTokens, Qwen2Config, Qwen2Weights, load_pretrained, pack
from qwen_functional.checkpoint import resolve_checkpoint
from qwen_functional.engine import check_checkpoint, checked_layers
from qwen_functional.forward import Vjp, forward_vjp
from qwen_functional.lora import LoraPair
from qwen_functional.memory import free_bytes

from .chat import read_probes
from .probes import create_generic_probes
from .shares import Shares
from .tokenization import check_probes

POOLINGS = ("mean", "none")
_BASES_KEPT = 8


class DifferentiableDeltaCompute(nn.Module):
    """Maps LoRA tensors to their delta, with gradients: ``delta(θ) = mean over probes of v(base + θ) − v(base)``.

    v is the hidden state of a probe's last token. All adapters run at once, on packed probes; the base model has
    no parameters here, is never changed and gets no gradient. A LoRA of zeros has a delta of exactly zero.

    Args:
        config, weights: the base model, from :func:`qwen_functional.load_pretrained`. They stay on their device.
        probes: token ids of each probe.
        spec: the LoRA; by default rank 16, alpha 32, all seven projections.
        layer: after which block to read out, from 0; −1 is after the last block and the final norm. A sequence
            reads out several.
        pooling: ``"mean"`` averages over the probes, ``"none"`` returns a delta for each.
        adapters_per_pass: how many adapters to run at once; None for all. With more adapters than that, the
            activation memory is that of one pass: the gradient computes all passes but one again, unless the loss is
            a mean over adapters, see :meth:`mean_loss`.
        checkpoint, memory_budget: see :func:`qwen_functional.forward.forward_vjp`.
        prepack: whether to hold a second form of the weights that a CPU multiplies faster, see
            :meth:`qwen_functional.Qwen2Weights.prepack`; ``"auto"`` does where it takes at most a quarter of the
            free memory.
        mesh: its dimension named ``"dp"`` splits the adapters of a call over ranks: all of them go in and come out
            whole on every rank, and so do gradients. Without it, such as where every rank has adapters of its own, a
            rank computes what it is given. The weights know of a ``"tp"`` dimension themselves.

    Shapes: one adapter gives (H,), G of them (G, H). Several layers put a dimension before H, and without pooling
    the probes put one before H: (G, layers, probes, H) with both. float32 (float64 for float64 weights).

    Raises:
        ValueError: no probes, an empty probe, ids outside the vocabulary, a probe longer than the model's
            positions, or another argument that is off.
    """

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        probes: Sequence[Sequence[int]],
        spec: LoraSpec | None = None,
        *,
        layer: int | Sequence[int] = -1,
        pooling: str = "mean",
        adapters_per_pass: int | None = None,
        checkpoint: str = "auto",
        memory_budget: int | None = None,
        prepack: bool | str = "auto",
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        self._shares = Shares.of(mesh)
        self.tokens = _checked_tokens(
            config,
            probes,
            layer=layer,
            pooling=pooling,
            adapters_per_pass=adapters_per_pass,
            checkpoint=checkpoint,
            prepack=prepack,
        )
        self.config, self.weights = config, _prepacked(weights, prepack)
        self.spec = LoraSpec() if spec is None else spec
        self.lora_shapes = self.spec.shapes(config)
        self.layer = layer if isinstance(layer, int) else tuple(layer)
        self.pooling = pooling
        self.adapters_per_pass = adapters_per_pass
        self.truncated_probes: tuple[int, ...] = ()
        self._engine_options: dict[str, Any] = {
            "checkpoint": checkpoint,
            "layer": (self.layer,) if isinstance(self.layer, int) else self.layer,
            "memory_budget": memory_budget,
        }
        self._bases: OrderedDict[tuple, Tensor] = OrderedDict()
        self._checkpoint_used: str | None = None
        with torch.inference_mode(False):  # or autograd could not save base_activation later
            self._bare = self._run(None, wanted=())[0][0]  # (layers, P, H), on every rank

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        probes: Sequence[str] | None = None,
        spec: LoraSpec | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        max_length: int = 256,
        *,
        chat: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        compute_dtype: torch.dtype | None = None,
        mesh: DeviceMesh | None = None,
        stream: bool | str = False,
        **options: Any,
    ) -> DifferentiableDeltaCompute:
        """Load a base model and its tokenizer, and tokenize the probes.

        Args:
            model: hub id or folder.
            probes: texts; by default the five of :func:`create_generic_probes`.
            device: by default a GPU where there is one, else the CPU.
            max_length: longer probes are cut to so many tokens; ``truncated_probes`` says which were.
            compute_dtype: of the matrix multiplications, see :meth:`qwen_functional.Qwen2Weights.compute_in`; by
                default ``dtype``, but float32 on a CPU that has no fast products in it.
            mesh: of several processes: ``"tp"`` splits the model, ``"dp"`` the adapters.
            stream: leave the base on ``"disk"`` (True) or in the ``"host"``'s memory, see ``load_pretrained``.
            chat: put each probe, as a user's message, into the checkpoint's own chat template.
            options: the keyword arguments of the constructor.

        Raises:
            ValueError: as the constructor and ``load_pretrained`` do; no tokenizer, or no chat template.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        texts = create_generic_probes() if probes is None else probes
        check_probes(texts)
        folder = resolve_checkpoint(model, revision=revision, local_files_only=local_files_only)
        tokenized = read_probes(folder, texts, max_length, chat=chat)
        config = Qwen2Config.from_json_file(folder / "config.json")
        _checked_tokens(config, tokenized.ids, **options)  # before the weights are read
        config, weights = load_pretrained(folder, dtype=dtype, device=device, lm_head=False, mesh=mesh, stream=stream)
        weights = weights if compute_dtype is None else weights.compute_in(compute_dtype)
        delta = cls(config, weights, tokenized.ids, spec, mesh=mesh, **options)
        delta.truncated_probes = tokenized.truncated
        return delta

    @property
    def base_activation(self) -> Tensor:
        """What the bare model gives where the delta of one adapter would stand; (H,) by default. Computed once."""
        return self._pooled(self._bare[None], batched=False)

    @property
    def is_split(self) -> bool:
        """Whether several ranks have to make each call together: the model or the adapters are split over them."""
        return self.weights.parallel is not None or self._shares.size > 1

    @property
    def checkpoint_used(self) -> str | None:
        """What ``checkpoint`` came to in the latest call with gradients, as ``Vjp.checkpoint`` says it."""
        return self._checkpoint_used

    def forward(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The delta of one adapter, or of G.

        Args:
            tensors: as :meth:`LoraSpec.bind` takes them.

        Raises:
            ValueError: as :meth:`LoraSpec.bind`.
        """
        lora = self.spec.bind(self.config, tensors)
        flat = [tensor for pair in lora.pairs.values() for tensor in (pair.A, pair.B)]
        # Under no_grad autograd would still name the tensors that require gradients, and their keep be in vain.
        values = _Values.apply(self, lora, *flat) if torch.is_grad_enabled() else self.values(lora)
        return self._pooled(values - self._base(lora), lora.batched)

    def deltas(self, lora: Lora) -> Tensor:
        """The deltas (G, …) of adapters that are bound already, of any spec, without gradients; nothing is kept."""
        with torch.no_grad():
            return self._pooled(self.values(lora) - self._base(lora), batched=True)

    def mean_loss(self, tensors: Mapping[str, Tensor], loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """The mean over adapters of a loss of their deltas: each pass goes forwards and back before the next one.

        The number and the gradients are those of ``loss(self(tensors), slice(0, G))``. In several passes that would
        compute nearly all of them twice, since no pass can go back before the loss is known; this computes each once.

        Args:
            tensors: of G adapters, as :meth:`forward` takes them.
            loss: from the deltas (g, …) of the adapters in a slice to a scalar, their mean. It must be linear in the
                mean: adapters that are compared with each other do not fit. Of what it depends on only the deltas
                get gradients.

        Raises:
            ValueError: one adapter without a leading G, a loss that is not a scalar, or as :meth:`forward`.
        """
        lora = self.spec.bind(self.config, tensors)
        if not lora.batched:
            raise ValueError("tensors are of one adapter without a leading G, expected a batch (G, …)")
        flat = [tensor for pair in lora.pairs.values() for tensor in (pair.A, pair.B)]
        return _MeanLoss.apply(self, lora, loss, torch.is_grad_enabled(), *flat)

    def forward_batch(self, batch: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The deltas (G, …) of G adapters given one by one.

        Raises:
            ValueError: an empty batch, adapters with different tensors, or as :meth:`forward`.
        """
        if not batch:
            raise ValueError("batch is empty, expected at least one adapter")
        loras = [self.spec.bind(self.config, tensors) for tensors in batch]
        names = loras[0].names()
        for index, lora in enumerate(loras):
            if lora.batched:
                raise ValueError(f"adapter {index} of the batch has a leading G, expected one adapter each")
            if lora.names() != names:
                odd = sorted(set(names) ^ set(lora.names()))[0]
                raise ValueError(f"adapters 0 and {index} of the batch differ in {odd!r}, expected the same tensors")
        each = [lora.tensors() for lora in loras]
        if not names:
            return self.forward({}).expand(len(batch), *self.base_activation.shape)
        return self.forward({name: torch.stack([tensors[name] for tensors in each]) for name in names})

    def _pooled(self, values: Tensor, batched: bool) -> Tensor:
        """(G, layers, P, H) pooled, and without the dimensions that were not asked for."""
        pooled = values.mean(2) if self.pooling == "mean" else values
        pooled = pooled[:, 0] if isinstance(self.layer, int) else pooled
        return pooled if batched else pooled[0]

    def _base(self, lora: Lora) -> Tensor:
        """The bare model's values (G, layers, P, H), computed in passes of the very shapes that the adapters take.

        GEMMs of other shapes may add in another order: with these the delta of a zero LoRA is zero to the bit. Below
        the first adapted block all adapters share one row of tokens, above it they have one each: which modules of
        that block are adapted decides every shape, and nearly all adapters have the same base.
        """
        first = min((layer for layer, _ in lora.pairs), default=None)
        least = {key: pair for key, pair in lora.pairs.items() if key[0] == first}
        key = lora.n_adapters, tuple(least)
        if key not in self._bases:
            zero = {
                key: LoraPair(torch.zeros_like(pair.A[:, :1]), torch.zeros_like(pair.B[..., :1]), 1.0)
                for key, pair in least.items()
            }
            with torch.no_grad():
                self._bases[key] = self.values(Lora(zero, lora.n_adapters, batched=True))
            while len(self._bases) > _BASES_KEPT:
                self._bases.popitem(last=False)
        self._bases.move_to_end(key)
        return self._bases[key]

    def passes(self, n_adapters: int) -> list[slice]:
        """The adapters of each pass on this rank."""
        own = self._shares.own(n_adapters)
        step = self.adapters_per_pass or max(1, own.stop - own.start)
        return [slice(start, min(start + step, own.stop)) for start in range(own.start, own.stop, step)]

    def values(self, lora: Lora) -> Tensor:
        """Hidden states (G, layers, P, H) under each adapter, pass by pass, nothing kept."""
        passes = self.passes(lora.n_adapters)
        return self._whole([self._run(lora[adapters], wanted=())[0] for adapters in passes], lora.n_adapters)

    def _whole(self, values: Sequence[Tensor], n_adapters: int) -> Tensor:
        """The values (G, layers, P, H) of all ranks from those of this rank's passes."""
        own = torch.cat(list(values)) if len(values) > 1 else values[0] if values else None
        return self._shares.whole(own, (n_adapters, *self._bare.shape), self._bare.dtype, self._bare.device)

    def _run(self, lora: Lora | None, wanted: Sequence[str] | None) -> tuple[Tensor, Vjp]:
        return forward_vjp(self.config, self.weights, self.tokens, lora, wrt=wanted, **self._engine_options)


def _checked_tokens(
    config: Qwen2Config,
    probes: Sequence[Sequence[int]],
    *,
    layer: int | Sequence[int] = -1,
    pooling: str = "mean",
    adapters_per_pass: int | None = None,
    checkpoint: str = "auto",
    memory_budget: int | None = None,
    prepack: bool | str = "auto",
) -> PackedTokens:
    """The packed probes, after all checks that need no weights."""
    if prepack not in (True, False, "auto"):
        raise ValueError(f"prepack is {prepack!r}, expected True, False or 'auto'")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}, expected one of {POOLINGS}")
    n = adapters_per_pass
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ValueError(f"adapters_per_pass is {n!r}, expected 1 or more, or None")
    checked_layers(config, layer)
    check_checkpoint(checkpoint)
    try:
        tokens = pack(probes)
        tokens.check_fits(config)
    except ValueError as error:
        raise ValueError(f"probes: {error}") from error
    return tokens


def _prepacked(weights: Qwen2Weights, prepack: bool | str) -> Qwen2Weights:
    if weights.packed is None and prepack == "auto":
        prepack = weights.can_prepack and weights.prepack_nbytes() <= free_bytes(weights.device) // 4
    return weights.prepack() if prepack and weights.packed is None else weights


class _Values(torch.autograd.Function):
    """Where autograd meets the engine: (A, B, A, B, …), each (G, …), to hidden states (G, layers, P, H)."""

    @staticmethod
    def forward(ctx: Any, delta: DifferentiableDeltaCompute, lora: Lora, *flat: Tensor) -> Tensor:
        ctx.delta, ctx.lora, ctx.vjp = delta, _refilled(lora, flat), None
        ctx.wanted = [name for name, need in zip(lora.names(), ctx.needs_input_grad[2:], strict=True) if need]
        ctx.save_for_backward(*flat)
        if not ctx.wanted:
            return delta.values(ctx.lora)
        passes = delta.passes(lora.n_adapters)
        values = [delta._run(ctx.lora[adapters], wanted=())[0] for adapters in passes[:-1]]
        if passes:  # memory for one pass is there: the last one keeps
            value, ctx.vjp = delta._run(ctx.lora[passes[-1]], ctx.wanted)
            values.append(value)
            delta._checkpoint_used = ctx.vjp.checkpoint
        return delta._whole(values, lora.n_adapters)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _Values._gradients(ctx, _marked(cotangent))

    @staticmethod
    @once_differentiable
    def _gradients(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # saved_tensors raises where a tensor was changed in place since the forward.
        delta, lora = ctx.delta, _refilled(ctx.lora, ctx.saved_tensors)
        parts: list[dict[str, Tensor]] = []
        for adapters in reversed(delta.passes(lora.n_adapters)):
            vjp, ctx.vjp = ctx.vjp, None
            if vjp is None:  # several passes, or a second backward through the same graph
                _, vjp = delta._run(lora[adapters], ctx.wanted)
                delta._checkpoint_used = vjp.checkpoint
            parts.insert(0, vjp(cotangent[adapters]))
        gradients = delta._shares.whole_gradients(_joined(parts), _wanted(lora, ctx.wanted))
        return (None, None, *(gradients.get(name) for name in lora.names()))


class _MeanLoss(torch.autograd.Function):
    """The loss of :meth:`DifferentiableDeltaCompute.mean_loss`, with its gradients computed on the way forwards."""

    @staticmethod
    def forward(
        ctx: Any,
        delta: DifferentiableDeltaCompute,
        lora: Lora,
        loss: Callable[[Tensor, slice], Tensor],
        wants_gradients: bool,
        *flat: Tensor,
    ) -> Tensor:
        ctx.names, lora = lora.names(), _refilled(lora, flat)
        needs = zip(ctx.names, ctx.needs_input_grad[4:], strict=True)
        wanted = [name for name, need in needs if need and wants_gradients]
        base, means, parts = delta._base(lora), [], []
        for adapters in delta.passes(lora.n_adapters):
            value, vjp = delta._run(lora[adapters], wanted)
            share = value.shape[0] / lora.n_adapters
            with torch.set_grad_enabled(bool(wanted)):
                value = value.requires_grad_(bool(wanted))
                mean = loss(delta._pooled(value - base[adapters], batched=True), adapters) * share
                if mean.numel() != 1:
                    raise ValueError(f"loss has shape {tuple(mean.shape)}, expected a scalar")
                if wanted:
                    (cotangent,) = torch.autograd.grad(mean.sum(), value)
                    parts.append(vjp(cotangent))
                    delta._checkpoint_used = vjp.checkpoint
            means.append(mean.detach())
        ctx.gradients = delta._shares.whole_gradients(_joined(parts), _wanted(lora, wanted))
        own = torch.stack(means).sum() if means else base.new_zeros(())
        return delta._shares.sum_(own)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _MeanLoss._gradients(ctx, _marked(cotangent))

    @staticmethod
    @once_differentiable
    def _gradients(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("mean_loss went backwards already, expected one backward for each")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = {name: gradient.mul_(cotangent) for name, gradient in gradients.items()}
        return (None, None, None, None, *(scaled.get(name) for name in ctx.names))


def _marked(cotangent: Tensor) -> Tensor:
    """``once_differentiable`` refuses second derivatives only where the cotangent requires a gradient.

    With create_graph it must, or those of a loss that is linear in the delta would count as zero.
    """
    if torch.is_grad_enabled() and not cotangent.requires_grad:
        return cotangent.detach().requires_grad_()
    return cotangent


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients of all passes together. Takes them out of the parts one by one: they are never there twice."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0] if parts else ())}


def _wanted(lora: Lora, names: Sequence[str]) -> dict[str, Tensor]:
    """{PEFT name: (G, …)} of some of the tensors."""
    tensors = lora.tensors() if lora.batched else {name: tensor[None] for name, tensor in lora.tensors().items()}
    return {name: tensors[name] for name in names}


def _refilled(lora: Lora, flat: Sequence[Tensor]) -> Lora:
    """The same adapters with other tensors in their places."""
    pairs = {
        key: LoraPair(A, B, pair.scaling)
        for (key, pair), A, B in zip(lora.pairs.items(), flat[::2], flat[1::2], strict=True)
    }
    return Lora(pairs, lora.n_adapters, batched=True)
