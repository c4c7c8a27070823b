"""The configuration of a dense Qwen2 model, under the field names of a checkpoint's ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import read_json_object

LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "yarn")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes and constants of a Qwen2 / Qwen2.5 model.

    Fields have the names and meanings of transformers' ``Qwen2Config``. ``None`` is resolved on construction:
    ``num_key_value_heads`` to ``num_attention_heads``, ``head_dim`` to
    ``hidden_size // num_attention_heads``, ``layer_types`` from ``use_sliding_window``, ``sliding_window``
    and ``max_window_layers``. ``rope_parameters`` always holds ``rope_type`` and ``rope_theta``; the older
    ``rope_theta`` and ``rope_scaling`` fields are read by :meth:`from_dict`.

    Raises:
        ValueError: a field has an unsupported value; the message names the field.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # resolved in __post_init__
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        resolve = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen dataclass)
        if self.num_key_value_heads is None:
            resolve("num_key_value_heads", self.num_attention_heads)
        for name in (*SIZES, "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config field {name} is {value!r}, expected a positive integer")
        for name in ("tie_word_embeddings", "use_sliding_window"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config field {name} is {getattr(self, name)!r}, expected true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config field num_key_value_heads is {self.num_key_value_heads}, "
                f"expected a divisor of num_attention_heads = {self.num_attention_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"config field hidden_size is {self.hidden_size}, expected a multiple of "
                    f"num_attention_heads = {self.num_attention_heads} where head_dim is not given"
                )
            resolve("head_dim", self.hidden_size // self.num_attention_heads)
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"config field head_dim is {self.head_dim!r}, expected a positive even integer")
        if self.hidden_act != "silu":
            raise ValueError(f"config field hidden_act is {self.hidden_act!r}, expected 'silu'")
        if not isinstance(self.rms_norm_eps, (int, float)) or not self.rms_norm_eps > 0:
            raise ValueError(f"config field rms_norm_eps is {self.rms_norm_eps!r}, expected a number above 0")
        if not self.use_sliding_window:
            resolve("sliding_window", None)
        elif not isinstance(self.sliding_window, int) or self.sliding_window < 1:
            raise ValueError(
                f"config field sliding_window is {self.sliding_window!r}, expected a positive integer as "
                "use_sliding_window is true"
            )
        if not isinstance(self.max_window_layers, int) or self.max_window_layers < 0:
            raise ValueError(
                f"config field max_window_layers is {self.max_window_layers!r}, expected an integer >= 0"
            )
        resolve("layer_types", self._resolved_layer_types())
        resolve("rope_parameters", _checked_rope(self.rope_parameters, self.max_position_embeddings))

    def _resolved_layer_types(self) -> tuple[str, ...]:
        if self.layer_types is None:
            windowed = self.max_window_layers if self.sliding_window is not None else self.num_hidden_layers
            return tuple(LAYER_TYPES[i >= windowed] for i in range(self.num_hidden_layers))
        if not isinstance(self.layer_types, (list, tuple)):
            raise ValueError(f"config field layer_types is {self.layer_types!r}, expected a list")
        types = tuple(self.layer_types)
        for i, kind in enumerate(types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"config field layer_types[{i}] is {kind!r}, expected one of {LAYER_TYPES}")
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"config field layer_types has {len(types)} entries, expected num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )
        if "sliding_attention" in types and self.sliding_window is None:
            raise ValueError(
                "config field layer_types names sliding_attention, expected use_sliding_window to be true"
            )
        return types

    @property
    def q_size(self) -> int:
        """Output rows of q_proj, and input columns of o_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output rows of k_proj, and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens (a token sees itself and window − 1 before it), or None."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Qwen2Config:
        """Read the fields of a ``config.json``, in the older or the newer spelling of rope.

        Fields that do not touch the computation (token ids, dtypes, versions, dropout of a frozen model) are
        left aside. Missing fields have transformers' defaults, but sizes must be given: a default that does
        not fit the others would only surface as a tensor of the wrong shape.

        Raises:
            ValueError: ``model_type`` is not ``qwen2``, a size is missing, or a value is not supported.
        """
        model_type = fields.get("model_type")
        if model_type != "qwen2":
            raise ValueError(f"config field model_type is {model_type!r}, expected 'qwen2'")
        for name in SIZES:
            if name not in fields:
                raise ValueError(f"config field {name} is missing, expected a positive integer")
        # Fields that change what transformers computes, unless they have the value beside them.
        for name, same in (
            ("quantization_config", None),
            ("per_layer_config", None),
            ("partial_rotary_factor", 1),
            ("is_causal", True),
        ):
            if fields.get(name) not in (None, same):
                raise ValueError(f"config field {name} is {fields[name]!r}, expected {same}")
        known = {f.name for f in dataclasses.fields(cls)} - {"rope_parameters"}
        values = {name: value for name, value in fields.items() if name in known}
        values.setdefault("sliding_window", 4096)
        rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config field rope_parameters is {rope!r}, expected an object")
        rope = dict(rope)
        rope.setdefault("rope_theta", fields.get("rope_theta", 10000.0))
        if "original_max_position_embeddings" in fields:  # transformers prefers it to the one within
            rope["original_max_position_embeddings"] = fields["original_max_position_embeddings"]
        return cls(**values, rope_parameters=rope)

    @classmethod
    def from_json_file(cls, path: str | Path) -> Qwen2Config:
        """Read a checkpoint's ``config.json``. Raises as :meth:`from_dict`, naming the file."""
        fields = read_json_object(path, "a Qwen2 config.json")
        try:
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as transformers 5 writes them, ready for ``json.dump`` and for :meth:`from_dict`."""
        fields = dataclasses.asdict(self)
        fields["layer_types"] = list(self.layer_types)
        fields["rope_parameters"] = dict(self.rope_parameters)
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **fields}


def _checked_rope(rope: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """Rope parameters with rope_type and rope_theta filled in, or a ``ValueError`` that names the field."""
    rope = dict(rope)
    nested = [key for key in LAYER_TYPES if key in rope]
    if nested:
        raise ValueError(f"config field rope_parameters has entries for {nested}, expected one for all")
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.setdefault("rope_theta", 10000.0)
    if kind not in ROPE_TYPES:
        raise ValueError(f"config field rope_parameters.rope_type is {kind!r}, expected one of {ROPE_TYPES}")
    if not isinstance(rope["rope_theta"], (int, float)) or not rope["rope_theta"] > 1:
        raise ValueError(f"config field rope_theta is {rope['rope_theta']!r}, expected a number above 1")
    if rope.get("partial_rotary_factor") not in (None, 1):
        partial = rope["partial_rotary_factor"]
        raise ValueError(f"config field rope_parameters.partial_rotary_factor is {partial!r}, expected 1")
    if kind == "default":
        return {"rope_type": kind, "rope_theta": rope["rope_theta"]}
    if kind == "yarn":
        original = rope.setdefault("original_max_position_embeddings", max_position_embeddings)
        if not isinstance(original, (int, float)) or not original > 0:
            raise ValueError(
                "config field rope_parameters.original_max_position_embeddings is "
                f"{original!r}, expected a positive number"
            )
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = rope.get(name)
            if value is not None and (not isinstance(value, (int, float)) or not value >= 0):
                raise ValueError(f"config field rope_parameters.{name} is {value!r}, expected a number >= 0")
        if rope.get("factor") is None:
            rope["factor"] = max_position_embeddings / original
    factor = rope.get("factor")
    if not isinstance(factor, (int, float)) or not factor >= 1:
        raise ValueError(f"config field rope_parameters.factor is {factor!r}, expected a number >= 1")
    return rope
