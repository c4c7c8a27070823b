"""A training run as its TOML file describes it, and the generator that it leaves in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_functional import LoraSpec, Qwen2Config, Qwen2Weights
from qwen_functional.files import read_json_object

from ..delta import DifferentiableDeltaCompute
from ..distributed import Ranks
from ..identity import Identity, sha256_of
from ..labelling.settings import label_identity, model_fingerprint, spec_facts, spec_of
from ..labelling.table import DeltaLabels
from ..lm_loss import DifferentiableLMLoss
from ..probes.tokenization import load_tokenizer
from ..stored_deltas import StoredDeltas
from ..teachers import StoredTopK
from ..text_delta import DifferentiableTextDelta
from .bases import check_labelled, common_spec, delta_of, load_base, mesh_of
from .checkpoints import RUN, Metrics, RunFolder, best_checkpoint, newest_checkpoint
from .conditions import ConditionCache, PromptEncoder
from .evaluation import Evaluation
from .generator import AdditiveGenerator, DirectGenerator, LoRAGenerator
from .options import CONTEXT
from .prompts import read_prompts
from .run_config import ADDITIVE, AdapterOptions, RunConfig
from .tasks import Tasks
from .terms import TextLosses, Written
from .text_lines import CONTEXT as CONTEXT_OF_TEXTS
from .text_lines import TextReader
from .texts import TextSet
from .tokens import TokenFormat
from .training import loss_facts, train

STATISTICS = 64  # how many teachers initialize the generator
_CONDITIONS, _TEXTS, _HELD_OUT = "conditions", "texts", "held_out"  # in the folder of a run


def train_run(config: RunConfig, ranks: Ranks | None = None, *, progress: bool = True) -> list[Metrics]:
    """Train a generator; the run's folder then holds what :mod:`lora_delta.generate.checkpoints` describes.

    Deltas are computed with the settings of the labels: probes, layer and pooling. Several ranks share each
    micro-batch, and ``config.tensor_parallel`` of them the base model.

    Returns:
        The metrics of every step, see :func:`lora_delta.generate.training.train`.

    Raises:
        ValueError: labels of another base model or dtype, an adapter without a label, teachers that differ in their
            spec or do not fit the token format, invalid texts, a folder whose run depends on something else, or as
            ``train``.
    """
    ranks = Ranks() if ranks is None else ranks
    mesh = mesh_of(ranks, config.tensor_parallel)
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"{config.out} is a file, expected a folder, or none yet")
    prompts = None if config.prompts is None else read_prompts(config.prompts)
    labels = None if config.labels is None else DeltaLabels(config.labels)
    if labels is not None:
        check_labelled(labels, prompts or (), f"{config.prompts}")
    reads_texts = bool(config.training.text_terms)
    device = ranks.device or config.device
    folder, base, weights = load_base(config.base, config.dtype, device, mesh, config.stream, lm_head=reads_texts)
    format = None
    if config.format is not None:
        format = TokenFormat.for_config(base, config.format["rank"], config.format["chunk_width"])
    facts: dict[str, Any] = {name: getattr(config, name) for name in ("dtype", "condition_layer", "max_length")}
    facts |= {"training": config.training.facts, **({} if config.format is None else {"format": dict(config.format)})}
    shown = {"model_sha256": f"here it is of {config.base}"}
    delta: DifferentiableDeltaCompute | None = None
    if labels is not None and prompts is not None:
        spec = common_spec(labels, prompts, format, base)
        delta, settings = delta_of(labels, base, weights, folder, spec, config.adapters_per_pass)
        facts |= {"model_sha256": settings["model_sha256"], "labels": label_identity(settings).facts}
        facts["teachers_sha256"] = sha256_of([_label_facts(labels, name) for name in prompts])
        shown["teachers_sha256"] = f"here {len(prompts)} of {config.labels}"
    else:
        spec = (config.adapter or AdapterOptions(8 if format is None else format.rank)).spec
        if format is not None and dict(spec.shapes(base)) != dict(format.shapes):
            raise ValueError(f"the adapter's spec {spec} does not fit the token format {format.name!r}")
        facts["model_sha256"] = model_fingerprint(base, weights)
    if prompts is not None:
        facts["prompts_sha256"] = sha256_of(list(prompts.items()))
        shown["prompts_sha256"] = f"here of {config.prompts}"
    with ExitStack() as stack:
        texts, own, held_out, cache, run = None, None, None, None, None
        if reads_texts:
            run = stack.enter_context(RunFolder.locked(config.out, ranks))  # texts are stored there
            own, held_out = text_sets(config, folder, base, prompts, ranks, progress=progress)
            texts = _text_losses(config, base, weights, spec, own)
            facts |= {_TEXTS: own.facts, "loss": loss_facts(texts)}
            shown[f"{_TEXTS}.sha256"] = f"here of {config.data}"
            if held_out is not None:
                facts[_HELD_OUT] = held_out.facts
            if config.condition_cache:
                key = sha256_of([facts[name] for name in ("model_sha256", "dtype", "condition_layer", "max_length")])
                cache = ConditionCache(config.out / _CONDITIONS, key, config.condition_cache)
                ranks.first(cache.clear)
        sizes: dict[str, Any] = {"layer": config.condition_layer, "max_length": config.max_length}
        encoder = PromptEncoder(base, weights, load_tokenizer(folder), **sizes, cache=cache)
        tasks = _tasks(encoder, prompts, labels, format, own, config)
        evaluation = None
        if held_out is not None and config.evaluation is not None:
            names = held_out.conditions if prompts is None else list(held_out.conditions)
            asked = {name: getattr(config.evaluation, name) for name in ("every", "conditions", "texts", "patience")}
            evaluation = Evaluation(Tasks(encoder, names, prompts, None, held_out), **asked)
        torch.manual_seed(config.training.seed)
        generator = _generator(format, base, spec, config.generator).to(weights.device)
        kept = {name: config.generator[name] for name in ("kind", "from_teachers") if name in config.generator}
        facts |= {"spec": spec_facts(spec), "generator": {**generator.sizes, **kept}}
        run = run or stack.enter_context(RunFolder.locked(config.out, ranks))
        run.begin(Identity(facts, shown=shown), about={"base": config.base, "context": config.teacher.context})
        if not run.progress.steps:
            _fit(generator, tasks, config)
        return train(
            generator, tasks, config.training, format=format, delta=delta, texts=texts, evaluation=evaluation, out=run,
            trackers=config.log, progress=progress, mesh=mesh,
        )  # fmt: skip


def text_sets(
    config: RunConfig,
    folder: Path,
    base: Qwen2Config,
    prompts: Mapping[str, Sequence[str]] | None,
    ranks: Ranks,
    *,
    with_context: bool | None = None,
    progress: bool = True,
) -> tuple[TextSet, TextSet | None]:
    """The texts of a run, and its held-out texts, tokenized into its folder.

    Args:
        folder: the base model's checkpoint.
        with_context: whether to make a teacher's contexts; by default if the run's steps need the bare model on them.

    Raises:
        ValueError: no data, or as :meth:`TextSet.compiled`.
    """
    if config.data is None:
        raise ValueError("data is missing, expected a file of texts")
    if with_context is None:
        with_context = bool(config.asks_base_for)
    reader = TextReader(
        folder,
        max_tokens=config.texts.max_tokens or base.max_position_embeddings,
        vocab_size=base.vocab_size,
        max_condition=None if prompts is not None else config.max_length,
        names=None if prompts is None else {name: own[0] for name, own in prompts.items()},
        context=config.teacher.context if with_context else None,
        chat_template_kwargs=config.texts.chat_template_kwargs,
        whole_prompts=with_context and config.training.delta_from_context and config.training.delta.positions == "all",
    )

    def compiled(path: str | Path, name: str) -> TextSet:
        def make() -> Path:
            given: dict[str, Any] = {"on_bad_line": config.texts.on_bad_line, "progress": progress}
            return TextSet.compiled(path, config.out, reader, name, **given).folder

        return TextSet.opened(ranks.first(make))

    held_out = None if config.evaluation is None else compiled(config.evaluation.data, _HELD_OUT)
    return compiled(config.data, _TEXTS), held_out


def _text_losses(
    config: RunConfig, base: Qwen2Config, weights: Qwen2Weights, spec: LoraSpec, texts: TextSet
) -> TextLosses:
    """The losses on a run's texts; what a teacher has stored is checked against the texts."""
    smoothing, reduction = config.texts.label_smoothing, config.texts.reduction
    passes = config.adapters_per_pass
    lm = DifferentiableLMLoss(
        base, weights, spec, label_smoothing=smoothing, reduction=reduction, adapters_per_pass=passes
    )
    made, asked = TextLosses(lm, config.teacher.temperature), config.training
    if "delta" in asked.text_terms:
        read: dict[str, Any] = {name: getattr(asked.delta, name) for name in ("positions", "pooling")}
        delta = DifferentiableTextDelta(base, lm.weights, spec, layer=asked.delta.layers, prepack=False, **read)
        parts: dict[str, Any] = {name: getattr(asked, name) for name in ("mse_weight", "cosine_weight")}
        made = replace(made, delta=delta, from_context="delta" in config.asks_base_for, **parts)
        if config.teacher.stored_deltas is not None:
            kept = StoredDeltas(config.teacher.stored_deltas)
            facts = stored_deltas_facts(config, texts, model_fingerprint(base, weights))
            kept.require(facts, texts.positions(delta.positions), f"those of {config.data}")
            made = replace(made, stored_deltas=kept)
    if asked.needs("kl") and config.teacher.stored is not None:
        stored = StoredTopK(config.teacher.stored, base.vocab_size)
        stored.require_lengths(texts.completions, f"the completions of {config.data}")
        made = replace(made, temperature=stored.temperature, stored=stored)
    return made


