"""Labels on disk: a table of deltas, and a log that says whose they are. Both are only appended to, never rewritten.

A folder of labels holds::

    manifest.json    what all of its labels depend on, and the shape of a delta; written first, and once
    deltas.f32       the deltas, one after the other, little-endian float32
    labels.jsonl     a line per pass: the adapters whose deltas it added, and those that have none

Rows are in the order in which they were finished. A table whose bytes depend neither on which process was faster nor on
when a job was killed would have to be sorted at the end, and so rewritten whenever labels are added. Each delta is the
same to the bit in any case, and that is enough. An adapter that is labelled again gets a new row; its old one stays,
unused.

What is read is checked. A line begins with 16 hex digits of a sha256 over the digits of the previous line, or of the
manifest, and its own other fields; each adapter's entry in it has those of its row. A row is on disk before the line
that names it: what a killed process left unfinished is the end of a file, which the next job cuts off.

Each rank of a job but the first has its own files, such as ``deltas-3.f32`` and ``labels-3.jsonl``. The first rank
merges them when the job ends or, if all ranks were killed, when the next job begins.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qwen_functional.files import read_json_object

from ..files import sync_folder, write_json
from ..identity import sha256_of
from .settings import COMPARED, label_identity

MANIFEST = "manifest.json"
KIND, FORMAT = "delta labels", 2
Entry = dict[str, Any]  # name, source, sha256, spec and version of an adapter; norm, check and row of its delta
_BEFORE, _AFTER, _DIGITS = b'{"check": "', b'", ', 16
_FIELDS = len(_BEFORE) + _DIGITS + len(_AFTER)  # where the other fields of a line begin


@dataclass(frozen=True, order=True)
class Failure:
    """An adapter without a label, and why; with the ``sha256`` of its content, where that could be read."""

    name: str
    source: str
    reason: str
    sha256: str | None = None


@dataclass(frozen=True)
class Known:
    """What some lines amount to: entries and failures by adapter name, the entries in the order of their rows."""

    labels: dict[str, Entry] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Known:
        """A failure removes an older label, unless the adapter's content could not be read at all."""
        known = cls()
        for line in lines:
            for entry in line["labels"]:
                known.labels.pop(entry["name"], None)
                known.labels[entry["name"]] = entry
                known.failures.pop(entry["name"], None)
            for failure in line["failures"]:
                known.failures[failure["name"]] = Failure(**failure)
                if failure["sha256"] is not None:
                    known.labels.pop(failure["name"], None)
        return known

    @functools.cached_property
    def by_content(self) -> dict[str, Entry]:
        """{sha256 of an adapter's content: an entry}"""
        return {entry["sha256"]: entry for entry in self.labels.values()}


