"""The delta of a LoRA: how it moves a frozen model's hidden states, differentiable in the LoRA tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwen_functional import Lora, LoraSpec, PackedTokens, Qwen2Config, Qwen2Weights, pack, read_config
from qwen_functional.compiled import opaque
from qwen_functional.hub import resolve_checkpoint
from qwen_functional.plan import check_options, checked_layers

from . import autograd
from .frozen import Frozen, load_frozen
from .passes import Passes, check_pass_options, prepacked
from .probes.chat import read_probes
from .probes.texts import create_generic_probes
from .probes.tokenization import Probes, check_probes

POOLINGS = ("mean", "none")


class DifferentiableDeltaCompute(Frozen):
    """Maps LoRA tensors to their delta, with gradients: ``delta(θ) = mean over probes of v(base + θ) − v(base)``.

    v is the hidden state of a probe's last token. All adapters run at once, on packed probes; the base model is not
    among the module's parameters, is never changed and gets no gradient. A LoRA of zeros has a delta of exactly zero.

    Under ``torch.compile`` a call is a graph break, and its numbers are those of eager torch. Under the transforms of
    ``torch.func`` it is an error: pass many adapters as one batch.

    Args:
        config, weights: the base model, from :func:`qwen_functional.load_pretrained`. The weights keep their device
            and dtype: :meth:`to` refuses others, and so does moving a module that contains this one; changing the
            dtype of such a module leaves them as they are.
        probes: token ids of each probe; or :class:`Probes`, which also hold where the ids come from.
        spec: the LoRA; by default rank 16, alpha 32, all seven projections.
        layer: after which block to read out, from 0; −1 is after the last block and the final norm. A sequence
            reads out several.
        pooling: ``"mean"`` averages over the probes, ``"none"`` returns a delta for each.
        adapters_per_pass: how many adapters to run at once; None for all. With more adapters than that, activation
            memory is that of one pass, and the backward recomputes all passes but one, unless the loss is a mean over
            adapters, see :meth:`mean_loss`.
        checkpoint, memory_budget, graph: see :func:`qwen_functional.forward.forward_vjp`. What a step needs apart
            from values is built at the first call with a given number and structure of adapters, and kept.
        validate: whether LoRA tensors are checked for NaN and infinity, see :meth:`LoraSpec.bind`.
        prepack: whether to hold a second form of the weights that a CPU multiplies faster, see
            :meth:`qwen_functional.Qwen2Weights.prepack`; ``"auto"`` does so if it takes at most a quarter of the
            free memory.
        mesh: its dimension named ``"dp"`` splits the adapters of a call over ranks: every rank passes in all adapters
            and gets all deltas and all gradients. Without it, as where each rank has its own adapters, a rank computes
            what it is given. A ``"tp"`` dimension is known to the weights.

    Shapes: one adapter gives (H,), G of them (G, H). Several layers add a dimension before H, and without pooling
    the probes add one before H: (G, layers, probes, H) with both. float32 (float64 for float64 weights).

    Raises:
        ValueError: no probes, an empty probe, ids outside the vocabulary, a probe longer than the model's
            positions, or another invalid argument.
    """

    def __init__(
        self,
        config: Qwen2Config,
        weights: Qwen2Weights,
        probes: Sequence[Sequence[int]] | Probes,
        spec: LoraSpec | None = None,
        *,
        layer: int | Sequence[int] = -1,
        pooling: str = "mean",
        adapters_per_pass: int | None = None,
        checkpoint: str = "auto",
        memory_budget: int | None = None,
        prepack: bool | str = "auto",
        mesh: DeviceMesh | None = None,
        graph: bool | str = "auto",
        validate: bool = True,
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            "layer": layer,
            "pooling": pooling,
            "adapters_per_pass": adapters_per_pass,
            "checkpoint": checkpoint,
            "memory_budget": memory_budget,
            "mesh": mesh,
            "graph": graph,
            "validate": validate,
        }
        ids = probes.ids if isinstance(probes, Probes) else probes
        tokens = _checked_tokens(config, ids, prepack=prepack, **self._options)
        self.probes = probes if isinstance(probes, Probes) else Probes([list(one) for one in ids])
        self.config, self.weights = config, prepacked(weights, prepack)
        self.spec = LoraSpec() if spec is None else spec
        self.lora_shapes = self.spec.shapes(config)
        self.layer = layer if isinstance(layer, int) else tuple(layer)
        self.pooling, self.adapters_per_pass = pooling, adapters_per_pass
        self._validate = validate
        self._passes = Passes(
            config,
            self.weights,
            tokens,
            adapters_per_pass,
            mesh,
            layer=(self.layer,) if isinstance(self.layer, int) else self.layer,
            checkpoint=checkpoint,
            memory_budget=memory_budget,
            graph=graph,
        )

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
        chat_template_kwargs: Mapping[str, Any] | None = None,
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
            max_length: longer probes are cut to this many tokens; ``truncated_probes`` says which were.
            compute_dtype: of the matrix multiplications, see :meth:`qwen_functional.Qwen2Weights.compute_in`; by
                default ``dtype``, but float32 on a CPU without fast matrix products in it.
            mesh: of several processes: ``"tp"`` splits the model, ``"dp"`` the adapters.
            stream: leave the base on ``"disk"`` (True) or in ``"host"`` memory, see ``load_pretrained``.
            chat: put each probe, as a user message, into the checkpoint's own chat template, with the variables in
                ``chat_template_kwargs`` if any, such as Qwen3's ``{"enable_thinking": False}``.
            options: the keyword arguments of the constructor.

        Raises:
            ValueError: as the constructor and ``load_pretrained`` do; no tokenizer, or no chat template.
        """
        texts = create_generic_probes() if probes is None else probes
        check_probes(texts)
        folder = resolve_checkpoint(model, revision=revision, local_files_only=local_files_only)
        read = read_probes(folder, texts, max_length, chat=chat, chat_template_kwargs=chat_template_kwargs)
        config = read_config(folder)
        _checked_tokens(config, read.ids, **options)  # before the weights are read
        given: dict[str, Any] = {"dtype": dtype, "lm_head": False, "mesh": mesh, "stream": stream}
        config, weights = load_frozen(folder, device, compute_dtype, **given)
        return cls(config, weights, read, spec, mesh=mesh, **options)

    def on(self, weights: Qwen2Weights) -> DifferentiableDeltaCompute:
        """The same delta with other weights of the same config: packed or not, in another dtype, on another device.

        They are used as they are (nothing is packed); what this delta has computed and kept is not shared.
        """
        return DifferentiableDeltaCompute(
            self.config, weights, self.probes, self.spec, prepack=False, **self._options
        )

    @property
    def base_activation(self) -> Tensor:
        """The bare model's hidden states, in the shape of one adapter's delta: (H,) by default. Computed once."""
        return self._pooled(self._passes.bare[None], batched=False)

    @property
    def tokens(self) -> PackedTokens:
        """The probes as the engine reads them."""
        return self._passes.tokens

    @property
    def truncated_probes(self) -> tuple[int, ...]:
        """The indices of the probes that were cut to ``max_length``."""
        return self.probes.truncated

    @property
    def is_split(self) -> bool:
        """Whether several ranks must make each call together, as the model or the adapters are split over them."""
        return self.weights.parallel is not None or self._passes.shares.size > 1

    @property
    def checkpoint_used(self) -> str | None:
        """The checkpointing chosen in the latest call with gradients, as in ``Vjp.checkpoint``."""
        return self._passes.checkpoint_used

    def release(self) -> None:
        """Free what is kept for later calls: plans, and on a GPU the memory of their graphs."""
        self._passes.plans.release()

    @opaque
    def forward(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The delta of one adapter, or of G.

        Args:
            tensors: as :meth:`LoraSpec.bind` takes them.

        Raises:
            ValueError: as :meth:`LoraSpec.bind`; tensors on another device than the base model, or inside a transform
                of ``torch.func``.
        """
        lora = self._bound(tensors)
        return self._pooled(autograd.values(self._passes, lora) - self._passes.base(lora), lora.batched)

    @opaque
    def deltas(self, lora: Lora) -> Tensor:
        """The deltas (G, …) of already bound adapters, of any spec, without gradients; nothing is kept."""
        with torch.no_grad():
            return self._pooled(self._passes.values(lora) - self._passes.base(lora), batched=True)

    @opaque
    def mean_loss(self, tensors: Mapping[str, Tensor], loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """The mean over adapters of a loss on their deltas: each pass runs forward and backward before the next one.

        The value and the gradients are those of ``loss(self(tensors), slice(0, G))``. With several passes that would
        compute nearly all of them twice, since no backward can start before the loss is known; this computes each once.

        Args:
            tensors: of G adapters, as :meth:`forward` takes them.
            loss: maps the deltas (g, …) of the adapters in a slice to a scalar, the mean of their losses. It must be
                such a mean: a loss that compares adapters with each other does not qualify. Only the deltas get
                gradients, not what else it depends on.

        Raises:
            ValueError: one adapter without a leading G, a loss that is not a scalar, or as :meth:`forward`.
        """
        lora = self._bound(tensors)
        if not lora.batched:
            raise ValueError("tensors are of one adapter without a leading G, expected a batch (G, …)")

        def of_values(moved: Tensor, adapters: slice) -> Tensor:
            return loss(self._pooled(moved, batched=True), adapters)

        return autograd.mean_loss(self._passes, lora, of_values)

    @opaque
    def forward_batch(self, batch: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The deltas (G, …) of G adapters given one by one.

        Raises:
            ValueError: an empty batch, adapters with different tensors, or as :meth:`forward`.
        """
        if not batch:
            raise ValueError("batch is empty, expected at least one adapter")
        loras = [self._bound(tensors) for tensors in batch]
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

    def _bound(self, tensors: Mapping[str, Tensor]) -> Lora:
        return autograd.bound(self.spec, self.config, tensors, self.device, validate=self._validate)

    def _pooled(self, values: Tensor, batched: bool) -> Tensor:
        """(G, layers, P, H) pooled, and without the dimensions that were not asked for."""
        pooled = values.mean(2) if self.pooling == "mean" else values
        pooled = pooled[:, 0] if isinstance(self.layer, int) else pooled
        return pooled if batched else pooled[0]


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
    mesh: DeviceMesh | None = None,
    graph: bool | str = "auto",
    validate: bool = True,
) -> PackedTokens:
    """The packed probes, after all checks that need no weights."""
    check_pass_options(adapters_per_pass, prepack)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}, expected one of {POOLINGS}")
    checked_layers(config, layer)
    check_options(checkpoint, graph=graph)
    try:
        tokens = pack(probes)
        tokens.check_fits(config)
    except ValueError as error:
        raise ValueError(f"probes: {error}") from error
    return tokens
