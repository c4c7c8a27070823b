"""Reading labels: deltas by adapter name, as one table, and as a Dataset. See ``log`` for the files."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..peft.adapters import AdapterFiles
from .log import Entry, Failure, Known, Log, read_manifest

TARGETS = ("tokens", "tensors")


class Tokenizes(Protocol):
    """What turns LoRA tensors into tokens, such as a :class:`lora_delta.generate.tokens.TokenFormat`."""

    def tokenize(self, tensors: dict[str, Tensor], /) -> Tensor: ...


def adapter_name(source: str | Path, folder: str | Path) -> str:
    """The name of an adapter among the labels of ``folder``, whatever the working directory is.

    For an adapter's folder it is the path relative to the parent of ``folder``, so that both can move together, or the
    absolute path if it is not in that parent. A hub id is its own name.
    """
    path = Path(source).expanduser()
    return _path_name(path, Path(folder)) if path.is_dir() else str(source)


def _path_name(path: Path, folder: Path) -> str:
    path, home = path.resolve(), folder.resolve().parent
    return (path.relative_to(home) if path.is_relative_to(home) else path).as_posix()


class DeltaLabels(Mapping[str, Tensor]):
    """The labels of a folder: a mapping of adapter names to deltas, in the order in which they were computed.

    A delta has the shape that :class:`DifferentiableDeltaCompute` gave it, (H,) by default, and is float32. The
    table is memory-mapped: a delta is read, and checked, on access.

    Attributes:
        settings: what the labels depend on.
        names: of all adapters.
        failures: of the adapters that have no label, by name.

    Raises:
        ValueError: no such folder, one without labels, or files that are not what was written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.settings: dict[str, Any] = manifest["settings"]
        self._log = Log(self.folder, manifest)
        if not self._log.path.exists():
            raise ValueError(f"{self.folder} has no {self._log.path.name}, expected the log of its labels")
        known = Known.of(self._log.lines)
        self._entries, self.names = known.labels, list(known.labels)
        self.failures: Mapping[str, Failure] = known.failures

    @functools.cached_property
    def tensor(self) -> Tensor:
        """All deltas, (N, …) float32, each checked; row i is that of ``names[i]``.

        Memory-mapped if each adapter was labelled once, else a copy.

        Raises:
            ValueError: a row that is not what was written.
        """
        for entry in self._entries.values():
            self._log.delta(entry)
        rows = [entry["row"] for entry in self._entries.values()]
        deltas = self._log.deltas()
        return deltas if rows == list(range(len(deltas))) else deltas[torch.tensor(rows, dtype=torch.int64)]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Tensor:
        """The delta of an adapter, by its name or by the path of its folder, checked.

        Raises:
            KeyError: there is none.
            ValueError: it is not what was written.
        """
        return self._log.delta(self.entry(name))

    def entry(self, name: str) -> Entry:
        """The log's entry of an adapter, looked up as in ``labels[name]``: see ``log``."""
        keys = [str(name)]
        if "\0" not in keys[0]:  # which no path contains
            keys.append(_path_name(Path(name).expanduser(), self.folder))
        for key in keys:
            if key in self._entries:
                return self._entries[key]
        few = ", ".join(self.names[:3]) or "none"
        raise KeyError(f"{self.folder} has no label for {str(name)!r}, expected one of its {len(self)} names: {few}, …")

    def source(self, name: str) -> str:
        """Where the adapter is read from: its folder, which may have moved with that of the labels, or its hub id."""
        entry = self.entry(name)
        near = self.folder.resolve().parent / entry["name"]
        return str(near) if near.is_dir() else entry["source"]

    def dataset(
        self,
        conditions: Mapping[str, Any],
        targets: str | None = None,
        format: Tokenizes | None = None,
        *,
        keep_bytes: int = 2 * 1024**3,
    ) -> LabelDataset:
        """What a generator is trained on: an item for each adapter that has a condition, in the order of conditions.

        Args:
            conditions: {adapter's name: what the generator is given for it}.
            targets: None: items are (condition, delta). ``"tensors"``: (condition, {PEFT name: tensor}, delta), the
                tensors as the adapter's file holds them. ``"tokens"``: (condition, tokens, delta).
            format: with ``"tokens"``: its ``tokenize`` turns the tensors into tokens.
            keep_bytes: memory for keeping adapters' tensors or tokens; those that fit are read once.

        Adapters are read when an item is accessed, and refused (``ValueError``) if they have changed since they were
        labelled.

        Raises:
            ValueError: a condition for an adapter without a label, unknown targets, tokens without a format.
        """
        if targets not in (None, *TARGETS):
            raise ValueError(f"targets is {targets!r}, expected None or one of {TARGETS}")
        if (targets == "tokens") != (format is not None):
            raise ValueError(f"targets is {targets!r} and format is {format!r}, expected a format only with 'tokens'")
        for name in conditions:
            try:
                self.entry(name)
            except KeyError as error:
                raise ValueError(f"conditions: {error.args[0]}") from None
        return LabelDataset(self, conditions, targets, format, keep_bytes)


class LabelDataset(Dataset):
    """See :meth:`DeltaLabels.dataset`."""

    def __init__(
        self,
        labels: DeltaLabels,
        conditions: Mapping[str, Any],
        targets: str | None,
        format: Tokenizes | None,
        keep_bytes: int,
    ) -> None:
        self.labels, self.targets, self.format = labels, targets, format
        self.items = list(conditions.items())
        self._read: set[str] = set()
        self._kept: dict[str, Tensor | dict[str, Tensor]] = {}
        self._room = keep_bytes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        name, condition = self.items[index]
        delta = self.labels[name]
        if self.targets is None:
            return condition, delta
        return condition, self._target(name), delta

    def _target(self, name: str) -> Tensor | dict[str, Tensor]:
        """Tokens or tensors, kept while there is room: all are accessed again and again, in any order."""
        target = self._kept.get(name)
        if target is None:
            tensors = self._tensors(name)
            target = self.format.tokenize(tensors) if self.format else tensors
            size = sum(tensor.nbytes for tensor in (target.values() if isinstance(target, dict) else [target]))
            if size <= self._room:
                self._kept[name] = target
                self._room -= size
        return dict(target) if isinstance(target, dict) else target

    def _tensors(self, name: str) -> dict[str, Tensor]:
        source = self.labels.source(name)
        files = AdapterFiles.read(source, local_files_only=name in self._read)  # the first read has fetched it
        if files.sha256 != self.labels.entry(name)["sha256"]:
            raise ValueError(f"adapter {source} has changed since it was labelled, expected it unchanged")
        self._read.add(name)
        return files.load()[1]
