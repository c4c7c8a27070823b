"""Delta labels on disk: a table of deltas, and a manifest that says whose they are and what they depend on.

A folder of labels holds two files::

    manifest.json                what the labels depend on; an entry per adapter, with its row, and per failure
    deltas-<hash>.safetensors    the tensor "deltas" (N, …) float32, its rows sorted by the adapters' names

The table is named after its content, and the manifest, which names it, is replaced last and the older table removed
after that: whenever a process dies, the folder holds a manifest and the very table that it speaks of. While a job is
under way there are its lock and its parts as well: see the modules ``lock`` and ``label_parts``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from qwen_functional.files import read_json_object

from .adapters import adapter_fingerprint, load_peft_adapter
from .files import replaces

MANIFEST, TENSOR = "manifest.json", "deltas"
KIND, FORMAT = "delta labels", 1
TARGETS = ("tokens", "tensors")
# Labels that differ in one of these are never put into the same table. The rest is there to be read.
COMPARED = ("dtype", "model_sha256", "layer", "pooling", "probes_sha256")
_SHOWN_WITH = {"model_sha256": ("model",), "probes_sha256": ("chat", "max_length")}
# Tables, and what a process that died has left half written.
_STALE = re.compile(r"deltas-[0-9a-f]{16}\.safetensors(\.\d+\.unfinished)?|manifest\.json\.\d+\.unfinished")


class Tokenizes(Protocol):
    """What turns LoRA tensors into tokens, such as a :class:`lora_delta.tokens.TokenFormat`."""

    def tokenize(self, tensors: dict[str, Tensor], /) -> Tensor: ...


@dataclass(frozen=True)
class Label:
    """What the manifest says of one adapter.

    Attributes:
        name: see :func:`adapter_name`.
        source: its folder, or its hub id.
        sha256: of its content, by :func:`lora_delta.adapters.adapter_fingerprint`.
        norm: of its delta, over all entries.
        spec: the fields of its LoraSpec.
        version: of the library that computed the delta.
    """

    name: str
    source: str
    sha256: str
    norm: float
    spec: Mapping[str, Any]
    version: str


@dataclass(frozen=True)
class Failure:
    """An adapter without a label, and why."""

    name: str
    source: str
    reason: str


def adapter_name(source: str | Path, folder: str | Path) -> str:
    """The name of an adapter among the labels of ``folder``, whatever the working directory is.

    A folder's is its path from the place where ``folder`` lies, so that both can move together; its whole path where
    it is elsewhere. A hub id is its own name.
    """
    path = Path(source).expanduser()
    return _path_name(path, Path(folder)) if path.is_dir() else str(source)


def _path_name(path: Path, folder: Path) -> str:
    path, home = path.resolve(), folder.resolve().parent
    return (path.relative_to(home) if path.is_relative_to(home) else path).as_posix()


class DeltaLabels(Mapping[str, Tensor]):
    """The labels of a folder, read: a mapping of adapters' names to deltas, in the order of the rows.

    A delta has the shape that :class:`DifferentiableDeltaCompute` gave it, (H,) by default, and is float32. The
    table is mapped from its file: a delta is read when it is looked at.

    Attributes:
        manifest: all of ``manifest.json``.
        settings: what the labels depend on.
        names: of all adapters.
        tensor: all deltas, (N, …); row i is that of ``names[i]``.

    Raises:
        ValueError: no such folder, one without labels, or a manifest and a table that do not belong together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.settings: dict[str, Any] = self.manifest["settings"]
        self._entries = {entry["name"]: entry for entry in self.manifest["adapters"]}
        self.names: list[str] = list(self._entries)
        self.tensor = _read_table(self.folder / self.manifest["table"])
        rows = [entry["row"] for entry in self._entries.values()]
        if rows != list(range(len(self.tensor))):
            raise ValueError(
                f"{self.folder} names {len(rows)} adapters and has {len(self.tensor)} deltas, expected a row for each"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Tensor:
        """The delta of an adapter, by its name or by the path of its folder. ``KeyError`` where there is none."""
        return self.tensor[self.entry(name)["row"]]

    def entry(self, name: str) -> dict[str, Any]:
        """What the manifest says of an adapter, found as by ``labels[name]``: :class:`Label`'s fields and its row."""
        for key in (str(name), _path_name(Path(name).expanduser(), self.folder)):
            if key in self._entries:
                return self._entries[key]
        few = ", ".join(self.names[:3]) or "none"
        raise KeyError(f"{self.folder} has no label of {str(name)!r}, expected one of its {len(self)} names: {few}, …")

    def source(self, name: str) -> str:
        """Where the adapter is read from: its folder, moved with that of the labels perhaps, or its hub id."""
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
        """What a generator is trained on: an item for each adapter that has a condition, in the order of those.

        Args:
            conditions: {adapter's name: what the generator is given for it}.
            targets: None: items are (condition, delta). ``"tensors"``: (condition, {PEFT name: tensor}, delta), the
                tensors as the adapter's file holds them. ``"tokens"``: (condition, tokens, delta).
            format: with ``"tokens"``, whose ``tokenize`` makes tokens of the tensors.

            keep_bytes: memory for what was made of adapters, tensors or tokens; those that find room are read once.

        Adapters are read when an item is asked for, and refused (``ValueError``) if they are no longer those that
        were labelled.

        Raises:
            ValueError: a condition for an adapter without a label, unknown targets, tokens without a format.
        """
        if targets not in (None, *TARGETS):
            raise ValueError(f"targets is {targets!r}, expected None or one of {TARGETS}")
        if (targets == "tokens") != (format is not None):
            raise ValueError(f"targets is {targets!r} and format is {format!r}, expected a format with 'tokens' alone")
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
        self._unchanged: set[str] = set()
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
        """Tokens or tensors, kept while there is room: all that are asked for again and again, in any order."""
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
        if name not in self._unchanged:
            if adapter_fingerprint(source) != self.labels.entry(name)["sha256"]:
                raise ValueError(f"adapter {source} has changed since it was labelled, expected it as it was then")
            self._unchanged.add(name)
        # The check has fetched it, if it is on the hub.
        return load_peft_adapter(source, local_files_only=True)[1]


class LabelWriter:
    """The labels of a folder while some are added. Nothing is on disk before :meth:`save`.

    Args:
        settings: what the labels depend on.
        shape: of one delta.

    Raises:
        ValueError: the folder holds something else, or labels that were made with other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], shape: Sequence[int]) -> None:
        self.folder, self.settings, self.shape = Path(folder), dict(settings), tuple(shape)
        self.hold([], [])
        self.changed = False
        if (self.folder / MANIFEST).exists():
            existing = DeltaLabels(self.folder)
            require_same(self.folder, existing.settings, self.settings)
            deltas = existing.tensor.clone()  # the file that it is mapped from will be removed
            entries = ({k: v for k, v in entry.items() if k != "row"} for entry in existing.manifest["adapters"])
            labels = [Label(**entry) for entry in entries]
            failures = [Failure(**entry) for entry in existing.manifest["failed"]]
            self.hold(list(zip(labels, deltas, strict=True)), failures)
        elif self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, expected a folder for labels, or none yet")

    def hold(self, labels: Sequence[tuple[Label, Tensor]], failures: Sequence[Failure]) -> None:
        """Take these for what the folder held at first."""
        self.labels = {label.name: (label, delta) for label, delta in labels}
        self.failures = {failure.name: failure for failure in failures}
        self._at_first = dict(self.labels)
        self._by_content = {label.sha256: (label, delta) for label, delta in self.labels.values()}

    def known(self, name: str, sha256: str) -> tuple[Label, Tensor] | None:
        """What the folder held at first for an adapter of this content, its own label before that of a copy."""
        own = self._at_first.get(name)
        return own if own is not None and own[0].sha256 == sha256 else self._by_content.get(sha256)

    def add(self, label: Label, delta: Tensor) -> None:
        """Give an adapter its delta, instead of one that it may have had."""
        before = self.labels.get(label.name)
        if before is None or before[0] != label or label.name in self.failures:
            self.labels[label.name] = label, delta
            self.failures.pop(label.name, None)
            self.changed = True

    def fail(self, failure: Failure, sha256: str | None) -> None:
        """Note that an adapter has no label. An older one stays only where its content could not be read at all."""
        stale = sha256 is not None and self.labels.pop(failure.name, None) is not None
        if stale or self.failures.get(failure.name) != failure:
            self.failures[failure.name] = failure
            self.changed = True

    def save(self) -> None:
        """Write everything, if anything has changed."""
        if not self.changed:
            return
        names = sorted(self.labels)
        rows = [self.labels[name][1] for name in names]
        table = torch.stack(rows).float() if rows else torch.zeros(0, *self.shape)
        digest = hashlib.sha256(table.flatten().view(torch.uint8).numpy().data).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"deltas-{digest}.safetensors"
        with replaces(file) as unfinished:
            save_file({TENSOR: table}, unfinished)
            unfinished.chmod(self.folder.stat().st_mode & 0o666)  # safetensors lets nobody else read it
        head = {"kind": KIND, "format": FORMAT, "table": file.name, "shape": list(table.shape)}
        entries = [{"row": row, **asdict(self.labels[name][0])} for row, name in enumerate(names)]
        failed = [asdict(self.failures[name]) for name in sorted(self.failures)]
        with replaces(self.folder / MANIFEST) as unfinished:
            text = _manifest_text({**head, "settings": self.settings}, entries, failed)
            unfinished.write_text(text, encoding="utf-8")
        for other in self.folder.iterdir():
            if _STALE.fullmatch(other.name) and other != file:
                other.unlink()
        self.changed = False


def _manifest_text(head: Mapping[str, Any], adapters: list[dict[str, Any]], failed: list[dict[str, Any]]) -> str:
    """JSON with a line for each adapter."""

    def lines(entries: list[dict[str, Any]]) -> str:
        return "[\n  " + ",\n  ".join(map(json.dumps, entries)) + "\n ]" if entries else "[]"

    start = json.dumps(head, indent=1).removesuffix("\n}")
    return f'{start},\n "adapters": {lines(adapters)},\n "failed": {lines(failed)}\n}}\n'


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no manifest.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {what}, expected a folder that lora-delta label has written")
    manifest = read_json_object(path, f"a manifest of {KIND}")
    if manifest.get("kind") != KIND:
        raise ValueError(f"{path} is not a manifest of {KIND}, expected a folder that lora-delta label has written")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {manifest.get('format')!r}, expected {FORMAT}; another version wrote it")
    keys = {"table": str, "settings": dict, "adapters": list, "failed": list}
    for key, kind in keys.items():
        if not isinstance(manifest.get(key), kind):
            raise ValueError(f"{path} has no {key!r}, expected the whole manifest of {KIND}")
    return manifest


def _read_table(file: Path) -> Tensor:
    try:
        with safe_open(file, "pt") as handle:
            return handle.get_tensor(TENSOR)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read, expected the table that {MANIFEST} names: {error}") from error


def require_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse (``ValueError``) to put labels of ``here``'s settings to those of ``there`` in a folder."""
    differing = [key for key in COMPARED if there.get(key) != here.get(key)]
    if "dtype" in differing and "model_sha256" in differing:
        differing.remove("model_sha256")  # it is of the weights in their dtype
    if not differing:
        return
    shown = [*differing]
    for key in differing:
        shown += [other for other in _SHOWN_WITH.get(key, ()) if there.get(other) != here.get(other)]
    what = "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in shown)
    raise ValueError(
        f"{folder} holds labels that were made with other settings: {what}. Labels of different settings are never "
        "mixed: take another folder (--out)"
    )