def stored_deltas_facts(config: RunConfig, texts: TextSet, model_sha256: str) -> dict[str, Any]:
    """What the target deltas of a run's texts depend on."""
    asked = config.training.delta
    found = {"model_sha256": model_sha256, "texts_sha256": texts.facts["sha256"], "positions": asked.positions}
    found |= {"layers": asked.layers, "target": asked.target}
    return found | ({"context": config.teacher.context} if asked.target == CONTEXT else {})


def _tasks(
    encoder: PromptEncoder,
    prompts: Mapping[str, Sequence[str]] | None,
    labels: DeltaLabels | None,
    format: TokenFormat | None,
    texts: TextSet | None,
    config: RunConfig,
) -> Tasks:
    """What there is to train on: teachers, texts, or both for the same names."""
    dataset = None
    if labels is not None and prompts is not None:
        if format is not None:
            dataset = labels.dataset(prompts, "tokens", format)
        else:
            own_delta = "delta" in config.training.text_terms and "delta" in config.asks_teachers_for
            reads = own_delta or config.training.needs("weights") or config.generator.get("from_teachers")
            dataset = labels.dataset(prompts, "tensors" if reads else None)
    if texts is None:
        assert prompts is not None
        return Tasks(encoder, list(prompts), prompts, dataset)
    if prompts is None:
        return Tasks(encoder, texts.conditions, None, None, texts)
    known = list(texts.conditions)
    if dataset is None:
        return Tasks(encoder, known, prompts, None, texts)
    without = sorted(set(prompts) - set(known))
    if without:
        raise ValueError(f"{config.data} has no text for {without[0]!r} of {config.prompts}, expected texts for each")
    return Tasks(encoder, list(prompts), prompts, dataset, texts)


