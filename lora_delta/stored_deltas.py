"""Targets of deltas on texts, computed once and kept in a file: the bare model's states, and the wanted ones.

A step whose target is the prompted base runs the bare model twice, on the texts alone and after their contexts; one
that reads this file does neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qwen_functional.safetensors_format import DISK_DTYPES, SafetensorsFile

from .files import replaces
from .stored import LENGTHS, StoredTexts
from .text_delta import DeltaTarget

_FORMAT = "lora-delta deltas 1"
_STATES = "states"
_NAMES = {dtype: name for name, dtype in DISK_DTYPES.items()}


class DeltaWriter:
    """Writes the targets of texts one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.lengths, self.shape = file, list[int](), tuple[int, ...]()
        self.dtype: torch.dtype | None = None

    def write(self, base: Tensor, wanted: Tensor) -> None:
        """Write the states of a text, (layers, P, H) each, in one dtype for all texts."""
        states = torch.stack((base, wanted)).permute(2, 0, 1, 3).contiguous().cpu()  # (P, 2, layers, H)
        self.lengths.append(len(states))
        self.shape, self.dtype = tuple(states.shape[1:]), states.dtype
        self._file.write(states.view(-1).view(torch.uint8).numpy().data)


@contextmanager
def deltas_written(path: str | Path, facts: dict[str, Any]) -> Iterator[DeltaWriter]:
    """A file of targets, which appears, whole, once all are written.

    Args:
        facts: what the targets depend on, as JSON.

    Raises:
        ValueError: no text was written.
    """
    with replaces(Path(path)) as unfinished, unfinished.open("wb") as file:
        # The header comes first, but the lengths of the texts are known last: it gets room for any number of rows.
        said = {"format": _FORMAT, "facts": json.dumps(facts)}
        room = -(-len(_header(said, "BF16", (2**62, 2, 2**20, 2**40), 2**62, 2**62)) // 8) * 8
        file.write(bytes(8 + room))
        writer = DeltaWriter(file)
        yield writer
        if writer.dtype is None:
            raise ValueError(f"no text was written to {path}, expected at least one")
        lengths = torch.tensor(writer.lengths, dtype=torch.int64)
        file.write(lengths.numpy().data)
        shape = (int(lengths.sum()), *writer.shape)
        n_bytes = math.prod(shape) * writer.dtype.itemsize
        header = _header(said, _NAMES[writer.dtype], shape, n_bytes, len(lengths))
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header.ljust(room))


def _header(said: dict[str, str], dtype: str, shape: Sequence[int], n_bytes: int, n_texts: int) -> bytes:
    states = {"dtype": dtype, "shape": shape, "data_offsets": [0, n_bytes]}
    lengths = {"dtype": "I64", "shape": [n_texts], "data_offsets": [n_bytes, n_bytes + 8 * n_texts]}
    return json.dumps({"__metadata__": said, _STATES: states, LENGTHS: lengths}).encode()


class StoredDeltas(StoredTexts):
    """What ``lora-delta teach --deltas`` wrote; the target of each text is read on demand.

    Attributes:
        lengths: (N,) positions of each text.
        facts: what the targets depend on.
        sha256: of the file.

    Raises:
        ValueError: no such file, or a file of something else.
    """

    format, content, unit = _FORMAT, "targets of deltas", "positions"

    def _open(self, file: Any, told: Mapping[str, str]) -> None:
        self.facts: dict[str, Any] = json.loads(told["facts"])
        self._file = SafetensorsFile(self.path)
        self._states = self._file.tensors[_STATES]
        shape, rows = self._states.shape, int(self.lengths.sum())
        if len(shape) != 4 or shape[:2] != (rows, 2) or self.lengths.dim() != 1 or int(self.lengths.min()) < 1:
            raise ValueError(f"its states have shape {shape}, expected ({rows}, 2, layers, H) from its lengths")

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The bare model's states of a text and the wanted ones, (layers, P, H) each.

        Raises:
            ValueError: they are not finite, or the file has become shorter.
        """
        states = self._file.read_rows(self._states, self._rows(index))
        if not bool(states.isfinite().all()):
            raise self._no_file(ValueError(f"the states of text {index} are not finite"))
        base, wanted = states.permute(1, 2, 0, 3)
        return base, wanted

    def target(self, texts: Sequence[Sequence[int]], device: torch.device) -> DeltaTarget:
        """The target of each adapter's texts, which are given by their numbers."""
        each = [[self[number] for number in own] for own in texts]
        base, wanted = ([torch.cat([one[k] for one in own], 1).to(device) for own in each] for k in (0, 1))
        return DeltaTarget(base, wanted)

    def require(self, facts: Mapping[str, Any], lengths: Tensor, what: str) -> None:
        """Raises ``ValueError``, which mentions ``what``, if the file was made from something else."""
        for name, value in facts.items():
            if self.facts.get(name) != value:
                found = f"{self.path} has {name} {self.facts.get(name)!r:.100}"
                raise ValueError(f"{found}, expected {value!r:.100} as here: lora-delta teach --deltas makes a new one")
        self.require_lengths(lengths, what)
