"""A job of labelling that is under way, on disk, so that a killed one goes on and ends in the very same bytes.

Beside the table and the manifest, a folder of labels then holds::

    parts-<hash>/                   <hash> of what the labels depend on, the adapters and the size of a pass
        job.json                    written first, removed first: without it the rest is waste
        unit-<number>.safetensors   what became of the adapters of one unit, all of them
        before.safetensors          the table before the job, where it was brought up to date after Ctrl-C

An adapter's delta depends by rounding on the others of its pass. So who shares one must not depend on when a job was
killed, or on which process came first: the units are fixed when a job begins, and a unit is computed in one pass, but
for those of its adapters that the table of that moment had already.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from qwen_functional.files import read_json_object

from .adapter_config import CONFIG_FILE
from .files import replaces, write_json
from .label_table import COMPARED, TENSOR, Failure, Label, LabelWriter, require_same

JOB, BEFORE, FORMAT = "job.json", "before.safetensors", 1
_PARTS = re.compile(r"parts-[0-9a-f]{16}")


@dataclass
class Part:
    """What became of some adapters.

    Attributes:
        labels: each with its delta.
        failures: each with the sha256 of the adapter's content, where that could be read.
    """

    labels: list[tuple[Label, Tensor]] = field(default_factory=list)
    failures: list[tuple[Failure, str | None]] = field(default_factory=list)

    @classmethod
    def load(cls, file: Path) -> Part | None:
        """Read what :meth:`save` wrote; None where there is nothing that can be read."""
        try:
            with safe_open(file, "pt") as handle:
                facts, rows = handle.metadata(), handle.get_tensor(TENSOR).clone()
            labels = [Label(**label) for label in json.loads(facts["labels"])]
            failures = [(Failure(**failure), sha256) for failure, sha256 in json.loads(facts["failures"])]
            return cls(list(zip(labels, rows, strict=True)), failures)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError):
            return None

    def save(self, file: Path) -> None:
        """Write a file, whole or not at all."""
        rows = torch.stack([row for _, row in self.labels]).float() if self.labels else torch.zeros(0)
        facts = {
            "labels": json.dumps([asdict(label) for label, _ in self.labels]),
            "failures": json.dumps([(asdict(failure), sha256) for failure, sha256 in self.failures]),
        }
        with replaces(file) as unfinished:
            unfinished.write_bytes(serialized({TENSOR: rows}, facts))

    def by_name(self) -> dict[str, tuple[str | None, Label | Failure, Tensor | None]]:
        """{adapter's name: (sha256 of its content, what became of it, its delta)}"""
        failed = {failure.name: (sha256, failure, None) for failure, sha256 in self.failures}
        return {**{label.name: (label.sha256, label, row) for label, row in self.labels}, **failed}


@dataclass(frozen=True)
class LabelJob:
    """The units of a job, and where their parts are.

    Attributes:
        folder: of the parts.
        settings: what the labels depend on.
        sources: {adapter's name: its folder or hub id}.
        units: names of the adapters of each.
        prepacked: whether the base weights are multiplied in their faster form, which rounds otherwise.
        threads: of each process, of which the order of sums depends.
    """

    folder: Path
    settings: Mapping[str, Any]
    sources: Mapping[str, str]
    units: Sequence[Sequence[str]]
    prepacked: bool
    threads: int

    @classmethod
    def begin(
        cls,
        out: Path,
        settings: Mapping[str, Any],
        shape: Sequence[int],
        sources: Mapping[str, str],
        per_pass: int,
        prepacked: bool,
        threads: int,
    ) -> LabelJob:
        """A new job, or the same one that was killed: then its units, and how it rounds, are those of before.

        What a killed job with other adapters has finished goes into the table first. The caller holds the folder.

        Raises:
            ValueError: there are labels of other settings, in the table or in parts. Nothing is written then.
        """
        writer = LabelWriter(out, settings, shape)
        facts = [FORMAT, {key: settings[key] for key in COMPARED}, per_pass, sources]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        there = [path for path in sorted(out.iterdir()) if _PARTS.fullmatch(path.name)]
        killed = {path: cls.read(path) for path in there if (path / JOB).exists()}
        for job in killed.values():
            if job.has_parts():
                require_same(out, job.settings, settings)
        same = killed.pop(out / f"parts-{key}", None)
        for job in killed.values():
            if job.has_parts():
                writer = job.before(settings, shape)
                job.merge(writer)
                writer.save()
            job.discard()
        for path in there:
            if not (path / JOB).exists():
                shutil.rmtree(path, ignore_errors=True)
        if same is not None:
            return same
        units = _units(sources, set(writer.labels), per_pass)
        job = cls(out / f"parts-{key}", dict(settings), dict(sources), units, prepacked, threads)
        write_json(job.folder / JOB, {"format": FORMAT, **{k: v for k, v in vars(job).items() if k != "folder"}})
        return job

    @classmethod
    def read(cls, folder: Path) -> LabelJob:
        """The job of a folder of parts."""
        facts = read_json_object(folder / JOB, "a job of labelling")
        if facts.pop("format", None) != FORMAT:
            raise ValueError(f"{folder / JOB} is of another format, expected {FORMAT}: finish it with the version that "
                             f"began it, or remove {folder}")
        return cls(folder, **facts)

    def has_parts(self) -> bool:
        """Whether any unit is finished."""
        return any(self._file(unit).exists() for unit in range(len(self.units)))

    def part(self, unit: int) -> Part | None:
        """What became of the adapters of a unit, None as long as it is not finished."""
        return Part.load(self._file(unit))

    def write(self, unit: int, part: Part) -> None:
        """Put a finished unit on disk."""
        part.save(self._file(unit))

    def before(self, settings: Mapping[str, Any], shape: Sequence[int]) -> LabelWriter:
        """The labels that the folder held when the job began."""
        writer = LabelWriter(self.folder.parent, settings, shape)
        if (part := Part.load(self.folder / BEFORE)) is not None:
            writer.hold(part.labels, [failure for failure, _ in part.failures])
            writer.changed = True
        return writer

    def keep_before(self, writer: LabelWriter) -> None:
        """Note the labels that the folder held when the job began, before some of its own are added to them."""
        if not (self.folder / BEFORE).exists():
            failures: list[tuple[Failure, str | None]] = [(failure, None) for failure in writer.failures.values()]
            Part(list(writer.labels.values()), failures).save(self.folder / BEFORE)

    def merge(self, writer: LabelWriter) -> dict[int, Part]:
        """Add what all finished units hold to the labels of before; {unit: its part}."""
        parts = {unit: part for unit in range(len(self.units)) if (part := self.part(unit)) is not None}
        for part in parts.values():
            for label, row in part.labels:
                writer.add(label, row)
            for failure, sha256 in part.failures:
                writer.fail(failure, sha256)
        return parts

    def discard(self) -> None:
        """Remove the parts, once the table has them."""
        (self.folder / JOB).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, unit: int) -> Path:
        return self.folder / f"unit-{unit:06d}.safetensors"


def _units(sources: Mapping[str, str], labelled: set[str], per_pass: int) -> list[list[str]]:
    """Alike adapters next to each other, so that little is filled up with zeros.

    Names without a label come first and make units of their own: a few new ones among many share their passes.
    """
    ordered = sorted(sources, key=lambda name: (name in labelled, *_kind(sources[name]), name))
    new = sum(name not in labelled for name in ordered)
    groups = (ordered[:new], ordered[new:])
    return [group[start : start + per_pass] for group in groups for start in range(0, len(group), per_pass)]


def _kind(source: str) -> tuple[int, str]:
    """Sorts adapters by what their config declares, without reading their tensors. A guess: any may share a pass."""
    try:
        config = json.loads((Path(source) / CONFIG_FILE).read_text(encoding="utf-8"))
        places = [config.get(key) for key in ("target_modules", "rank_pattern", "layers_to_transform")]
        places[0] = sorted(places[0]) if isinstance(places[0], list) else places[0]
        return int(config["r"]), json.dumps(places)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0, ""  # on the hub, or not to be read
