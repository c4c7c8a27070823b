"""Records what torch is asked to do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Records every GEMM with a base weight as (rows, in, out), and all tensors that are made.

    ``before_gemm`` is called before each of these GEMMs.
    """

    def __init__(self, before_gemm: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.before_gemm = before_gemm
        self.batched = 0  # number of batched GEMMs: the low-rank parts, and attention
        self.gemms: list[tuple[int, int, int]] = []
        self.made: list[weakref.ref[Tensor]] = []
        self.shapes: set[int] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_gemm = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if is_gemm and self.before_gemm:
            self.before_gemm()
        result = func(*args, **(kwargs or {}))
        self.batched += func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.baddbmm_)
        if is_gemm:
            left, right = args[-2:]
            self.gemms.append((*left.shape, right.shape[1]))
            self.dtypes.update((left.dtype, right.dtype))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.made.append(weakref.ref(tensor))
                self.shapes.update(tensor.shape)
        return result

    def work(self) -> int:
        """Multiplications in all GEMMs."""
        return sum(rows * n_in * out for rows, n_in, out in self.gemms)

    def held(self, beside: Iterable[Tensor] = ()) -> int:
        """Bytes of the recorded tensors that are still alive, except views of the tensors in ``beside``."""
        alive = [tensor for tensor in (ref() for ref in self.made) if tensor is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in alive}
        others = {tensor.untyped_storage().data_ptr() for tensor in beside}
        return sum(storage.nbytes() for place, storage in storages.items() if place not in others)
