"""From a checkpoint to ``(config, weights)``: every check first, then each tensor is copied to its place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .config import Qwen2Config, read_config
from .dtypes import default_compute_dtype
from .files import read_json_object
from .hub import resolve_checkpoint
from .parallel import TensorParallel
from .safetensors_format import DISK_DTYPES, SafetensorsFile, StoredTensor
from .streaming import StreamedBlocks, StreamedRows, blocks_from_host, moved
from .weights import BlockWeights, Qwen2Weights, block_views, empty_block, empty_weights

STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PIECE_BYTES = 1 << 20  # read at once: still in the cache when they are converted and checked
_MOST_INDEX = 1 << 24  # bytes
_SHARD = re.compile(r"[^/\\\x00-\x1f]{1,200}\.safetensors")


class _Entry(NamedTuple):
    """Where a tensor is, according to the header of its file."""

    file: SafetensorsFile
    name: str
    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape


def load_pretrained(
    model: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    lm_head: bool = True,
    mesh: DeviceMesh | None = None,
    stream: bool | str = False,
) -> tuple[Qwen2Config, Qwen2Weights]:
    """Read a Qwen2 or Qwen3 checkpoint: ``config.json`` and ``model.safetensors``, or shards with an index.

    Names, shapes and dtypes of all tensors are checked before the weights are allocated; then each tensor is
    copied, and converted on the way, to its place in the engine's layout. Peak memory is the loaded weights
    and a few megabytes. Where the config ties ``lm_head.weight`` to the embedding, the file may hold a copy
    of it. Names may lack the leading ``model.``, as in a headless ``Qwen2Model``.

    Args:
        model: a hub id, or a folder; an existing folder wins.
        dtype: float32, float64, bfloat16 or float16. None: that of the config (``dtype``, formerly
            ``torch_dtype``), else that of ``embed_tokens`` on disk.
        device: where the weights are put.
        revision: branch, tag or commit on the hub; not used for a folder.
        local_files_only: take a hub id from the local cache only.
        lm_head: whether to read a separate ``lm_head.weight``, which only logits and losses on tokens need.
        mesh: the processes that share the model: its dimension named ``"tp"``, or its only one. Each process
            reads its own part of the blocks' matrices, and everything else whole.
        stream: keep the weights on ``"disk"`` (True) or in the ``"host"``'s memory, and move one block after
            another to the device, the next while the current one computes. Of the embedding, only the rows in use
            are read. Blocks on disk are checked to be finite when they are first read.

    Raises:
        ValueError: the checkpoint cannot be found, is incomplete, corrupt or not a dense Qwen2 or Qwen3; a tensor is
            missing, unexpected, of another shape, not of a floating-point dtype, or not finite (on disk or once
            in ``dtype``); a tied ``lm_head.weight`` differs from the embedding; ``dtype`` or ``device`` is
            not supported; the model cannot be split over this many ranks.
    """
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected None or one of {STORAGE_DTYPES}")
    if stream not in (False, True, "disk", "host"):
        raise ValueError(f"stream is {stream!r}, expected False, True, 'disk' or 'host'")
    device = _usable_device(device)
    where: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    # The config alone first: a model of another type is refused before gigabytes are fetched.
    read_config(resolve_checkpoint(model, **where, patterns=("config.json",)))
    folder = resolve_checkpoint(model, **where)
    config = read_config(folder)

    entries = _matched_entries(folder, config, lm_head)
    if dtype is None:
        dtype = _dtype_on_disk(folder, entries["model.embed_tokens.weight"])
    # Weights made under a caller's inference mode could never be used with autograd.
    with torch.inference_mode(False), torch.no_grad():
        parallel = None if mesh is None else TensorParallel.of(mesh, config)
        if config.tie_word_embeddings and "lm_head.weight" in entries:
            _check_tied(entries["lm_head.weight"], entries["model.embed_tokens.weight"], dtype)
        if stream in (True, "disk"):
            return config, _streamed(config, entries, dtype, device, lm_head, parallel)
        place = torch.device("cpu") if stream == "host" else device
        weights = empty_weights(config, dtype, place, lm_head=lm_head, parallel=parallel)
        for name, view in weights.named_views(config).items():
            _copy(entries[name], view, parallel)
    return config, _from_host(weights, device) if stream == "host" else weights


def _streamed(
    config: Qwen2Config,
    entries: Mapping[str, _Entry],
    dtype: torch.dtype,
    device: torch.device,
    lm_head: bool,
    parallel: TensorParallel | None,
) -> Qwen2Weights:
    """Weights that stay on disk, except for the final norm."""
    local = config if parallel is None else parallel.local_config(config)
    checked: set[int] = set()

    def read(layer: int) -> BlockWeights:
        block = empty_block(local, dtype, "cpu")
        for name, view in block_views(block, local, layer).items():
            _copy(entries[name], view, parallel, check=layer not in checked)
        checked.add(layer)
        return block if device.type == "cpu" else moved(block, device)

    def rows(name: str) -> StreamedRows:
        entry = entries[name]

        def read_rows(part: slice) -> Tensor:
            found = entry.file.read_rows(entry.stored, part).to(dtype)
            if not _all_finite(found):
                where = f"tensor {entry.name} in {entry.file}"
                raise ValueError(f"{where} is not finite in {dtype}, expected finite values only")
            return found

        return StreamedRows(read_rows, (entry.shape[0], entry.shape[1]), dtype, device)

    norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
    _copy(entries["model.norm.weight"], norm)
    embed_tokens = rows("model.embed_tokens.weight")
    head = embed_tokens if config.tie_word_embeddings else rows("lm_head.weight") if lm_head else None
    nbytes = sum(tensor.nbytes for tensor in empty_block(local, dtype, "meta").tensors().values())
    n, compute = config.num_hidden_layers, default_compute_dtype(dtype, device)
    blocks = StreamedBlocks(read, n, n * nbytes, device, compute)
    return Qwen2Weights(embed_tokens, blocks, norm, head, parallel=parallel)


def _from_host(weights: Qwen2Weights, device: torch.device) -> Qwen2Weights:
    """Weights in the host's memory, streamed to the device."""
    assert isinstance(weights.blocks, tuple)
    compute = default_compute_dtype(weights.dtype, device)
    blocks = blocks_from_host(weights.blocks, device, compute)

    def rows(matrix: Tensor) -> StreamedRows:
        return StreamedRows(lambda part: matrix[part], (matrix.shape[0], matrix.shape[1]), matrix.dtype, device)

    embed_tokens, head = weights.embed_tokens, weights.lm_head
    assert isinstance(embed_tokens, Tensor)
    assert not isinstance(head, StreamedRows)
    streamed = rows(embed_tokens)
    lm_head = streamed if head is embed_tokens else None if head is None else rows(head)
    norm = weights.norm.to(device)
    return replace(weights, embed_tokens=streamed, blocks=blocks, norm=norm, lm_head=lm_head)


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        usable = torch.device(device)
        torch.empty(0, device=usable)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device is {device!r}, expected one that torch can use here: {error}") from error
    return usable


