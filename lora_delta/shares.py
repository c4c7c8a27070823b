"""Which adapters of a batch a rank computes, and how all ranks get the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

DATA_PARALLEL = "dp"  # the mesh dimension


@dataclass(frozen=True)
class Shares:
    """Adapters split over the ``"dp"`` dimension of a mesh, as evenly as possible; ``mesh`` None is one rank."""

    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> Shares:
        """The ``"dp"`` dimension of a mesh; without one, this rank alone.

        Raises:
            ValueError: not a mesh, or one whose dimensions have no names.
        """
        if mesh is None:
            return cls()
        if not isinstance(mesh, DeviceMesh) or mesh.mesh_dim_names is None:
            raise ValueError(f"mesh is {mesh!r}, expected a DeviceMesh with dimensions named 'dp', 'tp' or both")
        if DATA_PARALLEL not in mesh.mesh_dim_names:
            return cls()
        own = mesh if mesh.ndim == 1 else mesh[DATA_PARALLEL]
        return cls(own if own.size() > 1 else None)

    @property
    def size(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank()

    def own(self, n: int) -> slice:
        """Which of n adapters are this rank's; possibly none if there are fewer adapters than ranks."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def balanced(self, costs: Sequence[float]) -> list[int]:
        """Which of n items are this rank's, in their order: each rank gets n / size of them, at about the same cost.

        Greedy: the most expensive items go first, each to the rank that has the least so far and room for it. If all
        costs are zero, the items are those of :meth:`own`.
        """
        n = len(costs)
        if self.size == 1 or not any(costs):
            return list(range(n))[self.own(n)]
        room = [n * (rank + 1) // self.size - n * rank // self.size for rank in range(self.size)]
        given: list[list[int]] = [[] for _ in room]
        totals = [0.0] * self.size
        for item in sorted(range(n), key=lambda i: -costs[i]):
            rank = min((rank for rank in range(self.size) if len(given[rank]) < room[rank]), key=totals.__getitem__)
            given[rank].append(item)
            totals[rank] += costs[item]
        return sorted(given[self.rank])

    def whole(self, part: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """All ranks' rows (n, ...) from this rank's, which may be none."""
        if self.mesh is None and part is not None:
            return part
        total = torch.zeros(shape, dtype=dtype, device=device)
        if part is not None:
            total[self.own(shape[0])] = part
        return self.sum_(total)

    def whole_gradients(self, parts: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: (n, ...)} of all ranks from {name: this rank's rows}, one sum per dtype; ``like`` has the shapes."""
        if self.mesh is None:
            return dict(parts)
        gradients: dict[str, Tensor] = {}
        for dtype in {tensor.dtype for tensor in like.values()}:
            names = [name for name, tensor in like.items() if tensor.dtype == dtype]
            sizes = [like[name].numel() for name in names]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=next(iter(like.values())).device)
            for name, whole in zip(names, flat.split(sizes), strict=True):
                gradients[name] = whole.view(like[name].shape)
                if name in parts:
                    gradients[name][self.own(len(like[name]))] = parts[name]
            self.sum_(flat)  # every row is zero on all ranks but one: the sum is exact
        return gradients

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(x, group=self.mesh.get_group())
        return x
