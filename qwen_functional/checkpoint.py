"""A hub id or a folder to ``(config, weights)``: every check first, then each tensor to its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .config import Qwen2Config
from .dtypes import default_compute_dtype
from .files import read_json_object
from .parallel import TensorParallel
from .streaming import StreamedBlocks, StreamedRows, blocks_from_host, moved
from .weights import BlockWeights, Qwen2Weights, block_views, empty_block, empty_weights

STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DISK_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# The only files that are fetched from the hub: data, never code or pickles. Newer checkpoints keep the chat
# template in a file of its own instead of tokenizer_config.json.
FETCHED = ("*.json", "*.safetensors", "chat_template.jinja")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Pages of a memory-mapped file count as this process's memory until it is unmapped, so a file is read in
# pieces of this size and mapped anew for each, which takes a third of a millisecond.
PIECE_BYTES = 8 << 20


class _Entry(NamedTuple):
    """Where a tensor lies, as the header of its file says."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


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
    """Read a Qwen2 checkpoint: ``config.json`` and ``model.safetensors``, or shards with an index.

    Names, shapes and dtypes of all tensors are checked before the weights are allocated; then each tensor is
    copied, and converted on the way, to its place in the engine's layout. Peak memory is the loaded weights
    and a few megabytes. Where the config ties ``lm_head.weight`` to the embedding, the file may hold a copy
    of it. Names may lack the leading ``model.``, as in a headless ``Qwen2Model``.

    Args:
        model: a hub id, or a folder; an existing folder wins.
        dtype: float32, float64, bfloat16 or float16. None: as the config says (``dtype``, formerly
            ``torch_dtype``), else as ``embed_tokens`` is on disk.
        device: where the weights are put.
        revision: branch, tag or commit on the hub; not used for a folder.
        local_files_only: take a hub id from the local cache only.
        lm_head: whether to read a separate ``lm_head.weight``, which only the logits of ``forward`` need.
        mesh: of the processes that hold the model together: its dimension named ``"tp"``, or its only one. Each
            reads its own part of the blocks' matrices, and everything else.
        stream: keep the weights on ``"disk"`` (True) or in the ``"host"``'s memory, and bring one block after the
            other to the device, the next while the present one computes. Of the embedding only the rows in use are
            read. Blocks on disk are checked to be finite when they are first read.

    Raises:
        ValueError: the checkpoint cannot be found, is incomplete, corrupt or not a dense Qwen2; a tensor is
            missing, unexpected, of another shape, of no floating-point dtype, or not finite (on disk or once
            in ``dtype``); a tied ``lm_head.weight`` differs from the embedding; ``dtype`` or ``device`` is
            not supported; the model cannot be split over so many ranks.
    """
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected None or one of {STORAGE_DTYPES}")
    if stream not in (False, True, "disk", "host"):
        raise ValueError(f"stream is {stream!r}, expected False, True, 'disk' or 'host'")
    device = _usable_device(device)
    where: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    # The config alone first: a model of another type is refused before gigabytes are fetched.
    Qwen2Config.from_json_file(resolve_checkpoint(model, **where, patterns=("config.json",)) / "config.json")
    folder = resolve_checkpoint(model, **where)
    config = Qwen2Config.from_json_file(folder / "config.json")

    entries = _matched_entries(folder, config)
    if dtype is None:
        dtype = _dtype_on_disk(folder, entries["model.embed_tokens.weight"])
    # Under a caller's inference mode the weights would be unusable for autograd for ever after.
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
    """Weights that stay on disk but for the final norm."""
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
            found = torch.cat([piece for _, piece in _pieces(entry, (part, slice(0, entry.shape[1])))]).to(dtype)
            if not _all_finite(found):
                where = f"tensor {entry.name} in {entry.file}"
                raise ValueError(f"{where} is not finite in {dtype}, expected finite values only")
            return found

        return StreamedRows(read_rows, (entry.shape[0], entry.shape[1]), dtype, device)

    norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
    _copy(entries["model.norm.weight"], norm)
    embed_tokens = rows("model.embed_tokens.weight")
    head = embed_tokens if config.tie_word_embeddings else rows("lm_head.weight") if lm_head else None
    nbytes = sum(getattr(empty_block(local, dtype, "meta"), f.name).nbytes for f in fields(BlockWeights))
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


def resolve_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    patterns: Sequence[str] = FETCHED,
) -> Path:
    """The local folder of a checkpoint: ``model`` itself, or the hub's snapshot, fetched where need be.

    Only top-level files that fit ``patterns`` are fetched; by default json, safetensors, the chat template.

    Raises:
        ValueError: a path does not exist or is no folder; a hub id is not found, or not cached while offline.
    """
    text = str(model)
    try:
        folder = Path(model).expanduser()
    except RuntimeError:  # ~user for a user who does not exist
        folder = Path(model)
    if text and folder.is_dir():
        return folder
    if not text or folder.exists():
        raise ValueError(f"model is {text!r}, which is no folder; expected a checkpoint's folder or a hub id")
    if isinstance(model, Path) or text[0] in "./~" or text.count("/") > 1 or "\\" in text:
        raise ValueError(f"model is {text!r}, a folder that does not exist; expected a folder or a hub id")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                text,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the hub client's errors differ between its versions and transports
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"model {text!r} at revision {revision or 'main'!r} is not to be had from the hub or its local "
            f"cache, and no folder of that name exists: {reason}"
        ) from error


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
    dtype = getattr(torch, str(name).split(".")[-1], name) if name else DISK_DTYPES[embed_tokens.dtype]
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"{folder} is stored in {dtype}, expected a dtype argument, one of {STORAGE_DTYPES}")
    return dtype


