"""The frozen base weights, laid out for the engine: q, k and v stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .architecture import NORMS, PROJECTIONS, STACKS, block_shapes, projection_shape, stack_shape
from .backends.onednn import PackedWeight, packing_pays
from .config import Qwen2Config
from .dtypes import default_compute_dtype
from .ops.linear import Weight
from .parallel import TensorParallel
from .streaming import StreamedBlocks, StreamedRows


@dataclass(frozen=True)
class BlockWeights:
    """One decoder block: a matrix for each stack of projections that read one input, see ``architecture.py``. Sizes: H
    hidden, Q = heads·head_dim, K = kv heads·head_dim, I intermediate. Tensors that a family lacks are None.
    """

    input_layernorm: Tensor  # (H,)
    qkv_proj: Tensor  # (Q + 2K, H): q, k, v rows
    o_proj: Tensor  # (H, Q)
    post_attention_layernorm: Tensor  # (H,)
    gate_up_proj: Tensor  # (2I, H): gate, up rows
    down_proj: Tensor  # (H, I)
    qkv_bias: Tensor | None = None  # (Q + 2K,)
    q_norm: Tensor | None = None  # (head_dim,)
    k_norm: Tensor | None = None  # (head_dim,)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockWeights:
        """The block with ``function`` applied to each tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def to(self, dtype: torch.dtype) -> BlockWeights:
        """The same weights in ``dtype``; the block itself if they already are."""
        if self.qkv_proj.dtype == dtype:
            return self
        return self.map(lambda tensor: tensor.to(dtype))

    def stack(self, name: str) -> Tensor:
        """The matrix of a stack."""
        return getattr(self, f"{name}_proj")

    def bias(self, name: str) -> Tensor | None:
        """The bias of a stack."""
        return getattr(self, f"{name}_bias", None)

    def parts(self, name: str, config: Qwen2Config) -> tuple[Tensor, ...]:
        """The matrix of a stack split by projection, as views."""
        return self.stack(name).split([projection_shape(config, part)[0] for part in STACKS[name]])


# {stack: its matrices in the compute dtype}: in a backend's own layout, where that is faster.
PackedBlock = Mapping[str, tuple[Weight, ...]]


