"""Units of adapters, read from disk and made ready for their pass.

Adapters of any rank, scale and modules share a pass: a smaller rank is filled up with zeros, a module that an adapter
lacks is zero, and the scale is multiplied into B.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError

from qwen_functional import Lora, LoraSpec, Qwen2Config, Qwen2Weights
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.lora import PROJECTIONS, LoraPair

from .adapters import adapter_fingerprint, load_peft_adapter
from .label_parts import LabelJob, Part
from .label_table import Failure, Label, LabelWriter


@dataclass(frozen=True)
class Loaded:
    """An adapter that waits for its delta."""

    name: str
    source: str
    sha256: str
    spec: LoraSpec


@dataclass
class Unit:
    """A unit of a job.

    Attributes:
        index: its number in the job.
        part: what needs no computing: labels that were there, and adapters that cannot be read.
        reused: how many labels of ``part`` were there, in the table or in the part of a killed job.
        loaded: adapters that need a delta.
        lora: of all ``loaded``; None where there are none.
        on_disk: whether the job has this very part on disk.
    """

    index: int
    part: Part = field(default_factory=Part)
    reused: int = 0
    loaded: list[Loaded] = field(default_factory=list)
    lora: Lora | None = None
    on_disk: bool = False


class UnitReader:
    """Reads the units of a job, in any thread.

    Args:
        before: what the folder held when the job began.
    """

    def __init__(
        self,
        job: LabelJob,
        before: LabelWriter,
        config: Qwen2Config,
        weights: Qwen2Weights,
        local_files_only: bool = False,
    ) -> None:
        self.job, self.before, self.config, self.weights = job, before, config, weights
        self.local_files_only, self._stopped = local_files_only, threading.Event()

    def stop(self) -> None:
        """Read no further adapter."""
        self._stopped.set()

    def read(self, index: int) -> Unit | None:
        """A unit; None if :meth:`stop` came in between."""
        unit, loras = Unit(index), list[Lora]()
        finished = (self.job.part(index) or Part()).by_name()
        taken = 0
        for name in self.job.units[index]:
            if self._stopped.is_set():
                return None
            source, sha256 = self.job.sources[name], None
            try:
                sha256 = adapter_fingerprint(source, local_files_only=self.local_files_only)
                there, outcome, row = finished.get(name, (None, None, None))
                if there == sha256 and isinstance(outcome, Failure):
                    unit.part.failures.append((outcome, sha256))
                    taken += 1
                elif there == sha256 and isinstance(outcome, Label) and row is not None:
                    unit.part.labels.append((outcome, row))
                    taken += 1
                elif (known := self.before.known(name, sha256)) is not None:
                    unit.part.labels.append((replace(known[0], name=name, source=source), known[1]))
                else:
                    spec, tensors = load_peft_adapter(
                        source, local_files_only=self.local_files_only, config=self.config
                    )
                    loras.append(spec.bind(self.config, tensors))
                    unit.loaded.append(Loaded(name, source, sha256, spec))
            except (ValueError, OSError, SafetensorError) as error:
                unit.part.failures.append((Failure(name, source, " ".join(str(error).split())), sha256))
        unit.reused, unit.on_disk = len(unit.part.labels), taken == len(self.job.units[index])
        if loras:
            unit.lora = share_a_pass(loras, self.weights.compute_dtype, self.weights.device)
        return unit


def share_a_pass(loras: Sequence[Lora], dtype: torch.dtype, device: torch.device | str = "cpu") -> Lora:
    """One Lora of G adapters from G of one each, with whatever ranks, scales and modules.

    Exact but for the rounding to ``dtype``: ranks are filled up with zeros, and B holds ``scaling · B``.
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
