"""What deltas of texts should be, computed once and kept in a file: the states of the bare model, and the wanted ones.

A step that asks the prompted base runs the bare model twice, on the texts and behind their contexts; one that reads
this file does neither.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from qwen_functional.safetensors_format import DISK_DTYPES, SafetensorsFile

from .files import replaces
from .text_delta import DeltaTarget

_FORMAT = "lora-delta deltas 1"
_STATES, _LENGTHS = "states", "lengths"
_NAMES = {dtype: name for name, dtype in DISK_DTYPES.items()}


class DeltaWriter:
    """Takes the targets of texts one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.lengths, self.shape = file, list[int](), tuple[int, ...]()
        self.dtype: torch.dtype | None = None

    def write(self, base: Tensor, wanted: Tensor) -> None:
        """Of a text, (layers, P, H) each, in the same dtype as all."""
        states = torch.stack((base, wanted)).permute(2, 0, 1, 3).contiguous().cpu()  # (P, 2, layers, H)
        self.lengths.append(len(states))
        self.shape, self.dtype = tuple(states.shape[1:]), states.dtype
        self._file.write(states.view(-1).view(torch.uint8).numpy().data)


@contextmanager
def deltas_written(path: str | Path, facts: dict[str, Any]) -> Iterator[DeltaWriter]:
    """A file of targets that is there, whole, when all are written.

    Args:
        facts: JSON; what the targets depend on.

    Raises:
        ValueError: no text was written.
    """
    with replaces(Path(path)) as unfinished, unfinished.open("wb") as file:
        # A header comes first, and how long the texts are is known last: its place has room for any number of rows.
        said = {"format": _FORMAT, "facts": json.dumps(facts)}
        room = -(-len(_header(said, "BF16", (2**62, 2, 2**20, 2**40), 2**62, 2**62)) // 8) * 8
        file.write(bytes(8 + room))
        writer = DeltaWriter(file)
        yield writer
        if not writer.lengths or writer.dtype is None:
            raise ValueError(f"no text was written to {path}, expected some")
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
    return json.dumps({"__metadata__": said, _STATES: states, _LENGTHS: lengths}).encode()


class StoredDeltas:
    """What ``lora-delta teach --deltas`` wrote; the target of each text is read when it is asked for.

    Attributes:
        lengths: (N,) positions of each text.
        facts: what the targets depend on.
        sha256: of the file.

    Raises:
        ValueError: no such file, or another one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():  # a pipe may never open
            raise ValueError(f"{path} is not a file, expected one of targets of deltas")
        with self.path.open("rb") as content:
            self.sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        try:
            with safe_open(str(path), "pt") as file:
                told = file.metadata() or {}
                if told.get("format") != _FORMAT:
                    raise ValueError(f"its format is {told.get('format')!r:.100}, expected {_FORMAT!r}")
                self.facts: dict[str, Any] = json.loads(told["facts"])
                self.lengths = file.get_tensor(_LENGTHS)
            self._file = SafetensorsFile(self.path)
            self._states = self._file.tensors[_STATES]
            shape, rows = self._states.shape, int(self.lengths.sum())
            if len(shape) != 4 or shape[:2] != (rows, 2) or self.lengths.dim() != 1 or int(self.lengths.min()) < 1:
                raise ValueError(f"its states are of shape {shape}, expected ({rows}, 2, layers, H) as its lengths say")
        except Exception as error:  # whatever garbage leads the library to
            raise self._no_file(error) from error
        self._ends = self.lengths.cumsum(0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The bare model's states of a text and the wanted ones, (layers, P, H) each.

        Raises:
            ValueError: they are not finite, or the file has become shorter.
        """
        end = int(self._ends[range(len(self))[index]])
        states = self._file.read_rows(self._states, slice(end - int(self.lengths[index]), end))
        if not bool(states.isfinite().all()):
            raise self._no_file(ValueError(f"the states of text {index} are not finite"))
        base, wanted = states.permute(1, 2, 0, 3)
        return base, wanted

    def target(self, texts: Sequence[Sequence[int]], device: torch.device) -> DeltaTarget:
        """Of the texts of each adapter, by their numbers."""
        each = [[self[number] for number in own] for own in texts]
        base, wanted = ([torch.cat([one[k] for one in own], 1).to(device) for own in each] for k in (0, 1))
        return DeltaTarget(base, wanted)

    def require(self, facts: dict[str, Any], lengths: Tensor, what: str) -> None:
        """Raises ``ValueError``, which says ``what`` the texts are of, where it was made of something else."""
        for name, value in facts.items():
            if self.facts.get(name) != value:
                found = f"{self.path} has {name} {self.facts.get(name)!r:.100}"
                raise ValueError(f"{found}, expected {value!r:.100} as here: lora-delta teach --deltas makes it anew")
        if len(lengths) != len(self.lengths):
            raise ValueError(f"{self.path} is of {len(self.lengths)} texts, expected {len(lengths)} as {what}")
        odd = (lengths != self.lengths).nonzero()
        if len(odd):
            index = int(odd[0])
            found = f"{self.path} has {int(self.lengths[index])} positions for text {index}"
            raise ValueError(f"{found}, expected {int(lengths[index])} as {what}")

    def _no_file(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ValueError(f"{self.path} is no file of targets of deltas: {reason}")
