"""What the fields of an ``adapter_config.json`` may hold: plain LoRA on a Qwen2 or Qwen3, within bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from qwen_functional.architecture import FAMILIES
from qwen_functional.files import read_json_object
from qwen_functional.lora import path_pattern
from qwen_functional.patterns import Pattern, pattern_of

# Ways to start training that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract
# from the base what they put into the adapter, which then belongs to another base than the one that the file names.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Read below, or without effect on what a loaded adapter computes: how it was trained, or what only matters together
# with a field that is refused. Every other field must be empty, including those that later versions of PEFT add.
_PERMITTED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "peft_type", "task_type", "auto_mapping", "base_model_name_or_path",
    "init_lora_weights", "bias", "revision", "peft_version", "inference_mode", "lora_dropout", "runtime_config",
    "eva_config", "loftq_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
_EMPTY = "it absent or empty: LoraSpec declares plain LoRA on a Qwen2's projections"
# Limits on untrusted files. The largest Qwen2 has 80 layers with 560 modules, each of which may have a pattern.
MOST_LAYERS = 256
_MOST_RANK, _MOST_NAMES, _MOST_PATTERNS, _MOST_LAYERS_PATTERNS = 1 << 16, 4096, 1024, 16
_MOST_BASE_CONFIG = 1 << 20  # bytes
_MOST_WORK = 1 << 21  # steps of all keys of a pattern field on one module
_LARGEST = torch.finfo(torch.float32).max
_A_RANK, _AN_ALPHA = f"a positive integer of at most {_MOST_RANK:,}", "a finite number in float32"


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for the first field with a wrong type or a value that LoraSpec cannot represent; it names
    the field, its value and what was expected."""
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

    _expect(_is_rank(fields.get("r")), fields, "r", _A_RANK)
    _expect(_is_alpha(fields.get("lora_alpha")), fields, "lora_alpha", _AN_ALPHA)
    _expect(isinstance(fields.get("use_rslora", False), bool), fields, "use_rslora", "true or false")
    _check_patterns(fields, "rank_pattern", _is_rank, _A_RANK)
    _check_patterns(fields, "alpha_pattern", _is_alpha, _AN_ALPHA)
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = fields.get(name)
        _expect(_is_names(value), fields, name, "a list of strings, a regular expression or null")
        many = isinstance(value, list) and len(value) > _MOST_NAMES
        _expect(not many, fields, name, f"a list of at most {_MOST_NAMES:,}")
        if isinstance(value, str) and name != "layers_pattern":
            with naming(name, value):
                pattern_of(value)
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
    _expect(len(patterns) <= _MOST_LAYERS_PATTERNS, fields, "layers_pattern", f"at most {_MOST_LAYERS_PATTERNS}")
    for pattern in patterns:
        with naming("layers_pattern", pattern):
            layer_pattern(pattern)


def _check_base(fields: Mapping[str, Any]) -> None:
    """Other models' projections have the same names, so all that the fields say about the base model is checked."""
    _expect(fields.get("task_type") in (None, "CAUSAL_LM"), fields, "task_type", "'CAUSAL_LM' or null")
    mapping = fields.get("auto_mapping") or {}
    _expect(isinstance(mapping, dict), fields, "auto_mapping", "an object or null")
    base_class = mapping.get("base_model_class")
    # Wrappers such as FSDP's put their own name in front.
    known = tuple(family.architecture for family in FAMILIES.values())
    if base_class is not None and not str(base_class).endswith(known):
        raise ValueError(f"field auto_mapping.base_model_class is {base_class!r:.200}, expected one of {known}")
    base_model = fields.get("base_model_name_or_path")
    _expect(isinstance(base_model, (str, type(None))), fields, "base_model_name_or_path", "a string or null")
    check_model_type(fields, tuple(FAMILIES))


def check_model_type(fields: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Raises ``ValueError`` if the base model that the fields name is of another type; if its type cannot be found
    locally, nothing is checked.
    """
    base_model = fields.get("base_model_name_or_path")
    model_type = _model_type(base_model)
    expected = f"a model of type {' or '.join(map(repr, allowed))}, and not {model_type!r:.200}"
    _expect(model_type is None or model_type in allowed, fields, "base_model_name_or_path", expected)


def _model_type(base_model: Any) -> Any:
    """The base model's type, if its config is in a local folder or the hub's cache; nothing is fetched."""
    if not base_model:
        return None
    try:
        local = Path(base_model).expanduser() / "config.json"
        file = local if local.is_file() else try_to_load_from_cache(base_model, "config.json")
        return read_json_object(file, most_bytes=_MOST_BASE_CONFIG).get("model_type")  # type: ignore[arg-type]
    except (TypeError, ValueError, OSError, RuntimeError):
        return None


def _expect(valid: bool, fields: Mapping[str, Any], name: str, expected: str) -> None:
    if not valid:
        shown = name if name.isidentifier() else repr(name)
        raise ValueError(f"field {shown:.100} is {fields.get(name)!r:.200}, expected {expected}")


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_number(value, int) and 0 < value <= _MOST_RANK


def _is_alpha(value: Any) -> bool:
    return _is_number(value, (int, float)) and -_LARGEST <= value <= _LARGEST


def _is_names(value: Any) -> bool:
    return isinstance(value, (str, list, type(None))) and all(isinstance(name, str) for name in value or ())


def _check_patterns(fields: Mapping[str, Any], name: str, valid: Callable[[Any], bool], expected: str) -> None:
    patterns = {} if fields.get(name) is None else fields[name]
    if not isinstance(patterns, dict):
        raise ValueError(f"field {name} is a {type(patterns).__name__}, expected a dict or null")
    if len(patterns) > _MOST_PATTERNS:
        raise ValueError(f"field {name} has {len(patterns):,} patterns, expected at most {_MOST_PATTERNS:,}")
    work = 0
    for key, value in patterns.items():
        if not valid(value):
            raise ValueError(f"field {name}[{key!r:.200}] is {value!r:.200}, expected {expected}")
        with naming(name, key):
            work += path_pattern(key).work
    if work > _MOST_WORK:
        raise ValueError(f"field {name} takes up to {work:,} steps on a module, expected at most {_MOST_WORK:,}")


def layer_pattern(pattern: str) -> Pattern:
    """The pattern with which PEFT finds a layer's number, which is all that its group can match."""
    compiled = pattern_of(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
    if not compiled.ends_in_a_group_between_dots:
        raise ValueError("finds no layer in some of its alternatives, expected them in parentheses")
    return compiled


@contextmanager
def naming(field: str, value: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"field {field}: {value!r:.200} {error}") from None
