"""Reading and writing PEFT adapters: ``adapter_config.json`` and ``adapter_model.safetensors``, a spec and tensors."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor

from qwen_functional import LoraSpec, Qwen2Config
from qwen_functional.architecture import PROJECTIONS
from qwen_functional.checkpoint import STORAGE_DTYPES
from qwen_functional.finite import check_finite, is_symbolic
from qwen_functional.lora import parse_name, peft_name
from qwen_functional.safetensors_format import DISK_DTYPES, parse_header, tensor_in

from ..files import UNFINISHED, replaces
from .config import CONFIG_FILE, AdapterConfig, Module, adapter_fields, with_fitting_patterns
from .fields import MOST_LAYERS
from .sources import WEIGHTS_FILE, adapter_file
from .sources import find_adapters as find_adapters

_MOST_CONFIG, _MOST_WEIGHTS = 1 << 18, 1 << 33  # bytes
_Place = tuple[int, str, str]  # (layer, projection, side) of a tensor


@dataclass(frozen=True)
class AdapterFiles:
    """The content of an adapter's two files, each read once: the hash and the tensors are of the same bytes.

    Attributes:
        sha256: of both files, in hexadecimal: equal for copies, different after any change.
    """

    config_file: Path
    config: bytes = field(repr=False)
    weights_file: Path
    weights: bytearray = field(repr=False)

    @classmethod
    def read(
        cls, source: str | Path, *, revision: str | None = None, local_files_only: bool = False
    ) -> AdapterFiles:
        """Read ``adapter_config.json`` and ``adapter_model.safetensors``; pickles are neither fetched nor read.

        For an adapter on the hub, the config is checked before the weights are fetched.

        Args:
            source: an adapter's folder or its hub id; an existing folder takes precedence.
            revision: branch, tag or commit on the hub; not used for a folder.
            local_files_only: take a hub id from the local cache only.

        Raises:
            ValueError: the folder or hub id, or one of its files, is not found, is not a regular file, cannot be read
                or is too large; there is only a pickle; the fields of an adapter on the hub are refused.
        """
        where: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        config_file = adapter_file(source, CONFIG_FILE, **where)
        config = bytes(_content(config_file, _MOST_CONFIG))
        if config_file.parent != Path(source).expanduser():
            AdapterConfig.from_json(config, config_file)
        weights_file = adapter_file(source, WEIGHTS_FILE, **where)
        return cls(config_file, config, weights_file, _content(weights_file, _MOST_WEIGHTS))

    @functools.cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for content in (self.config, self.weights):
            digest.update(len(content).to_bytes(8, "big"))
            digest.update(content)
        return digest.hexdigest()

    def load(self, config: Qwen2Config | None = None) -> tuple[LoraSpec, dict[str, Tensor]]:
        """The spec and the tensors; returns and raises as :func:`load_peft_adapter` does."""
        model_type = None if config is None else config.model_type
        declared = AdapterConfig.from_json(self.config, self.config_file, model_type)
        header = parse_header(self.weights, str(self.weights_file))
        places = _places(header, str(self.weights_file), config)
        try:
            spec = declared.spec(_modules(places), None if config is None else config.num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"{self.config_file}: {error}") from None
        stored = {place: header[name] for place, name in places.items()}
        dtypes = {place: DISK_DTYPES.get(entry.dtype, entry.dtype) for place, entry in stored.items()}
        _check_entries(spec, dtypes, {place: entry.shape for place, entry in stored.items()}, config)
        tensors = {peft_name(*place): tensor_in(self.weights, entry) for place, entry in stored.items()}
        check_finite(tensors)
        return spec, tensors


def load_peft_adapter(
    source: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    config: Qwen2Config | None = None,
) -> tuple[LoraSpec, dict[str, Tensor]]:
    """Read a LoRA as PEFT's ``save_pretrained`` writes it. Pickles are neither fetched nor loaded.

    Everything is checked before a tensor is made: the fields, the names, shapes and dtypes, and that the fields
    declare exactly the modules that have tensors. The spec gives each of them exactly PEFT's rank and scale. Where
    a regular expression adapts a projection in some layers only, the spec covers more modules than the tensors,
    which ``LoraSpec.bind`` permits.

    Args:
        source: an adapter's folder or its hub id; an existing folder takes precedence.
        revision: branch, tag or commit on the hub; not used for a folder.
        local_files_only: take a hub id from the local cache only.
        config: of the base model. With it, sizes and layers are checked too, and ``layers_to_transform`` of the
            spec is None whenever all layers are adapted.

    Returns:
        The spec, and {PEFT name: (r, in) or (out, r)} in the order of ``spec.shapes``, in their own memory, on the
        CPU, in the dtype on disk.

    Raises:
        ValueError: a file is missing, truncated or corrupt, or there is only a pickle; a field is not one that
            LoraSpec can represent (DoRA, biases, ``modules_to_save``, another base model and so on), which the
            message names; fields and tensors disagree; a tensor is not a LoRA tensor of a projection, lacks its other
            half, has another shape or dtype, or is not finite.
    """
    return AdapterFiles.read(source, revision=revision, local_files_only=local_files_only).load(config)


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
    temporary names and renamed, the config last: a folder with a config is complete, even after a power cut. What
    killed saves have left is removed. A folder must have only one writer at a time.

    Args:
        folder: made if needed; an existing adapter is replaced.
        tensors: {name: (r, in) or (out, r)}, with the names that ``LoraSpec.bind`` reads; written in their dtype.
        base_model: the base's hub id or folder, for ``base_model_name_or_path``.
        config: of the base model. With it, sizes are checked too, and an adapter of all layers is written as one
            (``layers_to_transform`` null); without it, the layers are listed.

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
    # Copies, as safetensors takes neither views that share memory nor other strides.
    copies = {
        peft_name(*place): tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for place, tensor in ordered.items()
    }
    check_finite(copies)

    fields = adapter_fields(spec, modules, str(base_model), None if config is None else config.num_hidden_layers)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        for left in folder.glob(f"{name}.*{UNFINISHED}"):  # by a save that was killed
            left.unlink(missing_ok=True)
    # Renamed when both are written: first the weights, then the config.
    with replaces(folder / CONFIG_FILE) as new_config, replaces(folder / WEIGHTS_FILE) as new_weights:
        # Not save_file, which leaves a file that only its owner may read.
        new_weights.write_bytes(serialized(copies, metadata={"format": "pt"}))
        new_config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (folder / CONFIG_FILE).unlink(missing_ok=True)  # never an old config with new weights


def _content(file: Path, most_bytes: int) -> bytearray:
    try:
        with file.open("rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > most_bytes:
                raise ValueError(f"{file} has {size:,} bytes, expected an adapter's file of at most {most_bytes:,}")
            content = bytearray(size)
            rest = memoryview(content)
            while n := handle.readinto(rest):
                rest = rest[n:]
            return content[: size - len(rest)] if rest else content
    except OSError as error:
        raise ValueError(f"{file} cannot be read, expected an adapter's file: {error}") from error


def _places(names: Iterable[str], where: str, config: Qwen2Config | None) -> dict[_Place, str]:
    """{place: name as given}, in the order of ``LoraSpec.shapes``; every A with its B, in a layer of the config."""
    places: dict[_Place, str] = {}
    n_layers = MOST_LAYERS if config is None else config.num_hidden_layers
    for name in names:
        place = parse_name(name) if isinstance(name, str) else None
        if place is None:
            raise ValueError(
                f"{where} holds {name!r}, expected only the lora_A and lora_B weights of {list(PROJECTIONS)} in a "
                f"Qwen2ForCausalLM or Qwen3ForCausalLM, with names such as {peft_name(0, 'q_proj', 'A')!r}"
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
    """Check ranks against the spec, and the base's sizes against the config or, without one, against each other."""
    names = {name for projection in PROJECTIONS.values() for name in (projection.rows, projection.columns)}
    sizes = {} if config is None else {name: getattr(config, name) for name in names}
    for place, shape in shapes.items():
        if dtypes[place] not in STORAGE_DTYPES:
            raise ValueError(f"{_named(place)} has dtype {dtypes[place]}, expected one of {STORAGE_DTYPES}")
        layer, projection, side = place
        rank, _ = spec.rank_and_scaling(layer, projection)
        size = PROJECTIONS[projection].columns if side == "A" else PROJECTIONS[projection].rows
        if len(shape) == 2 and shape[side == "A"]:
            sizes.setdefault(size, shape[side == "A"])
        known = sizes.get(size, "a positive integer")
        expected = (rank, known) if side == "A" else (known, rank)
        if shape != expected:
            raise ValueError(
                f"{_named(place)} has shape {shape}, expected ({expected[0]}, {expected[1]}), as its rank is {rank} "
                f"and {size} is {known}"
            )
