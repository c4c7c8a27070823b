"""Delta labels: the deltas of many adapters, many at a time, written to a folder, by one process or several.

An adapter's delta depends on the others of its pass by rounding alone, so every pass is as large as it can be. The
adapters are cut into units of one pass each. Every process takes the next unit that none has taken, reads it from disk
while the unit before is computed, and writes what it finished to a part of its own; the first one puts the parts
together in the end.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwen_functional import LoraSpec, PackedTokens, Qwen2Config, Qwen2Weights

from .adapters import find_adapters
from .delta import DifferentiableDeltaCompute
from .distributed import Counters, Ranks, Told, as_told, told
from .label_parts import LabelJob
from .label_table import Failure, Label, LabelWriter, adapter_name, require_same
from .label_units import Unit, UnitReader, share_a_pass
from .lock import folder_lock

__all__ = [
    "LabelReport",
    "compute_labels",
    "label_settings",
    "model_fingerprint",
    "share_a_pass",
    "spec_facts",
    "spec_of",
]

PER_PASS_CPU, PER_PASS_GPU = 8, 32
_DIGESTS_AT_ONCE = 8
# Counts that all ranks share: units handed out, and adapters by what became of them.
_UNITS, _COMPUTED, _REUSED, _FAILED = "units", "computed", "reused", "failed"


@dataclass(frozen=True)
class LabelReport:
    """What :func:`compute_labels` did, in all processes together.

    Attributes:
        computed: names of the adapters whose delta was computed.
        reused: names of those that had one, of the very same content, in the folder.
        failed: those without a label, and why.
        labels: how many the folder holds now, those of earlier runs included.
        seconds: from reading the first adapter to the table on disk.
    """

    computed: tuple[str, ...]
    reused: tuple[str, ...]
    failed: tuple[Failure, ...]
    labels: int
    seconds: float


def compute_labels(
    delta: DifferentiableDeltaCompute,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    model: str = "",
    fingerprint: str | None = None,
    probes: Sequence[str] | None = None,
    chat: bool | None = None,
    max_length: int | None = None,
    adapters_per_pass: int | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> LabelReport:
    """Compute the deltas of adapters, each under its own spec, and add them to the label folder ``out``.

    An adapter whose content has a label in the folder is not computed again; one that has changed since is. Labels
    of adapters that are not named stay. An adapter that cannot be read, does not fit the model, or has a delta that
    is not finite is a failure in the report and the manifest; the others go on. ``label_table`` describes the files,
    :class:`lora_delta.label_table.DeltaLabels` reads them.

    Where torch.distributed's default group is there, all of its ranks make this call, with the same arguments and one
    folder that all of them see, and share the work. What is finished is on disk after every pass. A call that was
    killed, whatever the moment and however many ranks it had, goes on when it is made again, with the threads that it
    began with, and ends in the bytes that an uninterrupted one on that machine writes. One that ends in an exception,
    Ctrl-C included, has brought the table up to date; an exception in one rank ends all of them after what they have
    begun.

    Args:
        delta: base model, probes, layer and pooling; its own spec plays no part.
        adapters: folders, folders of folders, globs, ``.txt`` lists, hub ids: see
            :func:`lora_delta.adapters.find_adapters`. Those of rank 0 count.
        model, probes, chat, max_length: of what ``delta`` was made, for the manifest. What labels depend on is found
            out from ``delta`` itself: the content of its config and weights, its token ids, layer, pooling, dtype.
        fingerprint: :func:`model_fingerprint` of the model, where it is known already.
        adapters_per_pass: by default that of ``delta``, else 8 on a CPU and 32 on a GPU.
        local_files_only: take hub ids from the local cache only.
        progress: show a progress bar on stderr, on rank 0.

    Returns:
        The same report in all ranks.

    Raises:
        ValueError: ``delta`` is split over a mesh; no adapters; another job is at work in ``out``; ``out`` holds
            something else, or labels of another model, other probes, layer, pooling or dtype. Nothing is written then.
    """
    if delta.is_split:
        raise ValueError(
            "delta is split over a mesh, expected one that every process computes by itself: processes share the "
            "adapters here; a base model that is too large for a device can be streamed"
        )
    ranks, out = Ranks.current(), Path(out)
    per_pass = _adapters_per_pass(delta, adapters_per_pass)
    shape = delta.base_activation.shape
    settings = label_settings(
        delta, model=model, fingerprint=fingerprint, probes=probes, chat=chat, max_length=max_length
    )
    with ExitStack() as held:  # by rank 0: the lock of the folder

        def begin() -> LabelJob:
            found = [source if isinstance(source, str) else source.resolve() for source in find_adapters(adapters)]
            sources = {adapter_name(source, out): str(source) for source in found}
            held.enter_context(folder_lock(out))
            prepacked = delta.weights.packed is not None
            return LabelJob.begin(out, settings, shape, sources, per_pass, prepacked, torch.get_num_threads())

        job = ranks.first(begin)
        start, counters = time.monotonic(), ranks.counters()
        computed: list[str] = []
        error: BaseException | None = None
        with tqdm(total=len(job.sources), unit=" adapters", disable=not progress or ranks.rank > 0) as bar:
            try:
                require_same(out, job.settings, settings)  # another rank could have been given another model
                before = job.before(settings, shape)
                reader = UnitReader(job, before, delta.config, delta.weights, local_files_only)
                with _rounded_as(job, delta) as rounded, closing(_units(reader, counters)) as units:
                    for unit in units:
                        names = _compute(unit, rounded)
                        if not unit.on_disk:
                            job.write(unit.index, unit.part)
                        computed += names
                        _show(bar, job, counters, len(names), unit.reused, len(unit.part.failures))
            except BaseException as raised:
                error = raised
                with suppress(Exception):
                    counters.add(_UNITS, len(job.units))  # the others take no more
            ends = _ends(ranks, error, computed)
            with suppress(Exception):
                _show(bar, job, counters)
        broken = {rank: words for rank, (words, _) in enumerate(ends) if words is not None}
        by_all = {name for _, names in ends for name in names}
        report = ranks.first(lambda: _merged(job, job.before(settings, shape), by_all, not broken, start))
    if error is not None:
        raise error
    for rank, words in broken.items():
        raise as_told(rank, words)
    return report


def _units(reader: UnitReader, counters: Counters) -> Generator[Unit, None, None]:
    """The units that come to this rank; the next one is read ahead."""

    def take() -> Unit | None:
        index = counters.add(_UNITS) - 1
        return reader.read(index) if index < len(reader.job.units) else None

    with ThreadPoolExecutor(1) as pool:
        try:
            ahead = pool.submit(take)
            while (unit := ahead.result()) is not None:
                ahead = pool.submit(take)
                yield unit
        finally:
            reader.stop()


def _compute(unit: Unit, delta: DifferentiableDeltaCompute) -> list[str]:
    """Add to a unit's part the deltas that its adapters wait for; the names of those that have one now."""
    if unit.lora is None:
        return []
    names = []
    for one, row in zip(unit.loaded, delta.deltas(unit.lora).float().cpu(), strict=True):
        if row.isfinite().all():
            norm = float(torch.linalg.vector_norm(row.double()))
            label = Label(one.name, one.source, one.sha256, norm, spec_facts(one.spec), _version())
            unit.part.labels.append((label, row))
            names.append(one.name)
        else:
            unit.part.failures.append((Failure(one.name, one.source, "its delta is not finite"), one.sha256))
    return names