def _dtype_on_disk(folder: Path, embed_tokens: _Entry) -> torch.dtype:
    fields = read_json_object(folder / "config.json")
    name = fields.get("dtype") or fields.get("torch_dtype")
    dtype = getattr(torch, str(name).split(".")[-1], name) if name else DISK_DTYPES[embed_tokens.stored.dtype]
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"{folder} is stored in {dtype!s:.100}, expected a dtype argument, one of {STORAGE_DTYPES}")
    return dtype


def _matched_entries(folder: Path, config: Qwen2Config, lm_head: bool) -> dict[str, _Entry]:
    """Every tensor that the config requires, under its full name; also an unneeded ``lm_head.weight`` if present."""
    found = _tensors_of(folder)
    required = empty_weights(config, device="meta", lm_head=lm_head).named_views(config)
    expected = {name: tuple(view.shape) for name, view in required.items()}
    expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])

    entries: dict[str, _Entry] = {}
    for name, entry in found.items():
        full = name if name in expected or f"model.{name}" in found else f"model.{name}"
        where = f"tensor {name} in {entry.file}"
        if full not in expected:
            raise ValueError(f"{where} fits nothing, expected only tensors that a model of this config has")
        if entry.shape != expected[full]:
            raise ValueError(f"{where} has shape {entry.shape}, expected {expected[full]}")
        if entry.stored.dtype not in DISK_DTYPES:
            raise ValueError(f"{where} has dtype {entry.stored.dtype:.20}, expected one of {list(DISK_DTYPES)}")
        entries[full] = entry
    missing = [name for name in required if name not in entries]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        shape = expected[missing[0]]
        raise ValueError(f"tensor {missing[0]}{more} is missing from {folder}, expected it with shape {shape}")
    return entries