def _generator(
    format: TokenFormat | None, base: Qwen2Config, spec: LoraSpec, asked: Mapping[str, Any]
) -> LoRAGenerator | DirectGenerator | AdditiveGenerator:
    """A generator that writes tokens, or A and B if there is no format; or an additive one."""
    sizes = {name: value for name, value in asked.items() if name not in ("kind", "from_teachers")}
    if asked.get("kind") == ADDITIVE:
        return AdditiveGenerator(base, spec, base.hidden_size, **sizes)
    if format is not None:
        return LoRAGenerator(format, base.hidden_size, **sizes)
    return DirectGenerator(base, spec, base.hidden_size, **sizes)


def _fit(generator: LoRAGenerator | DirectGenerator | AdditiveGenerator, tasks: Tasks, config: RunConfig) -> None:
    """Initialize from the first teachers, if the generator does so."""
    by_tensors = isinstance(generator, AdditiveGenerator) and bool(config.generator.get("from_teachers"))
    if config.labels is None or not (by_tensors or isinstance(generator, LoRAGenerator)):
        return
    found = [tasks[index] for index in range(min(len(tasks), STATISTICS))]
    if isinstance(generator, LoRAGenerator):
        generator.fit(torch.stack([task.tokens for task in found if task.tokens is not None]))
    elif isinstance(generator, AdditiveGenerator):
        each = [task.tensors for task in found if task.tensors is not None]
        generator.fit({name: torch.stack([one[name] for one in each]) for name in generator.shapes})