@dataclass(frozen=True)
class Qwen2Weights:
    """All base weights, in one storage dtype on one device.

    ``lm_head`` is the same tensor as ``embed_tokens`` where the config ties them. It is None where it was left
    out: only logits and losses on tokens need it. ``packed`` is a faster form of the same blocks, which
    ``forward_vjp`` uses if present: see :meth:`prepack`. ``multiplied_in`` is set by :meth:`compute_in`.
    With ``parallel`` the blocks are this rank's part of a model that several ranks share. If the weights are streamed
    (see ``load_pretrained``), blocks and rows are read from disk or from the host's memory when they are used.
    """

    embed_tokens: Tensor | StreamedRows  # (V, H)
    blocks: tuple[BlockWeights, ...] | StreamedBlocks
    norm: Tensor  # (H,)
    lm_head: Tensor | StreamedRows | None  # (V, H)
    packed: tuple[PackedBlock, ...] | None = None
    multiplied_in: torch.dtype | None = None
    parallel: TensorParallel | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in."""
        return self.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix multiplications: that of :meth:`compute_in`, else the storage dtype, or float32 on
        a CPU that is slow in it, see :func:`qwen_functional.dtypes.default_compute_dtype`.
        """
        return self.multiplied_in or default_compute_dtype(self.dtype, self.device)

    def compute_in(self, dtype: torch.dtype) -> Qwen2Weights:
        """The same weights, not packed, with all matrix multiplications in ``dtype``, to which they are then rounded.

        For example bfloat16 for a float16 checkpoint on a CPU, which makes it as fast as a bfloat16 one and as
        accurate; or float32 for a bfloat16 checkpoint.

        Raises:
            ValueError: a dtype other than float32, float64, bfloat16 and, on a GPU, float16.
        """
        allowed = [torch.float32, torch.float64, torch.bfloat16]
        if self.device.type != "cpu":
            allowed.append(torch.float16)
        if dtype not in allowed:
            raise ValueError(f"dtype is {dtype!r}, expected one of {allowed} on {self.device}")
        blocks = self.blocks.to(dtype) if isinstance(self.blocks, StreamedBlocks) else self.blocks
        return replace(self, blocks=blocks, packed=None, multiplied_in=dtype)

    @property
    def streamed(self) -> bool:
        """Whether the weights are read only when they are used."""
        return isinstance(self.blocks, StreamedBlocks)

    def block(self, layer: int, then: int | None = None) -> BlockWeights:
        """The weights of a layer. If they are streamed, those of layer ``then`` are read while this one computes."""
        if isinstance(self.blocks, StreamedBlocks):
            return self.blocks.fetch(layer, then)
        return self.blocks[layer]

    def nbytes(self) -> int:
        """Bytes of all weights, wherever they are; a tied lm_head counts once, packed copies do not count."""
        return sum(tensor.nbytes for tensor in self._storages())

    @property
    def can_prepack(self) -> bool:
        """Whether :meth:`prepack` makes anything faster: for weights in memory on a CPU, if oneDNN multiplies faster
        by weights in its own layout, or if the weights are stored in another dtype than they are multiplied in.
        """
        if self.streamed or self.device.type != "cpu":
            return False
        return self.compute_dtype != self.dtype or packing_pays(self.compute_dtype, self.device)

    def prepack_nbytes(self) -> int:
        """Bytes that :meth:`prepack` takes: twice the blocks' matrices in the compute dtype, or once where they are
        only converted."""
        elements = sum(block.stack(name).numel() for block in self.blocks for name in STACKS)
        copies = 2 if packing_pays(self.compute_dtype, self.device) else 1
        return copies * elements * self.compute_dtype.itemsize

    def prepack(self) -> Qwen2Weights:
        """The same weights with ``packed`` filled in: ``forward_vjp`` runs faster, at the cost of
        :meth:`prepack_nbytes`.

        Raises:
            ValueError: :attr:`can_prepack` is false.
        """
        if self.streamed:
            raise ValueError("weights are streamed, expected weights in memory to pack them")
        if not self.can_prepack:
            raise ValueError(
                f"weights are {str(self.dtype).removeprefix('torch.')} on {self.device}, expected weights on a CPU "
                "that multiplies them faster when they are packed, or prepack='auto'"
            )
        dtype = self.compute_dtype
        packs = packing_pays(dtype, self.device)

        def packed(block: BlockWeights, name: str) -> tuple[Weight, ...]:
            matrix = block.stack(name)
            # The halves of gate|up are packed apart: the activation reads their outputs faster.
            parts = matrix.chunk(2) if name == "gate_up" else (matrix,)
            return tuple(PackedWeight(part.to(dtype)) if packs else part.to(dtype) for part in parts)

        return replace(self, packed=tuple({name: packed(block, name) for name in STACKS} for block in self.blocks))

    def shard(self, config: Qwen2Config, mesh: DeviceMesh) -> Qwen2Weights:
        """This rank's part of the weights, copied and not packed; from files, ``load_pretrained`` with a mesh reads
        only that part.

        Raises:
            ValueError: the model cannot be split over this many ranks.
        """
        parallel = TensorParallel.of(mesh, config)
        if parallel is None:
            return replace(self, packed=None)
        weights = empty_weights(config, self.dtype, self.device, lm_head=self.lm_head is not None, parallel=parallel)
        views = self.named_views(config)
        for name, view in weights.named_views(config).items():
            view.copy_(views[name][parallel.of_weight(name, tuple(views[name].shape))])
        return replace(weights, multiplied_in=self.multiplied_in)

    def _storages(self) -> Iterator[Tensor | StreamedRows | StreamedBlocks]:
        yield self.embed_tokens
        yield self.norm
        if self.lm_head is not None and self.lm_head is not self.embed_tokens:
            yield self.lm_head
        if isinstance(self.blocks, StreamedBlocks):
            yield self.blocks
        else:
            yield from (tensor for block in self.blocks for tensor in block.tensors().values())

    def named_views(self, config: Qwen2Config) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, under its Hugging Face name, as a view into these weights.

        Writing to a view writes the weight: the loader copies each tensor of a file straight to its place. A
        tied ``lm_head.weight`` is left out. With :attr:`parallel` they are the parts of this rank.

        Raises:
            ValueError: the weights are streamed.
        """
        if self.streamed:
            raise ValueError("weights are streamed, expected weights in memory to view them; see named_tensors")
        return dict(self.named_tensors(config))

    def named_tensors(self, config: Qwen2Config) -> Iterator[tuple[str, Tensor]]:
        """The same, one by one; if the weights are streamed, as copies, with at most one block in memory."""

        def whole(matrix: Tensor | StreamedRows) -> Tensor:
            return matrix if isinstance(matrix, Tensor) else matrix.to(matrix.dtype)

        config = config if self.parallel is None else self.parallel.local_config(config)
        yield "model.embed_tokens.weight", whole(self.embed_tokens)
        for layer in range(len(self.blocks)):
            yield from block_views(self.block(layer).to(self.dtype), config, layer).items()
        yield "model.norm.weight", self.norm
        if self.lm_head is not None and self.lm_head is not self.embed_tokens:
            yield "lm_head.weight", whole(self.lm_head)


def block_views(block: BlockWeights, config: Qwen2Config, layer: int) -> dict[str, Tensor]:
    """Every tensor of a block under its name in a checkpoint, as a view."""
    views = {f"{norm}.weight": getattr(block, norm) for norm in NORMS}
    for norm, projection in config.family.head_norms.items():
        views[f"{PROJECTIONS[projection].parent}.{norm}.weight"] = getattr(block, norm)
    for stack, names in STACKS.items():
        bias = block.bias(stack)
        sizes = [projection_shape(config, name)[0] for name in names]
        for index, (name, part) in enumerate(zip(names, block.parts(stack, config), strict=True)):
            views[f"{PROJECTIONS[name].path}.weight"] = part
            if bias is not None:
                views[f"{PROJECTIONS[name].path}.bias"] = bias.split(sizes)[index]
    # In the order in which checkpoints are written.
    return {f"model.layers.{layer}.{name}": views[name] for name in block_shapes(config, config.family)}


def empty_block(config: Qwen2Config, dtype: torch.dtype, device: torch.device | str) -> BlockWeights:
    """A block of the right shapes, not yet filled in."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(NORMS, (config.hidden_size,))
    for stack in STACKS:
        shapes[f"{stack}_proj"] = stack_shape(config, stack)
        if set(STACKS[stack]) <= set(config.family.biased):
            shapes[f"{stack}_bias"] = stack_shape(config, stack)[:1]
    shapes |= dict.fromkeys(config.family.head_norms, (config.head_dim,))
    return BlockWeights(**{name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()})


