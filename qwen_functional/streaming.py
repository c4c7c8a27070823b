"""Weights that are not all in the device's memory: one block is, and the next one is on its way.

A block is read when it is requested; meanwhile a thread reads the one that the caller says it will need next. Of the
embedding, only the rows of the tokens at hand are read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .weights import BlockWeights


class StreamedBlocks(Sequence["BlockWeights"]):
    """The blocks of a model, of which the latest one and one more are in memory.

    Args:
        read: returns a layer's block, on the device; it runs in another thread, one call at a time.
        n: how many there are.
        nbytes: bytes of all of them.
        dtype: the dtype in which they are handed out; None for the one in which they are read.
    """

    def __init__(
        self,
        read: Callable[[int], BlockWeights],
        n: int,
        nbytes: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._read, self._n, self.nbytes, self._device, self._dtype = read, n, nbytes, device, dtype
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="streamed-blocks")
        self._lock = threading.Lock()
        self._latest: tuple[int, BlockWeights] | None = None
        self._ahead: tuple[int, Future[BlockWeights]] | None = None
        # Copies to a GPU have a stream of their own, separate from the one that computes.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to(self, dtype: torch.dtype) -> StreamedBlocks:
        """The same blocks, converted to ``dtype`` when they are read."""
        return StreamedBlocks(self._read, self._n, self.nbytes, self._device, dtype)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, layer: int) -> BlockWeights: ...

    @overload
    def __getitem__(self, layer: slice) -> Sequence[BlockWeights]: ...

    def __getitem__(self, layer: int | slice) -> BlockWeights | Sequence[BlockWeights]:
        if isinstance(layer, slice):
            raise ValueError("streamed blocks are read one by one, expected a layer number")
        return self.fetch(range(self._n)[layer])

    def __iter__(self) -> Iterator[BlockWeights]:
        for layer in range(self._n):
            yield self.fetch(layer, layer + 1 if layer + 1 < self._n else None)

    def fetch(self, layer: int, then: int | None = None) -> BlockWeights:
        """The block of a layer; reading that of layer ``then`` starts now."""
        with self._lock:
            block = self._take(layer)
            self._latest = (layer, block)
            if then is not None and then != layer and self._ahead is None:
                self._ahead = (then, self._pool.submit(self._load, then))
        if self._stream is not None:
            for tensor in block.tensors().values():
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return block

    def _take(self, layer: int) -> BlockWeights:
        if self._latest is not None and self._latest[0] == layer:
            return self._latest[1]
        self._latest = None  # freed before another takes its place in memory
        if self._ahead is not None:
            (ahead, future), self._ahead = self._ahead, None
            block = future.result()
            if ahead == layer:
                return block
            del block, future
        return self._pool.submit(self._load, layer).result()

    def _load(self, layer: int) -> BlockWeights:
        # Modes are per thread: without this one the weights could be unusable for autograd.
        with torch.inference_mode(False), torch.no_grad():
            if self._stream is None:
                return self._converted(self._read(layer))
            with torch.cuda.stream(self._stream):
                block = self._converted(self._read(layer))
            self._stream.synchronize()
            return block

    def _converted(self, block: BlockWeights) -> BlockWeights:
        return block if self._dtype is None else block.to(self._dtype)


class StreamedRows:
    """A matrix (n, H) whose rows are read when they are requested: an embedding, or the lm_head.

    Args:
        read: returns the rows of a slice, on the CPU, in the dtype that they are stored in.
        shape, dtype, device: those of the matrix as it is handed out.
    """

    def __init__(
        self, read: Callable[[slice], Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._read, self.shape, self.dtype, self.device = read, torch.Size(shape), dtype, device
        self.nbytes = self.shape.numel() * dtype.itemsize

    def __getitem__(self, ids: Tensor) -> Tensor:
        """(*ids.shape, H); each row is read once."""
        unique, inverse = ids.unique(return_inverse=True)
        rows = torch.cat([self._read(slice(row, row + 1)) for row in unique.tolist()])
        return rows.to(self.device, self.dtype)[inverse.to(self.device)]

    def to(self, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """All of it, or some rows, in memory."""
        return self._read(rows or slice(0, self.shape[0])).to(self.device, self.dtype).to(dtype)


def blocks_from_host(
    blocks: Sequence[BlockWeights], device: torch.device, dtype: torch.dtype | None
) -> StreamedBlocks:
    """Blocks that stay in the host's memory, page-locked for a GPU, and are copied to ``device`` one by one."""
    if device.type == "cuda":
        blocks = [block.map(Tensor.pin_memory) for block in blocks]

    def read(layer: int) -> BlockWeights:
        return moved(blocks[layer], device)

    nbytes = sum(tensor.nbytes for block in blocks for tensor in block.tensors().values())
    return StreamedBlocks(read, len(blocks), nbytes, device, dtype)


def moved(block: BlockWeights, device: torch.device) -> BlockWeights:
    """The block on a device; from page-locked memory it is copied without waiting."""
    return block.map(lambda tensor: tensor.to(device, non_blocking=True))
