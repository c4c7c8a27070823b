"""PEFT's ``adapter_config.json``: what it declares, as a LoraSpec, and what no LoraSpec can say."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from qwen_functional import LoraSpec
from qwen_functional.files import read_json_object
from qwen_functional.lora import PROJECTIONS, matching_pattern

CONFIG_FILE = "adapter_config.json"
Module = tuple[int, str]  # (layer, projection)

# Ways to start training that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take
# from the base what they put into the adapter, which so belongs to another base than the one that the file names.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Read below, or without a say in what a loaded adapter computes: how it was trained, or what only counts together
# with a field that is refused. Every other field must be empty, those that later versions of PEFT add included.
_PERMITTED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "peft_type", "task_type", "auto_mapping", "base_model_name_or_path",
    "init_lora_weights", "bias", "revision", "peft_version", "inference_mode", "lora_dropout", "runtime_config",
    "eva_config", "loftq_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
_EMPTY = "it absent or empty: LoraSpec declares plain LoRA on a Qwen2's projections"
_PEFT_DEFAULT = ("q_proj", "v_proj")  # PEFT's target_modules for Qwen2 where a config has none
_NOT_ADAPTED = ("lm_head", "model.embed_tokens")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that say which modules carry an adapter, of what rank and scale, under PEFT's names.

    ``target_modules`` and ``exclude_modules`` are names or one regular expression, as in PEFT.
    ``layers_to_transform`` None is every layer.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    target_modules: Sequence[str] | str
    exclude_modules: Sequence[str] | str
    layers_to_transform: frozenset[int] | None
    layers_pattern: Sequence[str]

    @classmethod
    def from_json_file(cls, file: Path) -> AdapterConfig:
        """Read and check an ``adapter_config.json``.

        Raises:
            ValueError: it is no JSON object, a field has a wrong type, or a value that LoraSpec cannot represent;
                the message names file, field, value and what was expected.
        """
        fields = read_json_object(file)
        try:
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AdapterConfig:
        """Check the fields of an ``adapter_config.json``. Raises as :meth:`from_json_file`, without the file."""
        _expect(fields.get("peft_type") == "LORA", fields, "peft_type", "'LORA'")
        _check_base(fields)
        init = fields.get("init_lora_weights")
        harmless = isinstance(init, str) and init.lower() in _HARMLESS_INITS
        _expect(
            harmless or init in (None, True, False),
            fields,
            "init_lora_weights",
            f"true, false or one of {_HARMLESS_INITS}, which leave the base weights alone (PEFT's save_pretrained "
            "converts the others, given the initial adapter as path_initial_model_for_weight_conversion)",
        )
        _expect(fields.get("bias") in (None, "none"), fields, "bias", "'none'")
        for name, value in fields.items():
            _expect(name in _PERMITTED or not value, fields, name, _EMPTY)

        _expect(_is_number(fields.get("r"), int) and fields["r"] > 0, fields, "r", "a positive integer")
        alpha = fields.get("lora_alpha", math.nan)
        _expect(_is_number(alpha, (int, float)) and math.isfinite(alpha), fields, "lora_alpha", "a finite number")
        _expect(isinstance(fields.get("use_rslora", False), bool), fields, "use_rslora", "true or false")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = fields.get(name)
            _expect(_is_names(value), fields, name, "a list of strings, a regular expression or null")
            if isinstance(value, str) and name != "layers_pattern":
                _check_regex(name, value, value)
        chosen = fields.get("layers_to_transform")
        layers = chosen if isinstance(chosen, list) or chosen is None else [chosen]
        _expect(
            layers is None or all(_is_number(layer, int) for layer in layers),
            fields,
            "layers_to_transform",
            "a layer number, a list of them or null",
        )
        targets = fields.get("target_modules")
        for name in ("layers_to_transform", "layers_pattern"):  # PEFT refuses the pair, so it has no meaning
            alone = not isinstance(targets, str) or fields.get(name) is None
            _expect(alone, fields, name, "null where target_modules is a string")
        patterns = fields.get("layers_pattern") or []
        _expect(not patterns or chosen is not None, fields, "layers_pattern", "null without layers_to_transform")
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for pattern in patterns:
            _check_regex("layers_pattern", pattern, _layer_regex(pattern))
        declared = cls(
            r=fields["r"],
            lora_alpha=fields["lora_alpha"],
            rank_pattern=_or_empty(fields.get("rank_pattern")),
            alpha_pattern=_or_empty(fields.get("alpha_pattern")),
            use_rslora=fields.get("use_rslora", False),
            target_modules=_PEFT_DEFAULT if targets is None else targets,
            exclude_modules=fields.get("exclude_modules") or (),
            layers_to_transform=frozenset(layers) if layers else None,
            layers_pattern=patterns,
        )
        for path in _NOT_ADAPTED:
            if declared.targets(path):
                raise ValueError(f"field target_modules names {path}, expected only {list(PROJECTIONS)}")
        return declared

    def targets(self, path: str) -> bool:
        """Whether PEFT adapts the linear module at a path such as ``model.layers.3.self_attn.q_proj``."""
        exclude, target = self.exclude_modules, self.target_modules
        if re.fullmatch(exclude, path) if isinstance(exclude, str) else _named(exclude, path):
            return False
        if isinstance(target, str):
            if target.lower() == "all-linear":
                return path not in _NOT_ADAPTED
            return re.fullmatch(target, path) is not None
        if path in target:  # a whole path holds in any layer
            return True
        if self.layers_to_transform is None or not _named(target, path):
            return _named(target, path)
        regexes = [_layer_regex(pattern) for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        match = next(filter(None, (re.match(regex, path) for regex in regexes)), None)
        return match is not None and int(match["idx"]) in self.layers_to_transform

    def spec(self, modules: Collection[Module], n_layers: int | None = None) -> LoraSpec:
        """The spec of an adapter that has tensors for ``modules``, with exactly PEFT's rank and scale for each.

        A LoraSpec adapts the same projections in all of its layers: where the modules are no such product, the
        spec covers more than them, which :meth:`LoraSpec.bind` permits.

        Args:
            n_layers: of the base model. Where it is not known, layers above the last adapted one are not checked,
                and ``layers_to_transform`` is None only if the fields would adapt a further layer too.

        Raises:
            ValueError: modules that the fields do not declare, declared ones that are not among ``modules``, or
                bad ranks, scales or patterns.
        """
        layers = sorted({layer for layer, _ in modules})
        n = layers[-1] + 1 if n_layers is None else n_layers
        every = [(layer, projection) for layer in range(n) for projection in PROJECTIONS]
        declared = {module for module in every if self.targets(module_path(*module))}
        for what, difference in (
            ("has tensors for {}, which its fields do not declare", sorted(set(modules) - declared)),
            ("declares {}, for which there are no tensors", sorted(declared - set(modules))),
        ):
            if difference:
                more = f" and {len(difference) - 1} more" if len(difference) > 1 else ""
                raise ValueError(
                    f"the adapter {what.format(module_path(*difference[0]) + more)}; expected target_modules, "
                    "exclude_modules and layers_to_transform to give exactly the modules that have tensors"
                )
        open_ended = n_layers is not None or any(self.targets(module_path(n, p)) for p in PROJECTIONS)
        spec = LoraSpec(
            rank=self.r,
            alpha=self.lora_alpha,
            target_modules=tuple(p for p in PROJECTIONS if any(p == projection for _, projection in modules)),
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            use_rslora=self.use_rslora,
            layers_to_transform=None if open_ended and layers == list(range(n)) else tuple(layers),
        )
        return with_fitting_patterns(spec, modules)


def module_path(layer: int, projection: str) -> str:
    """A projection's path in transformers' ``Qwen2ForCausalLM``."""
    return f"model.layers.{layer}.{PROJECTIONS[projection]}"


def with_fitting_patterns(spec: LoraSpec, modules: Collection[Module]) -> LoraSpec:
    """``spec`` without the patterns that fit none of ``modules``: PEFT passes over them, LoraSpec refuses them."""
    paths = [module_path(*module) for module in modules]

    def fitting(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {p: v for p, v in patterns.items() if any(matching_pattern((p,), path) for path in paths)}

    return dataclasses.replace(spec, rank_pattern=fitting(spec.rank_pattern), alpha_pattern=fitting(spec.alpha_pattern))


def adapter_fields(
    spec: LoraSpec, modules: Collection[Module], base_model: str, n_layers: int | None = None
) -> dict[str, Any]:
    """Fields of an ``adapter_config.json`` with which PEFT adapts exactly ``modules``, in any number of layers.

    ``layers_to_transform`` is null only if ``n_layers`` is known and all of them are adapted alike: else PEFT
    would put adapters of its own into layers that have none.
    """
    layers = sorted({layer for layer, _ in modules})
    projections = [p for p in PROJECTIONS if any(p == projection for _, projection in modules)]
    alike = len(modules) == len(layers) * len(projections)
    every = n_layers is not None and layers == list(range(n_layers))
    return {
        "alpha_pattern": dict(spec.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": layers if alike and not every else None,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": dict(spec.rank_pattern),
        "revision": None,
        "target_modules": projections if alike else [module_path(*module) for module in modules],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": spec.use_rslora,
    }


def _check_base(fields: Mapping[str, Any]) -> None:
    """Other models' projections have the same names, so all that the fields tell of the base model is checked."""
    _expect(fields.get("task_type") in (None, "CAUSAL_LM"), fields, "task_type", "'CAUSAL_LM' or null")
    mapping = fields.get("auto_mapping") or {}
    _expect(isinstance(mapping, dict), fields, "auto_mapping", "an object or null")
    base_class = mapping.get("base_model_class")
    # Wrappers such as FSDP's put their own name in front.
    if base_class is not None and not str(base_class).endswith("Qwen2ForCausalLM"):
        raise ValueError(f"field auto_mapping.base_model_class is {base_class!r}, expected 'Qwen2ForCausalLM'")
    model_type = _model_type(fields.get("base_model_name_or_path"))
    _expect(
        model_type in (None, "qwen2"),
        fields,
        "base_model_name_or_path",
        f"a model of type 'qwen2', and not {model_type!r}",
    )


def _model_type(base_model: Any) -> Any:
    """The base model's type, if its config is at hand in a folder or the hub's cache; nothing is fetched."""
    if not base_model:
        return None
    try:
        local = Path(base_model).expanduser() / "config.json"
        file = local if local.is_file() else try_to_load_from_cache(base_model, "config.json")
        return read_json_object(file).get("model_type")  # type: ignore[arg-type]
    except (TypeError, ValueError, OSError, RuntimeError):
        return None


def _expect(valid: bool, fields: Mapping[str, Any], name: str, expected: str) -> None:
    if not valid:
        raise ValueError(f"field {name} is {fields.get(name)!r:.200}, expected {expected}")


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, (str, list, type(None))) and all(isinstance(name, str) for name in value or ())


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _check_regex(name: str, value: str, regex: str) -> None:
    try:
        re.compile(regex)
    except re.error as error:
        raise ValueError(f"field {name} is {value!r:.200}, expected a regular expression: {error}") from None


def _named(names: Collection[str], path: str) -> bool:
    return path in names or any(path.endswith(f".{name}") for name in names)


def _or_empty(patterns: Any) -> Any:
    return {} if patterns is None else patterns