def empty_weights(
    config: Qwen2Config,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    lm_head: bool = True,
    parallel: TensorParallel | None = None,
) -> Qwen2Weights:
    """Weights of the right shapes, not yet filled in. See :meth:`Qwen2Weights.named_views`.

    Without ``lm_head`` it is None, unless it is tied to the embedding. With ``parallel`` they are this rank's part.
    """
    config = config if parallel is None else parallel.local_config(config)

    def rows() -> Tensor:
        return torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)

    embed_tokens = rows()
    blocks = tuple(empty_block(config, dtype, device) for _ in range(config.num_hidden_layers))
    head = embed_tokens if config.tie_word_embeddings else rows() if lm_head else None
    norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
    return Qwen2Weights(embed_tokens, blocks, norm, head, parallel=parallel)


def init_weights(
    config: Qwen2Config,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Qwen2Weights:
    """Random weights, for tests and for benchmarks without a checkpoint.

    Matrices are normal with standard deviation ``config.initializer_range``; norms around one and biases around
    zero are normal with standard deviation 0.1, so that no weight hides a mistake by being trivial. Drawn in float32
    on the CPU: the same ``seed`` gives the same weights, up to rounding, for every dtype and device.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = empty_weights(config, dtype, device)
    with torch.no_grad():
        for name, view in weights.named_views(config).items():
            values = torch.randn(view.shape, generator=generator)
            if name.endswith("norm.weight"):
                values.mul_(0.1).add_(1.0)
            elif name.endswith(".bias"):
                values.mul_(0.1)
            else:
                values.mul_(config.initializer_range)
            view.copy_(values)
    return weights
