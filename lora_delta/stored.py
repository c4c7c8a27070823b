"""Files of a teacher's outputs on texts, in order: the rows of all texts, and how many each text has."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import Tensor

LENGTHS = "lengths"


class StoredTexts(ABC):
    """A file of one format, of which each text is read on demand.

    Attributes:
        lengths: (N,) rows of each text.
        sha256: of the file.

    Raises:
        ValueError: no such file, or a file of something else.
    """

    format: ClassVar[str]
    content: ClassVar[str]  # what the file holds, for messages
    unit: ClassVar[str]  # what a row stands for

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():  # opening a pipe may block forever
            raise ValueError(f"{path} is not a file, expected one of {self.content}")
        with self.path.open("rb") as content:
            self.sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        try:
            with safe_open(str(path), "pt") as file:
                told = file.metadata() or {}
                if told.get("format") != self.format:
                    raise ValueError(f"its format is {told.get('format')!r:.100}, expected {self.format!r}")
                self.lengths: Tensor = file.get_tensor(LENGTHS)
                self._open(file, told)
        except Exception as error:  # on garbage the library may raise anything
            raise self._no_file(error) from error
        self._ends = self.lengths.cumsum(0)

    @abstractmethod
    def _open(self, file: Any, told: Mapping[str, str]) -> None:
        """Read the rest of the file and its metadata; raises if they are invalid."""

    def __len__(self) -> int:
        return len(self.lengths)

    def _rows(self, index: int) -> slice:
        """The rows of a text."""
        end = int(self._ends[range(len(self))[index]])
        return slice(end - int(self.lengths[index]), end)

    def require_lengths(self, lengths: Tensor, what: str) -> None:
        """Raises ``ValueError``, which mentions ``what``, if the texts have other lengths."""
        if len(lengths) != len(self.lengths):
            raise ValueError(f"{self.path} holds {len(self.lengths)} texts, expected {len(lengths)} as {what}")
        odd = (lengths != self.lengths).nonzero()
        if len(odd):
            index = int(odd[0])
            found, wanted = int(self.lengths[index]), int(lengths[index])
            raise ValueError(f"{self.path} has {found} {self.unit} for text {index}, expected {wanted} as {what}")

    def _no_file(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ValueError(f"{self.path} is not a file of {self.content}: {reason}")
