"""PEFT adapters, in and out: ``adapter_config.json`` and ``adapter_model.safetensors`` to a spec and its tensors."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from qwen_functional import LoraSpec, Qwen2Config
from qwen_functional.checkpoint import DISK_DTYPES, STORAGE_DTYPES, resolve_checkpoint
from qwen_functional.lora import PROJECTIONS, check_finite, is_symbolic, parse_name, peft_name

from .adapter_config import CONFIG_FILE, AdapterConfig, Module, adapter_fields, with_fitting_patterns

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
# The base model's sizes that are rows of B and columns of A.
_SIZES = {
    "q_proj": ("q_size", "hidden_size"),
    "k_proj": ("kv_size", "hidden_size"),
    "v_proj": ("kv_size", "hidden_size"),
    "o_proj": ("hidden_size", "q_size"),
    "gate_proj": ("intermediate_size", "hidden_size"),
    "up_proj": ("intermediate_size", "hidden_size"),
    "down_proj": ("hidden_size", "intermediate_size"),
}
_MOST_LAYERS = 1000  # where the base model is not known: an untrusted file shall not make us count to a billion
_Place = tuple[int, str, str]  # (layer, projection, side) of a tensor
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def load_peft_adapter(
    source: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    config: Qwen2Config | None = None,
) -> tuple[LoraSpec, dict[str, Tensor]]:
    """Read a LoRA as PEFT's ``save_pretrained`` writes it. Pickles are neither fetched nor loaded.

    Everything is checked before a tensor is read: the fields, the names, shapes and dtypes, and that the fields
    declare exactly the modules that have tensors. The spec gives each of them exactly PEFT's rank and scale. Where
    a regular expression adapts a projection in some layers only, the spec covers more modules than the tensors,
    which ``LoraSpec.bind`` permits.

    Args:
        source: an adapter's folder or its hub id; an existing folder wins.
        revision: branch, tag or commit on the hub; not used for a folder.
        local_files_only: take a hub id from the local cache only.
        config: of the base model. With it sizes and layers are checked too, and ``layers_to_transform`` of the
            spec is None whenever all layers are adapted.

    Returns:
        The spec, and {PEFT name: (r, in) or (out, r)} in the order of ``spec.shapes``, in memory of their own, on
        the CPU, in the dtype on disk.

    Raises:
        ValueError: a file is missing, truncated or corrupt, or there is only a pickle; a field is not one that
            LoraSpec can represent (DoRA, biases, ``modules_to_save``, another base model and so on), which the
            message names; fields and tensors disagree; a tensor is no LoRA tensor of a projection, lacks its other
            half, has another shape or dtype, or is not finite.
    """
    where: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    declared = AdapterConfig.from_json_file(_adapter_file(source, CONFIG_FILE, **where))
    file = _adapter_file(source, WEIGHTS_FILE, **where)
    try:
        with safe_open(file, "pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
            places = _places(slices, str(file), config)
            try:
                spec = declared.spec(_modules(places), None if config is None else config.num_hidden_layers)
            except ValueError as error:
                raise ValueError(f"{file.with_name(CONFIG_FILE)}: {error}") from None
            header = {place: slices[name] for place, name in places.items()}
            dtypes = {place: DISK_DTYPES.get(s.get_dtype(), s.get_dtype()) for place, s in header.items()}
            _check_entries(spec, dtypes, {place: tuple(s.get_shape()) for place, s in header.items()}, config)
            # Copies, since what is read is mapped: the file may change later.
            tensors = {peft_name(*place): handle.get_tensor(name).clone() for place, name in places.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}, of {file.stat().st_size} bytes, is truncated or corrupt, expected a safetensors file: {error}"
        ) from error
    check_finite(tensors)
    return spec, tensors


def save_peft_adapter(
    folder: str | Path,
    spec: LoraSpec,
    tensors: Mapping[str, Tensor],
    base_model: str | Path = "Qwen/Qwen2.5-1.5B",
    *,
    config: Qwen2Config | None = None,
) -> None:
    """Write one adapter as a folder that PEFT's ``PeftModel.from_pretrained`` loads.

    PEFT will adapt exactly the modules that have tensors, whatever else the spec covers. Files are written under
    temporary names and renamed, the config last: a folder with a config is whole.

    Args:
        folder: made if need be; an adapter that is there is replaced.
        tensors: {name: (r, in) or (out, r)}, in the names that ``LoraSpec.bind`` reads; written in their dtype.
        base_model: the base's hub id or folder, for ``base_model_name_or_path``.
        config: of the base model. With it sizes are checked too, and an adapter of all layers is written as one
            (``layers_to_transform`` null); without it the layers are listed.

    Raises:
        ValueError: no tensors; a name that the spec does not cover, an A without its B, another shape, a leading
            G, a dtype that is not floating point of 16 to 64 bits, a tensor that is not finite; ``folder`` is a
            file.
        OSError: the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder is {str(folder)!r}, which is a file; expected a folder, or a name for a new one")
    if not isinstance(base_model, (str, Path)) or not str(base_model):
        raise ValueError(f"base_model is {base_model!r}, expected a hub id or a folder")
    if not isinstance(tensors, Mapping):
        raise ValueError(f"tensors is a {type(tensors).__name__}, expected a dict of LoRA tensors")
    places = _places(tensors, "tensors", config)
    modules = _modules(places)
    _check_covered(spec, modules)
    spec = with_fitting_patterns(spec, modules)
    ordered = {place: tensors[name] for place, name in places.items()}
    for place, tensor in ordered.items():
        if not isinstance(tensor, Tensor) or is_symbolic(tensor):
            raise ValueError(f"{_named(place)} is a {type(tensor).__name__} without values, expected a torch.Tensor")
        if tensor.dim() == 3:
            raise ValueError(
                f"{_named(place)} has shape {tuple(tensor.shape)}, expected one adapter without a leading G: save "
                "them one by one, as {name: tensor[g]}"
            )
    dtypes = {place: tensor.dtype for place, tensor in ordered.items()}
    _check_entries(spec, dtypes, {place: tuple(tensor.shape) for place, tensor in ordered.items()}, config)
    # Copies, as safetensors takes neither views of one memory nor other strides.
    copies = {
        peft_name(*place): tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for place, tensor in ordered.items()
    }
    check_finite(copies)

    fields = adapter_fields(spec, modules, str(base_model), None if config is None else config.num_hidden_layers)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        new_config, new_weights = Path(scratch) / CONFIG_FILE, Path(scratch) / WEIGHTS_FILE
        # Not save_file, which leaves a file that its owner alone may read.
        new_weights.write_bytes(serialized(copies, metadata={"format": "pt"}))
        new_config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (folder / CONFIG_FILE).unlink(missing_ok=True)  # never an old config beside new weights
        new_weights.replace(folder / WEIGHTS_FILE)
        new_config.replace(folder / CONFIG_FILE)