def _matched_entries(folder: Path, config: Qwen2Config) -> dict[str, _Entry]:
    """Every tensor that the config asks for, under its full name; a tied ``lm_head.weight`` if present."""
    found = _tensors_of(folder)
    required = empty_weights(config, device="meta").named_views(config)
    expected = {name: tuple(view.shape) for name, view in required.items()}
    expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])

    entries: dict[str, _Entry] = {}
    for name, entry in found.items():
        full = name if name in expected or f"model.{name}" in found else f"model.{name}"
        where = f"tensor {name} in {entry.file}"
        if full not in expected:
            raise ValueError(f"{where} fits nothing, expected only tensors that a Qwen2 of this config has")
        if entry.shape != expected[full]:
            raise ValueError(f"{where} has shape {entry.shape}, expected {expected[full]}")
        if entry.dtype not in DISK_DTYPES:
            raise ValueError(f"{where} has dtype {entry.dtype}, expected one of {list(DISK_DTYPES)}")
        entries[full] = entry
    missing = [name for name in required if name not in entries]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        shape = expected[missing[0]]
        raise ValueError(f"tensor {missing[0]}{more} is missing in {folder}, expected it with shape {shape}")
    return entries


def _tensors_of(folder: Path) -> dict[str, _Entry]:
    """All tensors of the folder's one file, or of the shards that its index names."""
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
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, expected an object of tensor names and shard names")
    for name, shard in weight_map.items():
        # The name decides, not where it leads: a hub snapshot's own files are links to ../../blobs.
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} puts {name} into {shard!r}, expected a .safetensors file beside it")
    shards = {shard: index.parent / shard for shard in sorted(set(weight_map.values()))}
    missing = [shard for shard, file in shards.items() if not file.is_file()]
    if missing:
        raise ValueError(f"{index} names {missing}, which {index.parent} does not have; expected every shard")
    headers = {shard: _read_header(file) for shard, file in shards.items()}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ValueError(f"tensor {name} is missing in {shards[shard]}, expected it there by {index}")
    found: dict[str, _Entry] = {}
    for shard, header in headers.items():
        for name, entry in header.items():
            if weight_map.get(name) != shard:
                raise ValueError(f"tensor {name} in {entry.file} is unexpected there, says {index}")
            found[name] = entry
    return found


def _read_header(file: Path) -> dict[str, _Entry]:
    try:
        with safe_open(file, "pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
            return {k: _Entry(file, k, s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}, of {file.stat().st_size} bytes, is truncated or corrupt, expected a safetensors file: "
            f"{error}"
        ) from error


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())  # a broken link is no file
    pickles = [name for name in names if name.endswith(PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if pickles and not others:
        return (
            f"{folder} has its weights only in pickles ({', '.join(pickles[:3])}), which are never loaded "
            "because they can run code; expected model.safetensors. If you trust them, convert them: "
            "transformers' Qwen2ForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return (
        f"{folder} has {', '.join(others[:3]) or 'no .safetensors file'}, expected model.safetensors or "
        "model.safetensors.index.json (.bin pickles are neither fetched nor loaded)"
    )


def _pieces(entry: _Entry, part: tuple[slice, ...] | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a tensor or of a part of it, piece by piece; the file is mapped no longer than a piece is in use."""
    rows, *columns = part or tuple(slice(0, size) for size in entry.shape)
    row_bytes = DISK_DTYPES[entry.dtype].itemsize * torch.Size(entry.shape[1:]).numel()
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        with safe_open(entry.file, "pt") as handle:
            piece = handle.get_slice(entry.name)[(slice(start, stop), *columns)]
            yield slice(start - rows.start, stop - rows.start), piece


def _copy(entry: _Entry, view: Tensor, parallel: TensorParallel | None = None, *, check: bool = True) -> None:
    part = None if parallel is None else parallel.of_weight(entry.name, entry.shape)
    for rows, piece in _pieces(entry, part):
        target = view[rows]
        target.copy_(piece)
        if check and not _all_finite(target):
            what = f"overflows in {view.dtype}" if _all_finite(piece.double()) else "is not finite"
            raise ValueError(f"tensor {entry.name} in {entry.file} {what}, expected finite values only")


def _check_tied(entry: _Entry, embed_tokens: _Entry, dtype: torch.dtype) -> None:
    for rows, piece in _pieces(entry):
        for own, tied in _pieces(embed_tokens, (rows, slice(0, entry.shape[1]))):
            if not torch.equal(piece[own].to(dtype), tied.to(dtype)):
                raise ValueError(
                    f"tensor {entry.name} in {entry.file} differs from the embedding, expected the same values "
                    "as config field tie_word_embeddings is true; set it to false to use the separate lm_head"
                )


def _all_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # both are nan where any is; no temporary as isfinite has
    return bool(torch.isfinite(low) & torch.isfinite(high))
