"""The safetensors format, parsed without its library: a header of names, dtypes, shapes and offsets, then the bytes.

https://huggingface.co/docs/safetensors: 8 bytes with the header's length, a JSON object, then the tensors without gaps.
The library gives the same tensors, but it maps whole files: their pages count as this process's memory until they are
unmapped, and a file that is truncated meanwhile kills the process. Its slices leak a few KB each, and from bytes it
copies all tensors before any can be inspected.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .files import parse_json

DISK_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MOST_HEADER = 1 << 23  # bytes; that of a model with 72 billion parameters has a hundred thousand
_LENGTH = 8
_LONGEST_NAME = 512


class StoredTensor(NamedTuple):
    """What a header says about a tensor. ``dtype`` is the format's name for it; the bytes from ``start`` to ``stop`` of
    the file are the values, row by row."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A file that stays open: one that later replaces it under its name is not read. ``str`` gives the path.

    Attributes:
        tensors: the header's entries, by name.

    Raises:
        ValueError: the file cannot be read, or is truncated or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY)
            self._descriptor = descriptor
            self._finalizer = weakref.finalize(self, os.close, descriptor)
            size = os.fstat(descriptor).st_size
            length = os.pread(descriptor, _LENGTH, 0)
            n_bytes = _header_bytes(length, size, str(path))
            header = bytearray(n_bytes)
            self._read(memoryview(header), _LENGTH)
        except OSError as error:
            raise ValueError(f"{path} cannot be read, expected a safetensors file: {error}") from error
        self.tensors = _stored(header, size, str(path))

    def __str__(self) -> str:
        return str(self.path)

    def read_rows(self, stored: StoredTensor, rows: slice, out: Tensor | None = None) -> Tensor:
        """Rows (rows, …) of a tensor, in its dtype, on the CPU.

        Args:
            out: where they are written, contiguous and of the same dtype and shape; None for new memory.

        Raises:
            ValueError: the file has been truncated meanwhile.
        """
        dtype = DISK_DTYPES[stored.dtype]
        shape = (rows.stop - rows.start, *stored.shape[1:])
        out = torch.empty(shape, dtype=dtype) if out is None else out
        if out.numel():
            start = stored.start + rows.start * math.prod(shape[1:]) * dtype.itemsize
            self._read(out.view(-1).view(torch.uint8).numpy().data, start)
        return out

    def _read(self, target: memoryview, start: int) -> None:
        while target:
            n_bytes = os.preadv(self._descriptor, [target], start)
            if n_bytes == 0:
                raise ValueError(f"{self} has become shorter, expected it unchanged while it is in use")
            target, start = target[n_bytes:], start + n_bytes


def parse_header(file: bytes | bytearray, where: str) -> dict[str, StoredTensor]:
    """The tensors of a file in memory, {name: place}.

    Raises:
        ValueError: the file is truncated or corrupt; the message names ``where``.
    """
    n_bytes = _header_bytes(file[:_LENGTH], len(file), where)
    return _stored(file[_LENGTH : _LENGTH + n_bytes], len(file), where)


def tensor_in(file: bytearray, stored: StoredTensor) -> Tensor:
    """A copy of a tensor from a file in memory."""
    dtype = DISK_DTYPES[stored.dtype]
    count = (stored.stop - stored.start) // dtype.itemsize
    if count == 0:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(file, dtype=dtype, count=count, offset=stored.start).clone().view(stored.shape)


def _header_bytes(length: bytes | bytearray, file_bytes: int, where: str) -> int:
    n_bytes = int.from_bytes(length, "little")
    if len(length) < _LENGTH or n_bytes > file_bytes - _LENGTH:
        raise _corrupt(where, file_bytes, "it ends before its header does")
    if n_bytes > _MOST_HEADER:
        raise _corrupt(where, file_bytes, f"its header has {n_bytes:,} bytes, expected at most {_MOST_HEADER:,}")
    return n_bytes


def _stored(header: bytes | bytearray, file_bytes: int, where: str) -> dict[str, StoredTensor]:
    """With the library's checks: every byte belongs to exactly one tensor."""
    try:
        if not header.startswith(b"{"):
            raise ValueError("its header is not a JSON object")
        entries = parse_json(bytes(header), "its header", "a JSON object")
        entries.pop("__metadata__", None)
        found = {name: _entry(name, entry, _LENGTH + len(header)) for name, entry in entries.items()}
        end = _LENGTH + len(header)
        for name, stored in sorted(found.items(), key=lambda item: item[1][2:]):
            if stored.start != end:
                raise ValueError(f"{name!r} begins at byte {stored.start}, expected {end}, where the previous one ends")
            end = stored.stop
        if end != file_bytes:
            raise ValueError(f"its tensors end at byte {end}, expected them to end with the file")
    except ValueError as error:
        raise _corrupt(where, file_bytes, f"{error!s:.300}") from None
    return found


def _entry(name: str, entry: Any, origin: int) -> StoredTensor:
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"it names a tensor {name!r:.100}, expected printable names of length <= {_LONGEST_NAME}")
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} is {entry!r:.200}, expected its dtype, shape and data_offsets")
    stored = StoredTensor(dtype, tuple(shape), origin + offsets[0], origin + offsets[1])
    if stored.stop < stored.start:
        raise ValueError(f"{name!r} has data_offsets {offsets}, expected them in order")
    if dtype in DISK_DTYPES:
        n_bytes = math.prod(shape) * DISK_DTYPES[dtype].itemsize
        if stored.stop - stored.start != n_bytes:
            raise ValueError(f"{name!r} has {stored.stop - stored.start} bytes, expected {n_bytes} for {dtype} {shape}")
    return stored


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _corrupt(where: str, file_bytes: int, why: str) -> ValueError:
    return ValueError(f"{where}, of {file_bytes} bytes, is truncated or corrupt, expected a safetensors file: {why}")