def adapter_fingerprint(source: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> str:
    """SHA-256 of the bytes of an adapter's two files, in hexadecimal: equal for copies, other for any change.

    Raises:
        ValueError: the folder or hub id, or one of its files, is not found.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        file = _adapter_file(source, name, revision=revision, local_files_only=local_files_only)
        content = file.read_bytes()
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()


def find_adapters(paths: str | Path | Iterable[str | Path]) -> list[str | Path]:
    """Sources for :func:`load_peft_adapter`, in the order given and without duplicates.

    Each of ``paths`` is one of these:

    * an adapter's folder, which holds ``adapter_config.json``;
    * a folder of such folders, taken in the order of their names;
    * a glob pattern (``*``, ``?``, ``[...]``, ``**``), of which folders of either kind are taken, sorted;
    * a ``.txt`` file with one of the above or a hub id per line, and comments from ``#`` on. Relative paths are
      relative to the file;
    * a hub id, ``owner/name``, where no such folder exists.

    Returns:
        A Path for a folder, a str for a hub id.

    Raises:
        ValueError: a path does not exist or leads to no adapter, or there is none at all.
    """
    found: dict[str, str | Path] = {}
    for entry in [paths] if isinstance(paths, (str, Path)) else paths:
        for source in _expanded(entry):
            found.setdefault(str(source.resolve()) if isinstance(source, Path) else source, source)
    if not found:
        raise ValueError("no adapter is given, expected folders, globs, .txt files or hub ids")
    return list(found.values())


def _expanded(entry: str | Path, parent: Path = Path(), lists: bool = True) -> list[str | Path]:
    text = os.path.expanduser(entry)  # noqa: PTH111  (leaves ~user be where there is no such user)
    path = parent / text
    if not text:
        raise ValueError("an adapter's path is empty, expected a folder, a glob, a .txt file or a hub id")
    if path.is_dir():
        folders = _adapters_in(path)
        if not folders:
            raise ValueError(f"{path} holds no {CONFIG_FILE}, and none of its folders does; expected adapters")
        return folders
    if path.suffix == ".txt" and lists:
        return _listed(path)
    if not path.exists() and re.search(r"[*?[]", text):
        matches = sorted(glob.glob(str(Path(glob.escape(str(parent)), text)), recursive=True))  # noqa: PTH207
        folders = [folder for match in matches if Path(match).is_dir() for folder in _adapters_in(Path(match))]
        if not folders:
            raise ValueError(f"{path} matches no adapter, expected folders with {CONFIG_FILE}")
        return folders
    if isinstance(entry, str) and not path.exists() and path.suffix != ".txt" and _HUB_ID.fullmatch(entry):
        return [entry]
    what = "is no folder" if path.exists() else "does not exist"
    raise ValueError(f"{path} {what}, expected an adapter's folder, a folder of them, a glob, a .txt file or a hub id")


def _adapters_in(folder: Path) -> list[str | Path]:
    """The folder itself if it is an adapter, else those of its folders that are."""
    if (folder / CONFIG_FILE).is_file():
        return [folder]
    return [child for child in sorted(folder.iterdir()) if (child / CONFIG_FILE).is_file()]


def _listed(file: Path) -> list[str | Path]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read, expected a text file of adapters, one per line: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        entry = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        try:
            found += _expanded(entry, file.parent, lists=False) if entry else []
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{file} lists no adapter, expected one per line")
    return found


def _adapter_file(source: str | Path, name: str, **where: Any) -> Path:
    try:
        folder = resolve_checkpoint(source, **where, patterns=(name,))
    except ValueError as error:
        raise ValueError(f"LoRA adapter {str(source)!r}: {error}") from error
    if (folder / name).is_file():
        return folder / name
    if name == WEIGHTS_FILE and (folder / _PICKLE).is_file():
        raise ValueError(
            f"{folder} has its weights only in the pickle {_PICKLE}, which is never loaded because it can run code; "
            f"expected {WEIGHTS_FILE}. If you trust it, load it with PEFT and save_pretrained it again"
        )
    raise ValueError(f"{folder} has no {name}, expected {CONFIG_FILE} and {WEIGHTS_FILE} (never pickles)")


def _places(names: Iterable[str], where: str, config: Qwen2Config | None) -> dict[_Place, str]:
    """{place: name as given}, in the order of ``LoraSpec.shapes``; every A with its B, in a layer of the config."""
    places: dict[_Place, str] = {}
    n_layers = _MOST_LAYERS if config is None else config.num_hidden_layers
    for name in names:
        place = parse_name(name) if isinstance(name, str) else None
        if place is None:
            raise ValueError(
                f"{where} holds {name!r}, expected only the lora_A and lora_B weights of {list(PROJECTIONS)} in a "
                f"Qwen2ForCausalLM, with names such as {peft_name(0, 'q_proj', 'A')!r}"
            )
        if place[0] >= n_layers:
            raise ValueError(f"{where} holds {name!r}, expected layers 0 to {n_layers - 1}")
        if place in places:
            raise ValueError(f"{where} holds {places[place]!r} and {name!r}, expected one spelling of a tensor")
        places[place] = name
    if not places:
        raise ValueError(f"{where} holds no tensors, expected those of at least one module")
    for layer, projection, side in places:
        other = (layer, projection, "B" if side == "A" else "A")
        if other not in places:
            have, lack = peft_name(layer, projection, side), peft_name(*other)
            raise ValueError(f"{where} holds {have!r} without {lack!r}, expected both or neither")
    position = list(PROJECTIONS).index
    return {place: places[place] for place in sorted(places, key=lambda p: (p[0], position(p[1]), p[2]))}


def _modules(places: Iterable[_Place]) -> list[Module]:
    return list(dict.fromkeys((layer, projection) for layer, projection, _ in places))


def _named(place: _Place) -> str:
    return f"LoRA tensor {peft_name(*place)!r}"


def _check_covered(spec: LoraSpec, modules: Iterable[Module]) -> None:
    chosen = spec.layers_to_transform
    layers = [chosen] if isinstance(chosen, int) else chosen
    for layer, projection in modules:
        if projection not in spec.target_modules or (layers is not None and layer not in layers):
            where = "in any layer" if layers is None else f"in layers {list(layers)}"
            expected = f"expected target_modules {list(spec.target_modules)} {where}, as the spec says"
            raise ValueError(f"{_named((layer, projection, 'A'))} fits nothing; {expected}")


def _check_entries(
    spec: LoraSpec,
    dtypes: Mapping[_Place, torch.dtype | str],
    shapes: Mapping[_Place, tuple[int, ...]],
    config: Qwen2Config | None,
) -> None:
    """Ranks are the spec's; the base model's sizes are the config's, or else the same wherever they occur."""
    sizes = {} if config is None else {size: getattr(config, size) for pair in _SIZES.values() for size in pair}
    for place, shape in shapes.items():
        if dtypes[place] not in STORAGE_DTYPES:
            raise ValueError(f"{_named(place)} has dtype {dtypes[place]}, expected one of {STORAGE_DTYPES}")
        layer, projection, side = place
        rank, _ = spec.rank_and_scaling(layer, projection)
        size = _SIZES[projection][side == "A"]
        if len(shape) == 2 and shape[side == "A"]:
            sizes.setdefault(size, shape[side == "A"])
        known = sizes.get(size, "a positive integer")
        expected = (rank, known) if side == "A" else (known, rank)
        if shape != expected:
            raise ValueError(
                f"{_named(place)} has shape {shape}, expected ({expected[0]}, {expected[1]}), as its rank is {rank} "
                f"and {size} is {known}"
            )
