"""Texts that adapters are meant for, tokenized once into files, from which a step reads what it draws."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import UNFINISHED, sync_folder
from ..identity import sha256_of
from ..progress import progress_bar
from .text_lines import EXPECTED, MOST_LINE, Text, TextReader

ON_BAD_LINE = ("error", "skip")
_LINES_AT_ONCE = 512
_IDS, _CONDITIONS, _INDEX = "ids.bin", "conditions.bin", "index.safetensors"
_ARRAYS = ("pairs", "first_pairs", "lines", "bounds", "numbers", "condition_ends")


class Conditions(Sequence[str]):
    """The conditions of a :class:`TextSet`, read on access."""

    def __init__(self, content: np.ndarray, ends: Tensor) -> None:
        self._content, self._ends = content, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = int(self._ends[place - 1]) if place else 0
        return bytes(self._content[start : int(self._ends[place])]).decode()


class TextSet:
    """Texts by condition, in files written by :meth:`compiled` and read on access.

    Attributes:
        conditions: (C,) texts, or names, in the order of their first lines.
        facts: what the ids depend on, including the file's sha256.
        skipped, first_skipped: how many bad lines were left out, and what is wrong with the first.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], skipped: tuple[int, str], arrays: Mapping[str, Tensor]
    ) -> None:
        self.folder, self.facts = folder, facts
        self.skipped, self.first_skipped = skipped
        self._pairs, self._first_pairs = arrays["pairs"], arrays["first_pairs"]
        self._lines, self._bounds, self.numbers = arrays["lines"], arrays["bounds"], arrays["numbers"]
        self._ids = _mapped(folder / _IDS, np.int32)
        self.conditions = Conditions(_mapped(folder / _CONDITIONS, np.uint8), arrays["condition_ends"])

    @classmethod
    def compiled(
        cls,
        path: str | Path,
        folder: str | Path,
        reader: TextReader,
        name: str = "texts",
        *,
        on_bad_line: str = "error",
        progress: bool = True,
    ) -> TextSet:
        """Tokenize a file of JSON lines into a folder within ``folder``; if that is there already, it is used.

        Args:
            name: the start of that folder's name; a hash of what the ids depend on follows.
            on_bad_line: ``"error"``, or ``"skip"``: leave bad lines out; a warning gives their number and the first.

        Raises:
            ValueError: no such file, a bad line, with its number, or no good line.
        """
        if on_bad_line not in ON_BAD_LINE:
            raise ValueError(f"on_bad_line is {on_bad_line!r}, expected one of {ON_BAD_LINE}")
        path, folder = Path(path), Path(folder)
        if not path.is_file():  # a pipe may never end
            raise ValueError(f"{path} is not a file, expected JSON lines, {EXPECTED}")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        facts = {**reader.facts, "on_bad_line": on_bad_line, "sha256": sha256}
        place = folder / f"{name}-{sha256_of(facts)[:16]}"
        try:
            made = cls.opened(place)
        except ValueError:  # not there, or damaged
            unfinished = place.with_name(f"{place.name}.{os.getpid()}{UNFINISHED}")
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process with the same id
            unfinished.mkdir(parents=True)
            try:
                _Compiler(path, unfinished, reader, on_bad_line).run(facts, progress)
                shutil.rmtree(place, ignore_errors=True)
                unfinished.replace(place)
                sync_folder(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            made = cls.opened(place)
        if made.skipped:
            found = f"{made.skipped} bad lines of {path} are skipped; the first: {made.first_skipped}"
            warnings.warn(found, stacklevel=2)
        return made

    @classmethod
    def opened(cls, folder: str | Path) -> TextSet:
        """Open a folder written by :meth:`compiled`.

        Raises:
            ValueError: it is missing, or its bytes are not as they were written.
        """
        folder = Path(folder)
        try:
            if not all((folder / name).is_file() for name in (_INDEX, _IDS, _CONDITIONS)):  # a pipe may never open
                raise ValueError("a file is missing")
            with safe_open(str(folder / _INDEX), "pt") as file:
                told = json.loads(file.metadata()["told"])
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            if told.pop("sha256") != sha256_of(told) or _digests(folder, arrays) != told["digests"]:
                raise ValueError("its checksums do not match")
            return cls(folder, told["facts"], (told["skipped"], told["first_skipped"]), arrays)
        except Exception as error:  # the library may raise anything on garbage
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{folder} does not hold tokenized texts: {reason}") from error

    def __len__(self) -> int:
        """How many conditions there are."""
        return len(self.conditions)

    def texts(self, index: int) -> Texts:
        """The texts of a condition."""
        return Texts(self, self._lines[int(self._bounds[index]) : int(self._bounds[index + 1])])

    @property
    def n_texts(self) -> int:
        return len(self._lines)

    @property
    def completions(self) -> Tensor:
        """How many tokens of each pair's completion have a token before them, in the file's order."""
        return self._pairs[:, 2] - self._pairs[:, 1] - (self._pairs[:, 1] == self._pairs[:, 0]).long()

    def positions(self, kind: str) -> Tensor:
        """How many positions of a kind in :data:`lora_delta.own_texts.POSITIONS` each pair has."""
        if kind == "completion":
            return self.completions
        whole = self._pairs[:, 2] - self._pairs[:, 0]
        return torch.ones_like(whole) if kind == "last" else whole

    def conditions_of_lines(self) -> Tensor:
        """(lines,) the condition that each line belongs to."""
        of = torch.empty(len(self._lines), dtype=torch.int64)
        of[self._lines] = torch.arange(len(self)).repeat_interleave(self._bounds.diff())
        return of

    def text(self, line: int) -> Text:
        first, last = int(self._first_pairs[line]), int(self._first_pairs[line + 1])
        pairs, contexts = [], []
        for start, middle, end, behind in self._pairs[first:last].tolist():
            ids = torch.from_numpy(self._ids[start:behind].astype(np.int64))
            pairs.append((ids[: middle - start], ids[middle - start : end - start]))
            if behind > end:
                contexts.append(ids[end - start :])
        return Text(tuple(pairs), tuple(contexts), first)

    def n_tokens(self, line: int) -> int:
        """How many tokens a line's prompts and completions have."""
        own = self._pairs[int(self._first_pairs[line]) : int(self._first_pairs[line + 1])]
        return int((own[:, 2] - own[:, 0]).sum())


class Texts(Sequence[Text]):
    """The texts of one condition."""

    def __init__(self, whole: TextSet, lines: Tensor) -> None:
        self._whole, self._lines = whole, lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Text: ...
    @overload
    def __getitem__(self, index: slice) -> list[Text]: ...
    def __getitem__(self, index: int | slice) -> Text | list[Text]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return self._whole.text(int(self._lines[range(len(self))[index]]))

    def n_tokens(self, index: int) -> int:
        """How many tokens a text has, without reading it."""
        return self._whole.n_tokens(int(self._lines[index]))


class _Compiler:
    """Writes the files of a :class:`TextSet`."""

    def __init__(self, path: Path, folder: Path, reader: TextReader, on_bad_line: str) -> None:
        self.path, self.folder, self.reader, self.skips = path, folder, reader, on_bad_line == "skip"
        self.pairs, self.first_pairs = array("q"), array("q", [0])
        self.groups, self.numbers, self.condition_ends = array("q"), array("q"), array("q")
        self.known: dict[bytes, int] = {}
        self.skipped, self.first_skipped = 0, ""
        self.n_ids = 0

    def run(self, facts: Mapping[str, Any], progress: bool) -> None:
        whole = hashlib.sha256()
        size = self.path.stat().st_size
        shown = progress and size >= 1 << 20
        bar = progress_bar(total=size, desc=self.path.name, unit="B", unit_scale=True, disable=not shown)
        with (
            self.path.open("rb") as lines,
            (self.folder / _IDS).open("wb") as ids,
            (self.folder / _CONDITIONS).open("wb") as conditions,
            bar,
        ):
            for block in _blocks(lines, whole.update):
                self.take(block, ids, conditions)
                bar.update(lines.tell() - bar.n)
            for file in (ids, conditions):
                file.flush()
                os.fsync(file.fileno())
        if not self.groups:
            also = f"; {self.first_skipped}" if self.skipped else ""
            raise ValueError(f"{self.path} holds no text, expected JSON lines, {EXPECTED}{also}")
        groups = torch.tensor(self.groups)
        order = torch.argsort(groups, stable=True)
        arrays: dict[str, Tensor] = {
            "pairs": torch.tensor(self.pairs).view(-1, 4),
            "first_pairs": torch.tensor(self.first_pairs),
            "lines": order,
            "bounds": torch.searchsorted(groups[order], torch.arange(len(self.known) + 1)),
            "numbers": torch.tensor(self.numbers),
            "condition_ends": torch.tensor(self.condition_ends),
        }
        if whole.hexdigest() != facts["sha256"]:
            raise ValueError(f"{self.path} changed while it was read, expected it to stay the same")
        told = {
            "facts": facts,
            "skipped": self.skipped,
            "first_skipped": self.first_skipped,
            "digests": _digests(self.folder, arrays),
        }
        told["sha256"] = sha256_of(told)
        save_file(arrays, str(self.folder / _INDEX), metadata={"told": json.dumps(told)})

    def take(self, block: Sequence[tuple[int, bytes]], ids: BinaryIO, conditions: BinaryIO) -> None:
        for (number, _), one in zip(block, self.reader.read([line for _, line in block]), strict=True):
            if isinstance(one, ValueError):
                if not self.skips:
                    raise ValueError(f"line {number} of {self.path}: {one}") from one
                self.first_skipped = self.first_skipped or f"line {number}: {one}"
                self.skipped += 1
                continue
            condition, text = one
            content = condition.encode()
            group = self.known.setdefault(hashlib.sha256(content).digest(), len(self.known))
            if group == len(self.condition_ends):
                conditions.write(content)
                self.condition_ends.append((self.condition_ends[-1] if group else 0) + len(content))
            for index, (prompt, completion) in enumerate(text.pairs):
                context = text.contexts[index] if text.contexts else prompt[:0]
                whole = torch.cat((prompt, completion, context)).numpy()
                start, self.n_ids = self.n_ids, self.n_ids + len(whole)
                middle, end = start + len(prompt), start + len(prompt) + len(completion)
                self.pairs.extend((start, middle, end, self.n_ids))
                ids.write(whole.tobytes())
            self.first_pairs.append(len(self.pairs) // 4)
            self.groups.append(group)
            self.numbers.append(number)


def _blocks(lines: BinaryIO, also: Callable[[bytes], None]) -> Iterator[list[tuple[int, bytes]]]:
    """(number, line) for the lines that are not blank, in blocks; ``also`` is called with every byte."""
    block: list[tuple[int, bytes]] = []
    number = 0
    while line := lines.readline(MOST_LINE + 1):
        also(line)
        number += 1
        rest = line
        while len(rest) > MOST_LINE and not rest.endswith(b"\n"):  # too long to hold in memory
            rest = lines.readline(MOST_LINE + 1)
            also(rest)
        if line.strip():
            block.append((number, line))
        if len(block) == _LINES_AT_ONCE:
            yield block
            block = []
    if block:
        yield block


def _digests(folder: Path, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """sha256 of everything that a :class:`TextSet` holds."""
    found: dict[str, Any] = {
        name: [str(arrays[name].dtype), *arrays[name].shape, hashlib.sha256(arrays[name].numpy().data).hexdigest()]
        for name in _ARRAYS
    }
    for name in (_IDS, _CONDITIONS):
        with (folder / name).open("rb") as content:
            found[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
