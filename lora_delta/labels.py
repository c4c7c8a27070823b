"""Delta labels: the deltas of many adapters, many at a time, written to a folder.

Adapters of any rank, scale and modules share a pass: a smaller rank is filled up with zeros, a module that an adapter
lacks is zero, and the scale is multiplied into B. So an adapter's delta depends on the others of its pass by rounding
alone, and every pass is as large as it can be. The next pass is read from disk while the present one computes.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from qwen_functional import Lora, LoraSpec, PackedTokens, Qwen2Config, Qwen2Weights
from qwen_functional.dtypes import accumulation_dtype
from qwen_functional.lora import PROJECTIONS, LoraPair

from .adapter_config import CONFIG_FILE
from .adapters import adapter_fingerprint, find_adapters, load_peft_adapter
from .delta import DifferentiableDeltaCompute
from .label_table import Failure, Label, LabelWriter, adapter_name

PER_PASS_CPU, PER_PASS_GPU = 8, 32
_DIGESTS_AT_ONCE = 8
_OUTCOMES_PER_BATCH = 64  # of adapters that need no computing, so that the bar moves


@dataclass(frozen=True)
class LabelReport:
    """What :func:`compute_labels` did.

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
    save_every: float = 60.0,
    progress: bool = True,
) -> LabelReport:
    """Compute the deltas of adapters, each under its own spec, and add them to the label folder ``out``.

    An adapter whose content has a label in the folder is not computed again; one that has changed since is. Labels
    of adapters that are not named stay. An adapter that cannot be read, does not fit the model, or has a delta that
    is not finite is a failure in the report and the manifest; the others go on. What is finished is on disk every
    ``save_every`` seconds, and when the call ends in any way, Ctrl-C included. ``label_table`` describes the files,
    :class:`lora_delta.label_table.DeltaLabels` reads them.

    Args:
        delta: base model, probes, layer and pooling; its own spec plays no part.
        adapters: folders, folders of folders, globs, ``.txt`` lists, hub ids: see
            :func:`lora_delta.adapters.find_adapters`.
        model, probes, chat, max_length: of what ``delta`` was made, for the manifest. What labels depend on is found
            out from ``delta`` itself: the content of its config and weights, its token ids, layer, pooling, dtype.
        fingerprint: :func:`model_fingerprint` of the model, where it is known already.
        adapters_per_pass: by default that of ``delta``, else 8 on a CPU and 32 on a GPU.
        local_files_only: take hub ids from the local cache only.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: no adapters; ``out`` holds something else, or labels of another model, other probes, layer,
            pooling or dtype. Nothing is written then.
    """
    per_pass = _adapters_per_pass(delta, adapters_per_pass)
    found = [source if isinstance(source, str) else source.resolve() for source in find_adapters(adapters)]
    sources = {adapter_name(source, out): str(source) for source in found}
    settings = label_settings(
        delta, model=model, fingerprint=fingerprint, probes=probes, chat=chat, max_length=max_length
    )
    writer = LabelWriter(out, settings, delta.base_activation.shape)
    start = saved = time.monotonic()
    computed: list[str] = []
    reused: list[str] = []
    failed: list[Failure] = []
    stop = threading.Event()
    reader = _Reader(delta, writer, per_pass, local_files_only, stop.is_set)
    batches = reader.batches(sources)
    with ThreadPoolExecutor(1) as pool, tqdm(total=len(sources), unit=" adapters", disable=not progress) as bar:
        try:
            ahead = pool.submit(next, batches, None)
            while (batch := ahead.result()) is not None:
                ahead = pool.submit(next, batches, None)
                failures = list(batch.failed)
                for label, row in batch.reused:
                    writer.add(label, row)
                    reused.append(label.name)
                if batch.lora is not None:
                    rows = delta.deltas(batch.lora).float().cpu()
                    for one, row in zip(batch.loaded, rows, strict=True):
                        if row.isfinite().all():
                            writer.add(one.label(row), row)
                            computed.append(one.name)
                        else:
                            failures.append((Failure(one.name, one.source, "its delta is not finite"), one.sha256))
                for failure, sha256 in failures:
                    writer.fail(failure, sha256)
                    failed.append(failure)
                bar.total -= len(batch.reused)  # they would spoil the rate
                if failed:
                    bar.set_postfix(failed=len(failed), refresh=False)
                bar.update(len(batch.loaded) + len(batch.failed))
                if time.monotonic() - saved > save_every:
                    writer.save()
                    saved = time.monotonic()
        finally:
            stop.set()
            writer.save()
    seconds = time.monotonic() - start
    return LabelReport(tuple(computed), tuple(reused), tuple(failed), len(writer.labels), seconds)


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