@contextmanager
def _rounded_as(job: LabelJob, delta: DifferentiableDeltaCompute) -> Iterator[DifferentiableDeltaCompute]:
    """The delta with its weights packed or not, and as many threads, as when the job began: the last bits depend on it.

    Free memory has decided the one, who started the process the other: torchrun gives each of several one thread.
    """
    threads = torch.get_num_threads()
    packed = job.prepacked and (delta.weights.packed is not None or delta.weights.can_prepack)
    if (packed, job.threads) != (delta.weights.packed is not None, threads):
        delta = copy.copy(delta)
        delta._bases = OrderedDict()
        weights = delta.weights if packed else replace(delta.weights, packed=None)
        delta.weights = weights.prepack() if packed and weights.packed is None else weights
    torch.set_num_threads(job.threads)
    try:
        yield delta
    finally:
        torch.set_num_threads(threads)


def _show(bar: tqdm, job: LabelJob, counters: Counters, computed: int = 0, reused: int = 0, failed: int = 0) -> None:
    """Count some adapters, and show what all ranks have counted."""
    computed, reused, failed = (
        counters.add(name, n) for name, n in ((_COMPUTED, computed), (_REUSED, reused), (_FAILED, failed))
    )
    bar.total = len(job.sources) - reused  # they would spoil the rate
    if failed:
        bar.set_postfix(failed=failed, refresh=False)
    bar.update(computed + failed - bar.n)


def _ends(ranks: Ranks, error: BaseException | None, computed: list[str]) -> list[tuple[Told | None, list[str]]]:
    """Of all ranks, once all are done: the exception that ended one, and names of what it computed."""
    try:
        return ranks.gather((told(error) if error else None, computed))
    except Exception as lost:  # a rank is gone
        raise error or lost from None


