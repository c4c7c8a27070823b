"""A training run of labelled teachers, and the generator that it leaves in its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, load_pretrained
from qwen_functional.dtypes import DTYPES
from qwen_functional.files import read_json_object
from qwen_functional.hub import resolve_checkpoint
from qwen_functional.parallel import TENSOR_PARALLEL

from ..delta import DifferentiableDeltaCompute
from ..distributed import Ranks, usable_device
from ..embedded import embedded_checkpoint
from ..identity import Identity, sha256_of
from ..labelling.settings import label_identity, label_settings, model_fingerprint, spec_facts, spec_of
from ..labelling.table import DeltaLabels, LabelDataset
from ..probes.chat import read_probes
from ..probes.tokenization import load_tokenizer
from ..shares import DATA_PARALLEL
from .checkpoints import RUN, Metrics, RunFolder, newest_checkpoint
from .conditions import PromptEncoder
from .generator import LoRAGenerator
from .prompts import read_prompts
from .run_config import RunConfig
from .tokens import TokenFormat
from .training import train

STATISTICS = 64  # teachers whose tokens start the generator


class Teachers:
    """Labelled adapters as the training loop takes them; states of prompts are computed when they are looked at."""

    def __init__(self, dataset: LabelDataset, encoder: PromptEncoder) -> None:
        self.dataset, self.encoder = dataset, encoder
        self.names = [name for name, _ in dataset.items]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        prompts, tokens, delta = self.dataset[index]
        return self.encoder.lazily(prompts), tokens, delta


def train_run(config: RunConfig, ranks: Ranks | None = None, *, progress: bool = True) -> list[Metrics]:
    """Train a generator as a file says; its folder then holds what :mod:`lora_delta.generate.checkpoints` describes.

    The deltas are computed under the settings of the labels: probes, layer and pooling. Several ranks share each
    micro-batch, and ``config.tensor_parallel`` of them the base model.

    Returns:
        The metrics of every step, see :func:`lora_delta.generate.training.train`.

    Raises:
        ValueError: labels of another base model or dtype, an adapter without a label, teachers that differ in their
            spec or do not fit the token format, a folder whose run depends on something else, or as ``train``.
    """
    ranks = Ranks() if ranks is None else ranks
    mesh = mesh_of(ranks, config.tensor_parallel)
    labels = DeltaLabels(config.labels)
    prompts = read_prompts(config.prompts)
    for name in prompts:
        try:
            labels.entry(name)
        except KeyError:
            raise ValueError(f"{config.prompts} names {name!r}, which has no label in {config.labels}") from None
    folder, base, weights = load_base(config.base, config.dtype, ranks.device or config.device, mesh, config.stream)
    format = TokenFormat.for_config(base, config.format["rank"], config.format["chunk_width"])
    spec = common_spec(labels, prompts, format, base)
    delta, settings = delta_of(labels, base, weights, folder, spec, config.adapters_per_pass)
    tokenizer = load_tokenizer(folder)
    encoder = PromptEncoder(base, weights, tokenizer, layer=config.condition_layer, max_length=config.max_length)
    teachers = Teachers(labels.dataset(prompts, "tokens", format), encoder)
    torch.manual_seed(config.training.seed)
    generator = LoRAGenerator(format, base.hidden_size, **config.generator).to(weights.device)
    identity = Identity(
        {
            "model_sha256": settings["model_sha256"],
            "dtype": config.dtype,
            "labels": label_identity(settings).facts,
            "teachers_sha256": sha256_of([_label_facts(labels, name) for name in prompts]),
            "prompts_sha256": sha256_of(list(prompts.items())),
            "condition_layer": config.condition_layer,
            "max_length": config.max_length,
            "format": dict(config.format),
            "spec": spec_facts(spec),
            "generator": generator.sizes,
            "training": config.training.facts,
        },
        shown={
            "model_sha256": f"here it is of {config.base}",
            "teachers_sha256": f"here {len(prompts)} of {config.labels}",
            "prompts_sha256": f"here of {config.prompts}",
        },
    )
    with RunFolder.held(config.out, identity, ranks, about={"base": config.base}) as run:
        if not run.progress.steps:
            generator.fit(torch.stack([teachers[i][1] for i in range(min(len(teachers), STATISTICS))]))
        return train(generator, teachers, delta, format, config.training, out=run, progress=progress, mesh=mesh)


def _label_facts(labels: DeltaLabels, name: str) -> list[Any]:
    """An adapter's name, the hash of its files, and that of its delta."""
    entry = labels.entry(name)
    return [entry["name"], entry["sha256"], entry.get("check")]


