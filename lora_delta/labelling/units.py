"""Units of adapters, each computed in one pass: which they are, and how they are read and prepared.

An adapter's delta depends, by rounding, on the others in its pass and on how the base is multiplied. So which adapters
share a pass must not depend on when a job was killed, or on which process came first: ``job.json`` records it from a
job's beginning to its end. Adapters that have a label when it begins are in units of their own.

Adapters of any rank, scale and modules can share a pass: a smaller rank is padded with zeros, a module that an adapter
lacks is zero, and the scale is multiplied into B.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from qwen_functional import Lora, Qwen2Config, Qwen2Weights
from qwen_functional.architecture import PROJECTIONS
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.files import read_json_object
from qwen_functional.lora import LoraPair

from ..files import write_json
from ..identity import sha256_of
from ..peft.adapters import AdapterFiles
from ..peft.config import CONFIG_FILE
from .log import Entry, Failure, Known, Log
from .settings import spec_facts

JOB = "job.json"
_MOST_CONFIG = 1 << 20  # bytes; a larger one is sorted without being read


@dataclass(frozen=True)
class Job:
    """What ``job.json`` holds.

    Attributes:
        key: a hash of the adapters and the size of a pass.
        lines: how many the log had when the job began.
        units: names of the adapters in each.
        prepacked: whether the base weights are multiplied in their faster form, which rounds differently.
        threads: of each process, on which the order of sums depends.
    """

    key: str
    lines: int
    units: Sequence[Sequence[str]]
    prepacked: bool
    threads: int

    @classmethod
    def begin(cls, log: Log, sources: Mapping[str, str], per_pass: int, prepacked: bool, threads: int) -> Job:
        """A new job, or the same one resumed after it was killed. The caller holds the folder.

        Args:
            sources: {adapter's name: its folder or hub id}.
        """
        key, path = sha256_of([sources, per_pass]), log.folder / JOB
        if path.exists():
            try:
                killed = cls(**read_json_object(path, "a job of labelling"))
                if killed.key == key and killed.lines <= len(log.lines):
                    return killed
            except (ValueError, TypeError) as error:
                warnings.warn(f"{path} is not what was written, and a new job begins: {error}", stacklevel=2)
        units = _units(sources, set(Known.of(log.lines).labels), per_pass)
        job = cls(key, len(log.lines), units, prepacked, threads)
        write_json(path, asdict(job))
        return job


def _units(sources: Mapping[str, str], labelled: set[str], per_pass: int) -> list[list[str]]:
    """Similar adapters next to each other, so that little is padded with zeros.

    Names without a label come first, in units of their own: a few new ones among many share their passes.
    """
    ordered = sorted(sources, key=lambda name: (name in labelled, *_kind(sources[name]), name))
    new = sum(name not in labelled for name in ordered)
    groups = (ordered[:new], ordered[new:])
    return [group[start : start + per_pass] for group in groups for start in range(0, len(group), per_pass)]


def _kind(source: str) -> tuple[int, str]:
    """Sorts adapters by what their config declares, without reading their tensors. A guess: any can share a pass."""
    try:
        config = read_json_object(Path(source) / CONFIG_FILE, most_bytes=_MOST_CONFIG)
        places = [config.get(key) for key in ("target_modules", "rank_pattern", "layers_to_transform")]
        places[0] = sorted(places[0]) if isinstance(places[0], list) else places[0]
        return int(config["r"]), json.dumps(places)
    except Exception:  # on the hub, or an invalid file: reading the adapter will say so
        return 0, ""


@dataclass
class Unit:
    """A unit of a job that has been read.

    Attributes:
        index: its number in the job.
        reused: names of adapters that already have a label.
        copied: entries, with deltas, of adapters whose content is that of another adapter in the folder.
        failures: of adapters that cannot be read.
        waiting: entries of adapters that wait for their deltas.
        lora: of all ``waiting``; None where there are none.
    """

    index: int
    reused: list[str] = field(default_factory=list)
    copied: list[tuple[Entry, Tensor]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    waiting: list[Entry] = field(default_factory=list)
    lora: Lora | None = None


class UnitReader:
    """Reads the units of a job, from any thread.

    Args:
        sources: {adapter's name: its folder or hub id}.
        log: of the folder.
        local_files_only: take hub ids from the local cache only.
    """

    def __init__(
        self,
        job: Job,
        sources: Mapping[str, str],
        log: Log,
        config: Qwen2Config,
        weights: Qwen2Weights,
        local_files_only: bool,
    ) -> None:
        self.job, self.sources, self.log, self.config, self.weights = job, sources, log, config, weights
        self.local_files_only, self.known = local_files_only, Known.of(log.lines)
        self._before, self._since = Known.of(log.lines[: job.lines]), Known.of(log.lines[job.lines :])

    def read(self, index: int) -> Unit:
        """Read a unit. Whatever an adapter's files hold, an error is a failure of that adapter alone."""
        unit, loras = Unit(index), list[Lora]()
        for name in self.job.units[index]:
            source, sha256 = self.sources[name], None
            try:
                files = AdapterFiles.read(source, local_files_only=self.local_files_only)
                sha256, failure = files.sha256, self._since.failures.get(name)
                own, copy = self.known.labels.get(name), self._before.by_content.get(sha256)
                if failure is not None and failure.sha256 == sha256:  # of this job, before it was killed
                    unit.failures.append(failure)
                elif own is not None and own["sha256"] == sha256 and self._delta(own) is not None:
                    unit.reused.append(name)
                elif copy is not None and (delta := self._delta(copy)) is not None:
                    unit.copied.append(({**copy, "name": name, "source": source}, delta))
                else:
                    spec, tensors = files.load(self.config)
                    entry = {"name": name, "source": source, "sha256": sha256, "spec": spec_facts(spec)}
                    loras.append(spec.bind(self.config, tensors))
                    unit.waiting.append({**entry, "version": _version()})
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                unit.failures.append(Failure(name, source, reason, sha256))
        if loras:
            unit.lora = share_a_pass(loras, self.weights.compute_dtype, self.weights.device)
        return unit

    def _delta(self, entry: Entry) -> Tensor | None:
        """The delta of an entry; None, and a warning, if it is not what was written."""
        try:
            return self.log.delta(entry)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
            return None


def share_a_pass(loras: Sequence[Lora], dtype: torch.dtype, device: torch.device | str = "cpu") -> Lora:
    """One Lora of G adapters from G of one each, with any ranks, scales and modules.

    Exact up to rounding to ``dtype``: ranks are padded with zeros, and B holds ``scaling · B``.
    """
    projections = list(PROJECTIONS)
    keys = sorted({key for lora in loras for key in lora.pairs}, key=lambda k: (k[0], projections.index(k[1])))
    wide, pairs = accumulation_dtype(dtype), {}
    for key in keys:
        own = {index: lora.pairs[key] for index, lora in enumerate(loras) if key in lora.pairs}
        rank = max(pair.A.shape[1] for pair in own.values())
        one = next(iter(own.values()))
        A = torch.zeros(len(loras), rank, one.A.shape[2], dtype=dtype, device=device)
        B = torch.zeros(len(loras), one.B.shape[1], rank, dtype=dtype, device=device)
        for index, pair in own.items():
            r = pair.A.shape[1]
            A[index, :r] = pair.A[0]
            B[index, :, :r] = pair.B[0].to(wide) * pair.scaling
        pairs[key] = LoraPair(A, B, 1.0)
    return Lora(pairs, len(loras), batched=True)


def _version() -> str:
    try:
        return metadata.version("qwen-functional")
    except metadata.PackageNotFoundError:
        return "unknown"
