"""Tensor parallelism: which part of a weight or a LoRA tensor a rank holds, and the sums over ranks.

q, k, v, gate and up are split by output rows, that is by heads and by neurons; o and down by input columns. The LoRA
of the former has A whole and B split, that of the latter A split and B whole, so that the low-rank part of a partial
sum is a partial sum itself, and both share one all-reduce (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .architecture import PROJECTIONS
from .config import Qwen2Config
from .lora import Lora, LoraPair

TENSOR_PARALLEL = "tp"  # the mesh dimension
# Which dimension of a weight is split, by projection; a bias is split with the rows.
SPLIT = {name: projection.split for name, projection in PROJECTIONS.items()}


@dataclass(frozen=True)
class TensorParallel:
    """A rank's place among those that share a model. ``mesh`` has one dimension."""

    mesh: DeviceMesh

    @classmethod
    def of(cls, mesh: DeviceMesh, config: Qwen2Config) -> TensorParallel | None:
        """The ``"tp"`` dimension of a mesh, or its only one where that has no name; None if absent or of one rank.

        Raises:
            ValueError: the model cannot be split over this many ranks; the message lists the numbers that are possible.
        """
        names = mesh.mesh_dim_names
        if names is None and mesh.ndim > 1:
            raise ValueError(f"mesh has {mesh.ndim} dimensions without names, expected one named {TENSOR_PARALLEL!r}")
        if names is not None and TENSOR_PARALLEL not in names:
            return None
        own = mesh if mesh.ndim == 1 else mesh[TENSOR_PARALLEL]
        if own.size() not in splits(config):
            raise ValueError(
                f"mesh has {own.size()} ranks for tensor parallelism, expected one of {splits(config)}, which divide "
                f"{config.num_key_value_heads} key-value heads and an intermediate_size of {config.intermediate_size}"
            )
        return cls(own) if own.size() > 1 else None

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    def local_config(self, config: Qwen2Config) -> Qwen2Config:
        """The model as this rank computes it: fewer heads and neurons, the residual stream whole."""
        return replace(
            config,
            num_attention_heads=config.num_attention_heads // self.size,
            num_key_value_heads=config.num_key_value_heads // self.size,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size // self.size,
        )

    def local_lora(self, lora: Lora) -> Lora:
        """This rank's part of the adapters; an A or B that is not split is a view."""
        pairs = {}
        for (layer, projection), pair in lora.pairs.items():
            A = pair.A[self.of_lora(projection, "A", pair.A.shape)].contiguous()
            B = pair.B[self.of_lora(projection, "B", pair.B.shape)]
            pairs[layer, projection] = LoraPair(A, B, pair.scaling)
        return Lora(pairs, lora.n_adapters, lora.batched)

    def of_lora(self, projection: str, side: str, shape: torch.Size) -> tuple[slice, slice, slice]:
        """Where this rank's part lies in A (G, r, in) or B (G, out, r); all of it where that is not split."""
        whole = slice(None)
        if side == "B" and SPLIT[projection] == 0:
            return whole, self._part(shape[1]), whole
        if side == "A" and SPLIT[projection] == 1:
            return whole, whole, self._part(shape[2])
        return whole, whole, whole

    def of_weight(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where this rank's part lies in a checkpoint's tensor; all of it for embeddings, norms and the lm_head."""
        part = [slice(0, size) for size in shape]
        projection = name.rsplit(".", 2)[-2]
        if projection in SPLIT:
            part[SPLIT[projection]] = self._part(shape[SPLIT[projection]])
        return tuple(part)

    def gather(self, name: str, part: Tensor) -> Tensor:
        """The whole of a checkpoint's tensor of which every rank has a part; all ranks must call it."""
        split = SPLIT.get(name.rsplit(".", 2)[-2])
        return part if split is None else DTensor.from_local(part, self.mesh, [Shard(split)]).full_tensor()

    def of_vocabulary(self, size: int) -> slice:
        """The tokens whose logits this rank computes, out of ``size``."""
        return slice(size * self.rank // self.size, size * (self.rank + 1) // self.size)

    def _part(self, size: int) -> slice:
        each = size // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place, the same bits on all of them."""
        dist.all_reduce(x, group=self.mesh.get_group())
        return x

    def max_(self, x: Tensor) -> Tensor:
        """The maximum over ranks of each entry, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.mesh.get_group())
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of partial sums; each rank's cotangent is that of the sum. Differentiable."""
        partial = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()

    def shared(self, x: Tensor) -> Tensor:
        """``x``, which all ranks have; its cotangent is the sum of theirs. Differentiable."""
        return DTensor.from_local(x, self.mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def splits(config: Qwen2Config) -> list[int]:
    """The numbers of ranks over which the model can be split: all get whole heads, and equally many."""
    heads, neurons = config.num_key_value_heads, config.intermediate_size
    return [size for size in range(1, heads + 1) if heads % size == 0 and neurons % size == 0]