def _merged(job: LabelJob, writer: LabelWriter, computed: set[str], whole: bool, start: float) -> LabelReport:
    """Bring the table up to date from the parts, and remove these once the job is whole.

    Args:
        writer: of the labels that the folder held when the job began.
        computed: names of what was computed since ``start``.
    """
    if not whole and job.has_parts():
        job.keep_before(writer)
    parts = job.merge(writer)
    missing = [unit for unit in range(len(job.units)) if unit not in parts]
    if whole and missing:
        raise ValueError(
            f"{job.folder} lacks the parts of {len(missing)} units that were finished, expected all of them there: "
            "the ranks of a job share one folder"
        )
    writer.save()
    if whole or not parts:
        job.discard()
    names = [label.name for part in parts.values() for label, _ in part.labels]
    return LabelReport(
        tuple(name for name in names if name in computed),
        tuple(name for name in names if name not in computed),
        tuple(failure for part in parts.values() for failure, _ in part.failures),
        len(writer.labels),
        time.monotonic() - start,
    )


def label_settings(
    delta: DifferentiableDeltaCompute,
    *,
    model: str = "",
    fingerprint: str | None = None,
    probes: Sequence[str] | None = None,
    chat: bool | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """What deltas depend on besides the adapter, ready for JSON; arguments as of :func:`compute_labels`."""
    ids, dtype = _sequences(delta.tokens), _dtype_name(delta.weights.dtype)
    if delta.weights.multiplied_in not in (None, delta.weights.dtype):
        dtype += f", multiplied in {_dtype_name(delta.weights.compute_dtype)}"
    return {
        "model": model,
        "model_sha256": fingerprint or model_fingerprint(delta.config, delta.weights),
        "dtype": dtype,
        "layer": delta.layer if isinstance(delta.layer, int) else list(delta.layer),
        "pooling": delta.pooling,
        "chat": chat,
        "max_length": max_length,
        "probes_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "probes": ids if probes is None else list(probes),
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def model_fingerprint(config: Qwen2Config, weights: Qwen2Weights) -> str:
    """sha256, as hex, of a config and of all weights that a delta depends on, as they are in memory.

    The whole content is read, at one to two gigabytes per second and core: no sample could miss less than everything.
    It is the same for one file or shards, on a CPU or a GPU, and another in another dtype. The lm_head is left out.
    """
    whole = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    pending: deque[tuple[str, Future[str]]] = deque()

    def finish() -> None:
        head, digest = pending.popleft()
        whole.update(f"{head} {digest.result()}\n".encode())

    with ThreadPoolExecutor() as pool:
        for name, part in weights.named_tensors(config):
            if name != "lm_head.weight":
                tensor = part if weights.parallel is None else weights.parallel.gather(name, part)
                head = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
                pending.append((head, pool.submit(_digest, tensor)))
            while len(pending) > _DIGESTS_AT_ONCE:  # streamed weights are not to be in memory all together
                finish()
        while pending:
            finish()
    return whole.hexdigest()


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()


def _sequences(tokens: PackedTokens) -> list[list[int]]:
    """Token ids of the sequences that were packed."""
    ids, sequences = tokens.input_ids.tolist(), []
    for node in tokens.last:
        sequence: list[int] = []
        while node >= 0:
            sequence.append(ids[node])
            node = tokens.parents[node]
        sequences.append(sequence[::-1])
    return sequences


def _adapters_per_pass(delta: DifferentiableDeltaCompute, wanted: int | None) -> int:
    default = PER_PASS_CPU if delta.weights.device.type == "cpu" else PER_PASS_GPU
    n = wanted if wanted is not None else delta.adapters_per_pass or default
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"adapters_per_pass is {n!r}, expected 1 or more, or None")
    return n


def spec_facts(spec: LoraSpec) -> dict[str, Any]:
    """The fields of a spec as JSON holds them, in a manifest for one; :func:`spec_of` reads them."""
    return json.loads(json.dumps({f.name: getattr(spec, f.name) for f in fields(spec)}, default=_plain))


def spec_of(facts: Mapping[str, Any]) -> LoraSpec:
    """The spec of which :func:`spec_facts` gave the fields."""
    return LoraSpec(**{**facts, "target_modules": tuple(facts["target_modules"])})


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else list(value)


def _version() -> str:
    try:
        return metadata.version("qwen-functional")
    except metadata.PackageNotFoundError:
        return "unknown"