class Log:
    """The log and the table of a folder, or of one rank (``part`` is ``"-3"``), as far as they are intact.

    Attributes:
        lines: of the log: ``unit`` (of its job), ``labels`` (entries), ``failures`` (the fields of :class:`Failure`).
        is_whole: whether nothing follows them. A warning says what does: a job is writing, or was stopped while it was.

    Raises:
        ValueError: what follows is not an unfinished write: the file is damaged.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], part: str = "") -> None:
        self.folder, self.manifest, self.shape = folder, manifest, tuple(manifest["shape"])
        self.path, self.table = folder / f"labels{part}.jsonl", folder / f"deltas{part}.f32"
        self.lines: list[dict[str, Any]] = []
        self._check, self._end, self._rows = sha256_of(manifest)[:_DIGITS].encode(), 0, 0
        self._row_bytes, self._mapped = 4 * math.prod(self.shape), torch.empty(0, *self.shape)
        for path in (self.path, self.table):  # reading a pipe or a device may never end; a link would lead elsewhere
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError(f"{path} is not a regular file, expected what lora-delta label has written")
        content = self.path.read_bytes() if self.path.exists() else b""
        held = self.table.stat().st_size if self.table.exists() else 0
        with _uncollected():
            fault = self._read(content, held)
        self.is_whole = fault is None
        if fault is not None:
            where = f"{self.path}, line {len(self.lines) + 1},"
            warnings.warn(f"{where} {fault}: it was not finished, and is ignored", stacklevel=3)

    def _read(self, content: bytes, held: int) -> str | None:
        """Take the lines; returns what is wrong with what follows the intact ones, if anything does.

        Args:
            content: of the log.
            held: bytes of the table.
        """
        for text in io.BytesIO(content):
            check = _digest(self._check, text[_FIELDS:])
            if not text.endswith(b"\n") or text[:_FIELDS] != _BEFORE + check + _AFTER:
                fault, rest = "is not what was written there", content[self._end :]
                if b"\n" not in rest or b"\0" in rest:  # a power cut leaves half a line, or zeros
                    return fault
                advice = "restore the file as it was, or use another folder"
                raise ValueError(f"{self.path}, line {len(self.lines) + 1}, {fault}: {advice}")
            line = _line(text)
            if (self._rows + len(line["labels"])) * self._row_bytes > held:
                return f"names rows that {self.table.name} has lost"
            self._take(line, text, check)
        return f"is missing, and {self.table.name} has its rows" if held > self._rows * self._row_bytes else None

    def _take(self, line: dict[str, Any], text: bytes, check: bytes) -> None:
        self.lines.append(line)
        self._check, self._end, self._rows = check, self._end + len(text), self._rows + len(line["labels"])

    def deltas(self) -> Tensor:
        """(rows, …) float32: the whole table, memory-mapped. Nothing is checked."""
        if len(self._mapped) < self._rows:
            size = self._rows * math.prod(self.shape)
            self._mapped = torch.from_file(str(self.table), shared=False, size=size).view(self._rows, *self.shape)
        return self._mapped

    def delta(self, entry: Entry) -> Tensor:
        """The row of an entry.

        Raises:
            ValueError: it is not what was written.
        """
        row = self.deltas()[entry["row"]]
        if check_of(row) != entry["check"]:
            raise ValueError(
                f"{self.table}, row {entry['row']}, is not the delta of {entry['name']!r} that was written there: "
                "lora-delta label computes it again"
            )
        return row

    def append(self, added: Iterable[tuple[int, Sequence[tuple[Entry, Tensor]], Sequence[dict[str, Any]]]]) -> None:
        """Add lines, each of (unit, entries with their deltas, failures), in place of whatever follows the intact ones.

        All rows are on disk before the first line.
        """
        check, row, new = self._check, self._rows, []
        with _end_of(self.table, row * self._row_bytes) as table:
            for unit, labels, failures in added:
                specs: list[Mapping[str, Any]] = []
                entries: list[Entry] = []
                for entry, delta in labels:
                    table.write(delta.numpy().data)
                    specs += [] if entry["spec"] in specs else [entry["spec"]]
                    entries.append({**entry, "row": row + len(entries), "spec": specs.index(entry["spec"])})
                row += len(entries)
                fields = {"unit": unit, "labels": entries, "specs": specs, "failures": failures}
                body = json.dumps(fields).encode()[1:] + b"\n"
                check = _digest(check, body)
                new.append((_BEFORE + check + _AFTER + body, check))
        with _end_of(self.path, self._end) as log:
            log.writelines(text for text, _ in new)
        for text, check in new:
            self._take(_line(text), text, check)

    def take_in_parts(self) -> None:
        """Add what the other ranks have written to their own files, and remove those. All ranks have ended."""
        there = Known.of(self.lines).labels
        for path in sorted(self.folder.glob("labels-*.jsonl")):
            part, added = Log(self.folder, self.manifest, path.stem.removeprefix("labels")), []
            for line in part.lines:
                labels = [(entry, part.deltas()[entry["row"]]) for entry in line["labels"]]
                is_there = [there.get(entry["name"], {}).get("check") == entry["check"] for entry, _ in labels]
                if not labels or not all(is_there):  # else a job was killed after it had merged it
                    added.append((line["unit"], labels, line["failures"]))
            self.append(added)
            path.unlink()
        for table in self.folder.glob("deltas-*.f32"):
            table.unlink()


def open_log(folder: Path, settings: Mapping[str, Any], shape: Sequence[int]) -> Log:
    """The labels of a folder, new or existing, intact and ready for more. The caller holds the folder.

    Args:
        settings: what the labels depend on.
        shape: of one delta.

    Raises:
        ValueError: the folder holds something else, labels that were made with other settings, or damaged ones. In
            these cases nothing is written.
    """
    if not (folder / MANIFEST).exists():
        facts = {"kind": KIND, "format": FORMAT, "shape": list(shape), "settings": dict(settings)}
        write_json(folder / MANIFEST, facts)
    log = Log(folder, read_manifest(folder, settings))
    if not log.is_whole or not log.path.exists():
        log.append([])
    log.take_in_parts()
    return log


def read_manifest(folder: Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of a folder of labels.

    Args:
        settings: what the labels should depend on.

    Raises:
        ValueError: there is none, or it is for something else or for other settings.
    """
    path, expected = folder / MANIFEST, "expected a folder that lora-delta label has written"
    if not path.is_file():
        raise ValueError(f"{folder} {'has no manifest.json' if folder.is_dir() else 'is not a folder'}, {expected}")
    manifest = read_json_object(path, f"a manifest of {KIND}")
    if manifest.get("kind") != KIND:
        raise ValueError(f"{path} is not a manifest of {KIND}, {expected}")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {manifest.get('format')!r}, expected {FORMAT}: another version of lora-delta wrote "
            "it; use that one, or label the adapters again into another folder"
        )
    shape = manifest.get("shape")
    is_shape = isinstance(shape, list) and all(isinstance(size, int) and 0 < size < 1 << 20 for size in shape)
    if not isinstance(shape, list) or not is_shape or len(shape) > 4 or not isinstance(manifest.get("settings"), dict):
        raise ValueError(f"{path} lacks 'shape' or 'settings', expected the whole manifest of {KIND}")
    if settings is not None:
        there = {name: manifest["settings"].get(name) for name in COMPARED}
        advice = "Labels of different settings are never mixed: use another folder (--out)"
        label_identity(settings).require_same(there, folder, advice)
    return manifest


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which would scan hundreds of thousands of new dicts again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _end_of(path: Path, size: int) -> Iterator[IO[bytes]]:
    """A file to write to from ``size`` on; what follows is cut off. On disk at the end, with its name if it is new."""
    is_new = not path.exists()
    with path.open("w+b" if is_new else "r+b") as file:
        file.seek(size)
        file.truncate()
        yield file
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def _line(text: bytes) -> dict[str, Any]:
    """The fields of a line. On disk its adapters share specs, which halves the time to parse a hundred thousand."""
    line = json.loads(text)
    for entry in line["labels"]:
        entry["spec"] = line["specs"][entry["spec"]]
    return line


def check_of(delta: Tensor) -> str:
    """The check that an entry has of its row, which is float32 and contiguous on the CPU."""
    return _digest(delta.numpy().data).decode()


def _digest(*content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    return digest.hexdigest()[:_DIGITS].encode()
