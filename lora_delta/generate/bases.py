"""What a training run is built on: the base model, the mesh that holds it, and the teachers' labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, load_pretrained
from qwen_functional.dtypes import DTYPES
from qwen_functional.hub import resolve_checkpoint
from qwen_functional.parallel import TENSOR_PARALLEL

from ..delta import DifferentiableDeltaCompute
from ..distributed import Ranks, usable_device
from ..embedded import embedded_checkpoint
from ..labelling.settings import label_identity, label_settings, spec_of
from ..labelling.table import DeltaLabels
from ..probes.chat import read_probes
from ..shares import DATA_PARALLEL
from .tokens import TokenFormat


def mesh_of(ranks: Ranks, tensor_parallel: int) -> DeviceMesh | None:
    """A mesh of all ranks with dimensions ``"dp"`` and ``"tp"``; None for a single rank.

    Raises:
        ValueError: the number of ranks is not a multiple of ``tensor_parallel``.
    """
    if ranks.world_size % tensor_parallel:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, expected a divisor of the {ranks.world_size} ranks")
    if ranks.world_size == 1:
        return None
    kind = ranks.device.type if ranks.device is not None else "cpu"
    shape = (ranks.world_size // tensor_parallel, tensor_parallel)
    return init_device_mesh(kind, shape, mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL))


def load_base(
    base: str,
    dtype: str,
    device: torch.device | str | None,
    mesh: DeviceMesh | None = None,
    stream: bool = False,
    lm_head: bool = False,
) -> tuple[Path, Qwen2Config, Qwen2Weights]:
    """(folder, config, weights) of a hub id, a folder, or ``"embedded"``."""
    places: dict[str, Any] = {"device": usable_device(device), "mesh": mesh, "stream": stream}
    folder = embedded_checkpoint() if base == "embedded" else resolve_checkpoint(base)
    config, weights = load_pretrained(folder, dtype=DTYPES[dtype], lm_head=lm_head, **places)
    return folder, config, weights


def delta_of(
    labels: DeltaLabels,
    config: Qwen2Config,
    weights: Qwen2Weights,
    folder: Path,
    spec: LoraSpec,
    adapters_per_pass: int | None = None,
) -> tuple[DifferentiableDeltaCompute, dict[str, Any]]:
    """The delta that the labels were computed with, now differentiable, and its settings.

    Raises:
        ValueError: the base model or the dtype is not the labels'.
    """
    settings = labels.settings
    probes, layer = settings["probes"], settings["layer"]
    if isinstance(probes[0], str):
        cut = settings["max_length"] or config.max_position_embeddings
        variables = settings.get("chat_template_kwargs")
        probes = read_probes(folder, probes, cut, chat=bool(settings["chat"]), chat_template_kwargs=variables)
    delta = DifferentiableDeltaCompute(
        config,
        weights,
        probes,
        spec,
        layer=layer if isinstance(layer, int) else tuple(layer),
        pooling=settings["pooling"],
        adapters_per_pass=adapters_per_pass,
    )
    ours = label_settings(delta)
    advice = "Use the base model and the dtype of the labels, or make labels with these."
    label_identity(ours).require_same(label_identity(settings).facts, labels.folder, advice)
    return delta, ours


def check_labelled(labels: DeltaLabels, names: Iterable[str], where: str) -> None:
    """Raises ``ValueError`` if an adapter that ``where`` names has no label."""
    for name in names:
        try:
            labels.entry(name)
        except KeyError:
            raise ValueError(f"{where} names {name!r}, which has no label in {labels.folder}") from None


def common_spec(
    labels: DeltaLabels, names: Iterable[str], format: TokenFormat | None, config: Qwen2Config
) -> LoraSpec:
    """The spec that all teachers share, from the labels.

    Raises:
        ValueError: the teachers' specs differ, or the format cannot hold theirs.
    """
    specs = {name: labels.entry(name)["spec"] for name in names}
    first, facts = next(iter(specs.items()))
    for name, other in specs.items():
        if other != facts:
            raise ValueError(f"adapters {first!r} and {name!r} have different specs, {facts} and {other}")
    spec = spec_of(facts)
    if format is not None and dict(spec.shapes(config)) != dict(format.shapes):
        raise ValueError(f"the teachers' spec {spec} does not fit the token format {format.name!r}")
    return spec
