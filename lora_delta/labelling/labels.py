"""Delta labels: the deltas of many adapters, many at a time, written to a folder, by one process or several.

An adapter's delta depends on the others in its pass only by rounding, so every pass is as large as possible. The
adapters are split into units of one pass each. Every process takes the next free unit, reads it from disk while its
previous unit is computed, and appends what it finished to its own log; the first process merges the others' logs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..delta import DifferentiableDeltaCompute
from ..distributed import Counters, Ranks, Told, as_told, told
from ..files import folder_lock
from ..peft.adapters import find_adapters
from ..progress import progress_bar
from .log import Entry, Failure, Known, Log, check_of, open_log, read_manifest
from .settings import label_settings
from .table import adapter_name
from .units import JOB, Job, Unit, UnitReader

PER_PASS_CPU, PER_PASS_GPU = 8, 32
_UNITS = "units"  # handed out: a count that all ranks share, like those of adapters computed, reused and failed
_Done = dict[str, list[Any]]  # names of adapters computed, names of those reused, and failures


@dataclass(frozen=True)
class LabelReport:
    """What :func:`compute_labels` did, in all processes together. Names and failures are sorted by name.

    Attributes:
        computed: names of the adapters whose delta was computed.
        reused: names of those that already had one, of the same content, in the folder.
        failed: those without a label, and why.
        zero: names of those whose delta is exactly zero, which also gives a warning.
        labels: how many the folder holds now, including those of earlier runs.
        seconds: from reading the first adapter to the end.
    """

    computed: tuple[str, ...]
    reused: tuple[str, ...]
    failed: tuple[Failure, ...]
    zero: tuple[str, ...]
    labels: int
    seconds: float


def compute_labels(
    delta: DifferentiableDeltaCompute,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    model: str = "",
    fingerprint: str | None = None,
    adapters_per_pass: int | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> LabelReport:
    """Compute the deltas of adapters, each under its own spec, and add them to the label folder ``out``.

    An adapter whose content has a label in the folder is not computed again; one that has changed since is. Labels
    of adapters that are not given stay. An adapter that cannot be read, does not fit the model, or has a delta that
    is not finite is a failure in the report and the log; the others are still computed, and the next call tries it
    again. ``log`` describes the files, :class:`lora_delta.labelling.table.DeltaLabels` reads them.

    If torch.distributed's default group exists, all of its ranks make this call, with the same arguments and one
    folder that all of them see, and share the work. What is finished is on disk after every pass. A call that was
    killed, at any moment and with any number of ranks, resumes when it is made again, with the number of threads it
    began with, and gives, to the bit, the deltas of an uninterrupted one on that machine. An exception in one rank,
    Ctrl-C included, ends all of them after what they have begun.

    Args:
        delta: base model, probes, layer and pooling; its own spec is not used.
        adapters: folders, folders of folders, globs, ``.txt`` lists, hub ids: see
            :func:`lora_delta.peft.adapters.find_adapters`. Those of rank 0 count.
        model, fingerprint: see :func:`lora_delta.labelling.settings.label_settings`.
        adapters_per_pass: by default that of ``delta``, else 8 on a CPU and 32 on a GPU.
        local_files_only: take hub ids from the local cache only.
        progress: show a progress bar on stderr, on rank 0.

    Returns:
        The same report on all ranks.

    Raises:
        ValueError: ``delta`` is split over a mesh; no adapters; another job is running in ``out``; ``out`` holds
            something else, damaged labels, or labels of another model, other probes, layer, pooling or dtype. In these
            cases nothing is written.
        OSError: the folder cannot be written.
    """
    if delta.is_split:
        raise ValueError(
            "delta is split over a mesh, expected one that every process computes by itself: processes share the "
            "adapters here; a base model that is too large for a device can be streamed"
        )
    ranks, out = Ranks.current(), Path(out)
    per_pass = _adapters_per_pass(delta, adapters_per_pass)
    settings = label_settings(delta, model=model, fingerprint=fingerprint)
    log: Log | None = None
    with ExitStack() as held:  # on rank 0: the folder's lock

        def begin() -> tuple[Job, dict[str, str]]:
            nonlocal log
            found = [source if isinstance(source, str) else source.resolve() for source in find_adapters(adapters)]
            sources = {adapter_name(source, out): str(source) for source in found}
            held.enter_context(folder_lock(out))
            log = open_log(out, settings, delta.base_activation.shape)
            prepacked = delta.weights.packed is not None
            return Job.begin(log, sources, per_pass, prepacked, torch.get_num_threads()), sources

        job, sources = ranks.first(begin)
        start, counters = time.monotonic(), ranks.counters()
        done: _Done = {"computed": [], "reused": [], "failed": []}
        error: BaseException | None = None
        with progress_bar(total=len(sources), unit=" adapters", disable=not progress or ranks.rank > 0) as bar:
            try:
                manifest = read_manifest(out, settings)  # another rank could have been given another model
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # the first rank may be adding to it by now
                    log = log or Log(out, manifest)
                own = Log(out, manifest, f"-{ranks.rank}") if ranks.rank else log
                reader = UnitReader(job, sources, log, delta.config, delta.weights, local_files_only)
                with _rounded_as(job, delta) as rounded, closing(_units(reader, counters)) as units:
                    for unit in units:
                        new = _finished(unit, rounded, own, reader.known)
                        for kind in done:
                            done[kind] += new[kind]
                        _show(bar, len(sources), counters, new)
            except BaseException as raised:
                error = raised
                with suppress(Exception):
                    counters.add(_UNITS, len(job.units))  # the other ranks take no more
            ends = _ends(ranks, error, done)
            with suppress(Exception):
                _show(bar, len(sources), counters, {})
        broken = {rank: words for rank, (words, _) in enumerate(ends) if words is not None}
        report = ranks.first(lambda: _report(log or own, [done for _, done in ends], not broken, start))
    if error is not None:
        raise error
    for rank, words in broken.items():
        raise as_told(rank, words)
    if report.zero and ranks.rank == 0:
        few = ", ".join(report.zero[:3]) + (", …" if len(report.zero) > 3 else "")
        why = "as with an untrained B, or lora_alpha 0"
        warnings.warn(f"{len(report.zero)} adapters have a delta of exactly zero, {why}: {few}", stacklevel=2)
    return report


def _finished(unit: Unit, delta: DifferentiableDeltaCompute, log: Log, known: Known) -> _Done:
    """Compute the deltas that a unit waits for, and write what is new to disk."""
    computed: list[tuple[Entry, Tensor]] = []
    if unit.lora is not None:
        for entry, row in zip(unit.waiting, delta.deltas(unit.lora).float().cpu(), strict=True):
            if row.isfinite().all():
                norm = float(torch.linalg.vector_norm(row.double()))
                computed.append(({**entry, "norm": norm, "check": check_of(row)}, row))
            else:
                reason = "its delta is not finite"
                unit.failures.append(Failure(entry["name"], entry["source"], reason, entry["sha256"]))
    added = [*unit.copied, *computed]
    if added or any(known.failures.get(failure.name) != failure for failure in unit.failures):
        log.append([(unit.index, added, [asdict(failure) for failure in unit.failures])])
    reused = [*unit.reused, *(entry["name"] for entry, _ in unit.copied)]
    return {"computed": [entry["name"] for entry, _ in computed], "reused": reused, "failed": unit.failures}


def _units(reader: UnitReader, counters: Counters) -> Generator[Unit, None, None]:
    """The units that this rank takes; the next one is read ahead."""

    def take() -> Unit | None:
        index = counters.add(_UNITS) - 1
        return reader.read(index) if index < len(reader.job.units) else None

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(take)
        while (unit := ahead.result()) is not None:
            ahead = pool.submit(take)
            yield unit


@contextmanager
def _rounded_as(job: Job, delta: DifferentiableDeltaCompute) -> Iterator[DifferentiableDeltaCompute]:
    """The delta with weights packed or not, and with as many threads, as when the job began: last bits depend on both.

    Free memory decided the former, the launcher the latter: torchrun gives each of several processes one thread.
    """
    threads = torch.get_num_threads()
    packed = job.prepacked and (delta.weights.packed is not None or delta.weights.can_prepack)
    torch.set_num_threads(job.threads)
    try:
        if (packed, job.threads) != (delta.weights.packed is not None, threads):
            weights = delta.weights if packed else replace(delta.weights, packed=None)
            delta = delta.on(weights.prepack() if packed and weights.packed is None else weights)
        yield delta
    finally:
        torch.set_num_threads(threads)


def _show(bar: tqdm, total: int, counters: Counters, new: _Done) -> None:
    """Count some adapters, and show what all ranks have counted."""
    computed, reused, failed = (counters.add(kind, len(new.get(kind, ()))) for kind in ("computed", "reused", "failed"))
    bar.total = total - reused  # they would distort the rate
    if failed:
        bar.set_postfix(failed=failed, refresh=False)
    bar.update(computed + failed - bar.n)


def _ends(ranks: Ranks, error: BaseException | None, done: _Done) -> list[tuple[Told | None, _Done]]:
    """For each rank, once all are done: the exception that ended it, if any, and what it did."""
    try:
        return ranks.gather((told(error) if error else None, done))
    except Exception as lost:  # a rank is gone
        raise error or lost from None


def _report(log: Log, done: Sequence[_Done], is_whole: bool, start: float) -> LabelReport:
    """What all ranks did, after merging what they finished into the folder. The job is over if no rank failed."""
    log.take_in_parts()
    kinds = {kind: tuple(sorted(chain.from_iterable(one[kind] for one in done))) for kind in done[0]}
    labels = Known.of(log.lines).labels
    if is_whole:
        (log.folder / JOB).unlink()
    there = sorted((*kinds["computed"], *kinds["reused"]))
    zero = tuple(name for name in there if labels.get(name, {}).get("norm") == 0)
    return LabelReport(**kinds, zero=zero, labels=len(labels), seconds=time.monotonic() - start)


def _adapters_per_pass(delta: DifferentiableDeltaCompute, wanted: int | None) -> int:
    default = PER_PASS_CPU if delta.weights.device.type == "cpu" else PER_PASS_GPU
    n = wanted if wanted is not None else delta.adapters_per_pass or default
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"adapters_per_pass is {n!r}, expected 1 or more, or None")
    return n
