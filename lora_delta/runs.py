"""A training run from a TOML file, and what it leaves in its folder: enough to generate adapters from prompts.

The file names the base model, the labels of the teachers (what ``lora-delta label`` wrote, and with what settings),
and their prompts; the rest has defaults::

    base = "Qwen/Qwen2.5-0.5B"        # hub id or folder
    labels = "deltas"                 # paths are relative to the file
    prompts = "prompts.jsonl"         # {"adapter": "teachers/math", "prompts": ["...", "..."]} per line
    out = "run"
    [format]
    rank = 8
    chunk_width = 128
    [generator]
    width = 256
    [training]
    steps = 1000
    [losses]
    weights = 1.0
    delta = {weight = 1.0, kind = "linear", warmup_steps = 100}
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights, load_pretrained
from qwen_functional.checkpoint import resolve_checkpoint
from qwen_functional.files import read_json_object
from qwen_functional.parallel import TENSOR_PARALLEL

from .chat import read_probes
from .commands import DTYPES
from .conditions import PromptEncoder
from .delta import DifferentiableDeltaCompute
from .distributed import Ranks
from .embedded import embedded_checkpoint
from .files import write_json
from .generator import LoRAGenerator
from .label_table import DeltaLabels
from .labels import label_settings, spec_facts, spec_of
from .losses import Schedule
from .shares import DATA_PARALLEL
from .tokenization import load_tokenizer
from .tokens import TokenFormat
from .training import CHECKPOINT, TERMS, TrainingOptions, load_generator_state, train

RUN = "run.json"
STATISTICS = 64  # teachers whose tokens start the generator


@dataclass(frozen=True)
class RunConfig:
    """What a TOML file says; see the module's docstring.

    Attributes:
        dtype: of the base weights.
        tensor_parallel: how many of ``torchrun``'s processes hold the base model together.
        stream: leave the base model on disk, see :func:`qwen_functional.load_pretrained`.
        condition_layer: the block whose output conditions the generator, −1 after the final norm.
        max_length: tokens of a prompt.
        format: ``rank`` and ``chunk_width`` of :meth:`TokenFormat.for_config`.
        generator: arguments of :class:`LoRAGenerator`, ``width`` and so on.
    """

    base: str
    labels: Path
    prompts: Path
    out: Path
    dtype: str = "bfloat16"
    device: str | None = None
    adapters_per_pass: int | None = None
    tensor_parallel: int = 1
    stream: bool = False
    condition_layer: int = -1
    max_length: int = 128
    format: Mapping[str, int] = field(default_factory=dict)
    generator: Mapping[str, int] = field(default_factory=dict)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    @classmethod
    def from_toml(cls, path: str | Path) -> RunConfig:
        """Read a file.

        Raises:
            ValueError: no such file, not TOML, a key that is missing, unknown, or of another type.
        """
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as TOML: {error}") from error
        losses = table.pop("losses", None)
        training = dict(_table(path, table, "training"))
        _check_keys(path, "[training]", training, [f.name for f in fields(TrainingOptions) if f.name != "losses"])
        if losses is not None:
            training["losses"] = {name: _schedule(path, name, value) for name, value in losses.items()}
        _check_keys(path, "[format]", _table(path, table, "format"), ["rank", "chunk_width"])
        _check_keys(path, "[generator]", _table(path, table, "generator"), ["width", "depth", "heads", "components"])
        _check_keys(path, "the file", table, [f.name for f in fields(cls)])
        for name in ("base", "labels", "prompts", "out"):
            if not isinstance(table.get(name), str):
                raise ValueError(f"{path} gives {name} = {table.get(name)!r}, expected a string")
        folder = path.resolve().parent
        for name in ("labels", "prompts", "out"):
            table[name] = folder / table[name]
        if (folder / table["base"]).is_dir():
            table["base"] = str(folder / table["base"])
        for name in ("rank", "chunk_width"):
            value = table["format"].get(name)
            if not isinstance(value, int):
                raise ValueError(f"{path} gives {name} = {value!r} in [format], expected an integer")
        if table.get("dtype", "bfloat16") not in DTYPES:
            raise ValueError(f"{path} gives dtype = {table['dtype']!r}, expected one of {tuple(DTYPES)}")
        split = table.get("tensor_parallel", 1)
        if not isinstance(split, int) or isinstance(split, bool) or split < 1:
            raise ValueError(f"{path} gives tensor_parallel = {split!r}, expected an integer of at least 1")
        if not isinstance(table.get("stream", False), bool):
            raise ValueError(f"{path} gives stream = {table['stream']!r}, expected true or false")
        try:
            return cls(**{**table, "training": TrainingOptions(**training)})
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from error


def _table(path: Path, table: dict[str, Any], name: str) -> dict[str, Any]:
    value = table.setdefault(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{path} gives {name} = {value!r}, expected a table [{name}]")
    return value


def _check_keys(path: Path, where: str, table: Mapping[str, Any], known: list[str]) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{path} gives {key!r} in {where}, expected some of {known}")


def _schedule(path: Path, name: str, value: Any) -> Schedule:
    if name not in TERMS:
        raise ValueError(f"{path} gives {name!r} in [losses], expected some of {TERMS}")
    try:
        return Schedule(**value) if isinstance(value, dict) else Schedule(float(value))
    except TypeError as error:
        raise ValueError(f"{path} gives {name} = {value!r} in [losses]: {error}") from error


def read_prompts(path: Path, key: str = "adapter") -> dict[str, list[str]]:
    """{name: prompts} from JSON lines ``{key: name, "prompts": [...]}``, or from plain text, a prompt a line.

    Plain lines are named ``prompt-0000`` and so on.

    Raises:
        ValueError: no such file, no prompts in it, or a line that is off.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"prompts cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"{path} holds no prompts, expected one per line")
    if not lines[0].lstrip().startswith("{"):
        return {f"prompt-{number:04d}": [line] for number, line in enumerate(lines)}
    read: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
        name, prompts = (entry.get(key), entry.get("prompts")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(prompts, list) or not prompts or name in read:
            expected = f'{{"{key}": a new name, "prompts": [...]}}'
            raise ValueError(f"line {number} of {path} is {line[:80]}, expected {expected}")
        read[name] = prompts
    return read


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


def load_base(
    base: str, dtype: str, device: torch.device | str | None, mesh: DeviceMesh | None = None, stream: bool = False
) -> tuple[Path, Qwen2Config, Qwen2Weights]:
    """(folder, config, weights) of a hub id, a folder, or ``"embedded"``."""
    folder = embedded_checkpoint() if base == "embedded" else resolve_checkpoint(base)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    places: dict[str, Any] = {"device": place, "mesh": mesh, "stream": stream}
    config, weights = load_pretrained(folder, dtype=DTYPES[dtype], lm_head=False, **places)
    return folder, config, weights


def train_run(config: RunConfig, ranks: Ranks | None = None, *, progress: bool = True) -> list[dict[str, float]]:
    """Train a generator as a file says; its folder then holds ``run.json``, metrics and a checkpoint.

    The deltas are computed under the settings of the labels: probes, layer and pooling. Several ranks share each
    micro-batch, and ``config.tensor_parallel`` of them the base model.

    Returns:
        The metrics of every step, see :func:`lora_delta.training.train`.

    Raises:
        ValueError: labels of another base model or dtype, an adapter without a label, teachers that differ in their
            spec or do not fit the token format, or as ``train``.
    """
    ranks = Ranks() if ranks is None else ranks
    mesh = mesh_of(ranks, config.tensor_parallel)
    labels = DeltaLabels(config.labels)
    prompts = read_prompts(config.prompts)
    folder, base, weights = load_base(config.base, config.dtype, ranks.device or config.device, mesh, config.stream)
    tokenizer = load_tokenizer(folder)
    format = TokenFormat.for_config(base, config.format["rank"], config.format["chunk_width"])
    for name in prompts:
        if name not in labels.names:
            raise ValueError(f"{config.prompts} names adapter {name!r}, which has no label in {config.labels}")
    spec = common_spec(labels, prompts, format, base)
    delta = delta_of(labels, base, weights, folder, spec, config.adapters_per_pass)
    encoder = PromptEncoder(base, weights, tokenizer, layer=config.condition_layer, max_length=config.max_length)
    conditions = {name: encoder(texts) for name, texts in prompts.items()}
    teachers = labels.dataset(conditions, "tokens", format)
    torch.manual_seed(config.training.seed)
    generator = LoRAGenerator(format, base.hidden_size, **config.generator).to(weights.device)
    if not (config.out / CHECKPOINT).exists():
        generator.fit(torch.stack([teachers[i][1] for i in range(min(len(teachers), STATISTICS))]))
    if ranks.rank == 0:
        save_run(config, spec)
    return train(generator, teachers, delta, format, config.training, out=config.out, progress=progress, mesh=mesh)


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


def delta_of(
    labels: DeltaLabels,
    config: Qwen2Config,
    weights: Qwen2Weights,
    folder: Path,
    spec: LoraSpec,
    adapters_per_pass: int | None = None,
) -> DifferentiableDeltaCompute:
    """The delta that the labels are of, differentiable.

    Raises:
        ValueError: another base model or dtype than the labels'.
    """
    settings = labels.settings
    probes, layer = settings["probes"], settings["layer"]
    if isinstance(probes[0], str):
        cut = settings["max_length"] or config.max_position_embeddings
        probes = read_probes(folder, probes, cut, chat=bool(settings["chat"])).ids
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
    for name in ("dtype", "model_sha256", "probes_sha256"):
        if ours[name] != settings[name]:
            raise ValueError(f"{labels.folder} was made with {name} = {settings[name]}, and the run has {ours[name]}")
    return delta


def common_spec(labels: DeltaLabels, names: Iterable[str], format: TokenFormat, config: Qwen2Config) -> LoraSpec:
    """The one spec of all teachers, as the labels' manifest says it.

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


def save_run(config: RunConfig, spec: LoraSpec) -> None:
    """Write ``run.json``, which :func:`load_run` reads."""
    facts = {
        "base": config.base,
        "dtype": config.dtype,
        "condition_layer": config.condition_layer,
        "max_length": config.max_length,
        "prompts_per_condition": config.training.prompts_per_condition,
        "format": dict(config.format),
        "generator": dict(config.generator),
        "spec": spec_facts(spec),
    }
    write_json(config.out / RUN, facts)


def load_run(folder: str | Path, device: str | None = None) -> Run:
    """A trained generator from the folder of its run.

    Raises:
        ValueError: not the folder of a run.
    """
    facts = read_json_object(Path(folder) / RUN, "the folder of a training run")
    state = load_generator_state(folder)
    base_folder, config, weights = load_base(facts["base"], facts["dtype"], device)
    format = TokenFormat.for_config(config, facts["format"]["rank"], facts["format"]["chunk_width"])
    spec = spec_of(facts["spec"])
    generator = LoRAGenerator(format, config.hidden_size, **facts["generator"]).to(weights.device)
    generator.load_state_dict(state)
    encoder = PromptEncoder(
        config, weights, load_tokenizer(base_folder), layer=facts["condition_layer"], max_length=facts["max_length"]
    )
    return Run(facts["base"], config, weights, encoder, format, spec, generator.eval())