def mesh_of(ranks: Ranks, tensor_parallel: int) -> DeviceMesh | None:
    """All ranks as a mesh of ``"dp"`` and ``"tp"``; None for one alone.

    Raises:
        ValueError: the ranks are no multiple of ``tensor_parallel``.
    """
    if ranks.world_size % tensor_parallel:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, expected a divisor of the {ranks.world_size} ranks")
    if ranks.world_size == 1:
        return None
    kind = ranks.device.type if ranks.device is not None else "cpu"
    shape = (ranks.world_size // tensor_parallel, tensor_parallel)
    return init_device_mesh(kind, shape, mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL))


def load_base(
    base: str, dtype: str, device: torch.device | str | None, mesh: DeviceMesh | None = None, stream: bool = False
) -> tuple[Path, Qwen2Config, Qwen2Weights]:
    """(folder, config, weights) of a hub id, a folder, or ``"embedded"``."""
    places: dict[str, Any] = {"device": usable_device(device), "mesh": mesh, "stream": stream}
    folder = embedded_checkpoint() if base == "embedded" else resolve_checkpoint(base)
    config, weights = load_pretrained(folder, dtype=DTYPES[dtype], lm_head=False, **places)
    return folder, config, weights


def delta_of(
    labels: DeltaLabels,
    config: Qwen2Config,
    weights: Qwen2Weights,
    folder: Path,
    spec: LoraSpec,
    adapters_per_pass: int | None = None,
) -> tuple[DifferentiableDeltaCompute, dict[str, Any]]:
    """The delta that the labels are of, differentiable, and its settings.

    Raises:
        ValueError: another base model or dtype than the labels'.
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
    advice = "Take the base model and the dtype of the labels, or labels of these."
    label_identity(ours).require_same(label_identity(settings).facts, labels.folder, advice)
    return delta, ours


def common_spec(labels: DeltaLabels, names: Iterable[str], format: TokenFormat, config: Qwen2Config) -> LoraSpec:
    """The one spec of all teachers, as the labels say it.

    Raises:
        ValueError: teachers with different specs, or one that the format cannot hold.
    """
    specs = {name: labels.entry(name)["spec"] for name in names}
    first, facts = next(iter(specs.items()))
    for name, other in specs.items():
        if other != facts:
            raise ValueError(f"adapters {first!r} and {name!r} have different specs, {facts} and {other}")
    spec = spec_of(facts)
    if dict(spec.shapes(config)) != dict(format.shapes):
        raise ValueError(f"the teachers' spec {spec} does not fit the token format {format.name!r}")
    return spec


@dataclass(frozen=True)
class Run:
    """A generator with all it needs: base model, encoder of its conditions, token format, spec of the adapters."""

    base: str
    config: Qwen2Config
    weights: Qwen2Weights
    encoder: PromptEncoder
    format: TokenFormat
    spec: LoraSpec
    generator: LoRAGenerator


def load_run(folder: str | Path, device: str | None = None) -> Run:
    """A trained generator from the folder of its run, with what its checkpoint was made with.

    ``run.json`` says where the base model is: it may be edited where that has moved.

    Raises:
        ValueError: not the folder of a run; files in it that are damaged, or not of the same run; another base model.
    """
    folder = Path(folder)
    told = read_json_object(folder / RUN, "the folder of a training run")
    found = newest_checkpoint(folder)
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint, expected the folder of a training run")
    path, state = found
    facts: Mapping[str, Any] = state["identity"]
    advice = "Expected both of one run."
    Identity(facts).require_same(told.get("identity", {}), folder / RUN, advice)
    if not isinstance(told.get("base"), str) or "condition_layer" not in facts:
        raise ValueError(f"{folder / RUN} names no base model, expected a run of lora-delta train")
    where, config, weights = load_base(told["base"], facts["dtype"], device)
    ours = Identity({"model_sha256": model_fingerprint(config, weights)}, {"model_sha256": f"here of {told['base']}"})
    ours.require_same({"model_sha256": facts["model_sha256"]}, path, "Take the base model that it was trained on.")
    format = TokenFormat.for_config(config, facts["format"]["rank"], facts["format"]["chunk_width"])
    generator = LoRAGenerator(format, config.hidden_size, **facts["generator"]).to(weights.device)
    generator.load_state_dict(state["generator"])
    layer, max_length = facts["condition_layer"], facts["max_length"]
    encoder = PromptEncoder(config, weights, load_tokenizer(where), layer=layer, max_length=max_length)
    return Run(told["base"], config, weights, encoder, format, spec_of(facts["spec"]), generator.eval())