def _label_facts(labels: DeltaLabels, name: str) -> list[Any]:
    """An adapter's name, the hash of its files, and that of its delta."""
    entry = labels.entry(name)
    return [entry["name"], entry["sha256"], entry.get("check")]


@dataclass(frozen=True)
class Run:
    """A generator with all it needs: base model, encoder of conditions, adapters' spec, token format.

    Attributes:
        facts: what its checkpoint depends on.
        folder: the base model's folder.
        context: how a teacher's context is made of ``{condition}`` and ``{prompt}``, as the run's file says.
    """

    base: str
    folder: Path
    context: str
    facts: Mapping[str, Any]
    config: Qwen2Config
    weights: Qwen2Weights
    encoder: PromptEncoder
    format: TokenFormat | None
    spec: LoraSpec
    generator: nn.Module

    def write(self, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """LoRA tensors {PEFT name: (B, …)} for conditions, float32."""
        with torch.no_grad():
            return Written(self.generator(states, mask), self.format).tensors


def load_run(
    folder: str | Path, device: str | None = None, *, last: bool = False, lm_head: bool = False
) -> Run:
    """A trained generator from its run's folder, with the base model and settings of its checkpoint.

    It is the generator that did best on held-out conditions, if the run has an evaluation, else that of the last
    checkpoint. ``run.json`` says where the base model is; edit it if the model has moved.

    Args:
        last: use that of the last checkpoint in any case.
        lm_head: whether to load the base model's head.

    Raises:
        ValueError: not a run's folder; files in it that are damaged or belong to different runs; another base model.
    """
    folder = Path(folder)
    told = read_json_object(folder / RUN, "the folder of a training run")
    found = (None if last else best_checkpoint(folder)) or newest_checkpoint(folder)
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint, expected the folder of a training run")
    path, state = found
    facts: Mapping[str, Any] = state["identity"]
    advice = "Expected both from one run."
    Identity(facts).require_same(told.get("identity", {}), folder / RUN, advice)
    if not isinstance(told.get("base"), str) or "condition_layer" not in facts:
        raise ValueError(f"{folder / RUN} names no base model, expected a run of lora-delta train")
    where, config, weights = load_base(told["base"], facts["dtype"], device, lm_head=lm_head)
    ours = Identity({"model_sha256": model_fingerprint(config, weights)}, {"model_sha256": f"here of {told['base']}"})
    ours.require_same({"model_sha256": facts["model_sha256"]}, path, "Use the base model that it was trained on.")
    format, spec = None, spec_of(facts["spec"])
    if "format" in facts:
        format = TokenFormat.for_config(config, facts["format"]["rank"], facts["format"]["chunk_width"])
    generator = _generator(format, config, spec, facts["generator"]).to(weights.device)
    generator.load_state_dict(state["generator"])
    layer, max_length = facts["condition_layer"], facts["max_length"]
    encoder = PromptEncoder(config, weights, load_tokenizer(where), layer=layer, max_length=max_length)
    context = told.get("context", CONTEXT_OF_TEXTS)
    if not isinstance(context, str):
        raise ValueError(f"{folder / RUN} has the context {context!r:.100}, expected a text")
    return Run(told["base"], where, context, facts, config, weights, encoder, format, spec, generator.eval())
