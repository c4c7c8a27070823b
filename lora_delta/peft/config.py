"""PEFT's ``adapter_config.json``: what it declares, as a LoraSpec, and what no LoraSpec can express."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_functional import LoraSpec
from qwen_functional.architecture import PROJECTIONS
from qwen_functional.files import parse_json
from qwen_functional.lora import matching_pattern
from qwen_functional.patterns import pattern_of

from .fields import check_fields, check_model_type, layer_pattern, naming

CONFIG_FILE = "adapter_config.json"
Module = tuple[int, str]  # (layer, projection)

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
    def from_json(cls, content: bytes, file: Path, model_type: str | None = None) -> AdapterConfig:
        """Check the content of an ``adapter_config.json``; with ``model_type``, also that its base is of that type.

        Raises:
            ValueError: it is not a JSON object, a field has a wrong type, or a value that LoraSpec cannot represent;
                the message names file, field, value and what was expected.
        """
        fields = parse_json(content, str(file), "an adapter_config.json")
        if not isinstance(fields, dict):
            raise ValueError(f"{file} holds a {type(fields).__name__}, expected a JSON object")
        try:
            declared = cls.from_dict(fields)
            if model_type is not None:
                check_model_type(fields, (model_type,))
            return declared
        except RecursionError:
            raise ValueError(f"{file} is nested too deeply, expected an adapter_config.json") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AdapterConfig:
        """Check the fields of an ``adapter_config.json``. Raises as :meth:`from_json`, without the file."""
        check_fields(fields)
        chosen, targets = fields.get("layers_to_transform"), fields.get("target_modules")
        layers = chosen if isinstance(chosen, list) or chosen is None else [chosen]
        patterns = fields.get("layers_pattern") or []
        declared = cls(
            r=fields["r"],
            lora_alpha=fields["lora_alpha"],
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            use_rslora=fields.get("use_rslora", False),
            target_modules=_PEFT_DEFAULT if targets is None else targets,
            exclude_modules=fields.get("exclude_modules") or (),
            layers_to_transform=frozenset(layers) if layers else None,
            layers_pattern=[patterns] if isinstance(patterns, str) else patterns,
        )
        for path in _NOT_ADAPTED:
            if declared.targets(path):
                raise ValueError(f"field target_modules names {path}, expected only {list(PROJECTIONS)}")
        return declared

    def targets(self, path: str) -> bool:
        """Whether PEFT adapts the linear module at a path such as ``model.layers.3.self_attn.q_proj``.

        Raises:
            ValueError: one of the regular expressions takes too many steps.
        """
        exclude, target = self.exclude_modules, self.target_modules
        if isinstance(exclude, str):
            with naming("exclude_modules", exclude):
                if pattern_of(exclude).fullmatch(path):
                    return False
        elif _named(exclude, path):
            return False
        if isinstance(target, str):
            if target.lower() == "all-linear":
                return path not in _NOT_ADAPTED
            with naming("target_modules", target):
                return pattern_of(target).fullmatch(path)
        if path in target:  # a whole path applies in any layer
            return True
        if self.layers_to_transform is None or not _named(target, path):
            return _named(target, path)
        # Wherever a pattern matches, what it finds is the one number in the path.
        number = next((int(part) for part in path.split(".") if part.isdecimal()), None)
        return number in self.layers_to_transform and (not self.layers_pattern or self._is_in_layers(path))

    def _is_in_layers(self, path: str) -> bool:
        for pattern in self.layers_pattern:
            with naming("layers_pattern", pattern):
                if layer_pattern(pattern).match(path):
                    return True
        return False

    def spec(self, modules: Collection[Module], n_layers: int | None = None) -> LoraSpec:
        """The spec of an adapter that has tensors for ``modules``, with exactly PEFT's rank and scale for each.

        A LoraSpec adapts the same projections in all of its layers: where the modules are not such a product, the
        spec covers more than them, which :meth:`LoraSpec.bind` permits.

        Args:
            n_layers: of the base model. If it is not known, layers above the last adapted one are not checked, and
                ``layers_to_transform`` is None only if the fields would adapt a further layer, too.

        Warns:
            UserWarning: a pattern matches none of the modules; PEFT warns, too.

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
        fitting = with_fitting_patterns(spec, modules)
        for name in ("rank_pattern", "alpha_pattern"):
            idle = [pattern for pattern in getattr(spec, name) if pattern not in getattr(fitting, name)]
            if idle:
                warnings.warn(f"{name} {idle!r:.200} matches no adapted module: PEFT ignores it, too", stacklevel=2)
        return fitting


def module_path(layer: int, projection: str) -> str:
    """A projection's path in transformers' ``Qwen2ForCausalLM`` and related classes."""
    return f"model.layers.{layer}.{PROJECTIONS[projection].path}"


def with_fitting_patterns(spec: LoraSpec, modules: Collection[Module]) -> LoraSpec:
    """``spec`` without the patterns that match none of ``modules``: PEFT ignores them, LoraSpec refuses them."""
    paths = [module_path(*module) for module in modules]

    def fitting(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {p: v for p, v in patterns.items() if any(matching_pattern((p,), path) for path in paths)}

    return dataclasses.replace(spec, rank_pattern=fitting(spec.rank_pattern), alpha_pattern=fitting(spec.alpha_pattern))


def adapter_fields(
    spec: LoraSpec, modules: Collection[Module], base_model: str, n_layers: int | None = None
) -> dict[str, Any]:
    """Fields of an ``adapter_config.json`` with which PEFT adapts exactly ``modules``, in a base of any depth.

    ``layers_to_transform`` is null only if ``n_layers`` is known and all of them are adapted alike, or if
    ``target_modules`` lists whole paths: otherwise PEFT would add its own adapters to layers that have none.
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


def _named(names: Collection[str], path: str) -> bool:
    return path in names or any(path.endswith(f".{name}") for name in names)