def _tensors_of(folder: Path) -> dict[str, _Entry]:
    """All tensors of the folder's single file, or of the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        found = _read_header(single)
    elif index.is_file():
        found = _tensors_of_index(index)
    else:
        raise ValueError(_no_weights(folder))
    # A buffer that older versions of transformers saved; it follows from the config.
    return {name: entry for name, entry in found.items() if not name.endswith("rotary_emb.inv_freq")}


def _tensors_of_index(index: Path) -> dict[str, _Entry]:
    weight_map = read_json_object(index, "an index of shards", _MOST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, expected an object of tensor names and shard names")
    for name, shard in weight_map.items():
        if not name.isprintable():
            raise ValueError(f"{index} names {name!r:.100}, expected names of tensors")
        # The name is checked, not where it leads: a hub snapshot's own files are links to ../../blobs.
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(f"{index} puts {name:.200} into {shard!r:.200}, expected a .safetensors file beside it")
    shards = {shard: index.parent / shard for shard in sorted(set(weight_map.values()))}
    missing = [shard for shard, file in shards.items() if not file.is_file()]
    if missing:
        raise ValueError(f"{index} names {missing[:3]}, which {index.parent} does not have; expected every shard")
    headers = {shard: _read_header(file) for shard, file in shards.items()}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ValueError(f"tensor {name:.200} is missing from {shards[shard]}, expected it there, see {index}")
    found: dict[str, _Entry] = {}
    for shard, header in headers.items():
        for name, entry in header.items():
            if weight_map.get(name) != shard:
                raise ValueError(f"tensor {name} in {entry.file} is unexpected there according to {index}")
            found[name] = entry
    return found


def _read_header(path: Path) -> dict[str, _Entry]:
    file = SafetensorsFile(path)
    return {name: _Entry(file, name, stored) for name, stored in file.tensors.items()}


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())  # a broken link is not a file
    pickles = [name for name in names if name.endswith(PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if pickles and not others:
        return (
            f"{folder} has its weights only in pickles ({', '.join(pickles[:3])}), which are never loaded "
            "because they can run code; expected model.safetensors. If you trust them, convert them: "
            "transformers' AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return (
        f"{folder} has {', '.join(others[:3]) or 'no .safetensors file'}, expected model.safetensors or "
        "model.safetensors.index.json (.bin pickles are neither fetched nor loaded)"
    )


def _copy(entry: _Entry, view: Tensor, parallel: TensorParallel | None = None, *, check: bool = True) -> None:
    """Copy a tensor, or this rank's part of it, to its place."""
    whole = tuple(slice(0, size) for size in entry.shape)
    rows, *columns = whole if parallel is None else parallel.of_weight(entry.name, entry.shape)
    straight = view.is_cpu and view.is_contiguous() and view.dtype == DISK_DTYPES[entry.stored.dtype]
    straight &= view.shape[1:] == entry.shape[1:]
    for piece in _pieces(entry, rows):
        target = view[piece.start - rows.start : piece.stop - rows.start]
        found = entry.file.read_rows(entry.stored, piece, target if straight else None)
        if not straight:
            target.copy_(found[(slice(None), *columns)])
        if check and not _all_finite(target):
            what = f"overflows in {view.dtype}" if _all_finite(found.double()) else "is not finite"
            raise ValueError(f"tensor {entry.name} in {entry.file} {what}, expected finite values only")


def _pieces(entry: _Entry, rows: slice) -> Iterator[slice]:
    row_bytes = DISK_DTYPES[entry.stored.dtype].itemsize * math.prod(entry.shape[1:])
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _check_tied(entry: _Entry, embed_tokens: _Entry, dtype: torch.dtype) -> None:
    for rows in _pieces(entry, slice(0, entry.shape[0])):
        own, tied = (e.file.read_rows(e.stored, rows).to(dtype) for e in (entry, embed_tokens))
        if not torch.equal(own, tied):
            raise ValueError(
                f"tensor {entry.name} in {entry.file} differs from the embedding, expected the same values because "
                "config field tie_word_embeddings is true; set it to false to use the separate lm_head"
            )


def _all_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # both are nan if any entry is; needs no temporary, unlike isfinite
    return bool(torch.isfinite(low) & torch.isfinite(high))