@dataclass(frozen=True)
class _Loaded:
    """An adapter that waits for its delta."""

    name: str
    source: str
    sha256: str
    spec: LoraSpec

    def label(self, delta: Tensor) -> Label:
        norm = float(torch.linalg.vector_norm(delta.double()))
        return Label(self.name, self.source, self.sha256, norm, spec_facts(self.spec), _version())


@dataclass
class _Batch:
    """What the reader hands on. ``lora`` holds all of ``loaded``, once there are enough for a pass."""

    reused: list[tuple[Label, Tensor]] = field(default_factory=list)
    failed: list[tuple[Failure, str | None]] = field(default_factory=list)
    loaded: list[_Loaded] = field(default_factory=list)
    loras: list[Lora] = field(default_factory=list)  # of each
    lora: Lora | None = None


class _Reader:
    """Reads adapters and makes passes of them, in a thread of its own."""

    def __init__(
        self,
        delta: DifferentiableDeltaCompute,
        writer: LabelWriter,
        per_pass: int,
        local_files_only: bool,
        stopped: Callable[[], bool],
    ) -> None:
        self.config, self.weights = delta.config, delta.weights
        self.known, self.out = writer.by_content, writer.folder
        self.per_pass, self.local_files_only, self.stopped = per_pass, local_files_only, stopped

    def batches(self, sources: dict[str, str]) -> Iterator[_Batch]:
        """All adapters of {name: source}, alike ones next to each other: little is filled up with zeros."""
        batch = _Batch()
        for name in sorted(sources, key=lambda name: (*_kind(sources[name]), name)):
            if self.stopped():
                return
            self._read(name, sources[name], batch)
            if len(batch.loaded) == self.per_pass:
                yield self._with_lora(batch)
                batch = _Batch()
            elif len(batch.reused) + len(batch.failed) >= _OUTCOMES_PER_BATCH:
                yield _Batch(batch.reused, batch.failed)
                batch = _Batch(loaded=batch.loaded, loras=batch.loras)
        yield self._with_lora(batch)

    def _read(self, name: str, source: str, batch: _Batch) -> None:
        sha256 = None
        try:
            sha256 = adapter_fingerprint(source, local_files_only=self.local_files_only)
            if sha256 in self.known:
                label, row = self.known[sha256]
                batch.reused.append((Label(name, source, sha256, label.norm, label.spec, label.version), row))
                return
            spec, tensors = load_peft_adapter(source, local_files_only=self.local_files_only, config=self.config)
            batch.loras.append(spec.bind(self.config, tensors))
            batch.loaded.append(_Loaded(name, source, sha256, spec))
        except (ValueError, OSError, SafetensorError) as error:
            batch.failed.append((Failure(name, source, " ".join(str(error).split())), sha256))

    def _with_lora(self, batch: _Batch) -> _Batch:
        if batch.loaded:
            batch.lora = share_a_pass(batch.loras, self.weights.compute_dtype, self.weights.device)
            batch.loras = []
        return batch


def _kind(source: str) -> tuple[int, str]:
    """Sorts adapters by what their config declares, without reading their tensors. A guess: any may share a pass."""
    try:
        config = json.loads((Path(source) / CONFIG_FILE).read_text(encoding="utf-8"))
        places = [config.get(key) for key in ("target_modules", "rank_pattern", "layers_to_transform")]
        places[0] = sorted(places[0]) if isinstance(places[0], list) else places[0]
        return int(config["r"]), json.dumps(places)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0, ""  # on the hub, or not to be read


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
